"""Verbs on one network, of a run or elsewhere: its gradients, its Neural ODE."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal

from deeplimit.errors import InputError
from deeplimit.terminal import ProgressCallback, silent
from deeplimit.training import RunFolder
from deeplimit.training.run_folder import check_spec
from deeplimit.verbs.answer import (
    COUNT,
    POSITIVE,
    Answer,
    Figure,
    Model,
    Seed,
    Shape,
    Trust,
    check_figure,
    option,
    renew_page,
)

if TYPE_CHECKING:
    from torch.nn import Module

RESULT, FIGURE = "gradient.json", "gradient.html"
STAGES = 11  # of gradient: the exact one, nine methods, the times of all
SAMPLES = 32  # that the distance to the Neural ODE is measured on


def gradient(
    model: Model,
    *,
    batch: Annotated[int | None, "N", COUNT] = None,
    shape: Shape = None,
    length: Annotated[int | None, "L", COUNT] = None,
    tolerance: Annotated[float, POSITIVE] = 0.01,
    steps: Annotated[int, COUNT] = 5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: Seed = 0,
    figure: Figure = None,
    trust: Trust = False,
    tell: ProgressCallback = silent,
) -> Answer:
    """Measure what memory-free gradients would save on a model, and at what error.

    Measures peak memory, time per step, gradient error and drift on one batch: for plain
    backpropagation, torch's checkpoint per block, states rebuilt with e = 1, 2, 3 evaluations,
    coded in 2, 4 and 8 bits, and the cheapest mixture of these within the tolerance. For example:
      deeplimit gradient runs/digits                            a run, with its data and its loss
      deeplimit gradient transformers:vit --batch 8             a model type, default config
      deeplimit gradient transformers:configs/my.json --length 256
      deeplimit gradient torchvision:resnet50 --shape 3,160,160
      deeplimit gradient net:build --tolerance 0.001            build() in net.py in this folder

    Your function returns a model, (model, batch) or (model, batch, loss_of); the batch is a tensor,
    a dict of keyword arguments or (inputs, targets), and loss_of(model, batch) a scalar. Elsewhere
    inputs and labels are random. In a run folder the result is left as gradient.json and
    gradient.html.

    Args:
        batch: Samples in the batch; 4, or a run's own batch size.
        length: Tokens in one random input; at most 128 of those the model takes by default.
        tolerance: Relative error of the gradient that the mixture stays within.
        steps: Steps that are timed for each method; the median counts.
        device: Where to measure; auto: on CUDA where there is any.
        seed: Seed of random parameters, inputs, labels and dropout.
        figure: Write the figure to this HTML file, which opens offline; for a run
            RUN/gradient.html.
    """
    check_spec(model, trust=trust)
    check_figure(figure)
    sizes = _sizes(shape)
    from deeplimit.report import gradient_cost_figure
    from deeplimit.report.page import write_figures, write_result
    from deeplimit.studies import measure_gradient_cost
    from deeplimit.training import BatchRequest, example, load_model
    from deeplimit.training.run_files import RunFiles

    wish, where = BatchRequest(batch, sizes, length, seed), _device(device)
    loaded = load_model(model, seed=seed, trust=trust)
    made = example(loaded, wish, where)
    run = None if loaded.run is None else RunFiles(loaded.run)
    done = iter(range(STAGES + 1))
    with nullcontext() if run is None else run.commit() as files:
        cost = measure_gradient_cost(
            loaded.model,
            made.loss_of,
            made.batch,
            name=model,
            weights=loaded.weights,
            tolerance=tolerance,
            steps=steps,
            seed=seed,
            tell=lambda message: tell(message, next(done, STAGES) / STAGES),
        )
        page, to = figure, None
        if files is not None:
            write_result(files.place(RESULT), cost)
            if figure is None:
                page, to = files.place(FIGURE), files.folder / FIGURE
        if page is None:
            return Answer(cost)
        title = f"{cost.model}: memory, time and error of gradients"
        figures = [("gradient", gradient_cost_figure(cost), "")]
        return Answer(cost, (write_figures(page, title, figures, to=to),))


def ode(
    model: Annotated[Model, "RUN|MODEL"],
    *,
    interpolation: Literal["linear", "constant"] = "linear",
    bound: bool = True,
    solver: Annotated[str | None, "SOLVER"] = None,
    steps: Annotated[tuple[int, ...], "K", COUNT] = (),
    tolerance: Annotated[float | None, POSITIVE] = None,
    batch: Annotated[int | None, "N", COUNT] = None,
    shape: Shape = None,
    length: Annotated[int | None, "L"] = None,
    seed: Seed = 0,
    figure: Figure = None,
    trust: Trust = False,
    tell: ProgressCallback = silent,
) -> Answer:
    """Measure how far a network is from its Neural ODE.

    Measures for every stage how smooth its controls are in depth, the distance of its states from
    the Neural ODE through the same controls, and the bounds on it. Of a run it also tells the
    accuracy on test data when other solvers run its layers, with other numbers of steps, and adds a
    section to the run's page. For example:
      deeplimit ode runs/digits
      deeplimit ode runs/digits --solver rk4 --steps 2 5 10
      deeplimit ode runs/digits --solver dopri5
      deeplimit ode transformers:vit --batch 1 --no-bound --figure vit.html

    Args:
        interpolation: Of the controls between the layers.
        bound: Compute the bounds on the distance; of a large model they take twenty times as long.
        solver: Of a run: a method of torchdiffeq, such as euler, midpoint, heun2, rk4 (with
            --steps) or dopri5, dopri8, bosh3 (adaptive); by default euler and rk4 with fewer and
            more steps, dopri5.
        steps: Numbers of steps in each chain, for the solver.
        tolerance: Of the step of an adaptive solver, 0.001 by default; the error at the end is
            larger.
        batch: Samples that the distance is measured on; 32, or 4 of a model without data.
        length: Tokens in one random input.
        seed: Of random parameters and inputs.
        figure: Of a model: write the figures to this HTML file, which opens offline.
    """
    check_spec(model, trust=trust)
    wish = (batch, _sizes(shape), length, seed)
    from deeplimit.ode import depth_limit
    from deeplimit.ode.solvers import TOLERANCE
    from deeplimit.report.depth_limit import depth_limit_figures
    from deeplimit.report.page import write_figures
    from deeplimit.training import BatchRequest, example, load_model
    from deeplimit.training.example_batch import inputs_of

    asked = {"solver": solver, "steps": steps or None, "tolerance": tolerance}
    own = {"shape": shape, "length": length, "figure": figure}
    loaded = load_model(model, seed=seed, trust=trust)
    network, written = loaded.model.eval(), []
    folder = None if loaded.run is None else RunFolder.open(loaded.run)
    with nullcontext() if folder is None else folder.commit() as new:
        if new is None:
            _refuse(asked, f" for {model}: accuracy needs a run, with its test data")
            check_figure(figure)
            given: dict[str, Any] = {
                "x": inputs_of(example(loaded, BatchRequest(*wish), "cpu").batch)
            }
        else:
            _refuse(own, f", but {model} is a run folder, which has its own data and page")
            given = _test_data_of(new, network, model, batch or SAMPLES, asked)
        limit = depth_limit(
            network,
            interpolation=interpolation,
            bound=bound,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            seed=seed,
            tell=lambda now: tell(now, 0.0),
            **given,
        )
        if new is not None:
            new.write(limit)
            written.append(renew_page(new))
    if folder is None and figure is not None:
        title = f"{model} and its Neural ODE"
        written.append(write_figures(figure, title, depth_limit_figures(limit)))
    return Answer(limit, tuple(written))


def _test_data_of(
    folder: RunFolder, network: "Module", name: str, batch: int, asked: dict[str, Any]
) -> dict[str, Any]:
    """Test data for the distance and for the solvers."""
    from deeplimit._anatomy.chain import chains_in
    from deeplimit.training import run_data
    from deeplimit.training.building import evaluation_batches

    test = run_data(folder).test
    x, _ = next(iter(evaluation_batches(test.take(min(batch, len(test))))))
    depths = [len(chain) for _, chain in chains_in(network)]
    if not depths:
        _refuse(asked, f" for {name}: its layers are not a chain of residual functions")
        return {"x": x}
    solvers = _solvers(max(depths), **asked)
    return {"x": x, "loader": evaluation_batches(test), "solvers": solvers}


def _refuse(asked: dict[str, Any], why: str) -> None:
    """Raises InputError for an option that would be ignored."""
    for name, value in asked.items():
        if value is not None:
            raise InputError(f"{option(name)} given{why}; leave {option(name)} out")


def _solvers(
    depth: int, solver: str | None, steps: tuple[int, ...] | None, tolerance: float | None
) -> list[tuple[str, int | None]]:
    """Returns what is asked for; by default fewer and more steps than the network's."""
    from deeplimit.ode.solvers import FIXED, TOLERANCE, check_solver

    if solver is None and steps:
        raise InputError("--steps given without --solver; name one, such as --solver rk4")
    fewer = sorted({max(depth // 4, 1), max(depth // 2, 1), 2 * depth})
    rough = sorted({max(depth // 8, 1), max(depth // 4, 1)})
    runs = [*(("euler", k) for k in fewer), *(("rk4", k) for k in rough), ("dopri5", None)]
    asked = runs if solver is None else [(solver, k) for k in steps or (None,)]
    for name, k in asked:
        check_solver(name, k, TOLERANCE if tolerance is None else tolerance)
    if solver in FIXED and tolerance is not None:
        raise InputError(
            f"--tolerance given, but {solver} takes steps of one size; leave it out, "
            "or name an adaptive solver, such as dopri5"
        )
    return asked


def _sizes(shape: str | None) -> tuple[int, ...] | None:
    """The numbers in "3,224,224"."""
    try:
        return None if shape is None else tuple(int(size) for size in shape.split(","))
    except ValueError:
        raise InputError(f"shape is {shape!r}; expected sizes such as 3,224,224") from None


def _device(name: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device is cuda, but torch sees none here; give cpu or auto")
    return ("cuda" if there else "cpu") if name == "auto" else name
