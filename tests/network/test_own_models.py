"""Models written by somebody else, with habits of their own: read right, or refused in words."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    StageCost,
    crop,
    discretization_gap,
    turnpike_profile,
)
from deeplimit.control import Fading
from deeplimit.network import BlockAnatomy, anatomy, register
from deeplimit.network.anatomy.registry import FAMILIES


class Step(nn.Module):
    def __init__(self, habit: str) -> None:
        super().__init__()
        self.linear, self.habit = nn.Linear(5, 5), habit

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        if self.habit == "in place":
            x += self.linear(torch.relu(x))
            return x
        if self.habit == "relu in place":
            return x + self.linear(nn.functional.relu(x, inplace=True))
        y = x + self.linear(torch.relu(x))
        return (y, None) if self.habit == "tuple" else y


class Own(nn.Module):
    def __init__(self, habit: str = "", names: Sequence[str] = "01234") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.habit = habit
        self.stem, self.end = nn.Linear(4, 5), nn.Linear(5, 3)
        self.body = nn.Sequential(OrderedDict((name, Step(habit)) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.body:
            x, *_ = step(x) if self.habit == "tuple" else (step(x),)
        z = self.end(torch.tanh(x))
        return z / 0 * 0 if self.habit == "nan" else z


class OwnAnatomy(BlockAnatomy):
    model: Own

    @property
    def containers(self) -> Sequence[nn.Module]:
        body = self.model.body
        return [{"slice": body[:-1], "list": list(body)}.get(self.model.habit, body)]

    def head(self, x: Tensor) -> Tensor:
        if self.model.habit == "nan":
            return torch.full((len(x), 3), torch.nan)
        return self.model.end(x if self.model.habit == "wrong head" else torch.tanh(x))

    def example(self) -> Tensor | None:
        return torch.linspace(-2, 2, 24).reshape(6, 4)


class Unchecked(OwnAnatomy):
    def example(self) -> None:
        return None


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(Own)(OwnAnatomy)
    yield
    del FAMILIES[Own]


X, Y = torch.linspace(-1, 1, 32).reshape(8, 4).sin(), torch.arange(8) % 3


@pytest.mark.parametrize("habit", ["in place", "relu in place"])
def test_a_state_that_is_written_over_is_not_taken_for_another(habit: str) -> None:
    says = "layer 0 of Own changes its input in place, which loses state 0; write x = x"
    with pytest.raises(InputError, match=says):
        anatomy(Own(habit))
    register(Own)(Unchecked)
    for measure in (
        lambda: turnpike_profile(Own(habit), [(X, Y)], SoftCrossEntropy(3)),
        lambda: StageCost(Own(habit), SoftCrossEntropy(3))(X, Y),
    ):
        with pytest.raises(InputError, match=says):
            measure()


@pytest.mark.parametrize("habit", ["slice", "list"])
def test_lists_of_blocks_are_the_models_own(habit: str) -> None:
    with pytest.raises(InputError, match="no part of the model, such as a slice; give the model's"):
        anatomy(Own(habit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_is_not_the_models_is_refused_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="logits of its last state differ from the model's own by"):
        anatomy(Own("wrong head").to(dtype))
    assert anatomy(Own().to(dtype)).horizon == 5


def test_the_example_goes_where_the_model_is() -> None:
    """As in the docs it is of single precision; a copy in double precision is what is measured."""
    model = Own().eval()
    with torch.no_grad():
        cost, logits = StageCost(model.double(), SoftCrossEntropy(3), 0.0)(X.double(), Y)
    assert torch.equal(logits, model(X.double()))
    assert float(cost) == pytest.approx(float(SoftCrossEntropy(3).mean(logits, Y)), rel=1e-14)
    gap = discretization_gap(model.float(), X, bound=False)
    assert anatomy(Own().to("meta")).horizon == 5
    register(Own)(Unchecked)
    assert discretization_gap(model, X, bound=False) == gap
    assert gap.gap[0] == 0 < gap.gap[1]


def test_logits_that_are_not_numbers_agree_with_nothing() -> None:
    with pytest.raises(InputError, match="differ from the model's own by nan"):
        anatomy(Own("nan"))


@pytest.mark.parametrize("first", [False, True])
def test_blocks_that_return_more_than_a_state_fade_to_nothing(first: bool) -> None:
    model = Own("tuple").eval()
    with Fading(model, [1, 3]) as fade:
        for step in (0.0,) if first else (0.5, 0.0):
            fade.set_step(step)
            faded = model(X)
        assert torch.equal(faded, crop(model, remove=[1, 3])(X))


@pytest.mark.parametrize(
    ("names", "removed", "left"),
    [
        (("block1", "block2", "block3"), [], ["block1", "block2", "block3"]),
        (("block1", "block2", "block3"), [0], ["block1", "block2"]),
        (("first", "second", "third"), [1], ["first", "third"]),
        (("0", "1", "2"), [0], ["0", "1"]),
    ],
)
def test_the_names_of_blocks_count_on(names, removed, left) -> None:
    model = Own(names=names)
    cut = crop(model, remove=removed)
    assert [name for name, _ in cut.body.named_children()] == left
    Own(names=left).load_state_dict(cut.state_dict())
    kept = [block for n, block in enumerate(model.body) if n not in removed]
    for mine, theirs in zip(cut.body, kept, strict=True):
        assert torch.equal(mine.linear.weight, theirs.linear.weight)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("block1", "block2"), ["block1", "block2", "block3", "block4"]),
        (("first", "second"), ["first", "first_1", "second", "second_1"]),
    ],
)
def test_a_block_that_is_there_twice_has_a_name_of_its_own(names, left) -> None:
    model = Own(names=names)
    deeper = anatomy(model).repeated([2, 2])
    assert [name for name, _ in deeper.body.named_children()] == left
    for n, block in enumerate(deeper.body):
        assert torch.equal(block.linear.weight, model.body[n // 2].linear.weight)
