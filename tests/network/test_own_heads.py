"""Heads of models written by somebody else: what they read beside the last state."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from own_models import Own, Step, X, Y
from torch import Tensor, nn

from deeplimit import EarlyExit, InputError, SoftCrossEntropy, StageCost, crop
from deeplimit.network import anatomy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_reads_all_states_is_refused_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"the logits of its last state differ from its own by \d"):
        anatomy(Own("sum").to(dtype))
    assert anatomy(Own().to(dtype)).horizon == 5


def test_a_head_that_begins_with_zeros_is_read_as_it_will_be() -> None:
    """Its answers are 0 whatever is injected; the zeros stay where they were."""
    with pytest.raises(InputError, match=r"the logits of its last state differ from its own by \d"):
        anatomy(zeroed(Own("sum")))
    model = zeroed(Own("input").double().eval())
    objective = StageCost(model, SoftCrossEntropy(3), 0.5)
    assert not any(bool(p.any()) for one in (model.end, model.again) for p in one.parameters())
    for p in model.parameters():
        nn.init.normal_(p)
    states = [model.stem(X.double())]
    for step in model.body:
        states.append(step(states[-1]))
    loss = SoftCrossEntropy(3)
    *below, last = (
        loss(model.end(torch.tanh(h)) + model.again(X.double()), Y).mean() for h in states
    )
    expected = float(last + 0.5 * sum(below))
    assert float(objective(X.double(), Y)[0]) == pytest.approx(expected, rel=1e-12)


class Mixing(nn.Module):
    """The head reads a mixture of all states, the last one alone as long as nothing was trained."""

    def __init__(self, weights: list[float]):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.body = nn.ModuleList(Step("") for _ in weights)
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        x, mixed = self.stem(x), torch.zeros(())
        for step, weight in zip(self.body, self.weights, strict=True):
            x = step(x)
            mixed = mixed + weight * x
        head: Tensor = self.head(mixed)
        return head


@pytest.mark.parametrize("weights", [[0.0, 0, 0, 1], [1e-6, 1e-6, 1e-6, 1]])
def test_a_mixture_of_states_that_begins_with_the_last_one_is_refused(weights: list[float]) -> None:
    """Once it is trained the logits of a state are not those of a model that is cut."""
    model = Mixing(weights)
    with pytest.raises(InputError, match=r"the logits of its last state differ from its own by \d"):
        anatomy(model, X)
    assert model.weights.tolist() == torch.tensor(weights).tolist()


def zeroed(model: Own) -> Own:
    for one in (model.end, model.again):
        nn.init.zeros_(one.weight)
        nn.init.zeros_(one.bias)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["", "input"])
def test_a_reading_runs_the_model_twice_and_each_block_once(kind: str, dtype: torch.dtype) -> None:
    model = Own(kind).to(dtype)
    calls = []
    for module in (model, anatomy(model).blocks[2]):
        module.register_forward_pre_hook(lambda module, _: calls.append(type(module)))
    anatomy(model)
    assert (calls.count(Own), calls.count(Step)) == (2, 1)


class Pairs(Own):
    """A number for each two samples, as for images and texts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.again(x).T


