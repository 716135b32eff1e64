"""The stages of a model that are dynamical systems: vector field, its derivatives, own states."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from deeplimit._anatomy import Anatomy, ReplayedBlock, Stack, anatomy, model_of
from deeplimit._anatomy.evaluation import Inputs, device_of, to_device, to_precision
from deeplimit._anatomy.stand_ins import state_among, state_of
from deeplimit.errors import InputError
from deeplimit.network.blocks import check_values

Interpolation = Literal["linear", "constant"]
Control = dict[str, Tensor]
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # a state, and a block's arguments with it
Place = tuple[int, float]  # n and c: s = s_n + c h
RESIDUAL = 1e-4  # of a singular vector, at which the search for it ends
KRYLOV = 64  # products with JᵀJ at most
NUMBERS = 2**24  # held at a time: 128 MiB


def stages(model: nn.Module | Anatomy) -> tuple[Stack, ...]:
    """The stages of a model that have at least two layers whose blocks are alike.

    A chain is one stage; of blocks that add their input it is the longest run, in each stage, of
    one class and of parameters of the same names and shapes.
    """
    read = anatomy(model)
    fixed = set(read.fixed)
    found = [run for stack in read.stacks if (run := stack.alike(fixed)) is not None]
    long = tuple(run for run in found if run.horizon > 1)
    if not long:
        there = "alike layers in its stages: " + ", ".join(str(run.horizon) for run in found)
        there = there if found else "it has no layers, or those of a stage differ"
        raise InputError(
            f"{type(read.model).__name__} has no stage of two layers or more whose blocks have the "
            f"same class and the same shapes of parameters ({there}): its controls are no "
            "points of one curve in depth; give a network with two alike layers in a stage"
        )
    return long


def longest_stage(model: nn.Module | Anatomy) -> Stack:
    """The stage with the most layers, the first of these."""
    return max(stages(model), key=lambda stage: stage.horizon)


def with_values(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads; its parameters have values."""
    module = model_of(model)
    check_values(module.named_parameters())
    return module


class VectorField:
    """φ(x, θ) of a stage: its first block's function, with a control put in place of its own.

    θ(s) on [s_n, s_{n+1}], s_n = n h, goes from θ_n to θ_{n+1} on a straight line, or is θ_n all
    along. A control is parameters and, since they are part of a function in evaluation mode,
    floating-point buffers such as a batch norm's running statistics. Euler's N steps have the nodes
    θ_0 … θ_{N−1} only: θ is θ_{N−1} on the last interval. Heun's have θ_0 … θ_N. At a node θ is the
    limit from the side of the interval it is asked of. The masks, positions and the like of the
    first block's `call` are those of all. `evaluations` counts how often φ was evaluated so far.
    """

    def __init__(self, stage: Stack, *, linear: bool = True, call: Call | None = None):
        every = [_tensors(block) for block in stage.blocks]
        first = every[0]
        names = [n for n in first if any(_differs(t[n], first[n]) for t in every)]
        for name in names:
            if not first[name].is_floating_point():
                raise InputError(
                    f"the buffer {name!r} holds {first[name].dtype} that differ from block to "
                    "block; there is nothing between them"
                )
        self.stage, self.horizon, self.step = stage, stage.horizon, stage.step
        self.evaluations = 0
        self._fixed = {name: t for name, t in first.items() if name not in names}
        self._nodes = [{name: t[name] for name in names} for t in every]
        alone = torch.empty(0)
        self._linear, self._call = linear, call or (alone, (alone,), {})
        self._block = stage.blocks[0]
        if isinstance(vars(self._block).get("forward"), ReplayedBlock):
            del self._block.forward  # no forward-mode derivative, and here nothing is replayed

    def control(self, n: int, fraction: float = 0.0) -> Control:
        """θ(s_n + fraction·h)."""
        left, right = self._ends(n)
        if left is right or fraction == 0:
            return left
        return {name: torch.lerp(a, right[name], fraction) for name, a in left.items()}

    def change(self, n: int) -> Control:
        """The change h θ′ inside the interval n: θ_{n+1} − θ_n, or 0."""
        left, right = self._ends(n)
        return {name: right[name] - a for name, a in left.items()}

    @property
    def size(self) -> int:
        """The numbers in one θ_n."""
        return sum(t.numel() for t in self._nodes[0].values())

    def __call__(self, control: Control, x: Tensor) -> Tensor:
        """φ(x, θ)."""
        self.evaluations += 1
        given, args, kwargs = self._call
        args = tuple(x if v is given else v for v in args)
        kwargs = {name: x if v is given else v for name, v in kwargs.items()}
        theta = self._fixed | control
        out = functional_call(self._block, theta, args, kwargs, tie_weights=False)
        y = cast(Tensor, state_of(out))
        return y - x if self.stage.adds else y

    def _ends(self, n: int) -> tuple[Control, Control]:
        left = self._nodes[n]
        return left, self._nodes[n + 1] if self._linear and n + 1 < len(self._nodes) else left


