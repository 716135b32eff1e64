"""A model as everything else sees it: stem, stages of layers, what carries a state on, head."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.block_call import BlockCall
from deeplimit._anatomy.branches import parameter_ends
from deeplimit._anatomy.chain import ResidualChain, Stack, chains_in, control, stacks_of
from deeplimit._anatomy.checks import layer_numbers
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics, concatenated, evaluating
from deeplimit._anatomy.inputs import call, placed
from deeplimit._anatomy.stand_ins import PASSING, state_of, version
from deeplimit.errors import InputError, several

StateHook = Callable[[int, Tensor], None]
Head = Callable[[Tensor], Tensor]
RunningCost = Callable[[Head, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One residual step of a model.

    Attributes:
        stage: the stage of the state that enters it; states of one stage have one shape.
        controls: the modules whose parameters are its control (two for a Heun step).
        removable: whether the model can do without it.
    """

    stage: int
    controls: tuple[nn.Module, ...]
    removable: bool = True


class Anatomy(ABC):
    """A model read as x_0 = stem(input), layers x_n → x_{n+1} in stages, logits = head(x_N).

    State n (0 ≤ n < N) is what enters layer n; state N is what enters the head. Between stages the
    shape changes; `carry` takes a state of one stage past the change by the shortcut alone, so that
    every state has logits z_n = head(carry(… carry(x_n))) without new parameters ([PHFF25]
    arXiv 2506.21453).

    Our own networks have a subclass each, registered with `register`; any other model is read
    through its own forward, by `ReadModel`.

    Attributes:
        model: the model.
        rebuildable: whether a layer's input can be found again from what it returns.
        tokens: whether there are logits for every token, [B, L, C], and the head reads each token
            by itself: states [T, d] → logits [T, C].
        name: of the lists of blocks, where the model was found to have such.
        others: names of other lists of blocks that it has.
    """

    rebuildable = True
    tokens = False
    name: str | None = None
    others: Sequence[str] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    def run(self, x: Any) -> Tensor:
        """The logits of the model's own forward."""
        return call(self.model, x)

    @property
    @abstractmethod
    def stages(self) -> int:
        """The number of stages; the head reads states of the last one."""

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """The residual steps in order, through all stages."""

    @abstractmethod
    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """Calls hook(n, x_n), n = 0 … N, while the model's own forward runs."""

    def register_leaving_hook(self, n: int, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls hook(x) with the state as it leaves layer n, before what follows the layer."""

        def leaves(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if (x := state_of(output)) is not None:
                hook(x)

        return self._called[n].register_forward_hook(leaves)

    @property
    def _called(self) -> Sequence[nn.Module]:
        """What is called for each layer, and returns what leaves it."""
        return [layer.controls[-1] for layer in self.layers]

    @property
    def replayed(self) -> bool:
        """True where layers are replayed in the backward pass, so that kept states cost memory."""
        return False

    def collect_stage_costs(
        self, costs: Mapping[int, RunningCost], x: Inputs
    ) -> AbstractContextManager[list[Tensor]]:
        """Collects costs[n](head, x_n, x′) of layers n < N, inside them; where they are replayed.

        x are the inputs that the model is about to run on. head(x_n) is z_n; as in `logits` with
        the running statistics of this moment. x′ is what leaves the layer, x_{n+1} within a stage.
        """
        raise InputError(f"{type(self).__name__} has no layers that are replayed")

    @abstractmethod
    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """A state of `stage` in the shape of stage + 1, through the shortcut alone."""

    def passing(
        self, first: int, x: Tensor | None, last: int
    ) -> AbstractContextManager[list[Tensor]]:
        """Runs layers first … last − 1 alone in each forward of the model inside; collects x_last.

        What enters layer `first` is x, a state for each sample of the inputs that the model is
        called with; None is the model's own, with `first` 0. What follows the layers reads x_last,
        so that the model returns z_last in the form of its own answer.
        """
        raise InputError(f"{type(self).__name__} does not say how some of its layers are run")

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """A function that takes a state past layer n as if the layer did nothing."""
        return lambda x: x

    @abstractmethod
    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """The logits [B, C] of states of the last stage; [T, C] of tokens [T, d] (`tokens`)."""

    def like(self, model: nn.Module) -> "Anatomy":
        """The anatomy of another model of this kind, such as a cut of it."""
        return type(self)(model)

    @abstractmethod
    def leave_out(self, removed: set[int]) -> nn.Module:
        """The model less some layers, of the same kind; independent of it."""

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """The model with layer n times[n] ≥ 0 times in a row, of the same kind; independent of it.

        Every layer is a module of its own; what the model says of itself is brought up to date.

        Raises:
            InputError: the family does not say how.
        """
        raise InputError(
            f"{type(self).__name__} does not say how layers of {type(self.model).__name__} are "
            "repeated, so its depth cannot be changed: override repeated"
        )

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The parameters in which the residual branches of a block end, found by trial.

        Times c they turn x + φ(x) into x + c φ(x), up to O(c²) where branches of one block follow
        one another; at 0 the block returns its input.

        Raises:
            InputError: there is no example to try on, or no module's output is added to the state.
        """
        n = next(n for n, layer in enumerate(self.layers) if block in layer.controls)
        x = self.fitting_example()
        if x is None:
            raise InputError(
                f"{type(self).__name__} has no example of its model's input, on which the ends of "
                "the residual branches are found; override example"
            )
        with evaluating(self.model), torch.no_grad():
            ends = parameter_ends(BlockCall(self, n, x))
        if not ends:
            raise InputError(
                f"where the residual branches of {type(block).__name__} end is not known, so the "
                "step of its layers cannot be changed, nor the depth; tie and untie work"
            )
        return ends

    def example(self) -> Inputs | None:
        """A small input on which the anatomy is checked; None where there is none to be had."""
        return None

    def fitting_example(self) -> Any:
        """The example where the model is: on its device, numbers with a fraction in its precision.

        None of a model on the meta device, which computes nothing.
        """
        x, meta = self.example(), any(p.is_meta for p in self.model.parameters())
        return None if x is None or meta else placed(self.model, x)

    def runner(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """A function that runs another model as this one is run, without reading it."""
        other = copy.copy(self)
        other.model = model
        return other.run

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The residual blocks in order, each once."""
        return tuple(dict.fromkeys(b for layer in self.layers for b in layer.controls))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks of each stage, their step and scheme, and whether a block adds its input.

        The model's chains; where it has none blocks add their input, and the step is 1.
        """
        if chains := self._chains:
            return stacks_of(chains)
        found = []
        for stage, own in groupby(enumerate(self.layers), lambda numbered: numbered[1].stage):
            numbers, layers = zip(*own, strict=True)
            found.append(Stack(stage, numbers[0], tuple(layer.controls[0] for layer in layers)))
        return tuple(found)

    @property
    def _chains(self) -> list[ResidualChain]:
        """The chains whose steps are the layers, if they are."""
        return [chain for _, chain in chains_in(self.model)]

    @property
    def stem_and_head(self) -> tuple[nn.Module, nn.Module] | None:
        """The modules that make the first state and read the last, where each is one."""
        return None

    def with_stacks(self, stacks: Sequence[Stack], neurons: int | None = None) -> nn.Module:
        """The model with other blocks in its stages, and another step; else independent of it.

        What the model says of itself is brought up to date.

        Args:
            stacks: one for each of `stacks`.
            neurons: how many a block of the first stage has, where that changes.

        Raises:
            InputError: its step is no number.
        """
        raise InputError(f"the layers of {type(self.model).__name__} have no step that is a number")

    @property
    def horizon(self) -> int:
        """N: the number of layers."""
        return len(self.layers)

    @property
    def state_stages(self) -> tuple[int, ...]:
        """The stage of each state x_0 … x_N."""
        return (*(layer.stage for layer in self.layers), self.stages - 1)

    @property
    def fixed(self) -> tuple[int, ...]:
        """The layers that the model cannot do without."""
        return tuple(n for n, layer in enumerate(self.layers) if not layer.removable)

    def control(self, n: int) -> list[nn.Parameter]:
        """The parameters θ_n on which a control cost acts.

        All of the block's; where it has a norm, those from its last norm on. A family whose blocks
        add to the state more than once says otherwise.
        """
        return [p for module in self.layers[n].controls for p in control(module)]

    @property
    def controls(self) -> list[nn.Parameter]:
        """The controls of all layers, each parameter once."""
        every = (p for n in range(self.horizon) for p in self.control(n))
        return list({id(p): p for p in every}.values())

    @contextmanager
    def hooked(self, hook: StateHook) -> Iterator[None]:
        """Calls hook(n, x_n), n = 0 … N, in each forward of the model inside the block."""
        handles = self.register_state_hook(hook)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collects the states x_0 … x_N of each forward of the model inside the block."""
        states: list[Tensor] = []
        with self.hooked(lambda _, x: states.append(x)):
            yield states

    def states(self, x: Any) -> tuple[list[Tensor], Tensor]:
        """The states x_0 … x_N and the model's own logits for a batch of inputs.

        Raises:
            InputError: a layer, or what follows the last one, writes over the state that it reads.
        """
        states: list[Tensor] = []
        versions: list[int] = []

        def seen(_: int, x: Tensor) -> None:
            states.append(x)
            versions.append(version(x))

        with self.hooked(seen):
            logits = self.run(x)
        self._check_unwritten(states, versions)
        return states, logits

    def _check_unwritten(self, states: Sequence[Tensor], versions: Sequence[int]) -> None:
        """Raises InputError where a state was written over since."""
        for n, (state, before) in enumerate(zip(states, versions, strict=True)):
            if version(state) != before:
                name = type(self.model).__name__
                who = f"layer {n}" if n < len(states) - 1 else "what follows the last layer"
                raise InputError(
                    f"{who} of {name} changes its input in place, which loses state {n}; write "
                    "x = x + … for x += …, and leave out inplace=True where it reads the state"
                )

    def carried(self, n: int, x: Tensor, inputs: Any = None) -> Tensor:
        """State n in the shape of state n + 1 (itself within a stage)."""
        stages = self.state_stages
        if stages[n] == stages[n + 1]:
            return x
        with RunningStatistics(self.model.modules()).use():
            for stage in range(stages[n], stages[n + 1]):
                x = self.carry(stage, x, inputs)
        return x

    def logits(
        self,
        states: Sequence[Tensor],
        first: int | Sequence[int] = 0,
        statistics: RunningStatistics | None = None,
        x: Any = None,
    ) -> Tensor:
        """The logits z_n [len(states), B, C] of the states first, first + 1, … of inputs x.

        Of states that do not follow one another `first` is which they are, in order. The states of
        a stage are stacked along the batch and meet each shortcut and the head once, not layer by
        layer. Batch norms use their running statistics, of now or of another moment, and leave them
        alone. A head that reads the inputs too needs x.
        """
        if not states:
            raise InputError("no states given; expected at least one")
        stages = self.state_stages
        at: dict[int, list[Tensor]] = {}
        of = range(first, first + len(states)) if isinstance(first, int) else first
        for n, state in zip(of, states, strict=True):
            at.setdefault(stages[n], []).append(state)
        z = self.through(at, x, statistics)
        return z.reshape(len(states), len(z) // len(states), *z.shape[1:])

    def through(
        self,
        at: Mapping[int, Sequence[Tensor]],
        x: Any = None,
        statistics: RunningStatistics | None = None,
    ) -> Tensor:
        """The logits of states by the stages that they are of, in order, one after the other."""
        statistics = statistics or RunningStatistics(self.model.modules())
        with statistics.use():
            stacked: list[Tensor] = []
            for stage in range(min(at), self.stages):
                if stacked:
                    stacked = [self.carry(stage - 1, concatenated(stacked))]
                stacked += at.get(stage, ())
            return self.head(concatenated(stacked))

    def without(self, removed: Iterable[SupportsIndex]) -> nn.Module:
        """An independent copy of the model less some layers.

        Raises:
            InputError: a layer that does not exist, or that the model cannot do without.
        """
        gone = layer_numbers(removed)
        self.check_removable(gone)
        with PASSING:  # no copy of what stands in the blocks while another thread passes them
            return self.leave_out(gone)

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """Checks that the model can do without these layers.

        Raises:
            InputError: a layer that does not exist, or that the model cannot do without.
        """
        layers = self.layers
        for n in sorted(layer_numbers(removed)):
            if not 0 <= n < len(layers):
                raise InputError(
                    f"layer {n} to be removed: the model has layers 0 … {len(layers) - 1}"
                )
            if not layers[n].removable:
                raise InputError(
                    f"layer {n} cannot be removed: {type(self.model).__name__} needs it; "
                    "choose_cut chooses among the others"
                )

    def __str__(self) -> str:
        """The parts, a line each."""
        lines = [
            f"{type(self.model).__name__}: {several(self.horizon, 'layer')}, read by "
            f"{type(self).__name__}"
        ]
        for stage in sorted({layer.stage for layer in self.layers}):
            own = [n for n, layer in enumerate(self.layers) if layer.stage == stage]
            names = dict.fromkeys(type(m).__name__ for n in own for m in self.layers[n].controls)
            lines.append(f"  stage {stage}: layers {own[0]} … {own[-1]} ({', '.join(names)})")
        if self.others:
            lines.append(f"  read: {self.name}; also there, for blocks=…: {', '.join(self.others)}")
        if self.fixed:
            lines.append(f"  cannot be removed: layers {', '.join(map(str, self.fixed))}")
        return "\n".join(lines)
