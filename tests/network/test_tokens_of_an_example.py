"""What an example's tokens cannot tell is not concluded from them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from deeplimit._anatomy.inputs import call
from deeplimit.network import anatomy
from deeplimit.network.blocks import TwoLayerResidual

WIDTH, WORDS = 6, 20


class Smoothed(nn.Module):
    """A head that looks at three neighbouring tokens, or at the first one that is an end."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=WORDS, **config)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(TwoLayerResidual(WIDTH, 2 * WIDTH, "tanh") for _ in range(4))
        self.end = nn.Conv1d(WIDTH, 3, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.read(x, ids)

    def read(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.end(x.mT).mT
        ends = getattr(self.config, "eos_token_id", None)
        if ends is None:
            return y
        return y[torch.arange(len(y)), torch.isin(ids, torch.tensor(ends)).int().argmax(1)]


def _agrees(model: Smoothed, example: Tensor, ids: Tensor) -> None:
    structure = anatomy(model, example=example)
    states, logits = structure.states(ids)
    z = structure.logits(states, x=ids)
    assert torch.equal(logits, z[-1])
    for n, state in enumerate(states):
        torch.testing.assert_close(z[n], model.read(state, ids), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(z[0], z[-1], rtol=0.01)


def test_one_token_does_not_tell_whether_tokens_are_read_by_themselves() -> None:
    ids = torch.arange(21).reshape(3, 7) % WORDS
    _agrees(Smoothed().double().eval(), ids[:, :1], ids)


def test_a_configuration_may_list_several_tokens_that_end_a_text() -> None:
    ids = torch.arange(21).reshape(3, 7) % 15
    example = ids.clone()
    ids[0, 2], ids[1, 5], ids[2, 3] = 17, 18, 17
    _agrees(Smoothed(eos_token_id=[17, 18]).double().eval(), example, ids)


class Named(Smoothed):
    """The same, called by the name of its input as models of transformers are."""

    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


def test_none_of_them_is_in_an_example_that_is_made() -> None:
    structure = anatomy(Named(eos_token_id=list(range(3, WORDS)), pad_token_id=0).double().eval())
    assert set(structure.example()["input_ids"].flatten().tolist()) <= {1, 2}
    assert structure.horizon == 4


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 36,
}  # fmt: skip


def _bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=37, decoder_ffn_dim=37, eos_token_id=2,
    )  # fmt: skip
    return hf.BartForSequenceClassification(config)


def _audio() -> nn.Module:
    return hf.ASTForAudioClassification(hf.ASTConfig(max_length=64, num_mel_bins=32, **SMALL))


def _choice() -> nn.Module:
    return hf.BertForMultipleChoice(hf.BertConfig(vocab_size=99, **SMALL))


def _features() -> nn.Module:
    """Tokens come first, and bands last."""
    return hf.ParakeetEncoder(hf.ParakeetEncoderConfig(subsampling_conv_channels=8, **SMALL))


def _small_images() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=16)
    return hf.ConvNextForImageClassification(config)


def _captions() -> nn.Module:
    tower = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = hf.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL)
    both = hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=98)
    return hf.LlavaForConditionalGeneration(both)


@pytest.mark.parametrize(
    ("make", "layers"),
    [(_bart, 3), (_audio, 3), (_choice, 3), (_features, 3), (_small_images, 4), (_captions, 3)],
)
def test_an_example_is_made_that_the_model_takes(
    make: Callable[[], nn.Module], layers: int
) -> None:
    torch.manual_seed(0)
    structure = anatomy(make().double().eval())
    example = structure.example()
    states, logits = structure.states(example)
    assert len(states) == layers + 1
    torch.testing.assert_close(logits, call(structure.model, example), rtol=0, atol=0)
    *_, last = structure.logits(states, x=example)
    torch.testing.assert_close(last, logits, rtol=1e-13, atol=1e-13)
