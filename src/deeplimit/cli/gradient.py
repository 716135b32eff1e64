"""`deeplimit gradient`: what the adjoint would save on a model, and at what error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust, sizes
from deeplimit.cli.output import emit, say
from deeplimit.errors import InputError

if TYPE_CHECKING:
    from deeplimit.studies import GradientCost
    from deeplimit.training.run_files import RunFiles

RESULT, FIGURE = "gradient.json", "gradient.html"
STAGES = 8  # the exact gradient, six methods, the times of all


@dataclass(frozen=True)
class Gradient:
    """What would I save with memory-free gradients, and at what error?

    Measures peak memory, time per step, gradient error and drift on one batch: for plain
    backpropagation, torch's checkpoint per block, the adjoint with e = 1, 2, 3 evaluations, and the
    adjoint with as many anchors (kept states) as the tolerance asks for. For example:
      deeplimit gradient runs/digits                            a run, with its data and its loss
      deeplimit gradient transformers:vit --batch 8             a model type, default config
      deeplimit gradient transformers:configs/my.json --length 256
      deeplimit gradient torchvision:resnet50 --shape 3,160,160
      deeplimit gradient net:build --tolerance 0.001            build() in net.py in this folder

    Your function returns a model, (model, batch) or (model, batch, loss_of); the batch is a tensor,
    a dict of keyword arguments or (inputs, targets), and loss_of(model, batch) a scalar. Elsewhere
    inputs and labels are random. In a run folder the result is left as gradient.json and
    gradient.html.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A run folder, module:function, transformers:NAME (a model type, config.json, folder or cached
    hub name), torchvision:NAME, or timm:NAME. Nothing is downloaded."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Samples in the batch; 4, or a run's own batch size."""
    shape: Annotated[str | None, arg(metavar="C,H,W")] = None
    """Shape of one random input, where the model does not say it: 3,224,224."""
    length: Annotated[int | None, arg(metavar="L")] = None
    """Tokens in one random input; at most 128 of those the model takes by default."""
    evaluations: Annotated[int, arg(metavar="E")] = 2
    """Evaluations of a block for each rebuilt state, with planned anchors."""
    tolerance: float = 0.01
    """Relative error of the gradient that the planned anchors stay within."""
    steps: int = 5
    """Steps that are timed for each method; the median counts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto: on CUDA where there is any."""
    seed: int = 0
    """Seed of random parameters, inputs, labels and dropout."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the figure to this HTML file, which opens offline; for a run RUN/gradient.html."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Measures, writes what belongs into a run folder, and prints the answer."""
        from deeplimit.cli.figure_page import check_place
        from deeplimit.report import gradient_summary
        from deeplimit.studies import measure_gradient_cost
        from deeplimit.training import BatchRequest, example, load_model
        from deeplimit.training.run_files import RunFiles

        wish = BatchRequest(self.batch, sizes(self.shape), self.length, self.seed)
        device = _device(self.device)
        check_place(self.figure)
        loaded = load_model(self.model, seed=self.seed, trust=self.trust)
        made = example(loaded, wish, device)
        run = None if loaded.run is None else RunFiles(loaded.run)
        with nullcontext() if run is None else run.commit() as files:
            with _progress(quiet=self.json) as tell:
                cost = measure_gradient_cost(
                    loaded.model,
                    made.loss_of,
                    made.batch,
                    name=self.model,
                    weights=loaded.weights,
                    evaluations=self.evaluations,
                    tolerance=self.tolerance,
                    steps=self.steps,
                    seed=self.seed,
                    tell=tell,
                )
            written = _write(cost, self.figure, files)
        emit(cost, gradient_summary(cost), *written, json=self.json)


def _device(name: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device is cuda, but torch sees none here; give cpu or auto")
    return ("cuda" if there else "cpu") if name == "auto" else name


def _write(cost: "GradientCost", figure: Path | None, files: "RunFiles | None") -> list[str]:
    """The files; what to say of them."""
    from deeplimit.cli.figure_page import write_figures, write_result
    from deeplimit.report import gradient_cost_figure

    title = f"{cost.model}: memory, time and error of gradients"
    figures = [("gradient", gradient_cost_figure(cost), "")]
    if files is not None:
        write_result(files.place(RESULT), cost)
        if figure is None:
            page = files.place(FIGURE)
            return [write_figures(page, title, figures, to=files.folder / FIGURE)]
    return [] if figure is None else [write_figures(figure, title, figures)]


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is measured now: a bar where stderr is a terminal, otherwise a line each."""
    if quiet:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield lambda message: say(f"measuring: {message}")
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from deeplimit.terminal import Terminal

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=STAGES)
        done = iter(range(STAGES + 1))
        yield lambda message: bar.update(task, description=message, completed=next(done))
