"""`deeplimit ode`: how far a network is from its Neural ODE."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust, sizes
from deeplimit.cli.output import emit, say
from deeplimit.errors import InputError

if TYPE_CHECKING:
    from torch.nn import Module

    from deeplimit.training import LoadedModel, RunFolder

SAMPLES = 32


@dataclass(frozen=True)
class Ode:
    """How far is my network from its Neural ODE?

    Measures for every stage how smooth its controls are in depth, the distance of its states from
    the Neural ODE through the same controls, and the bounds on it. Of a run it also tells the
    accuracy on test data when other solvers run its layers, with other numbers of steps, and adds a
    section to the run's page. For example:
      deeplimit ode runs/digits
      deeplimit ode runs/digits --solver rk4 --steps 2 5 10
      deeplimit ode runs/digits --solver dopri5
      deeplimit ode transformers:vit --batch 1 --no-bound --figure vit.html
    """

    model: Annotated[str, Positional, arg(metavar="RUN|MODEL")]
    """A run folder, module:function, transformers:NAME, torchvision:NAME, timm:NAME, or a
    .safetensors file of a network, as in deeplimit gradient. Nothing is downloaded."""
    interpolation: Literal["linear", "constant"] = "linear"
    """Of the controls between the layers."""
    bound: bool = True
    """Compute the bounds on the distance too; of a large model they take twenty times as long."""
    solver: Annotated[str | None, arg(metavar="SOLVER")] = None
    """Of a run: a method of torchdiffeq, such as euler, midpoint, heun2, rk4 (with --steps) or
    dopri5, dopri8, bosh3 (adaptive); by default euler and rk4 with fewer and more steps, dopri5."""
    steps: Annotated[tuple[int, ...], arg(metavar="K")] = ()
    """Numbers of steps in each chain, for the solver."""
    tolerance: float | None = None
    """Of the step of an adaptive solver, 0.001 by default; the error at the end is larger."""
    batch: Annotated[int | None, arg(metavar="N")] = None
    """Samples that the distance is measured on; 32, or 4 of a model without data."""
    shape: Annotated[str | None, arg(metavar="C,H,W")] = None
    """Shape of one random input, where the model does not say it: 3,224,224."""
    length: Annotated[int | None, arg(metavar="L")] = None
    """Tokens in one random input."""
    seed: int = 0
    """Of random parameters and inputs."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of a model: write the figures to this HTML file, which opens offline."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Measures, writes what belongs into a run folder, and prints the answer."""
        from deeplimit.cli.figure_page import write_figures
        from deeplimit.cli.finish import renew_page
        from deeplimit.ode import depth_limit
        from deeplimit.ode.solvers import TOLERANCE
        from deeplimit.report.depth_limit import depth_limit_figures, depth_limit_summary
        from deeplimit.training import RunFolder, load_model

        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch is {self.batch}; expected at least 1")
        loaded = load_model(self.model, seed=self.seed, trust=self.trust)
        model = loaded.model.eval()
        folder = None if loaded.run is None else RunFolder.open(loaded.run)
        written = []
        with nullcontext() if folder is None else folder.commit() as new:
            given = self._of_model(loaded) if new is None else self._of_run(new, model)
            limit = depth_limit(
                model,
                interpolation=self.interpolation,
                bound=self.bound,
                tolerance=TOLERANCE if self.tolerance is None else self.tolerance,
                seed=self.seed,
                tell=(lambda _: None) if self.json else (lambda now: say(f"measuring: {now}")),
                **given,
            )
            if new is not None:
                new.write(limit)
                written.append(renew_page(new))
        if folder is None and self.figure is not None:
            title = f"{self.model} and its Neural ODE"
            written.append(write_figures(self.figure, title, depth_limit_figures(limit)))
        emit(limit, depth_limit_summary(limit), *written, json=self.json)

    def _of_run(self, folder: "RunFolder", model: "Module") -> dict[str, Any]:
        """Test data for the distance and for the solvers."""
        from deeplimit._anatomy.chain import chains_in
        from deeplimit.training import run_data
        from deeplimit.training.building import evaluation_batches

        for option in ("shape", "length", "figure"):
            if getattr(self, option) is not None:
                raise InputError(
                    f"--{option} given, but {self.model} is a run folder, which has its own data "
                    f"and page; leave --{option} out"
                )
        test = run_data(folder).test
        x, _ = next(iter(evaluation_batches(test.take(min(self.batch or SAMPLES, len(test))))))
        chains = [chain for _, chain in chains_in(model)]
        if not chains:
            self._no_solver("its layers are not a chain of residual functions")
            return {"x": x}
        depth = max(map(len, chains))
        return {"x": x, "loader": evaluation_batches(test), "solvers": self._solvers(depth)}

    def _of_model(self, loaded: "LoadedModel") -> dict[str, Any]:
        """One batch, the user's own or random."""
        from deeplimit.cli.figure_page import check_place
        from deeplimit.training import BatchRequest, example
        from deeplimit.training.example_batch import inputs_of

        self._no_solver("accuracy needs a run, with its test data")
        check_place(self.figure)
        wish = BatchRequest(self.batch, sizes(self.shape), self.length, self.seed)
        return {"x": inputs_of(example(loaded, wish, "cpu").batch)}

    def _no_solver(self, why: str) -> None:
        asked = {"solver": self.solver, "steps": self.steps or None, "tolerance": self.tolerance}
        for option, value in asked.items():
            if value is not None:
                raise InputError(f"--{option} given for {self.model}: {why}; leave it out")

    def _solvers(self, depth: int) -> list[tuple[str, int | None]]:
        """What is asked for; by default fewer and more steps than the network's."""
        from deeplimit.ode.solvers import FIXED, TOLERANCE, check_solver

        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        if self.solver is not None:
            asked = [(self.solver, steps) for steps in self.steps or (None,)]
            for solver, steps in asked:
                check_solver(solver, steps, tolerance)
            if self.solver in FIXED and self.tolerance is not None:
                raise InputError(
                    f"--tolerance given, but {self.solver} takes steps of one size; leave it out, "
                    "or name an adaptive solver, such as dopri5"
                )
            return asked
        if self.steps:
            raise InputError("--steps given without --solver; name one, such as --solver rk4")
        check_solver("dopri5", None, tolerance)
        fewer = sorted({max(depth // 4, 1), max(depth // 2, 1), 2 * depth})
        rough = sorted({max(depth // 8, 1), max(depth // 4, 1)})
        return [("euler", k) for k in fewer] + [("rk4", k) for k in rough] + [("dopri5", None)]
