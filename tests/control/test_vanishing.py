"""Group norms as control cost: the proximal step in closed form, and layers that vanish exactly."""

import copy
import math

import pytest
import torch
from model_families import CLASSES, FAMILIES, sample
from text_families import BERT, padded, text_model
from torch import Tensor, nn
from vision_families import vision

from deeplimit import (
    InputError,
    ResidualChain,
    SoftCrossEntropy,
    StageCost,
    anatomy,
    crop,
    use_adjoint,
)
from deeplimit.control import control_norms, vanished
from deeplimit.control.control_cost import ProximalStep
from deeplimit.network import CifarResNet
from deeplimit.network.blocks import ConvolutionalResidual, LinearResidual

LOSS = SoftCrossEntropy(CLASSES, 0.1)
R = 0.4


def last_layers(model: nn.Module) -> list[nn.Module]:
    """Of each block of our own networks that keeps the shape, by hand."""
    if isinstance(model, CifarResNet):
        blocks = [b for stage in model.stages for b in stage if hasattr(b, "bn2")]
        return [b.bn2 for b in blocks if b.conv1.stride == (1, 1)]
    found: list[nn.Module] = []
    for chain in [model] if isinstance(model, ResidualChain) else model.stages:
        for block in chain if len(chain) >= chain.scheme.nodes else ():
            if isinstance(block, ConvolutionalResidual):
                normed = len(list(block.norm2.parameters())) > 0
                found.append(block.norm2 if normed else block.conv2)
            else:
                found.append(block if isinstance(block, LinearResidual) else block.outer)
    return found


def shrunk(parameters: list[Tensor], cut: float) -> list[Tensor]:
    """Block soft thresholding, number by number."""
    norm = math.sqrt(sum(v**2 for p in parameters for v in p.flatten().tolist()))
    return [p * max(0.0, 1 - cut / norm) if norm else 0 * p for p in parameters]


def grouped(model: nn.Module, r: float = R) -> StageCost:
    return StageCost(model, LOSS, 0.3, control_cost=r, control_cost_kind="group")


def test_a_group_lasso_is_solved_in_closed_form() -> None:
    """min ½‖θ − b‖² + r Σ_g ‖θ_g‖ has θ_g = b_g max(0, 1 − r/‖b_g‖): some groups are exactly 0."""
    generator = torch.Generator().manual_seed(0)
    b = [torch.randn(3, generator=generator).double() * 0.3**k for k in range(6)]
    theta = [nn.Parameter(torch.ones(3).double()) for _ in b]
    groups = [theta[:2], *([p] for p in theta[2:])]
    optimizer = torch.optim.SGD(theta, lr=0.3)
    optimizer.register_step_post_hook(ProximalStep(optimizer, groups, 0.25))
    for _ in range(120):
        optimizer.zero_grad()
        sum(((p - goal) ** 2).sum() / 2 for p, goal in zip(theta, b, strict=True)).backward()
        optimizer.step()
    solution = shrunk(b[:2], 0.25) + [shrunk([goal], 0.25)[0] for goal in b[2:]]
    for mine, theirs in zip(theta, solution, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=0)
    zeros = [not bool(p.any()) for p in theta]
    assert zeros == [not bool(p.any()) for p in solution]
    assert 0 < sum(zeros) < len(zeros)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "two rates"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_optimisers_and_then_the_naive_one(name: str, optimizer: str) -> None:
    family = sample(name)
    naive = copy.deepcopy(family.model)

    def made(model: nn.Module) -> torch.optim.Optimizer:
        if optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=0.02)
        rates = [0.3, 0.3 if optimizer == "sgd" else 0.9]
        halves = list(model.parameters())[::2], list(model.parameters())[1::2]
        every = [{"params": p, "lr": lr} for p, lr in zip(halves, rates, strict=True)]
        return torch.optim.SGD(every)

    objective, plain = grouped(family.model), StageCost(naive, LOSS, 0.3)
    one, other = made(family.model), made(naive)
    objective.proximal(one)
    before = [[p.detach().clone() for p in m.parameters()] for m in last_layers(naive)]
    for _ in range(2):
        for cost, step in ((objective, one), (plain, other)):
            step.zero_grad()
            for half in (slice(0, 3), slice(3, None)):  # gradients of two batches, accumulated
                cost(family.x[half], family.y[half])[0].backward()
            step.step()
        rates = {p: group["lr"] for group in other.param_groups for p in group["params"]}
        for module in last_layers(naive):
            own = list(module.parameters())
            values = [shrunk(own, R * rates[p])[k] for k, p in enumerate(own)]
            for p, value in zip(own, values, strict=True):
                p.data.copy_(value)
    for (key, mine), theirs in zip(
        family.model.state_dict().items(), naive.state_dict().values(), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12), key
    moved = zip(before, last_layers(naive), strict=True)
    assert all(not torch.equal(ps[0], next(m.parameters())) for ps, m in moved)


