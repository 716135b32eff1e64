"""Models written by somebody else, with habits of their own: read right, or refused in words."""

from collections.abc import Callable

import pytest
import torch
from own_models import Own, Step, X, Y
from torch import Tensor, nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    StageCost,
    at_depth,
    crop,
    discretization_gap,
    turnpike_profile,
)
from deeplimit.control import Fading
from deeplimit.network import anatomy


@pytest.mark.parametrize("habit", ["in place", "relu in place"])
def test_a_state_that_is_written_over_is_not_taken_for_another(habit: str) -> None:
    says = "layer 0 of Own changes its input in place, which loses state 0; write x = x"
    for reading in (
        lambda: anatomy(Own(habit)),
        lambda: turnpike_profile(Own(habit), [(X, Y)], SoftCrossEntropy(3)),
        lambda: StageCost(Own(habit), SoftCrossEntropy(3))(X, Y),
    ):
        with pytest.raises(InputError, match=says):
            reading()


@pytest.mark.parametrize("habit", ["slice", "list"])
def test_the_blocks_are_those_that_the_forward_calls(habit: str) -> None:
    """A list made anew in every forward; what is left of it stands in the model's own."""
    model = Own(habit).eval()
    blocks = list(model.body)[:-1] if habit == "slice" else list(model.body)[1:]
    structure = anatomy(model)
    assert structure.blocks == tuple(blocks)
    states, logits = structure.states(X)
    walk = [model.stem(X)]
    for block in blocks:
        walk.append(block(walk[-1]))
    assert all(map(torch.equal, states, walk))
    assert torch.equal(logits, model(X))
    cut = crop(model, remove=[1])
    assert len(cut.body) == 4
    expected = walk[1]
    for block in blocks[2:]:
        expected = block(expected)
    assert torch.equal(cut(X), model.end(torch.tanh(expected)))


@pytest.mark.parametrize("habit", ["", "tuple"])
def test_states_and_logits_are_those_of_a_walk_by_hand(habit: str) -> None:
    model = Own(habit).double().eval()
    states, logits = anatomy(model).states(X.double())
    state = model.stem(X.double())
    z = anatomy(model).logits(states)
    assert len(states) == len(z) == 6
    for n, block in enumerate([*model.body, None]):
        assert torch.equal(states[n], state)
        torch.testing.assert_close(z[n], model.end(torch.tanh(state)), rtol=1e-14, atol=1e-14)
        if block is not None:
            state = state + block.linear(torch.relu(state))
    assert torch.equal(logits, model.end(torch.tanh(state)))


@pytest.mark.slow
def test_the_example_goes_where_the_model_is() -> None:
    """One of single precision; a copy in double precision is what is measured."""
    model = Own().eval()
    double = anatomy(model.double(), example=X)
    with torch.no_grad():
        cost, logits = StageCost(double, SoftCrossEntropy(3), 0.0)(X.double(), Y)
    assert torch.equal(logits, model(X.double()))
    assert float(cost) == pytest.approx(float(SoftCrossEntropy(3).mean(logits, Y)), rel=1e-14)
    gap = discretization_gap(model.float(), X, bound=False)
    assert gap.gap[0] == 0 < gap.gap[1]


@pytest.mark.parametrize("habit", ["", "tuple", "input"])
def test_a_model_without_values_has_its_horizon_read(habit: str) -> None:
    structure = anatomy(Own(habit).to("meta"))
    assert structure.horizon == 5
    assert structure.state_stages == (0,) * 6
    assert [name for name, _ in crop(structure, 3).body.named_children()] == ["0", "1", "2"]


def test_a_state_that_is_the_second_output_is_refused() -> None:
    says = r"Step of Own returns its state as output 1; expected it first: return \(state, …\)"
    with pytest.raises(InputError, match=says):
        anatomy(Own("second"))