class TokensFirst(Own):
    """States [tokens, samples, 5]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x, 2 * x, 3 * x])).mean(0)


@pytest.mark.parametrize(("kind", "rows"), [(Pairs, 2), (Pairs, 5), (TokensFirst, 5)])
def test_what_is_not_read_row_by_row_takes_no_third_run(kind: type[Own], rows: int) -> None:
    model, calls = kind().double(), []
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(module) if module is model else None
    ):
        structure = anatomy(model, example=X[:rows].double())
    assert len(calls) == 2
    x = X.double()
    states, _ = structure.states(x)
    z = structure.logits(states, x=x)
    for n, state in enumerate(states):
        own = model.end(torch.tanh(state))
        expected = own @ model.again(x).T if kind is Pairs else own.mean(0)
        torch.testing.assert_close(z[n], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_reads_the_inputs_again_is_given_them(dtype: torch.dtype) -> None:
    """Those of the states, not those of the example."""
    model, x = Own("input").to(dtype).eval(), X.to(dtype)
    structure = anatomy(model)
    states, logits = structure.states(x)
    with pytest.raises(InputError, match=r"head of Own reads the inputs too; .*x=inputs"):
        structure.logits(states)
    z = structure.logits(states, x=x)
    for n, state in enumerate(states):
        assert torch.equal(z[n], model.end(torch.tanh(state)) + model.again(x))
    assert torch.equal(z[-1], logits)
    assert torch.equal(structure.logits(states[2:4], 2, x=x), z[2:4])
    assert torch.equal(structure.head(states[3], x), z[3])
    cost, _ = StageCost(model, SoftCrossEntropy(3), 0.5)(x, Y)
    loss = SoftCrossEntropy(3)
    costs = [loss(one, Y).mean() for one in z]
    expected = costs[-1] + 0.5 * sum(costs[:-1])
    assert float(cost) == pytest.approx(float(expected), rel=4 * torch.finfo(dtype).eps)


def test_logits_that_are_not_numbers_agree_with_nothing() -> None:
    with pytest.raises(InputError, match="Own answers NaN to its example"):
        anatomy(Own("nan"))


@pytest.mark.parametrize("answer", [lambda z: z.argmax(1), lambda z: z.mean()])
def test_answers_that_are_no_logits_are_refused(answer: Callable[[Tensor], Tensor]) -> None:
    class Answers(Own):
        def forward(self, x: Tensor) -> Tensor:
            return answer(super().forward(x))

    with pytest.raises(InputError, match=r"Answers answers .*; expected logits"):
        anatomy(Answers())


def test_logits_that_are_infinite_agree_with_themselves() -> None:
    """As those of tokens that may not be said."""

    class Masked(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([True, False, False]), -torch.inf)

    states, logits = anatomy(Masked()).states(X)
    assert torch.equal(anatomy(Masked()).logits(states)[-1], logits)


@pytest.mark.parametrize("habit", ["centred", "compared"])
def test_a_head_that_reads_the_whole_batch_is_given_it(habit: str) -> None:
    """Of states of several layers at once it would be another batch."""

    def read(x: Tensor) -> Tensor:
        return x - x.mean(0) if habit == "centred" else x @ x.T

    class Batch(Own):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for step in self.body:
                x = step(x)
            return read(x)

    structure = anatomy(Batch().double())
    states, logits = structure.states(X.double())
    z = structure.logits(states, x=X.double())
    assert torch.equal(logits, z[-1])
    for n, state in enumerate(states):
        torch.testing.assert_close(z[n], read(state), rtol=1e-13, atol=1e-13)


class Pair(NamedTuple):
    states: Tensor
    logits: Tensor


@dataclass
class Fields:
    states: Tensor
    logits: Tensor


@pytest.mark.parametrize("kind", [Pair, Fields, dict])
@torch.no_grad()
def test_answers_are_read_by_their_names(kind: Callable[..., Any]) -> None:
    """Also where something else stands first, and where samples leave early."""

    class Named(Own):
        def forward(self, x: Tensor) -> Any:
            h = self.body(self.stem(x))
            return kind(states=h, logits=self.end(torch.tanh(h)))

    def logits(out: Any) -> Tensor:
        return out["logits"] if kind is dict else out.logits

    model = Named().eval()
    states, z = anatomy(model).states(X)
    assert torch.equal(z, logits(model(X)))
    first, last = model.end(torch.tanh(states[1])), logits(model(X))
    torch.testing.assert_close(anatomy(model).logits(states)[1], first)
    sure = first.softmax(1).amax(1)
    out = EarlyExit(model, {1: float(sure.median())}).eval()(X)
    leaves = (sure >= sure.median())[:, None]
    torch.testing.assert_close(logits(out), torch.where(leaves, first, last))


def test_inputs_may_be_a_tuple() -> None:
    """Given one after the other; a model of another depth is proven on them too."""

    class Scaled(Own):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__("input", [str(n) for n in range(config.depth)])
            self.config = config

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scale * super().forward(x)

    model, batch = Scaled(SimpleNamespace(depth=5)).eval(), (X, torch.tensor(2.0))
    structure = anatomy(model, example=batch)
    states, logits = structure.states(batch)
    assert torch.equal(logits, model(*batch))
    z = structure.logits(states, x=batch)
    for n, state in enumerate(states):
        assert torch.equal(z[n], 2 * (model.end(torch.tanh(state)) + model.again(X)))
    with pytest.raises(InputError, match="reads the inputs too; give them with the states"):
        structure.head(states[2])
    cut = crop(structure, remove=[1, 2])
    assert (cut.config.depth, model.config.depth) == (3, 5)
    expected = states[1]
    for block in model.body[3:]:
        expected = block(expected)
    assert torch.equal(cut(*batch), 2 * (model.end(torch.tanh(expected)) + model.again(X)))


class Text(nn.Module):
    """Pools the tokens that are no padding, or takes the first one behind which there is the end.

    Token 0 is padding, token 1 the end of a text.
    """

    def __init__(self, pools: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pools = pools
        self.embed, self.end = nn.Embedding(20, 4, padding_idx=0), nn.Linear(4, 3)
        self.config = SimpleNamespace(vocab_size=20, eos_token_id=1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.read(x, ids)

    def read(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = ids.ne(0).to(x.dtype)[..., None]
        if not self.pools:
            at = ids.eq(1).int().argmax(1)
            return self.end(x[torch.arange(len(x)), at])
        return self.end((weights * x).sum(1) / weights.sum(1))


@pytest.mark.slow
@pytest.mark.parametrize("pools", [True, False])
def test_padding_that_the_example_lacks_is_no_part_of_a_text(pools: bool) -> None:
    """What the head reads of the inputs does not show on the example."""
    model = Text(pools).double().eval()
    ids = torch.arange(24).reshape(3, 8) % 17 + 2
    example = ids.clone()
    for i, length in enumerate((6, 3, 7)):
        ids[i, length] = 1
        ids[i, length + 1 :] = 0
    for given in (example, ids, None):
        structure = anatomy(model, example=given)
        states, logits = structure.states(ids)
        z = structure.logits(states, x=ids)
        assert torch.equal(logits, z[-1])
        for n, state in enumerate(states):
            torch.testing.assert_close(z[n], model.read(state, ids), rtol=1e-13, atol=1e-13)


class Between(nn.Module):
    """Something is done to the state between its blocks, in the loop."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), scale
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.scale * torch.relu(block(x))
        return self.head(x)


