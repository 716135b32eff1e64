"""The gap of whole models: stages of ours and of others, and what is left of the model after it."""

import copy
from functools import partial

import pytest
import torch
from gap_models import assert_bounds_hold, cifar, classifier, images, rough_chain
from naive_ode import NaiveODE, Phi, added, plain
from text_families import padded, text_model
from torch import Tensor, nn
from vision_families import vision

from deeplimit import use_adjoint
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.ode import discretization_gap
from deeplimit.ode.field import longest_stage, stages

pytestmark = pytest.mark.slow


def text_phi(model: nn.Module, inputs: dict[str, Tensor]) -> Phi:
    """A block of a GPT-2 or Llama called by hand."""
    seen, backbone = inputs["attention_mask"].bool(), getattr(model, model.base_model_prefix)
    length = seen.shape[1]
    allowed = seen[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    more = {"attention_mask": mask}
    if model.config.model_type == "llama":
        like = torch.zeros(1, 1, 1, dtype=torch.float64)
        more["position_embeddings"] = backbone.rotary_emb(like, torch.arange(length)[None])
    return lambda block, x: added(partial(block, **more), x)  # type: ignore[arg-type]


def given(name: str) -> tuple[nn.Module, Inputs, Phi]:
    """A model, its input and its φ."""
    if name in ("ViT", "DINOv2"):
        made = vision(name)
        return made.model.eval(), made.x, added
    if name == "CIFAR ResNet":
        return cifar(), images(side=4), added
    if name.startswith("classifier"):
        return classifier(*name.split(", ")[1:]), images(), plain
    inputs = padded()
    model = text_model(name)
    return model, inputs, text_phi(model, inputs)


MODELS = [
    "classifier, batch",
    "classifier, group",
    "classifier, none",
    "classifier, batch, heun",
    "CIFAR ResNet",
    "ViT",
    "DINOv2",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
]


@pytest.mark.parametrize("name", MODELS)
def test_gap_by_scipy_and_bounds(name: str):
    model, x, phi = given(name)
    found = discretization_gap(model, x)
    stage = longest_stage(model)
    states: list[Tensor] = []
    with torch.no_grad():
        first = stage.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        model(**x) if isinstance(x, dict) else model(x)
        first.remove()
        del states[1:]
        for n in range(stage.horizon):
            blocks = [partial(phi, b) for b in stage.blocks[n : n + stage.scheme.nodes]]
            states.append(stage.scheme.step(blocks, states[-1], stage.step))
    # Llama normalises in float32, and ReLU has kinks: there no finer tolerance makes sense.
    rtol = 1e-6 if name in ("LlamaForCausalLM", "CIFAR ResNet") else 1e-9
    naive = NaiveODE(stage.blocks, stage.step, linear=True, phi=phi).gaps(states, rtol=rtol)
    assert found.gap == pytest.approx(naive.amax(1).tolist(), abs=found.solver_error, rel=0)
    assert (found.stage, found.horizon) == (stage.index, stage.horizon)
    assert found.samples == len(states[0])
    if found.scheme == "euler":
        assert_bounds_hold(found)
        assert found.lipschitz_residual < 1e-3


def test_running_statistics_are_part_of_the_function():
    """A stage whose blocks differ in nothing else; ‖x″‖ at the first node by differences."""
    model = classifier()
    stage = stages(model)[0]
    same = copy.deepcopy(stage.blocks[0].state_dict())
    for block in stage.blocks:
        statistics = {k: v.clone() for k, v in block.state_dict().items() if "running" in k}
        block.load_state_dict({**same, **statistics})
    found = discretization_gap(model, images(), stage=stage.index)
    naive = NaiveODE(stage.blocks, stage.step, linear=True)
    states: list[Tensor] = []
    with (
        torch.no_grad(),
        model.stages[stage.index].register_state_hook(lambda _, x: states.append(x)),
    ):
        model(images())
    assert found.gap == pytest.approx(naive.gaps(states).amax(1).tolist(), abs=found.solver_error)
    constant = discretization_gap(model, images(), stage=stage.index, interpolation="constant")
    assert max(constant.gap) != pytest.approx(max(found.gap), rel=0.01)
    start = naive.acceleration(0, 0.0, states[0])
    assert found.acceleration[0] >= float(start.max()) * (1 - 1e-6)
    flat = NaiveODE(stage.blocks, stage.step, linear=False).acceleration(0, 0.0, states[0])
    assert float(flat.max()) != pytest.approx(float(start.max()), rel=0.01)


@pytest.mark.parametrize("make", [cifar, rough_chain])
def test_the_model_is_left_as_it_was(make: object):
    model = make().float()  # type: ignore[operator]
    x = images(side=4).float() if make is cifar else torch.randn(4, 3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(x.clone()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random, kept = torch.get_rng_state(), x.clone()
    discretization_gap(model, x)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert counts == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("make", [cifar, rough_chain])
def test_the_adjoint_makes_no_difference(make: object):
    model = make()  # type: ignore[operator]
    x = images(side=4) if make is cifar else torch.randn(4, 3)
    plain_gap = discretization_gap(model, x)
    use_adjoint(model, on_drift="ignore")
    assert discretization_gap(model, x) == plain_gap


def test_single_precision_is_computed_in_double():
    """The float32 model is the same function in float64: figures to all digits."""
    model = rough_chain().float()
    x = torch.randn(4, 3)
    assert discretization_gap(model, x) == discretization_gap(model.double(), x.double())


def test_a_batch_is_its_samples():
    model, x = classifier(), images(3)
    whole = discretization_gap(model, x, bound=False)
    each = [discretization_gap(model, x[i : i + 1], bound=False) for i in range(3)]
    near = whole.solver_error + max(g.solver_error for g in each)
    worst = [max(values) for values in zip(*(g.gap for g in each), strict=True)]
    mean = [sum(values) / 3 for values in zip(*(g.gap for g in each), strict=True)]
    assert whole.gap == pytest.approx(worst, abs=near)
    assert whole.mean_gap == pytest.approx(mean, abs=near)
    assert whole.bound is whole.lipschitz is whole.acceleration is None
