"""What comes in beside a model: targets of other types or alignment, inputs that are no numbers."""

import pytest
import torch
from model_families import sample
from torch import Tensor, nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    StageCost,
    choose_cut,
    crop,
    dissipativity,
    turnpike_profile,
    use_adjoint,
    verify_crop,
)
from deeplimit.control import Distillation, picture_trajectories
from deeplimit.network import anatomy

pytest.importorskip("transformers")
from text_families import VOCABULARY, next_words, padded, text_model, words

LOSS, TEXT_LOSS = SoftCrossEntropy(4, 0.1), SoftCrossEntropy(VOCABULARY, 0.1)
Batch = tuple[dict[str, Tensor] | Tensor, Tensor]


def decoder() -> nn.Module:
    return text_model("LlamaForCausalLM")


def answers(model: nn.Module, batch: Batch, loss: SoftCrossEntropy, **shift: bool) -> str:
    """What every entrance makes of a batch, in full precision; NaN is NaN."""
    profile = turnpike_profile(model, [batch], loss, **shift)
    choice = choose_cut(model, profile, [batch], blocks=2, **shift)
    report = verify_crop(model, crop(model, remove=[1]), [batch], loss, **shift)
    objective = StageCost(model, loss, 0.3, **shift)
    taught = Distillation(model, loss, crop(model, remove=[1]), weight=0.3, **shift)
    with torch.no_grad():
        costs = [float(o(*batch)[0]) for o in (objective, taught)]
    figures = (report.samples, report.accuracy_after, report.loss_before, report.loss_after)
    return repr([profile, choice, figures, dissipativity(objective, [batch]), costs])


