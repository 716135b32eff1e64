"""An optimiser carried over to a network of another depth, so that its steps do what they did.

A parameter θ' = ρ Σ w_i θ_i with gradients γ Σ w_i g_i has to move by ρ Σ w_i δθ_i (`Origin`):

    SGD     momentum buffer · γ,   learning rate · ρ/γ,   weight decay · γ/ρ
    Adam    exp_avg · γ,  exp_avg_sq · γ²,  ε · γ,  learning rate · ρ,  weight decay · γ/ρ
    AdamW   likewise, but weight decay · 1/ρ

An update without momentum, η g, becomes (ηρ/γ) γg; Adam's η m/(√v + ε) does not see γ once ε is
scaled with it. The decay of SGD and Adam is added to the gradient, λρθ · γ/ρ = γ λθ; AdamW's moves
the parameter by ηρ · (λ/ρ) · ρθ = ρ · ηλθ. These are exact; that the gradients shrink by γ holds to
first order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from deeplimit.errors import InputError

ONE = Fraction(1)
# Schedulers keep what they start from in the groups; the next one starts from it.
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
DECOUPLED = "decoupled_weight_decay"  # Adam can be told to decay as AdamW does


@dataclass(frozen=True)
class Origin:
    """A parameter's value is ρ Σ w_i θ_i; its gradient is, to first order, γ Σ w_i ∂L/∂θ_i.

    The weights of the sources add up to 1; the first source says in which of an optimiser's groups
    the parameter belongs.
    """

    sources: tuple[tuple[nn.Parameter, Fraction], ...]  # (θ_i, w_i)
    gradient: Fraction = ONE  # γ
    size: Fraction = ONE  # ρ, so that an update of ρ Σ w_i δθ_i does what the δθ_i did


Origins = dict[nn.Parameter, Origin]


def mixed(tensors: Sequence[Tensor], weights: Sequence[Fraction], by: Fraction = ONE) -> Tensor:
    """Σ w_i t_i times `by`, a new tensor; to the last bit the first where all are equal."""
    first = tensors[0].detach()
    if all(torch.equal(first, tensor) for tensor in tensors[1:]):
        return _scaled(first.clone(), by)
    if len(tensors) == 2:
        return _scaled(torch.lerp(first, tensors[1].detach(), float(weights[1])), by)
    terms = (_scaled(t.detach(), w) for t, w in zip(tensors, weights, strict=True))
    return _scaled(torch.stack(list(terms)).sum(0), by)


def _scaled(tensor: Tensor, by: Fraction) -> Tensor:
    """Tensor times `by`, rounded once where that is m or 1/m."""
    if by == 1:
        return tensor
    return tensor / by.denominator if by.numerator == 1 else tensor * by.numerator / by.denominator


@dataclass(frozen=True)
class Rule:
    """The powers of γ and ρ with which an optimiser's figures go."""

    moments: Mapping[str, int]  # of γ, for each entry of a parameter's state
    settings: Mapping[str, tuple[int, int]]  # of γ and ρ, for each entry of a group

    def factors(self, group: Mapping[str, Any], origin: Origin) -> dict[str, Fraction]:
        """The factors on a group's settings for a parameter of this origin."""
        powers = {name: power for name, power in self.settings.items() if group.get(name)}
        every = {n: origin.gradient**gamma * origin.size**rho for n, (gamma, rho) in powers.items()}
        return {name: factor for name, factor in every.items() if factor != 1}

    def state(self, states: Sequence[Mapping[str, Any]], origin: Origin) -> dict[str, Any]:
        """A parameter's state from those of its sources; counters are the first one's."""
        weights, made = [weight for _, weight in origin.sources], {}
        for name, value in states[0].items():
            if name in self.moments and isinstance(value, Tensor):
                values = [state[name] for state in states]
                made[name] = mixed(values, weights, origin.gradient ** self.moments[name])
            else:
                made[name] = value.clone() if isinstance(value, Tensor) else value
        return made


ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule({"momentum_buffer": 1}, dict.fromkeys(RATES, (-1, 1)) | {"weight_decay": (1, -1)}),
    Adam: Rule(ADAM, dict.fromkeys(RATES, (0, 1)) | {"weight_decay": (1, -1), "eps": (1, 0)}),
    AdamW: Rule(ADAM, dict.fromkeys(RATES, (0, 1)) | {"weight_decay": (0, -1), "eps": (1, 0)}),
}


def checked_optimiser(optimizer: Optimizer | None, model: nn.Module) -> Optimizer | None:
    """The optimiser itself, out of Fabric's wrapper, if it can be carried over."""
    if optimizer is None:
        return None
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    if type(inner) not in RULES:
        raise InputError(
            f"the optimizer is {type(inner).__name__}, whose state goes with depth in a way not "
            "known here; give SGD, Adam or AdamW of torch.optim, or make a new one afterwards"
        )
    held = {p for group in inner.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise InputError(
            f"the optimizer holds no parameter of this {type(model).__name__}; give the one that "
            "trains it"
        )
    return inner


def carry_over(
    optimizer: Optimizer | None, old: nn.Module, new: nn.Module, origins: Origins
) -> None:
    """Puts the new model's parameters where those of the old one were, in place.

    A group is divided where its parameters now need different settings. What the optimiser holds
    besides the old model stays as it is.
    """
    if optimizer is None:
        return
    rule, mine = RULES[type(optimizer)], set(old.parameters())
    names = {p: name for name, p in new.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        held = set(group["params"])
        heirs = {p: o for p, o in origins.items() if o.sources[0][0] in held}
        others = {p: Origin(((p, ONE),)) for p in group["params"] if p not in mine}
        called = dict(zip(group["params"], group.get("param_names", ()), strict=False)) | names
        for made in _divided(RULES[AdamW] if group.get(DECOUPLED) else rule, group, heirs | others):
            if "param_names" in group:
                made["param_names"] = [called[p] for p in made["params"]]
            groups.append(made)
    states: dict[Tensor, dict[str, Any]] = {}
    for parameter, origin in origins.items():
        found = [optimizer.state.get(source) for source, _ in origin.sources]
        if all(found):  # none of them is still to take its first step
            states[parameter] = rule.state([state for state in found if state], origin)
    for parameter in mine:
        optimizer.state.pop(parameter, None)
    optimizer.state.update(states)
    optimizer.param_groups[:] = groups


def _divided(rule: Rule, group: Mapping[str, Any], origins: Origins) -> list[dict[str, Any]]:
    """A group for each of the settings that its parameters need; of none, the group itself."""
    parts: dict[tuple[tuple[str, Fraction], ...], list[nn.Parameter]] = {}
    for parameter, origin in origins.items():
        parts.setdefault(tuple(rule.factors(group, origin).items()), []).append(parameter)
    return [
        {**group, "params": parameters, **{n: group[n] * float(by) for n, by in factors}}
        for factors, parameters in (parts or {(): []}).items()
    ]