@pytest.mark.slow
def test_what_stands_between_blocks_must_not_tell_a_bypass_from_a_cut() -> None:
    """A ReLU twice is a ReLU; a scale twice is another."""
    with pytest.raises(InputError, match="something stands between its blocks, which stays"):
        anatomy(Between(0.5))
    model = Between(1.0).eval()
    states, _ = anatomy(model).states(torch.ones(2, 4))
    for depth in (1, 2, 3):
        expected = crop(model, depth)(torch.ones(2, 4))
        assert torch.allclose(anatomy(model).logits(states)[depth], expected)


class OfGraph(Own):
    """Takes its inputs inside a mapping of a mapping, and reads them again in the head."""

    def forward(self, inputs: dict[str, dict[str, Tensor]]) -> Tensor:  # type: ignore[override]
        nodes = inputs["graph"]["nodes"]
        return super().forward(nodes) + self.again(nodes)


def test_inputs_inside_others_are_fitted_and_repeated() -> None:
    """The example is of another precision than the model; the head meets it once for each state."""
    model = OfGraph().double().eval()
    structure = anatomy(model, example={"graph": {"nodes": X}})
    x = {"graph": {"nodes": X.double()}}
    states, logits = structure.states(x)
    assert torch.equal(logits, model(x))
    z = structure.logits(states, x=x)
    for one, h in zip(z, states, strict=True):
        expected = model.end(torch.tanh(h)) + model.again(X.double())
        torch.testing.assert_close(one, expected, rtol=1e-13, atol=1e-13)
