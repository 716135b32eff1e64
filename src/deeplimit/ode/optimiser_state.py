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

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from deeplimit.errors import InputError
from deeplimit.ode.origins import ONE, Origin, Origins, mixed, scaled

# Schedulers keep what they start from in the groups; the next one starts from it.
RATES = ("lr", "initial_lr", "max_lr", "min_lr")


@dataclass(frozen=True)
class Rule:
    """How an optimiser's figures go with γ and ρ.

    Attributes:
        moments: the power of γ of each entry of a parameter's state.
        settings: the powers of γ and ρ of each entry of a group.
    """

    moments: Mapping[str, int]
    settings: Mapping[str, tuple[int, int]]

    def factors(self, group: Mapping[str, Any], origin: Origin) -> dict[str, Fraction]:
        """What a group's settings are multiplied by for a parameter of this origin."""
        powers = {name: power for name, power in self.settings.items() if group.get(name)}
        every = {n: origin.gradient**gamma * origin.size**rho for n, (gamma, rho) in powers.items()}
        return {name: factor for name, factor in every.items() if factor != 1}

    def state(self, states: Sequence[Mapping[str, Any]], origin: Origin) -> dict[str, Any]:
        """A parameter's state from those of its sources; counters are the first one's."""
        made = {}
        for name, value in states[0].items():
            if name in self.moments and isinstance(value, Tensor):
                blend = mixed([state[name] for state in states], origin.weights)
                made[name] = scaled(blend, origin.gradient ** self.moments[name])
            else:
                made[name] = value.clone() if isinstance(value, Tensor) else value
        return made


def _rates(gamma: int, rho: int) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(RATES, (gamma, rho))


MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule({"momentum_buffer": 1}, _rates(-1, 1) | {"weight_decay": (1, -1)}),
    Adam: Rule(MOMENTS, _rates(0, 1) | {"weight_decay": (1, -1), "eps": (1, 0)}),
    AdamW: Rule(MOMENTS, _rates(0, 1) | {"weight_decay": (0, -1), "eps": (1, 0)}),
}
DECOUPLED = "decoupled_weight_decay"  # Adam can be told to decay as AdamW does


def checked_optimiser(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """The optimiser itself, out of Fabric's wrapper, if it can be carried over.

    Raises:
        InputError: of another class, or it holds nothing of the model.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
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


def carry_over(optimizer: Optimizer, old: nn.Module, new: nn.Module, origins: Origins) -> None:
    """Puts the new model's parameters where those of the old one were, in place.

    A group is divided where its parameters now need different settings. What the optimiser holds
    besides the old model stays as it is, also its state.

    Args:
        optimizer: as `checked_optimiser` returns it.
        old: the model that it trains.
        new: the model that it will train.
        origins: of every parameter of the new one.
    """
    rule = RULES[type(optimizer)]
    mine = set(old.parameters())
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
    states = {p: _state(rule, optimizer, origin) for p, origin in origins.items()}
    for parameter in mine:
        optimizer.state.pop(parameter, None)
    optimizer.state.update({p: state for p, state in states.items() if state})
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


def _state(rule: Rule, optimizer: Optimizer, origin: Origin) -> dict[str, Any]:
    """Nothing where a source has not been stepped yet."""
    sources = [parameter for parameter, _ in origin.sources]
    if not all(optimizer.state.get(source) for source in sources):
        return {}
    return rule.state([optimizer.state[source] for source in sources], origin)
