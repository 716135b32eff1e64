"""Switching a model to memory-free gradients, and back."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import nn

from deeplimit._anatomy.chain import ResidualChain, chains_in
from deeplimit.errors import InputError
from deeplimit.gradient.automatic import Auto
from deeplimit.gradient.engine import Engine
from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import KEPT, OnDrift, Settings
from deeplimit.gradient.planning import MemoryPlan
from deeplimit.gradient.replay_context import Modules
from deeplimit.gradient.stand_ins import AdjointForward, engines, switches

Model = TypeVar("Model", bound=nn.Module)


def use_adjoint(
    model: Model,
    *,
    evaluations: int | None = None,
    bits: int | Literal["auto"] = 0,
    plan: MemoryPlan | None = None,
    anchor_every: int | None = None,
    tolerance: float | None = None,
    on_drift: OnDrift = "warn",
    blocks: Iterable[str] | None = None,
    anchors: Iterable[str] = (),
) -> Model:
    """Switches a model, in place, to gradients whose memory does not grow with depth.

    The states between residual blocks are not stored; in the backward pass each is rebuilt from the
    next, as the fixed point of

        z⁰ = x_{n+1},   z^j = x_{n+1} − Φ_n(z^{j−1}),   j = 1 … e,      x_{n+1} = x_n + Φ_n(x_n)

    with e evaluations of the block in all, the last of them with gradients. With h = T/N the
    relative error of the parameter gradients is O(N^{-e}) for blocks twice differentiable; for Heun
    steps, which start from the scheme's own inverse, O(N^{-(e+3)}) for controls smooth in depth.
    [SAP22] arXiv 2205.14612 is of order 1 at the price of e = 2. The function that the model
    computes, its parameters and its state_dict do not change.

    With `bits` b = 2, 4 or 8 it also works where that does not converge, and for blocks that do not
    add their input (a norm or a ReLU after the addition, gates): only the state's shape must stay.
    Of each block the update is kept in b bits, with what is lost fed into the next one's code,

        u_n = x_{n+1} − x_n,   v_n = u_n + c_n,   q_n = Q_b(v_n),   c_{n+1} = v_n − q_n,

    and states are rebuilt as x̂_n = x̂_{n+1} − q_n. Since Σq telescopes, x̂_n − x_n = −c_n: half a
    quantum at most, whatever the depth and the blocks. Q_b has a scale in bfloat16 for each 64
    numbers, so that memory is (b + 1/4)/32 of a float32 checkpoint's; e = 1 costs its time. With
    e > 1, for blocks that add their input, x̂_n is where the fixed point starts, and the quantum
    around it what it cannot leave.

        >>> model = use_adjoint(nn.Sequential(*blocks), bits=8)
        >>> loss = model(x).square().mean()
        >>> loss.backward()

    Blocks are found while the model first runs: the children of a `Sequential` or `ModuleList` (or
    the steps of a `ResidualChain`) that add their input to their output, or with bits only keep
    its shape; `layout(model)` then says which, and why others were left as they are. Blocks that
    are not linked to another, and the first and last of a chain, keep their input, as a checkpoint
    does.

    Args:
        model: any model.
        evaluations: e ≥ 1; by default 2, or 1 with bits. e = 1 costs what a checkpoint does.
        bits: b = 2, 4 or 8; 0 to keep nothing of the updates. The gradient's relative error goes
            down by about 5 (from 2 to 4) and 15 (from 4 to 8): at 4 bits it is about 1 %. "auto":
            each state is kept, coded or rebuilt as `plan_memory` plans it, for half the tolerance.
            The first step keeps all; before the second some 15 to 40 steps are measured on the
            first batch. The error is measured again after 1, 2, 4, … 256, 512, 768, … steps and
            when a bound has grown, which takes two more steps and a checkpoint's memory; beyond the
            tolerance it is said, and planned anew.
        plan: a plan of `plan_memory`, in place of evaluations and bits.
        anchor_every: keep every so manyth state of a chain exactly.
        tolerance: of the gradient's relative error; by default 1e-2, or the plan's. At kept
            states the drift ‖x̃_n − x_n‖ / ‖x_{n+1} − x_n‖ is measured in every backward pass; with
            bits the response r_n = ‖Φ_n(x̂_n) − Φ_n(x_n)‖ / ‖Φ_n(x_n)‖, on 256 entries of each.
        on_drift: when the gradient's error may exceed the tolerance, which is when 2·drift does, or
            2.5·√drift for blocks with kinks (ReLU), with bits 8·√Σr_n² or 4·(Σr_n²)^(1/4):
            "warn" (once), "raise" an AdjointError at the end of backward(), or with "auto" in the
            next forward pass, where it is measured; or "ignore". With a plan the measured error
            stands as long as the bound is what it was beside it.
        blocks: names of the blocks, as in `named_modules()`, instead of those that would be found.
        anchors: names of blocks whose input is kept.

    Returns:
        The model.

    Raises:
        InputError: a setting that cannot be, a name that is no block, a model with no candidate, or
            with gradient checkpointing on; the model is as it was. Checkpoints switched on later
            are an InputError of the next forward pass with gradients; parameters offloaded or
            without a shape yet, a second thread, and with bits an update that is not finite, are
            an AdjointError there (the last on other devices at the end of the backward pass).
    """
    kept = _names(anchors, "anchors")
    ways, measured = dict.fromkeys(kept, KEPT), None
    if plan is not None:
        if bits or evaluations is not None:
            raise InputError(
                "plan given, and bits or evaluations, which the plan says; leave them out"
            )
        bits, ways, measured = "auto", {**plan.ways, **ways}, (plan.error, plan.bound)
    if tolerance is None:
        tolerance = 1e-2 if plan is None else plan.tolerance
    if evaluations is None:
        evaluations = 1 if bits else 2
    settings = Settings(evaluations, anchor_every, tolerance, on_drift, bits, ways, measured)
    engine = Engine(settings)
    names = None if blocks is None else _names(blocks, "blocks")
    Modules([model]).refuse_checkpoints(type(model).__name__)
    found = _chains(model) if names is None else []
    candidates = _candidates(model) if names is None else _named(model, names)
    if not found and not candidates:
        raise InputError(
            f"{type(model).__name__} has no residual blocks that could be found: expected a "
            "ResidualChain, or a Sequential or ModuleList of blocks; give their names to "
            "use_adjoint(model, blocks=[…])"
        )
    places = {
        *candidates,
        *(_place(name, n) for name, chain in found for n in range(chain.horizon)),
    }
    if unknown := ways.keys() - places:
        given = "anchors" if unknown & kept else "the plan"
        raise InputError(f"{given} names {min(unknown)!r}, which is not one of the blocks")
    use_backprop(model)
    steps: dict[str, Step] = {}
    for name in sorted(candidates, key=lambda name: -name.count(".")):
        block = candidates[name]
        inner = tuple(s for other, s in steps.items() if other.startswith(name + "."))
        step = Step.of(name, block, inner=inner, named=names is not None)
        steps[name] = step
        AdjointForward(engine, step, block).put()
    if bits == "auto" and plan is None:
        engine.auto = Auto(model, engine)
    for name, chain in found:
        for n, block in enumerate(chain.steps):
            step = Step.of(_place(name, n), *block.controls, named=True)
            AdjointForward(engine, step, block).put()
    return model


def use_backprop(model: Model) -> Model:
    """Switches a model back to ordinary backpropagation, in place; undoes `use_adjoint`."""
    for switch in switches(model):
        if switch.engine.auto is not None:
            switch.engine.auto.leave(model)
        switch.remove()
    return model


@dataclass(frozen=True)
class Layout:
    """Which blocks of a switched model have their states rebuilt, and why others have not.

    Attributes:
        rebuilt: names of the blocks whose states come back by a fixed point, in order.
        alone: residual blocks that no other was linked to; their input is kept, as by a checkpoint.
        plain: the other candidates, but for parts of those and what holds them: name → reason.
        waiting: candidates that have not run with gradients yet.
        coded: the blocks whose states come back by codes: name → bits.
        kept: linked blocks whose input is kept: by a plan, as anchors, or since shapes in them
            depend on numbers; the first and last of a chain are, whatever they stand under.
    """

    rebuilt: tuple[str, ...]
    alone: tuple[str, ...]
    plain: dict[str, str]
    waiting: tuple[str, ...]
    coded: dict[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line each."""
        lines = [f"rebuilt: {', '.join(self.rebuilt) or 'none'}"]
        for bits in sorted(set(self.coded.values())):
            names = ", ".join(name for name, b in self.coded.items() if b == bits)
            lines.append(f"coded in {bits} bits: {names}")
        if self.kept:
            lines.append(f"kept: {', '.join(self.kept)}")
        if lines[1:] and not self.rebuilt:
            del lines[0]
        if self.alone:
            lines.append(f"linked to no other block, their input kept: {', '.join(self.alone)}")
        lines += [f"plain: {name}: {why}" for name, why in self.plain.items()]
        return "\n".join([*lines, *(f"not run yet: {name}" for name in self.waiting)])


