"""Bridges: what removed layers did, by least squares in weights that are there already."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deeplimit import InputError, ResidualChain, anatomy, crop
from deeplimit._anatomy.block_call import End
from deeplimit._anatomy.branches import find_end
from deeplimit.control import bridge_of
from deeplimit.control.least_squares import Moments, fits, fold
from deeplimit.network import CifarArchitecture


class Bent(nn.Module):
    """φ(x) = V tanh(W x), no bias at its end unless asked for."""

    def __init__(self, width: int, bias: bool = False, shared: nn.Linear | None = None):
        super().__init__()
        self.inner = shared or nn.Linear(width, 12)
        self.outer = nn.Linear(12, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Follows(nn.Module):
    """φ(x) = A x in the first three coordinates."""

    def __init__(self, a: Tensor):
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :3] @ self.a.T, torch.zeros_like(x[:, 3:])], 1)


def chain(bias: bool = False, blocks: int = 4) -> ResidualChain:
    torch.manual_seed(0)
    return ResidualChain([Bent(5, bias) for _ in range(blocks)], step=0.5).double().eval()


def batches(width: int = 5, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(16 * count, width, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(16).long()) for part in x.double().split(16)]


def inputs() -> Tensor:
    return torch.cat([x for x, _ in batches()])


@pytest.mark.slow
@torch.no_grad()
def test_the_map_solves_the_least_squares_of_all_states() -> None:
    for bias in (False, True):
        model = chain(bias)
        bridged = crop(model, remove=[2], bridge=batches())
        (gap,) = bridge_of(bridged).gaps
        assert (gap.start, gap.stop, gap.kind, gap.place) == (2, 3, "linear", "1.outer")
        states, _ = anatomy(model).states(inputs())
        m, u = model[1](states[1]), states[3] - states[2]
        means = (m.mean(0), u.mean(0)) if bias else (0.0, 0.0)
        centred = m - means[0]
        damping = (gap.ridge * centred.square().sum(0).mean()).sqrt() * torch.eye(5).double()
        z = torch.cat([centred, damping])
        a = torch.linalg.lstsq(z, torch.cat([u - means[1], 0 * damping])).solution
        after, _ = anatomy(bridged).states(inputs())
        expected = states[2] + centred @ a + means[1]
        assert torch.allclose(after[2], expected, rtol=0, atol=1e-11)
        assert (states[3] - expected).norm() < 0.85 * u.norm()
        assert gap.after < gap.before


@torch.no_grad()
def test_a_removed_layer_that_is_linear_in_the_branch_is_bridged_exactly() -> None:
    model = chain(blocks=3)
    with torch.no_grad():
        # The first coordinates of x_1 are nothing but what block 0 adds: block 1 maps it on.
        model[0].outer.weight[3:] = 0
    model[1] = Follows(torch.randn(3, 3).double())
    x = [(torch.cat([0 * a[:, :3], a[:, 3:]], 1), y) for a, y in batches()]
    bridged = crop(model, remove=[1], bridge=x)
    (gap,) = bridge_of(bridged).gaps
    assert gap.kind == "linear"
    assert gap.after < 1e-6 < 0.05 < gap.before
    every = torch.cat([a for a, _ in x])
    assert torch.allclose(bridged(every), model(every), rtol=0, atol=1e-10)
    assert not torch.allclose(crop(model, remove=[1])(every), model(every), atol=1e-2)


def applied(structure, end: End, x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """The logits with the map applied by a hook."""
    shape = [1, -1, 1, 1] if end.axis == 1 else [-1]
    change = lambda m: torch.einsum("ij,bj...->bi...", a, m.movedim(end.axis, 1))  # noqa: E731

    def mapped(_: nn.Module, __: object, m: Tensor) -> Tensor:
        gain = end.gain.reshape(shape)
        return m + change(m).movedim(1, end.axis) / gain + c.reshape(shape) / gain

    handle = end.module.register_forward_hook(mapped)
    try:
        return structure.run(x)
    finally:
        handle.remove()


def llama(layers: int = 4) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config).eval()


def cifar() -> nn.Module:
    torch.manual_seed(0)
    model = CifarArchitecture((3, 3, 3)).build()
    model.train()
    for _ in range(3):  # running statistics of something
        model(torch.rand(8, 3, 16, 16))
    return model.eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=6,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


TEXTS = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(2))
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("make", "x", "place", "mixes", "offset"),
    [
        (llama, TEXTS, "model.layers.1.mlp.down_proj", True, 0.0),
        (gpt2, TEXTS, "transformer.h.1.mlp.c_proj", True, 0.0),
        (cifar, IMAGES, "layer1.1.bn2", True, 0.0),
        (bert, TEXTS, "bert.encoder.layer.1.output.LayerNorm", False, 0.0),
        (gemma, TEXTS, "model.layers.1.post_feedforward_layernorm", False, 1.0),
        (chain, inputs(), "1.outer", True, 0.0),
    ],
)
@torch.no_grad()
def test_what_is_folded_is_the_map_applied(make, x, place, mixes, offset) -> None:
    model = make().double()
    structure = anatomy(model)
    end = find_end(structure, 1, x)
    assert isinstance(end, End)
    assert (end.name, end.mixes) == (place, mixes)
    d = len(end.gain)
    torch.manual_seed(1)
    a, c = 0.3 * torch.randn(d, d).double(), torch.randn(d).double() * end.biased
    a = a if mixes else torch.diag(a.diagonal())
    before = structure.run(x)
    expected = applied(structure, end, x, a, c)
    fold(end, a, c, torch.eye(d).double(), offset)
    after = structure.run(x)
    assert (expected - before).abs().max() > 1e-3
    limit = 1e-6 if offset else 1e-12  # Gemma's norm is computed in float32
    assert torch.allclose(after, expected, rtol=0, atol=limit * float(expected.abs().max() + 1))


@torch.no_grad()
def test_a_batch_norm_is_left_with_the_statistics_of_what_it_normalises() -> None:
    model = cifar().double()
    structure, x = anatomy(model), IMAGES.double()
    end = find_end(structure, 1, x)
    seen: dict[str, Tensor] = {}
    handle = end.module.register_forward_hook(lambda _, args, m: seen.update(h=args[0], m=m))
    structure.run(x)
    # Statistics of these very images, and then a map that mixes channels.
    h = seen["h"].transpose(0, 1).flatten(1)
    end.module.running_mean.copy_(h.mean(1))
    end.module.running_var.copy_(h.var(1, correction=0))
    structure.run(x)
    m = end.rows(seen["m"])
    torch.manual_seed(1)
    fold(end, 0.3 * torch.randn(16, 16).double(), torch.ones(16).double(), m.T.cov(correction=0))
    structure.run(x)
    h = seen["h"].transpose(0, 1).flatten(1)
    handle.remove()
    assert torch.allclose(end.module.running_mean, h.mean(1), atol=1e-12)
    assert torch.allclose(end.module.running_var, h.var(1, correction=0), atol=1e-12)


@torch.no_grad()
def test_the_fits_of_moments_are_those_of_rows() -> None:
    torch.manual_seed(3)
    m, u = torch.randn(50, 4).double() + 1, torch.randn(50, 4).double()
    moments = Moments(4, m.device)
    for part in range(0, 50, 7):
        moments.add(m[part : part + 7], u[part : part + 7], u[part : part + 7])
    gain = torch.tensor([1.0, 2, 0.5, -1]).double()
    end = End("", nn.Linear(4, 4).double(), None, -1, -1, gain)
    for fit in fits(moments, end):
        left = float((u - m @ fit.a.T - fit.c).norm() / u.norm())
        assert moments.residual(fit) == pytest.approx(left, rel=1e-12)
        if fit.kind == "scale":
            s = (u * m * gain).sum() / (m * gain).square().sum()
            assert torch.allclose(fit.a, torch.diag(s * gain))
        z = torch.cat([m, torch.ones(50, 1).double()], 1)
        if fit.kind == "channels":
            for j in range(4):
                w = torch.linalg.lstsq(z[:, [j, 4]], u[:, j]).solution
                assert torch.allclose(torch.stack([fit.a[j, j], fit.c[j]]), w)
        if fit.named == ("linear", 0.0):
            w = torch.linalg.lstsq(z, u).solution.T
            assert torch.allclose(torch.cat([fit.a, fit.c[:, None]], 1), w)


@pytest.mark.slow
def test_a_bridged_crop_loads_in_its_class_and_does_better(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = llama()
    texts = [TEXTS.roll(k, 1).add(k).remainder(37).add(3) for k in range(12)]
    kept = copy.deepcopy(model.state_dict())
    bridged = crop(model, remove=[1, 2], bridge=texts)
    plain = crop(model, remove=[1, 2])
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    changed = [
        k for k, v in bridged.state_dict().items() if not torch.equal(v, plain.state_dict()[k])
    ]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    bridged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        z = model(TEXTS).logits
        assert torch.equal(again(TEXTS).logits, bridged(TEXTS).logits)
        errors = [float((net(TEXTS).logits - z).square().mean()) for net in (plain, bridged)]
    assert errors[1] < errors[0]
    assert bridge_of(plain) is None
    assert "layers 1 … 2: linear in model.layers.0.mlp.down_proj" in str(bridge_of(bridged))


@pytest.mark.slow
def test_padding_does_not_count() -> None:
    model = llama().double()
    mask = torch.ones_like(TEXTS)
    mask[:, 4:] = 0
    other = TEXTS.masked_fill(mask == 0, 7)
    both = [crop(model, remove=[2], bridge=[{"input_ids": t, "attention_mask": mask}]) for t in
            (TEXTS, other)]  # fmt: skip
    first, second = (net.state_dict() for net in both)
    assert all(torch.allclose(v, second[k], rtol=0, atol=1e-12) for k, v in first.items())
    record = bridge_of(both[0])
    assert (record.samples, record.rows) == (8, 32)


@pytest.mark.slow
def test_resnets_and_gaps_that_cannot_be_bridged_beside_others() -> None:
    model = cifar()
    images = [torch.rand(8, 3, 16, 16) for _ in range(2)]
    bridged = crop(model, remove=[0, 2, 5], bridge=images)
    first, second, third = bridge_of(bridged).gaps
    assert first.reason == "nothing stands before it"
    assert second.place == "layer1.0.bn2"
    assert second.after < second.before
    assert third.place == "layer2.1.bn2"
    assert type(bridged) is type(model)
    with pytest.raises(InputError, match=r"no gap can be bridged: layer 0: .*nothing stands"):
        crop(model, remove=[0], bridge=images)
    with pytest.raises(InputError, match="layer 3 changes the shape"):
        crop(model, remove=[3], bridge=images)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gave no sample"),
        ([(inputs()[:1], torch.zeros(1))], "at least two samples"),
        ([inputs() / 0], "expected finite ones"),
        ([[1, 2, 3]], r"expected batches \(x, y\) or x"),
        (iter([inputs()]), "only once"),
    ],
)
def test_wrong_data_are_refused_in_one_line(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        crop(chain(), remove=[2], bridge=data)
    assert "\n" not in str(caught.value)


def test_no_gap_and_shared_weights_are_refused() -> None:
    with pytest.raises(InputError, match="no layer is removed"):
        crop(chain(), remove=[], bridge=batches())
    model = chain()
    model[3].outer.weight = model[1].outer.weight
    with pytest.raises(InputError, match="ends is not found"):
        crop(model, remove=[2], bridge=batches())


def test_few_samples_of_many_unknowns_leave_a_map_that_is_damped_or_none() -> None:
    torch.manual_seed(0)
    model = ResidualChain([Bent(40) for _ in range(3)]).double().eval()
    bridged = crop(model, remove=[1], bridge=[torch.randn(8, 40).double()])
    (gap,) = bridge_of(bridged).gaps
    assert gap.kind != "linear" or gap.ridge > 0
    assert gap.after <= gap.before


class TwoConvolutions(nn.Module):
    """x + norm(last(σ(x))), beside another convolution of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.last.load_state_dict(self.beside.state_dict())
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        side = self.beside(h)  # as much as what goes on, number for number
        return x + self.norm(self.last(h)) + 0 * side


def test_the_convolution_behind_which_a_norm_stands_is_the_one_that_it_is_given() -> None:
    torch.manual_seed(0)
    blocks = [TwoConvolutions() for _ in range(3)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 5 * 5, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, head).double().eval()
    x = torch.rand(8, 3, 7, 7).double()
    end = find_end(anatomy(model, example=x), 1, x)
    assert isinstance(end, End)
    assert end.module is blocks[1].norm
    assert end.convolution is blocks[1].last