def _tensors(block: nn.Module) -> Control:
    """Parameters and buffers, one that has several names under each of them; no counters."""
    parameters = block.named_parameters(remove_duplicate=False)
    every = chain(parameters, block.named_buffers(remove_duplicate=False))
    return {n: t.detach() for n, t in every if not n.endswith("num_batches_tracked")}


def _differs(a: Tensor, b: Tensor) -> bool:
    return a is not b and not torch.equal(a, b)


@torch.no_grad()
def record(read: Anatomy, x: Inputs, stage: Stack, *, linear: bool) -> tuple[VectorField, Tensor]:
    """Runs a copy of the model in float64 and evaluation mode on x: its field, and x_0 … x_N."""
    _check_mode(read.model)
    other = copy.deepcopy(read.model).double().eval()
    structure = anatomy(other)  # which runs the model on an example: before the hooks
    own = next(s for s in stages(structure) if s.index == stage.index)
    entered: list[Call] = []
    left: list[Tensor] = []

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((cast(Tensor, state_among(args, kwargs)), args, kwargs))

    hooks = [own.blocks[0].register_forward_pre_hook(enters, with_kwargs=True)]
    hooks.append(structure.register_leaving_hook(own.layers[-1], left.append))
    try:
        with structure.recording() as states:
            structure.run(to_precision(to_device(x, device_of(other)), torch.float64))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{type(other).__name__} does not run on x, {_described(x)}: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    states = [*states[own.first : own.first + own.horizon], left[-1]]
    shape = list(states[0].shape)
    if len(shape) < 2 or shape[0] == 0:
        raise InputError(
            f"the states have shape {shape}; expected [samples, …] with at least one sample: give "
            "a batch"
        )
    for n, state in enumerate(states):
        if not state.isfinite().all():
            raise InputError(
                f"state {n} of stage {own.index} is not finite (NaN or infinite); its distance "
                "to the Neural ODE is not defined: give an x and a model without"
            )
    field = VectorField(own, linear=linear, call=entered[0])
    for n in range(own.horizon):
        controls = [field.control(m) for m in range(n, n + own.scheme.nodes)]
        after = own.scheme.step([partial(field, theta) for theta in controls], states[n], own.step)
        near = 1e-6 * float(states[n + 1].square().mean().sqrt())
        if not torch.allclose(after, states[n + 1], rtol=1e-6, atol=near):
            raise InputError(
                f"layer {own.first + n} is not what the first of stage {own.index} is with its "
                "parameters (another activation, mask, index, …); the Neural ODE is defined for "
                "layers that differ in their parameters only"
            )
    return field, torch.stack(states)


def _check_mode(model: nn.Module) -> None:
    """Raises InputError where the model's function is another in evaluation mode, as examined."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            what = "is in training mode" if module.training else "keeps no running statistics"
            do = "call model.eval() first" if module.training else "give it some"
            raise InputError(
                f"the batch norm {name!r} {what}: it normalises by the batch; the gap is defined "
                f"for the function in evaluation mode: {do}"
            )
        if module.training and _drops(module):
            raise InputError(
                f"{name!r} ({type(module).__name__}) drops at random in training mode; the gap is "
                "defined for the function in evaluation mode: call model.eval() first"
            )


def _drops(module: nn.Module) -> bool:
    """Dropout, dropped paths, attention's own dropout: by the names that all libraries use."""
    own = type(module).__name__.lower()
    names = [k for k in vars(module) if "drop" in k]
    names += ["p"] if "drop" in own or "stochasticdepth" in own else []
    rates = [vars(module).get(name) for name in names]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _described(x: Inputs) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if not isinstance(x, dict):
        return f"a {type(x).__name__}; expected a tensor, or a dict of the model's arguments"
    return ", ".join(f"{name} of shape {list(value.shape)}" for name, value in x.items())