def entrances(model: nn.Module, good: Batch, wrong: Batch, loss: SoftCrossEntropy, **shift: bool):
    """Calls of each of them with a wrong batch."""
    profile, smaller = turnpike_profile(model, [good], loss), crop(model, remove=[1])
    objective = StageCost(model, loss, 0.3, **shift)
    return [
        lambda: turnpike_profile(model, [wrong], loss, **shift),
        lambda: choose_cut(model, profile, [wrong], blocks=2, **shift),
        lambda: verify_crop(model, smaller, [wrong], **shift),
        lambda: objective(*wrong),
        lambda: Distillation(model, loss, smaller, **shift)(*wrong),
        lambda: dissipativity(objective, [wrong]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_whole_numbers_of_any_type_are_classes(dtype: torch.dtype) -> None:
    family = sample("vector")
    model = family.model.eval()
    assert answers(model, (family.x, family.y.to(dtype)), LOSS) == answers(
        model, (family.x, family.y), LOSS
    )


@pytest.mark.slow
def test_true_and_false_are_the_classes_one_and_zero() -> None:
    family = sample("vector")
    model, said = family.model.eval(), family.y > 1
    assert answers(model, (family.x, said), LOSS) == answers(model, (family.x, said.long()), LOSS)


def test_a_byte_of_156_is_a_class() -> None:
    """In 8 bits it is −100."""
    z, y = torch.randn(2, 200, generator=torch.manual_seed(0)), torch.tensor([156, 3])
    loss = SoftCrossEntropy(200)
    assert torch.equal(loss.fitted(z, y.to(torch.uint8)), y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "padding"), [("GPT2LMHeadModel", False), ("LlamaForCausalLM", True)]
)
def test_targets_that_are_the_inputs_are_shifted_where_that_is_said(
    name: str, padding: bool
) -> None:
    model = text_model(name)
    inputs = padded() if padding else {"input_ids": words(3, 7, 1)}
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    by_hand = next_words({"input_ids": ids, "attention_mask": mask})
    assert answers(model, (inputs, ids), TEXT_LOSS, shift=True) == answers(
        model, (inputs, by_hand), TEXT_LOSS
    )
    for call in entrances(model, (inputs, by_hand), (inputs, ids), TEXT_LOSS):
        with pytest.raises(InputError, match=r"inputs themselves.*give shift=True, or shift them"):
            call()
    for call in entrances(model, (inputs, by_hand), (inputs, by_hand), TEXT_LOSS, shift=True):
        with pytest.raises(InputError, match="each target is the next input already"):
            call()


@pytest.mark.slow
def test_padding_in_front_is_predicted_by_nothing() -> None:
    ids, mask = words(2, 6, 1), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    by_hand = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    by_hand[0, :3] = -100
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert turnpike_profile(decoder(), [(inputs, ids)], TEXT_LOSS, shift=True) == (
        turnpike_profile(decoder(), [(inputs, by_hand)], TEXT_LOSS)
    )


@pytest.mark.slow
def test_what_is_no_mistake_is_taken() -> None:
    """Hidden words of a text, the same word on and on, a few that happen to be said twice."""
    model, ids = decoder(), words(3, 7, 1)
    hidden = torch.full_like(ids, -100)
    hidden[:, ::2] = ids[:, ::2]
    covered = ids.clone()
    covered[:, ::2] = 3
    covered[0, 0] = ids[0, 0]  # some are left as they were
    few = torch.full_like(ids, -100)
    few[0] = ids[0]
    alike = torch.full_like(ids, 5)
    for batch in ((covered, hidden), (ids, few), (alike, alike)):
        assert turnpike_profile(model, [batch], TEXT_LOSS).samples == int((batch[1] != -100).sum())
        StageCost(model, TEXT_LOSS)(*batch)


def test_shift_is_of_tokens() -> None:
    family = sample("vector")
    batch = (family.x, family.y)
    for call in entrances(family.model.eval(), batch, batch, LOSS, shift=True):
        with pytest.raises(InputError, match="has no logits for every token: leave it out"):
            call()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_named(wrong: float) -> None:
    family = sample("three stages, batch")
    x = family.x.clone()
    x[2, 1, 0, 3] = wrong
    good = (family.x, family.y)
    calls = entrances(family.model.eval(), good, (x, family.y), LOSS)
    calls.append(lambda: picture_trajectories(family.model, [(x, family.y)], LOSS))
    for call in calls:
        with pytest.raises(InputError, match=r"x\[2, 1, 0, 3\] is (nan|inf), and so are 0 more"):
            call()


def test_a_network_that_diverged_is_not_the_inputs_fault() -> None:
    family = sample("vector")
    with torch.no_grad():
        next(family.model.parameters()).fill_(torch.nan)
        cost, _ = StageCost(family.model, LOSS)(family.x, family.y)
    assert bool(cost.isnan())
    profile = turnpike_profile(family.model, [(family.x, family.y)], LOSS)
    assert profile.loss[-1] != profile.loss[-1]


def test_an_input_that_the_model_does_without_may_be_none() -> None:
    class Imputed(type(sample("chain").model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num(0.0))

    family = sample("chain")
    family.model.__class__ = Imputed
    x = family.x.clone()
    x[1] = torch.nan
    assert anatomy(family.model).horizon == family.depth
    cost, _ = StageCost(family.model, LOSS, 0.0)(x, family.y)
    assert bool(cost.isfinite())


@pytest.mark.slow
@pytest.mark.parametrize("switched", [False, True])
def test_a_compiled_objective_is_the_objective(switched: bool) -> None:
    torch._dynamo.reset()
    family = sample("three stages, batch")
    model = family.model.eval()
    if switched:
        use_adjoint(model, on_drift="ignore")
    taught = Distillation(model, LOSS, model, weight=0.3).eval()
    for objective in (StageCost(model, LOSS, 0.3), taught):
        parameters = list(objective.model.parameters())
        for _ in range(1 + switched):  # the adjoint's first pass finds out about the blocks
            cost, logits = objective(family.x, family.y)
            expected = torch.autograd.grad(cost, parameters)
        compiled = torch.compile(objective, backend="aot_eager")
        again, same = compiled(family.x, family.y)
        assert (float(again.detach()), True) == (float(cost.detach()), torch.equal(same, logits))
        mine = torch.autograd.grad(again, parameters)
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