def layout(model: nn.Module) -> Layout:
    """What `use_adjoint` has found out about a model so far.

    Raises:
        InputError: the model is not switched.
    """
    engines(model)
    found = switches(model)
    steps = [switch.step for switch in found]
    residual = [s for s in steps if s.known and s.plain is None]
    covered = {
        s.name
        for s in steps
        for r in residual
        if s.name.startswith(r.name + ".") or r.name.startswith(s.name + ".")
    }
    linked = {
        step.name: way
        for step, switch in zip(steps, found, strict=True)
        if step.known and step.linked and (way := switch.engine.way(step, 1)) is not None
    }
    return Layout(
        tuple(name for name, way in linked.items() if way.evaluations and not way.bits),
        tuple(s.name for s in residual if not s.linked),
        {s.name: s.plain for s in steps if s.plain is not None and s.name not in covered},
        tuple(s.name for s in steps if not s.known),
        {name: way.bits for name, way in linked.items() if way.bits},
        tuple(name for name, way in linked.items() if way == KEPT),
    )


def _names(names: Iterable[str], what: str) -> frozenset[str]:
    if isinstance(names, str):
        raise InputError(f"{what} is the text {names!r}; expected a list of names")
    return frozenset(names)


def _chains(model: nn.Module) -> list[tuple[str, ResidualChain]]:
    """The chains in it, each once."""
    first = {chain: name for name, chain in reversed(chains_in(model, nested=True))}
    return [(name, chain) for chain, name in reversed(first.items())]


def _place(name: str, part: int | str) -> str:
    """What step n of a chain is called, or a child of a module."""
    return f"{name}.{part}" if name else str(part)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Children of Sequentials and ModuleLists that have parts of their own, outside our chains."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    ours = {part for _, chain in _chains(model) for part in chain.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or module in ours:
            continue
        for child_name, child in module.named_children():
            # What holds a chain of ours is none: the chain's steps are switched already.
            whole = next(child.children(), None) is not None and ours.isdisjoint(child.modules())
            runs = "forward" in vars(child) or type(child).forward is not nn.Module.forward
            if whole and child not in seen and runs:
                seen.add(child)
                found[_place(name, child_name)] = child
    return found


def _named(model: nn.Module, names: frozenset[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in sorted(names):
        if name not in modules:
            raise InputError(f"blocks names {name!r}, which the model does not have")
        inside = next((o for o in names if o != name and name.startswith(o + ".")), None)
        if inside is not None:
            raise InputError(f"blocks names {name!r} and {inside!r}, which holds it; give one")
    return {name: modules[name] for name in sorted(names)}