def test_a_layer_that_thaws_after_the_hook_was_set_is_charged() -> None:
    family = sample("vector")
    frozen = last_layers(family.model)[1].requires_grad_(requires_grad=False)
    objective = grouped(family.model, 1e3)
    optimizer = torch.optim.SGD(family.model.parameters(), lr=0.05)
    objective.proximal(optimizer)
    for thawed, gone in ((False, [0, 2, 3]), (True, [0, 1, 2, 3])):
        frozen.requires_grad_(thawed)
        optimizer.zero_grad()
        objective(family.x, family.y)[0].backward()
        optimizer.step()
        assert vanished(family.model) == gone


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_shrinks_nothing(*, fused: bool) -> None:
    family = sample("vector")
    objective = grouped(family.model)
    optimizer = torch.optim.AdamW(family.model.parameters(), lr=0.05, fused=fused)
    objective.proximal(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for scale in (math.inf, 1.0):
        before = control_norms(family.model)
        optimizer.zero_grad()
        scaler.scale(scale * objective(family.x, family.y)[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (control_norms(family.model) == before) == math.isinf(scale)


def test_under_the_adjoint_the_step_is_the_same() -> None:
    family = sample("vector")
    for module in family.model.modules():
        if isinstance(module, ResidualChain):
            module.step = 0.02
    plain = copy.deepcopy(family.model)
    for model in (plain, use_adjoint(family.model, evaluations=12)):
        objective = grouped(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        objective.proximal(optimizer)
        for _ in range(2):
            objective(family.x, family.y)[0].backward()
            optimizer.step()
    for mine, theirs in zip(family.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_vanish_exactly_and_go_without_a_difference(name: str) -> None:
    family = sample(name)
    model = family.model.eval()
    assert vanished(model) == []
    norms = control_norms(model)
    assert min(norms) > 0
    gone = [0, 1] if anatomy(model).horizon > 2 else [0]
    heun = any(getattr(m, "scheme", None) and m.scheme.nodes == 2 for m in model.modules())
    ends = last_layers(model)
    silent = {ends[k] for n in gone for k in ((n, n + 1) if heun else (n,))}
    if "three stages" in name and heun:  # every stage has a control more than it has steps
        gone, silent = [0], set(ends[:2])
    with torch.no_grad():
        for module in silent:
            for p in module.parameters():
                p.zero_()
    assert vanished(model) == gone
    smaller = crop(model, remove=vanished(model))
    assert anatomy(smaller).horizon == anatomy(model).horizon - len(gone)
    assert torch.equal(smaller(family.x), model(family.x))
    # A bias, or one control of two, is enough to be there.
    with torch.no_grad():
        next(iter(ends[0].parameters())).flatten()[0] = 1e-30
    assert 0 not in vanished(model)


@pytest.mark.parametrize("name", ["vector", "three stages, group", "CIFAR ResNet"])
def test_norms_are_those_of_the_last_layers(name: str) -> None:
    model = sample(name).model
    squares = [
        sum(float(p.detach().square().sum()) for p in m.parameters()) for m in last_layers(model)
    ]
    known = [norm for norm in control_norms(model) if not math.isnan(norm)]
    assert len(known) == anatomy(model).horizon - 2 * name.startswith("CIFAR")
    assert known == pytest.approx([math.sqrt(s) for s in squares], rel=1e-13)


def test_a_large_cost_makes_all_layers_vanish_and_a_small_one_none() -> None:
    for r, count in ((1e-4, 0), (1e3, 4)):
        family = sample("vector")
        objective = grouped(family.model, r)
        optimizer = torch.optim.AdamW(family.model.parameters(), lr=0.05)
        objective.proximal(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            objective(family.x, family.y)[0].backward()
            optimizer.step()
        assert len(vanished(family.model)) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", BERT])
def test_branches_of_a_transformer_vanish_one_by_one(name: str) -> None:
    model, x = text_model(name), padded(seed=1)
    names = {
        "GPT2LMHeadModel": ("attn.c_proj", "mlp.c_proj"),
        "LlamaForCausalLM": ("self_attn.o_proj", "mlp.down_proj"),
        BERT: ("attention.output.dense", "output.dense"),
    }[name]
    blocks = anatomy(model).blocks
    attention, mlp = (lambda n, k=k: blocks[n].get_submodule(names[k]) for k in (0, 1))
    assert (vanished(model), vanished(model, granularity="branch")) == ([], [])
    with torch.no_grad():
        for module in (attention(0), attention(1), mlp(1), mlp(2)):
            for p in module.parameters():
                p.zero_()
    pairs = vanished(model, granularity="branch")
    # Of a block with norms behind the sums these are left: it is not the identity.
    assert [n for n, _ in pairs] == ([0, 1, 2] if name == BERT else [0, 1, 1, 2])
    assert vanished(model) == ([] if name == BERT else [1])
    smaller = crop(model, remove=pairs, granularity="branch")
    assert torch.equal(smaller(**x).logits, model(**x).logits)
    if name != BERT:
        assert torch.equal(crop(model, remove=[1])(**x).logits, model(**x).logits)
    groups = StageCost(
        model, SoftCrossEntropy(2), control_cost=1.0, control_cost_kind="group"
    )._groups
    every = [
        [f"{which}.{p}" for p, _ in block.get_submodule(which).named_parameters()]
        for block in blocks
        for which in names
    ]
    assert [
        [g.split(".", 4 if name == BERT else 3)[-1] for g in group] for group in groups
    ] == every


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DINOv2", "ResNet, bottleneck", "ConvNeXt", "ConvNeXt V2"])
def test_blocks_of_images_vanish_by_their_last_scale_or_layer(name: str) -> None:
    """A scale of the block's own, a norm, a linear layer."""
    family = vision(name)
    model = family.model.eval()
    block = anatomy(model).blocks[1]
    ends = {
        "DINOv2": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
        "ResNet, bottleneck": ("layer.2.normalization.weight", "layer.2.normalization.bias"),
        "ConvNeXt": ("layer_scale_parameter",),
        "ConvNeXt V2": ("pwconv2.weight", "pwconv2.bias"),
    }[name]
    groups = StageCost(model, LOSS, control_cost=1.0, control_cost_kind="group")._groups
    names = {p: which for which, p in model.named_parameters()}
    own = [names[block.get_parameter(end)] for end in ends]
    assert [which for group in groups for which in group if which in own] == own
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for end in ends:
            before[names[block.get_parameter(end)]] = block.get_parameter(end).zero_().clone()
    assert vanished(model) == [1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    smaller = crop(model, remove=[1])
    assert torch.equal(smaller(family.x).logits, model(family.x).logits)


@pytest.mark.slow
def test_of_a_stage_that_has_vanished_a_layer_stays() -> None:
    family = vision("ResNet, basic")
    model = family.model.eval()
    with torch.no_grad():
        for block in anatomy(model).blocks[:3]:
            for p in block.layer[-1].normalization.parameters():
                p.zero_()
    gone = vanished(model)
    assert gone == [0, 1, 2]
    with pytest.raises(InputError, match=r"all layers 0 … 2 to be removed; .* keeps at least one"):
        crop(model, remove=gone)
    assert torch.equal(crop(model, remove=gone[1:])(family.x).logits, model(family.x).logits)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [("mlp",), ("attention", "mlp")])
def test_a_branch_whose_scale_is_zero_is_called_as_before(gone: tuple[str, ...]) -> None:
    family = vision("DINOv2")
    family.model.config.mlp_ratio = 4  # the MLP has more parameters than attention
    torch.manual_seed(0)
    model = type(family.model)(family.model.config).double().eval()
    block = anatomy(model).blocks[1]
    scales = {"attention": block.layer_scale1.lambda1, "mlp": block.layer_scale2.lambda1}
    with torch.no_grad():
        for name in gone:
            scales[name].zero_()
    pairs = [(1, name) for name in gone]
    assert vanished(model, granularity="branch") == pairs
    for remove in (pairs, pairs[-1:]):
        smaller = crop(model, remove=remove, granularity="branch")
        assert torch.equal(smaller(family.x).logits, model(family.x).logits)
    smaller = crop(model, remove=[(1, "attention")], granularity="branch")
    with torch.no_grad():
        scales["attention"].zero_()
    assert torch.equal(smaller(family.x).logits, model(family.x).logits)


def test_a_block_whose_residual_function_does_not_end_in_its_last_layer_is_refused() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    chain = ResidualChain([Backwards() for _ in range(3)])
    with pytest.raises(InputError, match=r"no last layer is found in Backwards .* another kind"):
        grouped(chain)
    with torch.no_grad():
        for p in chain[1].first.parameters():
            p.zero_()
    assert vanished(chain) == []  # its update is a constant
    assert all(map(math.isnan, control_norms(chain)))


def test_what_would_silently_do_nothing_is_refused() -> None:
    family = sample("vector")
    objective = grouped(family.model)
    with pytest.raises(InputError, match=r"call stage_cost\.proximal\(optimizer\) once"):
        objective(family.x, family.y)
    others = torch.optim.SGD(sample("vector").model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="holds the last layer of no residual branch"):
        objective.proximal(others)

    class Without(torch.optim.Optimizer):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, {})

    with pytest.raises(InputError, match="Without has no learning rate"):
        objective.proximal(Without(family.model.parameters()))
    with pytest.raises(InputError, match="the control cost is squared, which has no proximal step"):
        StageCost(family.model, LOSS, control_cost=1.0).proximal(others)
    with torch.no_grad():
        objective(family.x, family.y)


def test_what_no_optimiser_charges_is_said_before_it_trains() -> None:
    family = sample("vector")
    objective = grouped(family.model)
    blocks = anatomy(family.model).blocks
    one, other = (torch.optim.SGD(half.parameters(), 0.1) for half in (blocks[0], blocks[1]))
    rest = torch.optim.SGD([p for b in blocks[2:] for p in b.parameters()], 0.1)
    objective.proximal(one)
    objective.proximal(rest)
    with pytest.raises(InputError, match=r"no optimiser that it was told of holds .*\.1\."):
        objective(family.x, family.y)
    blocks[1].requires_grad_(requires_grad=False)
    objective(family.x, family.y)
    blocks[1].requires_grad_(requires_grad=True)
    objective.proximal(other)
    objective(family.x, family.y)
