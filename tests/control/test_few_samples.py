"""Few samples, or none: the fewer there are, the less is cut, and a line says what is missing."""

import json
from dataclasses import replace

import pytest
import torch
from model_families import CLASSES, sample
from profiles import profile
from torch import nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    choose_cut,
    crop,
    every_depth,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control import layers_to_remove, picture_trajectories, verifying
from deeplimit.control.batches import aligned
from deeplimit.control.verdict import judge, loss_bounds
from deeplimit.errors import several
from deeplimit.network import Architecture, anatomy
from deeplimit.ode import solver_accuracies
from deeplimit.records import to_plain
from deeplimit.report.answer import data_sentence
from deeplimit.training.results import Parts

LOSS = SoftCrossEntropy(CLASSES, 0.05)
FEW = 11  # samples: of fewer no cut is chosen


@pytest.fixture
def model() -> nn.Module:
    """A network whose first answers, of the stem alone, are as good as its last."""
    return sample("vector").model.eval()


@pytest.fixture
def idle() -> nn.Module:
    """A network whose layers do nothing."""
    return Architecture("vector", (6,), CLASSES, (4,), width=5, hidden=5).build().double().eval()


def improving(model: nn.Module, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Samples whose targets are what the network without its layers answers: cut, it is better."""
    x = torch.randn(count, 6, generator=torch.manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        y = crop(model, 0)(x).argmax(1)
    return [(x, y)]


@pytest.mark.parametrize("count", [1, 2, 4, 2 * FEW - 2])
def test_too_few_samples_cut_nothing(model: nn.Module, count: int) -> None:
    data = improving(model, count)
    made = turnpike_profile(model, data, LOSS)
    chosen = choose_cut(model, made, data, accuracy=0.02)
    assert chosen.samples < FEW
    assert chosen.removed == ()
    assert chosen.needed == 133
    assert chosen.accuracy_error == 0
    json.dumps(to_plain([chosen, made]), allow_nan=False)
    samples = "1 sample" if chosen.samples == 1 else f"{chosen.samples} samples"
    assert str(chosen) == (
        f"no layer is removed: the network stays the same; accuracy "
        f"{100 * chosen.accuracy_before:.2f} % of {samples}; so few cannot exclude a loss of "
        "2 points at 95 %, 133 could"
    )
    assert choose_cut(model, made, data, accuracy=0.0).needed == FEW


def test_enough_samples_cut(idle: nn.Module) -> None:
    data = improving(idle, 2 * FEW)
    made = turnpike_profile(idle, data, LOSS)
    assert len(choose_cut(idle, made, data, accuracy=0.02).removed) == 4


def test_the_least_number_is_where_a_loss_of_a_fifth_can_be_excluded() -> None:
    assert loss_bounds(FEW, 0, 0)[1] <= 0.2 < loss_bounds(FEW - 1, 0, 0)[1]


def test_a_profile_of_too_few_samples_recommends_the_full_depth(idle: nn.Module) -> None:
    for count, depth in ((FEW - 1, 4), (FEW, 0)):
        made = turnpike_profile(idle, improving(idle, count), LOSS)
        assert made.recommended_depth == depth
        assert len(layers_to_remove(made)) == 4 - depth
    arc = profile([9.0, 0.5, 0.4, 8.0], accuracy=[0.1, 0.8, 0.8, 0.99])
    assert layers_to_remove(arc) == range(1, 2)
    assert len(layers_to_remove(replace(arc, samples=FEW - 1))) == 0


def test_batches_without_a_sample_are_not_told_as_targets_that_count_nowhere(
    model: nn.Module,
) -> None:
    x, y = improving(model, 12)[0]
    empty, none = [(x[:0], y[:0])], [(x, torch.full_like(y, -100))]
    made, smaller = turnpike_profile(model, [(x, y)], LOSS), crop(model, 2)
    calls = {
        "a profile needs": lambda data: turnpike_profile(model, data, LOSS),
        "a crop is verified on": lambda data: verify_crop(model, smaller, data),
        "a cut is chosen on": lambda data: choose_cut(model, made, data, blocks=2),
    }
    for what, call in calls.items():
        for data, why in (
            (empty, "the loader gave batches without a sample"),
            (none, "every target is −100"),
            ([], "the loader gave no batch"),
        ):
            with pytest.raises(InputError, match=f"^{why}; {what} at least one sample"):
                call(data)
    for call in (picture_trajectories, lambda m, data, _: solver_accuracies(m, data, [])):
        with pytest.raises(InputError, match="gave batches without a sample"):
            call(model, empty, LOSS)
    assert repr(turnpike_profile(model, [*empty, (x, y), *empty], LOSS)) == repr(made)
    assert choose_cut(model, made, [*empty, (x, y)], blocks=2).samples == 6
    assert every_depth(model, [*empty, (x, y)], LOSS).costs.latency_batch == len(y)


def test_single_samples_are_no_batches(model: nn.Module) -> None:
    x, y = improving(model, 12)[0]
    with pytest.raises(InputError, match=r"gives single samples; .* batch_size=64\)"):
        turnpike_profile(model, list(zip(x, y, strict=True)), LOSS)


def test_targets_that_are_no_tensor_are_told_in_one_line_everywhere(model: nn.Module) -> None:
    x, y = improving(model, 12)[0]
    made, wrong = turnpike_profile(model, [(x, y)], LOSS), y.numpy()

    class Data:
        def __iter__(self):
            return iter([(x, wrong)])

    for call in (
        lambda: aligned(anatomy(model), x, wrong, shift=False),  # as StageCost does
        lambda: turnpike_profile(model, Data(), LOSS),
        lambda: verify_crop(model, crop(model, 2), Data()),
        lambda: choose_cut(model, made, Data(), blocks=2),
    ):
        with pytest.raises(InputError) as told:
            call()
        assert str(told.value) == (
            "a ndarray given as the targets; expected a tensor: torch.as_tensor(y)"
        )


@pytest.mark.slow
def test_networks_that_are_alike_take_the_same_time(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    measure = verifying.latencies

    def counted(runs, x):
        timed.append(len(runs))
        return measure(runs, x)

    monkeypatch.setattr(verifying, "latencies", counted)
    data = improving(model, 12)
    same = verify_crop(model, crop(model, 4), data)
    smaller = verify_crop(model, crop(model, 2), data)
    assert same.latency_before == same.latency_after > 0
    assert smaller.latency_before != smaller.latency_after
    assert timed == [1, 2]


def test_one_is_singular() -> None:
    one = judge(tolerance=0.01, samples=1, lost=1, gained=0, right=1, largest=1, right_in_largest=1)
    assert str(one).startswith("Nothing learnt: on 1 sample the network before is right for 100")
    counted = [several(1, "point"), several(1.0, "point"), several(0.5, "point")]
    assert counted == ["1 point", "1 point", "0.5 points"]
    assert several(1203, "batch", "batches") == "1,203 batches"
    assert several(100 * 0.01, "point") == "1 point"
    assert data_sentence(Parts(1, 1, 1)) == (
        "The networks were trained on 1 sample, chosen on 1 (validation) and judged on 1 other "
        "(test)."
    )
