"""Chains of residual functions, their schemes and stages: x_{n+1} = x_n + h φ_n(x_n)."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit.errors import InputError

Residual = Callable[[Tensor], Tensor]


@runtime_checkable
class Scheme(Protocol):
    """A discretisation of ẋ = φ(x, θ); a small object without state.

    Attributes:
        order: order of accuracy in h of the states, for controls smooth in depth.
        nodes: how many neighbouring controls one step uses; N steps need N + nodes − 1 controls.
    """

    @property
    def order(self) -> int:
        """Order of accuracy."""
        ...

    @property
    def nodes(self) -> int:
        """Controls per step."""
        ...

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """x_{n+1} from x_n, with the `nodes` residual functions φ(·, θ_n), φ(·, θ_{n+1}), …"""
        ...

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """A first guess of x_n from x_{n+1}, where a fixed point for x_n may start."""
        ...


@dataclass(frozen=True)
class Euler:
    """x_{n+1} = x_n + h φ(x_n, θ_n): an ordinary residual block. First order."""

    order = 1
    nodes = 1

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """One Euler step."""
        (residual,) = residuals
        return torch.add(x, residual(x), alpha=h)

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """x_{n+1} itself, an error of O(h)."""
        return x


@dataclass(frozen=True)
class Heun:
    """a = φ(x_n, θ_n),  x_{n+1} = x_n + h/2 (a + φ(x_n + h a, θ_{n+1})).

    Second order for controls smooth in depth; N steps use N + 1 controls θ_0 … θ_N, and a step is
    the identity only if both of its controls vanish. Source: [SAP22] arXiv 2205.14612.
    """

    order = 2
    nodes = 2

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """One step of Heun's method."""
        left, right = residuals
        a = left(x)
        return torch.add(x, a + right(torch.add(x, a, alpha=h)), alpha=h / 2)

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """A step of Heun's method backwards: b = φ(x, θ_{n+1}),  x − h/2 (b + φ(x − h b, θ_n)).

        An error of O(h⁴) for controls smooth in depth, O(h²) for independent ones. Source: [SAP22].
        """
        left, right = residuals
        b = right(x)
        return torch.add(x, b + left(torch.add(x, b, alpha=-h)), alpha=-h / 2)


SCHEMES: dict[str, Scheme] = {"euler": Euler(), "heun": Heun()}


StateHook = Callable[[int, Tensor], None]


class ChainStep(nn.Module):
    """Step n of a chain, x_n ↦ x_{n+1}: called as a block is, for hooks and stand-ins.

    It is a part of no model: its controls are parts of the chain.
    """

    chain: "ResidualChain"
    n: int

    def __init__(self, chain: "ResidualChain", n: int):
        super().__init__()
        vars(self).update(chain=chain, n=n)

    @property
    def controls(self) -> tuple[nn.Module, ...]:
        """The residual functions that it uses: φ_n for Euler, φ_n and φ_{n+1} for Heun."""
        return tuple(self.chain.controls(self.n))

    def forward(self, x: Tensor) -> Tensor:
        """x_{n+1}."""
        return self.chain.advance(self.n, x)

    def inverse_start(self, x: Tensor) -> Tensor:
        """A first guess of x_n from x_{n+1}, as the scheme says."""
        return self.chain.scheme.inverse_start(self.controls, x, self.chain.step)


