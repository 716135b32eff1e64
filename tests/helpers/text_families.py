"""Small text models of transformers, of every family that an anatomy of ours reads.

In float64, seeded, with all parameters moved away from their starting values: logits are of order
one, so that a scale or a cap that was forgotten shows.
"""

import copy
from functools import cache

import pytest
import torch
from model_families import shaken
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY, DEPTH, CLASSES = 61, 5, 4
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": CLASSES,
    # Layers of two kinds, where there are such; in an order that no period makes.
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ("sliding_attention", *2 * ("full_attention",), *2 * ("sliding_attention",)),
    "no_rope_layers": (1, 1, 0, 0, 1),
    # What a head may do besides.
    "logits_scaling": 3.0,
    "final_logit_softcapping": 2.0,
}
BERT = "BertForSequenceClassification"
NAMES = (
    "Apertus Arcee Cohere Cohere2 Ernie4_5 Exaone4 Gemma Gemma2 "
    "Gemma3 Glm Glm4 Granite Helium HunYuanDenseV1 Llama Ministral "
    "Ministral3 Mistral Nemotron Olmo Olmo2 Olmo3 Phi Phi3 "
    "Qwen2 Qwen3 SeedOss SmolLM3 StableLm Starcoder2 VaultGemma "
)
DECODERS = ["GPT2LMHeadModel", *(f"{name}ForCausalLM" for name in NAMES.split())]


def text_model(name: str, **settings: object) -> nn.Module:
    """A model of this class in evaluation mode, independent of others."""
    return copy.deepcopy(_made(name, tuple(settings.items())))


@cache
def _made(name: str, settings: tuple[tuple[str, object], ...]) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = cls.config_class
    known = {field for c in config.__mro__ for field in getattr(c, "__annotations__", {})}
    known |= {"num_labels", *config.attribute_map}
    every = SETTINGS | dict(settings)
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in every.items() if k in known}
    return shaken(cls(config(**wanted))).eval()


def words(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padded(batch: int = 3, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Texts of different lengths: tokens with a mask."""
    ids, mask = words(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for i in range(1, batch):
        ids[i, length - i :], mask[i, length - i :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def next_words(inputs: dict[str, Tensor]) -> Tensor:
    """Targets aligned with the logits: the next token, −100 where there is none."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    targets = ids.masked_fill(mask == 0, -100).roll(-1, dims=1)
    targets[:, -1] = -100
    return targets


def naive_text_walk(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The states x_0 … x_N of a GPT-2, Llama or BERT, its blocks called by hand."""
    ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
    length = ids.shape[1]
    place = torch.arange(length)[None]
    allowed = seen[:, None, None, :].expand(-1, 1, length, -1)
    backbone = getattr(model, model.base_model_prefix)
    more = {}
    if model.config.model_type == "bert":
        x, blocks = backbone.embeddings(ids), backbone.encoder.layer
    else:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
        if model.config.model_type == "gpt2":
            x, blocks = backbone.wte(ids) + backbone.wpe(place), backbone.h
        else:
            x, blocks = backbone.embed_tokens(ids), backbone.layers
            more["position_embeddings"] = backbone.rotary_emb(x, place)
    mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, -torch.inf)
    states = [x]
    for block in blocks:
        y = block(states[-1], attention_mask=mask, **more)
        states.append(y[0] if isinstance(y, tuple) else y)
    return states


def naive_text_logits(model: nn.Module, x: Tensor) -> Tensor:
    """A GPT-2's, Llama's or BERT's logits of a state."""
    backbone = getattr(model, model.base_model_prefix)
    if model.config.model_type == "bert":
        pooler = backbone.pooler.dense
        first = torch.tanh(x[:, 0] @ pooler.weight.T + pooler.bias)
        return first @ model.classifier.weight.T + model.classifier.bias
    norm = backbone.ln_f if model.config.model_type == "gpt2" else backbone.norm
    return norm(x) @ model.lm_head.weight.T
