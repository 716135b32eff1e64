"""Decoders of transformers that predict the next token: logits for every token."""

from collections.abc import Sequence

from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.registry import register
from deeplimit.network.anatomy.transformers_anatomy import OneStack


@register(
    *(
        f"transformers.{name}ForCausalLM"
        for name in (
            "Apertus",
            "Arcee",
            "Ernie4_5",
            "Gemma",
            "Glm",
            "Helium",
            "HunYuanDenseV1",
            "Llama",
            "Ministral",
            "Ministral3",
            "Mistral",
            "Nemotron",
            "Olmo",
            "Phi3",
            "Qwen2",
            "Qwen3",
            "SeedOss",
            "SmolLM3",
            "StableLm",
        )
    )
)
class DecoderAnatomy(OneStack):
    """`model.layers`, then a norm and the unembedding, token by token."""

    tokens = True
    ends = ("self_attn.o_proj", "mlp.down_proj")

    @property
    def containers(self) -> Sequence[Container]:
        """`model.layers`."""
        return (self.backbone.layers,)

    def norm(self, x: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return self.backbone.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Norm and unembedding of tokens [T, d] (or [B, L, d])."""
        return self.model.lm_head(self.norm(x))


@register(
    *(f"transformers.{name}ForCausalLM" for name in ("Exaone4", "Olmo2", "Olmo3")),
)
class NormedBranches(DecoderAnatomy):
    """Each residual branch ends in a norm."""

    ends = ("post_attention_layernorm", "post_feedforward_layernorm")


@register("transformers.Glm4ForCausalLM")
class Glm4Anatomy(DecoderAnatomy):
    """Each residual branch ends in a norm, of another name."""

    ends = ("post_self_attn_layernorm", "post_mlp_layernorm")


@register("transformers.Starcoder2ForCausalLM")
class Starcoder2Anatomy(DecoderAnatomy):
    """The last linear layer has another name."""

    ends = ("self_attn.o_proj", "mlp.c_proj")


@register("transformers.PhiForCausalLM")
class PhiAnatomy(DecoderAnatomy):
    """The norm has another name."""

    ends = ("self_attn.dense", "mlp.fc2")

    def norm(self, x: Tensor) -> Tensor:
        """`model.final_layernorm`."""
        return self.backbone.final_layernorm(x)


@register("transformers.GPT2LMHeadModel")
class GPT2Anatomy(DecoderAnatomy):
    """`transformer.h`; the depth is called `n_layer`, or `num_hidden_layers`."""

    ends = ("attn.c_proj", "mlp.c_proj")

    @property
    def containers(self) -> Sequence[Container]:
        """`transformer.h`."""
        return (self.backbone.h,)

    def norm(self, x: Tensor) -> Tensor:
        """`transformer.ln_f`."""
        return self.backbone.ln_f(x)

    def index_matters(self, removed: set[int]) -> str | None:
        """With `scale_attn_by_inverse_layer_idx` a block divides its scores by its place."""
        if not self.model.config.scale_attn_by_inverse_layer_idx:
            return None
        first = self.horizon - len(removed)
        if all(n >= first for n in removed):
            return None
        return "scale_attn_by_inverse_layer_idx=True divides the scores of block n by n + 1"


@register("transformers.GraniteForCausalLM")
class GraniteAnatomy(DecoderAnatomy):
    """The logits are divided by a number."""

    def head(self, x: Tensor) -> Tensor:
        """Norm, unembedding, / `logits_scaling`."""
        return super().head(x) / self.model.config.logits_scaling


@register("transformers.CohereForCausalLM", "transformers.Cohere2ForCausalLM")
class CohereAnatomy(DecoderAnatomy):
    """The logits are multiplied by a number."""

    def head(self, x: Tensor) -> Tensor:
        """Norm, unembedding, · `logit_scale`."""
        return super().head(x) * self.model.logit_scale


@register(
    "transformers.Gemma2ForCausalLM",
    "transformers.Gemma3ForCausalLM",
    "transformers.VaultGemmaForCausalLM",
)
class CappedAnatomy(DecoderAnatomy):
    """The logits may be capped; of Gemma 2 and 3 each residual branch ends in a norm."""

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last linear layers, where no norm follows them.

        Raises:
            InputError: a norm does.
        """
        if hasattr(block, "post_feedforward_layernorm"):
            raise InputError(
                f"the residual branches of {type(self.model).__name__} end in norms that multiply "
                "by 1 + weight, which no scaling of the weight scales; its depth cannot be "
                "changed. tie and untie work"
            )
        return super().branch_ends(block)

    def head(self, x: Tensor) -> Tensor:
        """Norm, unembedding, c·tanh(· / c) with c = `final_logit_softcapping`."""
        z = super().head(x)
        cap = self.model.config.final_logit_softcapping
        return z if cap is None else (z / cap).tanh() * cap