class ResidualChain(nn.Sequential):
    """A controlled dynamical system in discrete time: N steps of a scheme over residual functions.

    With `Euler` (the default) x_{n+1} = x_n + h φ_n(x_n) for n = 0 … N−1, the standard residual
    network for h = 1, a discretised Neural ODE on [0, T] for h = T/N. With `Heun`, whose step uses
    two neighbouring controls, the horizon is one less than the number of blocks.

    Args:
        blocks: the residual functions φ_n; each maps a state to a tensor of the state's shape.
        step: the step size h > 0.
        scheme: `Euler()` or `Heun()`.

    Its state_dict keys are those of an `nn.Sequential` of the blocks: `0.…`, `1.…`.

    Raises:
        InputError: h is not a positive number.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], *, step: float = 1.0, scheme: Scheme | None = None
    ):
        super().__init__(*blocks)
        if not (math.isfinite(step) and step > 0):
            raise InputError(f"the step size is {step}; it must be a positive number (1, or T/N)")
        self.step = float(step)
        self.scheme: Scheme = Euler() if scheme is None else scheme
        self._state_hooks: dict[int, StateHook] = OrderedDict()
        self._steps = [ChainStep(self, n) for n in range(self.horizon)]

    @property
    def horizon(self) -> int:
        """N: the number of steps."""
        return max(len(self) - self.scheme.nodes + 1, 0)

    def controls(self, n: int) -> list[nn.Module]:
        """The residual functions that step n uses: φ_n for Euler, φ_n and φ_{n+1} for Heun."""
        return [self._modules[str(i)] for i in range(n, n + self.scheme.nodes)]

    def advance(self, n: int, x: Tensor) -> Tensor:
        """x_{n+1} from x_n: the scheme's step with the controls θ_n, θ_{n+1}, … that it uses."""
        return self.scheme.step(self.controls(n), x, self.step)

    @property
    def steps(self) -> list[ChainStep]:
        """The N steps, as what is called for each."""
        if self._steps and self._steps[0].chain is not self:  # those of whom it is a replica
            self._steps = []
        self._steps += [ChainStep(self, n) for n in range(len(self._steps), self.horizon)]
        return self._steps[: self.horizon]

    def forward(self, input: Tensor) -> Tensor:
        """x_N from x_0."""
        x = input
        self._show(0, x)
        for step in self.steps:
            x = step(x)
            self._show(step.n + 1, x)
        return x

    def trajectory(self, x: Tensor) -> list[Tensor]:
        """The N + 1 states x_0 … x_N, in the graph when gradients are on."""
        states: list[Tensor] = []
        with self.register_state_hook(lambda _, state: states.append(state)):
            self(x)
        return states

    def register_state_hook(self, hook: StateHook) -> RemovableHandle:
        """Calls hook(n, x_n) for n = 0 … N whenever the chain runs; remove by the handle."""
        handle = RemovableHandle(self._state_hooks)
        self._state_hooks[handle.id] = hook
        return handle

    def without(self, steps: Iterable[int]) -> "ResidualChain":
        """A new chain over the same blocks that leaves out these steps.

        Step n takes its last control away with it (θ_n for Euler, θ_{n+1} for Heun), so that a cut
        of the tail leaves the first k steps exactly as they were for either scheme.

        Raises:
            InputError: a step that the chain does not have.
        """
        removed = set(steps)
        for n in sorted(removed):
            if not 0 <= n < self.horizon:
                raise InputError(
                    f"step {n} to be left out: the chain has steps 0 … {self.horizon - 1}"
                )
        gone = {n + self.scheme.nodes - 1 for n in removed}
        kept = [block for i, block in enumerate(self) if i not in gone]
        return self._like(kept)

    def _show(self, n: int, x: Tensor) -> None:
        for hook in list(self._state_hooks.values()):
            hook(n, x)

    def _like(self, blocks: Iterable[nn.Module]) -> "ResidualChain":
        chain = ResidualChain(blocks, step=self.step, scheme=self.scheme)
        chain.training = self.training
        return chain

    def __getitem__(self, index: Any) -> Any:
        """A block, or for a slice the chain of those blocks with the same step and scheme."""
        if isinstance(index, slice):
            return self._like(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __getstate__(self) -> dict[str, Any]:
        """Without the state hooks: they belong to whoever registered them, not to a copy."""
        return self.__dict__ | {"_state_hooks": OrderedDict()}

    def extra_repr(self) -> str:
        """Step size, scheme and horizon."""
        return f"horizon={self.horizon}, step={self.step:g}, scheme={type(self.scheme).__name__}"


def chains_in(
    model: nn.Module, name: str = "", *, nested: bool = False
) -> list[tuple[str, ResidualChain]]:
    """The chains that a model holds or is, by their names; with `nested` those in blocks too."""
    own = [(name, model)] if isinstance(model, ResidualChain) else []
    if own and not nested:
        return own
    inside = [(f"{name}.{n}" if name else n, m) for n, m in model._modules.items() if m is not None]
    return own + [found for n, m in inside for found in chains_in(m, n, nested=nested)]


def with_steps(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, and the steps of its chains, which are none of them."""
    for module in model.modules():
        yield module
        if isinstance(module, ResidualChain):
            yield from module.steps


NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # noqa: SLF001


def layers_of(block: nn.Module) -> list[nn.Module]:
    """The modules that have parameters of their own, in order of registration, taken for use."""
    return [m for m in block.modules() if next(m.parameters(recurse=False), None) is not None]


def control(block: nn.Module) -> list[nn.Parameter]:
    """The control θ_n of a block, on which a control cost acts.

    All its parameters; where the block has a norm, those from its last norm on, which is the norm's
    scale and bias if the block ends in it. A penalty on the weights before a norm is no control
    cost, since the norm undoes their scale. θ_n = 0 gives φ = 0.
    """
    layers = layers_of(block)
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, NORM_LAYERS)]
    deciding = layers[norms[-1] :] if norms else layers
    every = (p for layer in deciding for p in layer.parameters(recurse=False))
    return list({id(p): p for p in every}.values())


@dataclass(frozen=True)
class Stack:
    """The blocks of a stage, whose controls are points of one curve θ(s), s_n = n h, where alike.

    Attributes:
        index: the stage's number in the model.
        first: the number of its first layer, counted through all stages of the model.
        blocks: φ(·, θ_0), φ(·, θ_1), …; N of them for Euler, N + 1 for Heun.
        step: the step size h; 1 for models that have none.
        scheme: how a layer moves the state.
        adds: whether a block returns x + φ(x), as foreign ones do, instead of φ(x).
    """

    index: int
    first: int
    blocks: tuple[nn.Module, ...]
    step: float = 1.0
    scheme: Scheme = SCHEMES["euler"]
    adds: bool = True

    @property
    def horizon(self) -> int:
        """N: the number of layers."""
        return max(len(self.blocks) - self.scheme.nodes + 1, 0)

    @property
    def layers(self) -> range:
        """The layers' numbers in the model."""
        return range(self.first, self.first + self.horizon)

    def controls(self) -> dict[str, Tensor]:
        """The blocks' parameters by their name in a block: [len(blocks), *shape], detached."""
        every = [dict(block.named_parameters()) for block in self.blocks]
        return {name: torch.stack([p[name].detach() for p in every]) for name in every[0]}

    def alike(self, fixed: Collection[int] = ()) -> "Stack | None":
        """Its longest run of blocks of one class and of parameters of the same names and shapes.

        None where there is none; of blocks with a common step and scheme all must be alike.
        """
        numbered = [(n, b) for n, b in enumerate(self.blocks, self.first) if n not in fixed]
        # Numbers that follow one another: a block that changes the shape lies between stages only.
        runs = [list(run) for _, run in groupby(numbered, key=lambda pair: _kind(pair[1]))]
        run = max(runs, key=len, default=[])
        if not run or (len(run) < len(self.blocks) and not self.adds):
            return None
        return replace(self, first=run[0][0], blocks=tuple(block for _, block in run))


def chain_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The chains that a model holds or is, those without layers too; none of any other model."""
    return stacks_of([chain for _, chain in chains_in(model)])


def stacks_of(chains: Iterable[ResidualChain]) -> tuple[Stack, ...]:
    """Chains that follow one another."""
    first, found = 0, []
    for m, chain in enumerate(chains):
        found.append(Stack(m, first, tuple(chain), chain.step, chain.scheme, adds=False))
        first += chain.horizon
    return tuple(found)


def _kind(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return (type(block), shapes)
