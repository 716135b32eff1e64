"""Unmodified transformers models from their configurations, against plain backpropagation."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from adjoint_references import exact_gradients, gradients, relative_error
from torch import nn

from deeplimit import drift, gradient_error, plan_memory, use_adjoint, use_backprop
from deeplimit.gradient import DriftWarning, layout
from deeplimit.gradient.meter import SAFETY

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3}
RESIDUAL_ENDS = ("c_proj", "o_proj", "down_proj", "fc2", "output.dense", "layer_norm2")


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=4, n_head=2, **TEXT)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    layers = {"num_hidden_layers": 4, "num_key_value_heads": 1, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SMALL, **layers))


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, **IMAGE, num_hidden_layers=4, intermediate_size=24)
    return transformers.ViTForImageClassification(config)


def _dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        **SMALL, **IMAGE, num_hidden_layers=4, mlp_ratio=2, layerscale_value=0.2
    )
    return transformers.Dinov2ForImageClassification(config)


def _convnext() -> nn.Module:
    # The layer scale of 1e-6 at the start would make every block the identity.
    config = transformers.ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[3, 3],
        patch_size=2,
        num_labels=3,
        layer_scale_init_value=0.3,
    )
    return transformers.ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, **TEXT, num_hidden_layers=3, intermediate_size=24)
    return transformers.BertForSequenceClassification(config)


# name: how it is made, how many of its blocks are under the adjoint
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "GPT-2": (_gpt2, 4),
    "Llama": (_llama, 4),
    "ViT": (_vit, 4),
    "DINOv2": (_dinov2, 4),
    "ConvNeXt": (_convnext, 6),
    "ResNet": (_resnet, 5),
}


def made(make: Callable[[], nn.Module], contracting: bool = True) -> nn.Module:
    """In float64 and training mode; residual branches scaled down so that they contract."""
    torch.manual_seed(0)
    model = make().double().train()
    if contracting:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                module = name.rpartition(".")[0]
                # In a ResNet's block the last batch norm ends the residual branch.
                if module.endswith(RESIDUAL_ENDS) or ".layer.1.normalization" in name:
                    parameter.mul_(0.3)
    return model


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tokens or images with their labels."""
    generator = torch.Generator().manual_seed(1)
    if not hasattr(model.config, "vocab_size"):
        size = min(getattr(model.config, "image_size", 16), 16)
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    labels = torch.tensor([0, 1]) if model.config.model_type == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss."""
    return model(**batch).loss


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_same_and_the_reported_error_is_the_error(name: str) -> None:
    make, rebuilt = MODELS[name]
    model = made(make)
    batch = batch_for(model)
    loss, exact = exact_gradients(model, batch, loss_of)
    errors = []
    for evaluations in (1, 2, 3, 4):
        use_adjoint(model, evaluations=evaluations, on_drift="ignore")
        gradients(model, batch, loss_of)  # where blocks hold a Sequential this tells which to take
        loss_now, found = gradients(model, batch, loss_of)
        assert abs(float(loss_now - loss)) <= 1e-12
        errors.append(relative_error(found, exact))
        largest = drift(model)
        torch.manual_seed(0)
        accuracy = gradient_error(model, loss_of, batch)
        assert accuracy.error == pytest.approx(errors[-1], rel=1e-6, abs=1e-13)
        assert accuracy.drift == pytest.approx(largest, rel=1e-6)
        assert errors[-1] <= SAFETY * largest
    assert len(layout(model).rebuilt) == rebuilt
    assert 1e-9 < errors[0] < 0.5  # states were rebuilt, and are not exact
    if name == "ResNet":  # a ReLU after the addition: no evaluations help, and that is known
        assert errors[3] > 0.05
        assert accuracy.drift > 0.05
    else:
        assert errors[3] < errors[1] / 10  # two more evaluations
        assert errors[3] < 2e-3


def test_a_network_that_cannot_be_inverted_warns() -> None:
    model = made(_resnet)
    batch = batch_for(model)
    use_adjoint(model, evaluations=4)
    gradients(model, batch, loss_of)
    with pytest.warns(DriftWarning, match=r"drift .* at resnet\.encoder.*plan_memory"):
        gradients(model, batch, loss_of)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "ViT", "ResNet"])
def test_states_that_were_planned_keep_the_tolerance(name: str) -> None:
    model = made(MODELS[name][0], contracting=name != "ViT")
    batch = batch_for(model)
    _, exact = exact_gradients(model, batch, loss_of)
    use_adjoint(model, evaluations=1, on_drift="ignore")
    torch.manual_seed(0)
    plan = plan_memory(model, loss_of, batch, 1e-3)
    assert gradient_error(model, loss_of, batch).error > 1e-3
    assert plan.ways
    use_adjoint(model, plan=plan, on_drift="ignore")
    _, found = gradients(model, batch, loss_of)
    assert relative_error(found, exact) == pytest.approx(plan.error, rel=1e-6, abs=1e-13)
    assert plan.error <= 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_keys_stay_and_backprop_leaves_nothing_behind(name: str) -> None:
    model = made(MODELS[name][0])
    batch = batch_for(model)
    keys = list(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    _, exact = exact_gradients(model, batch, loss_of)
    use_adjoint(model, on_drift="ignore")
    assert list(model.state_dict()) == keys
    gradients(model, batch, loss_of)
    assert list(model.state_dict()) == keys
    use_backprop(model)
    assert list(model.state_dict()) == keys
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [type(m) for m in model.modules()] == classes
    statistics_moved = copy.deepcopy(model)  # by one step more than in the reference
    _, found = gradients(statistics_moved, batch, loss_of)
    assert relative_error(found, exact) == 0.0


def test_post_norm_model_stays_plain_and_says_so() -> None:
    model = made(_bert)
    batch = batch_for(model)
    _, exact = exact_gradients(model, batch, loss_of)
    use_adjoint(model)
    with pytest.warns(DriftWarning, match=r"no state will be rebuilt: bert\.encoder\.layer\.0"):
        _, found = gradients(model, batch, loss_of)
    assert relative_error(found, exact) == 0.0
    assert layout(model).rebuilt == ()
    reasons = layout(model).plain
    assert list(reasons) == [f"bert.encoder.layer.{n}" for n in range(3)]
    assert all("does not add its input to its output" in reason for reason in reasons.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found = gradients(model, batch, loss_of)  # said once
    assert relative_error(found, exact) == 0.0


def test_blocks_that_are_named_are_those_that_are_rebuilt() -> None:
    model = made(_gpt2)
    batch = batch_for(model)
    _, exact = exact_gradients(model, batch, loss_of)
    named = ("transformer.h.0", "transformer.h.1", "transformer.h.2")
    use_adjoint(model, blocks=named, on_drift="ignore")
    _, found = gradients(model, batch, loss_of)
    assert layout(model).rebuilt == named
    assert layout(model).plain == {}
    assert 0 < relative_error(found, exact) < 1e-3


@pytest.mark.slow
def test_encoder_and_decoder_are_two_chains() -> None:
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter.mul_(0.1)
    batch = batch_for(model) | {"use_cache": False}
    _, exact = exact_gradients(model, batch, loss_of)
    use_adjoint(model, evaluations=6, on_drift="ignore")
    _, found = gradients(model, batch, loss_of)
    assert len(layout(model).rebuilt) == 3 * (2 + 3)  # its sublayers are the residual blocks
    assert 0 < relative_error(found, exact) < 1e-4