class Keywords(nn.Module):
    """Blocks that are called by keywords, and answer with tensors by name."""

    def __init__(self, first: str, answer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.answer = first, answer
        self.body, self.end = nn.ModuleList(Keyed(answer) for _ in range(4)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linspace(0.5, 1.5, len(x))[:, None].expand_as(x)
        for block in self.body:
            given = {"scale": scale, "state": x}
            x = block(**{name: given[name] for name in sorted(given, key=self.first.__ne__)})
            x = x["state"]
        return self.end(x)


class Keyed(Step):
    def __init__(self, answer: str) -> None:
        super().__init__(answer)

    def forward(self, *, state: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = state + scale * self.linear(state)
        return {"scale": scale, "state": y} if self.habit == "scale" else {"state": y}


@pytest.mark.parametrize(
    ("first", "answer", "says"),
    [
        ("scale", "state", r"takes the state of Keyed as another argument than its first"),
        ("state", "scale", r"Keyed of Keywords returns its state as output 1; expected it first"),
    ],
)
def test_a_state_that_is_not_the_first_argument_is_refused(
    first: str, answer: str, says: str
) -> None:
    """Though what is first has its shape."""
    x = torch.linspace(-1, 1, 30).reshape(6, 5).sin()
    with pytest.raises(InputError, match=says):
        anatomy(Keywords(first, answer))
    model = Keywords("state", "state").eval()
    structure = anatomy(model)
    states, logits = structure.states(x)
    assert torch.equal(states[0], x)
    assert torch.equal(logits, model(x))
    torch.testing.assert_close(structure.logits(states), model.end(torch.stack(states)))


def test_a_loss_that_each_block_gives_beside_its_state_is_that_of_the_layers_that_run() -> None:
    class Weighed(Step):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.linear(x).square().mean()

    class Mixture(Own):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h, paid = self.stem(x), torch.zeros(())
            for step in self.body:
                h, more = step(h)
                paid = paid + more
            return self.end(h), paid

    model = Mixture().eval()
    model.body = nn.Sequential(*(Weighed("") for _ in range(5)))
    for depth in (1, 3):
        z, paid = crop(model, depth)(X)
        with at_depth(model, depth):
            theirs = model(X)
        assert torch.equal(theirs[0], z)
        assert torch.equal(theirs[1], paid)


def test_blocks_may_stand_in_a_dict() -> None:
    """A dict of parts of several kinds is no stack."""

    class Keyed(Own):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({f"layer{n}": Step("") for n in range(4)})
            self.parts = nn.ModuleDict({"norm": nn.LayerNorm(5), "out": nn.Linear(5, 5)})

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for name in self.body:
                h = self.body[name](h)
            return self.end(self.parts["out"](self.parts["norm"](h)))

    model = Keyed().eval()
    assert anatomy(model).name == "body"
    states, _ = anatomy(model).states(X)
    smaller = crop(model, remove=[1])
    assert list(smaller.body) == ["layer0", "layer1", "layer2"]
    h = states[1]
    for name in ("layer2", "layer3"):
        h = model.body[name](h)
    assert torch.equal(smaller(X), model.end(model.parts["out"](model.parts["norm"](h))))


def test_a_block_that_is_added_later_is_not_overlooked() -> None:
    model = Own()
    objective = StageCost(model, SoftCrossEntropy(3), 0.5)
    model.body.append(Step(""))
    with pytest.raises(InputError, match="one more than in its example runs"):
        objective(X, Y)


@torch.no_grad()
def test_what_a_hook_changes_of_a_block_is_part_of_it() -> None:
    model = Own().eval()
    model.body[1].register_forward_pre_hook(lambda _, args: (1.5 * args[0],))
    model.body[2].register_forward_hook(lambda _, __, y: 0.5 * y)
    states, _ = anatomy(model).states(X)
    z = anatomy(model).logits(states)
    h = model.stem(X)
    for n, step in enumerate(model.body):
        assert torch.equal(states[n], h)
        assert torch.equal(z[n], model.end(torch.tanh(h)))
        h = step(h)


@pytest.mark.filterwarnings("ignore:torch:DeprecationWarning", "ignore:torch:UserWarning")
@torch.no_grad()
def test_quantised_blocks_without_parameters_are_blocks() -> None:
    """Their activations' scale is that of a batch, so that each state meets the head alone."""
    model = torch.ao.quantization.quantize_dynamic(Own().eval(), {nn.Linear})
    states, logits = anatomy(model, example=X).states(X)
    z, h = anatomy(model).logits(states, x=X), model.stem(X)
    for n, step in enumerate(model.body):
        assert torch.equal(z[n], model.end(torch.tanh(h)))
        assert n == 0 or torch.equal(crop(model, n)(X), z[n])
        h = step(h)
    assert torch.equal(z[-1], logits)


def test_nested_tensors_are_no_states() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
            layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.stem(x), src_key_padding_mask=x == 0)[:, 0])

    model, x = Masked().eval(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    says = r"nested tensors enter its blocks.* set use_nested_tensor = False"
    with pytest.raises(InputError, match=says):
        anatomy(model, example=x)
    structure = anatomy(model, example=x.flip(1))  # such padding is packed into none
    with pytest.raises(InputError, match=says), torch.no_grad():
        structure.states(x)
    model.encoder.use_nested_tensor = False
    with torch.no_grad():
        states, logits = structure.states(x)
    assert torch.equal(structure.logits(states, x=x)[-1], logits)


@pytest.mark.parametrize("place", [4, 3, 2])
def test_a_module_that_is_two_layers_is_refused(place: int) -> None:
    model = Own()
    model.body[place] = model.body[1]
    with pytest.raises(InputError, match=r"one Step is called 2 times .* a block of its own"):
        anatomy(model)


def test_one_module_for_all_layers_is_read_and_not_cut() -> None:
    model = Own()
    model.body = nn.Sequential(*[model.body[0]] * 3)
    structure = anatomy(model)
    states, _ = structure.states(X)
    assert structure.horizon == 3
    for n in range(3):
        assert torch.equal(states[n + 1], model.body[0](states[n]))
    with pytest.raises(InputError, match="calls of one Step"):
        crop(model, 2)


class Growing(nn.Module):
    """Blocks of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(n, n + 1), nn.Tanh()) for n in range(4, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2), "no stack of blocks in Linear: expected a ModuleList or Sequential"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "no stack of blocks in Seq"),
        (Growing(), r"no stack .* Growing: .*; a Sequential takes \[2, 4\] and returns \[2, 5\]"),
    ],
)
def test_a_model_without_repeated_blocks_is_refused(model: nn.Module, says: str) -> None:
    for reading in (anatomy, lambda m: crop(m, 1), lambda m: StageCost(m, SoftCrossEntropy(3))):
        with pytest.raises(InputError, match=says):
            reading(model)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.zeros(2, 7), r"does not run on the example \(mat1 and mat2 shapes .*example=…"),
        ({"y": X}, r"does not run on the example \(.*must be Tensor, not dict\)"),
        ((X, X), r"does not run on the example \(.*takes 2 positional arguments but 3"),
        ((), r"does not run on the example \(.*missing 1 required"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        anatomy(Own(), example=example)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("nope", "blocks='nope' given; Own has no such list of blocks; found: body"),
        ([], r"blocks=\[\] given; expected the name of a list of blocks, a pattern, or the blocks"),
        ([nn.Linear(2, 2)], "a Linear given among the blocks is in no ModuleList or Sequential"),
    ],
)
def test_blocks_that_are_not_there_are_refused(blocks: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        anatomy(Own(), blocks=blocks)


def test_the_blocks_may_be_given() -> None:
    """Between two that are not neighbours stands what is the model's own."""
    model = Own().eval()
    for blocks in ("body", model.body, list(model.body)):
        assert anatomy(model, blocks=blocks).blocks == tuple(model.body)
    structure = anatomy(model, blocks=[model.body[3], model.body[1], model.body[3]])
    assert structure.blocks == (model.body[1], model.body[3])
    states, _ = structure.states(X)
    x = model.stem(X)
    walk = [x := block(x) for block in model.body]
    assert all(map(torch.equal, states, [walk[0], walk[2], walk[3]]))
    onward = [model.body[4](model.body[2](walk[0])), *(model.body[4](w) for w in walk[2:4])]
    expected = torch.stack([model.end(torch.tanh(s)) for s in onward])
    torch.testing.assert_close(structure.logits(states), expected, rtol=1e-6, atol=1e-6)


class Head(nn.Module):
    """As wide as the state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("head", [Head, lambda: nn.Linear(5, 5)])
def test_what_ends_a_sequential_is_its_head_and_one_layer_of_it_is_read(head) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), *(Step("") for _ in range(3)), head()).eval()
    structure = anatomy(model)
    assert structure.blocks == tuple(model[1:4])
    for depth in (2, 1):
        cut = crop(model, depth)
        assert len(anatomy(cut).blocks) == depth == len(cut) - 2
        _, logits = anatomy(cut).states(X[:, :4])
        assert torch.equal(structure.logits(structure.states(X[:, :4])[0])[depth], logits)
    assert anatomy(model, blocks=list(model)[1:4]).horizon == 3
    if head is Head:
        assert anatomy(model, blocks=list(model)[1:]).horizon == 4


def test_a_cut_is_read_by_the_list_that_was_cut() -> None:
    """Which is not the longest any more."""
    model = Own().eval()
    model.stem = nn.Sequential(model.stem, nn.Sequential(*(Step("") for _ in range(3))))
    assert anatomy(model).name == anatomy(crop(model, 2)).name == "body"
    assert anatomy(crop(model, 1)).horizon == 1


MEASURES: list[Callable[[object], object]] = [
    lambda a: a.states(X),
    lambda a: StageCost(a, SoftCrossEntropy(3))(X, Y),
    lambda a: turnpike_profile(a, [(X, Y)], SoftCrossEntropy(3)),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_blocks_that_depend_on_the_data_are_refused_where_they_do(measure: Callable) -> None:
    """Left out in the forward but not in the example, and the other way round."""
    model = Own()
    structure = anatomy(model, example=X)
    model.skip = -torch.inf
    with pytest.raises(InputError, match=r"Own has 5 blocks, and 5 states .* not called once each"):
        measure(structure)
    structure = anatomy(model, example=X)
    assert structure.horizon == 4
    measure(structure)
    model.skip = None
    with pytest.raises(
        InputError,
        match=r"4 blocks, and one more than in its .* not called once",
    ):
        measure(structure)


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


TYPES = """
import torch
from torch import nn
from deeplimit import StageCost, SoftCrossEntropy, anatomy, crop, turnpike_profile

model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)))
block = model[1]
calls = [lambda m=m: anatomy(m) for m in ("resnet", None, [model], 3, nn.Module)]
calls += [lambda x=x: anatomy(model, example=x) for x in (3, "text", model, 0.5, {})]
calls += [lambda b=b: anatomy(model, blocks=b) for b in (3, block[0], "body", [3], [[block]], {})]
calls += [lambda m=m: StageCost(m, SoftCrossEntropy(3)) for m in ("resnet", None, [model])]
calls += [lambda m=m: turnpike_profile(m, [], SoftCrossEntropy(3)) for m in ("resnet", None)]
"""


@pytest.mark.slow
def test_things_of_another_type_are_refused_in_a_line(refused_calls: Callable[[str], None]) -> None:
    refused_calls(TYPES)