class PlainBatchNorm(TorchFunctionMode):
    """Batch norms by their formula: torch's have no derivative in their running statistics."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        x, mean, variance, weight, bias, *_, eps = given.args
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        y = (x - mean.view(shape)) * scale.view(shape)
        return y if bias is None else y + bias.view(shape)


class Derivatives:
    """∂_xφ and ∂_sφ + ∂_xφ·φ of a vector field at many places (n, c), s = s_n + c h, at once.

    Samples are independent of each other. Small layers are put together with `torch.vmap`, if that
    gives what the layers give one by one on an example [samples, …].
    """

    def __init__(self, field: VectorField, example: Tensor):
        self._field = field
        self._together = self._maps(example)

    def accelerations(self, places: Sequence[Place], states: Tensor) -> Tensor:
        """‖x″‖ = ‖∂_sφ + ∂_xφ·φ‖ [places, samples] where x(s) is states [places, samples, …].

        By a Jacobian-vector product in (θ, x). At a node ∂_sφ is the one inside interval n.
        """
        field, found = self._field, []
        for some in self._chunks(places, states[0].numel()):
            theta = _stacked([field.control(*place) for place in places[some]])
            change = _stacked([field.change(n) for n, _ in places[some]])
            slope = {name: value / field.step for name, value in change.items()}
            x = states[some]
            phi = self._each(len(x))
            with PlainBatchNorm():
                bend = jvp(phi, (theta, x), (slope, phi(theta, x)))[1]
            found.append(torch.linalg.vector_norm(bend.flatten(2), dim=2))
        return torch.cat(found)

    def jacobian_norms(
        self, places: Sequence[Place], states: Tensor, seed: int, tell: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        """σ_max of ∂_xφ [places, samples], and the residuals ‖JᵀJv − σ²v‖/σ² of its vectors v.

        Lanczos: v is the best vector in the span of the iterates of the power iteration on JᵀJ,
        whose convergence it speeds up. σ is reached from below. `tell` is told how many places are
        done.
        """
        generator = torch.Generator().manual_seed(seed)
        norms, residuals = [], []
        for some in self._chunks(places, states[0].numel() * KRYLOV):
            tell(some.start)
            theta = _stacked([self._field.control(*place) for place in places[some]])
            x = states[some]
            start = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            value, residual = _largest_eigenvalue(_normal(self._each(len(x)), theta, x), start)
            norms.append(value.sqrt())
            residuals.append(residual)
        return torch.cat(norms), torch.cat(residuals)

    def _each(self, count: int) -> Callable[[Control, Tensor], Tensor]:
        """φ for stacked controls and states, place by place."""
        if count > 1:
            return torch.vmap(self._field)
        return lambda theta, x: self._field({k: v[0] for k, v in theta.items()}, x[0])[None]

    def _chunks(self, places: Sequence[Place], numbers: int) -> Iterator[slice]:
        """Parts of the places, as many at a time as there is room for."""
        room = NUMBERS // (self._field.size + numbers) if self._together else 1
        size = max(1, room)
        return (slice(i, i + size) for i in range(0, len(places), size))

    def _maps(self, x: Tensor) -> bool:
        """True where layers can be put together; foreign code may branch on what it computes."""
        controls = [self._field.control(n) for n in (0, 1)]
        try:
            both = torch.vmap(self._field)(_stacked(controls), torch.stack([x, x]))
        except (RuntimeError, TypeError, ValueError):
            return False
        return torch.allclose(both, torch.stack([self._field(c, x) for c in controls]), rtol=1e-9)


def _stacked(controls: Sequence[Control]) -> Control:
    return {name: torch.stack([c[name] for c in controls]) for name in controls[0]}


def _normal(
    phi: Callable[[Control, Tensor], Tensor], theta: Control, x: Tensor
) -> Callable[[Tensor], Tensor]:
    """The map v ↦ JᵀJv, J = ∂_xφ."""

    def of_state(y: Tensor) -> Tensor:
        return phi(theta, y)

    pull = vjp(of_state, x)[1]
    return lambda v: pull(jvp(of_state, (x,), (v,))[1])[0]


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of a symmetric positive operator, and its relative residual.

    Lanczos with full reorthogonalisation, for each [p, b] of start [p, b, …] by itself: after k
    products the residual of the Ritz pair (λ, Qs) is β_k |s_k|.
    """
    shape = start.shape
    q = start.flatten(2)
    q = q / torch.linalg.vector_norm(q, dim=2, keepdim=True)
    last = min(KRYLOV, q.shape[2])
    basis = q.new_zeros(*q.shape[:2], last, q.shape[2])
    tridiagonal = q.new_zeros(*q.shape[:2], last, last)
    for k in range(last):
        basis[:, :, k] = q
        w = apply(q.view(shape)).flatten(2)
        rounding = 1e-12 * torch.linalg.vector_norm(w, dim=2)
        tridiagonal[:, :, k, k] = (q * w).sum(2)
        known = basis[:, :, : k + 1]
        for _ in range(2):
            w = w - ((known @ w[..., None]).mT @ known)[:, :, 0]
        beta = torch.linalg.vector_norm(w, dim=2)
        # Nothing left of w: the span is invariant, and holds a part of every eigenspace.
        beta = torch.where(beta > rounding, beta, 0.0)
        if k + 1 in (8, 16, 32, last):
            values, vectors = torch.linalg.eigh(tridiagonal[:, :, : k + 1, : k + 1])
            value = values[..., -1].clamp(min=0)
            residual = torch.where(value > 0, beta * vectors[..., -1, -1].abs() / value, 0.0)
            if k + 1 == last or residual.max() <= RESIDUAL:
                break
        tridiagonal[:, :, k, k + 1] = tridiagonal[:, :, k + 1, k] = beta
        q = torch.where(beta[..., None] > 0, w / beta[..., None], 0.0)
    return value, residual
