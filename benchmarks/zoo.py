"""Small networks of every architecture at hand: of transformers by rule, of timm and torchvision by
name, a few written by hand.

`zoo()` gives (library, architecture, head, make); `make()` builds the model, seeded, in evaluation
mode, every block of it with weights that change its state, and a batch of inputs it runs on.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo_inputs import batches

CLASSES, MOST_PARAMETERS = 5, 12_000_000
HEADS = {  # of transformers, by the name of its table of classes
    "": "Model",
    "FOR_CAUSAL_LM": "CausalLM",
    "FOR_MASKED_LM": "MaskedLM",
    "FOR_SEQUENCE_CLASSIFICATION": "SequenceClassification",
    "FOR_TOKEN_CLASSIFICATION": "TokenClassification",
    "FOR_QUESTION_ANSWERING": "QuestionAnswering",
    "FOR_MULTIPLE_CHOICE": "MultipleChoice",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM": "ConditionalGeneration",
    "FOR_SPEECH_SEQ_2_SEQ": "SpeechSeq2Seq",
    "FOR_IMAGE_TEXT_TO_TEXT": "ImageTextToText",
    "FOR_IMAGE_CLASSIFICATION": "ImageClassification",
    "FOR_AUDIO_CLASSIFICATION": "AudioClassification",
    "FOR_CTC": "CTC",
}
Rules = dict[str, Any]
# A key of a config by its ending words, the first that fits; what is a list keeps its length.
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks", "encoder_num_hidden_layers",
    "decoder_num_hidden_layers", "num_block_layers",
)  # fmt: skip
SIZES: Rules = {
    **dict.fromkeys(COUNTS, 4),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim",
         "word_embed_proj_dim", "encoder_embed_dim", "projection_dim", "out_hidden_size",
         "decoder_hidden_size", "encoder_hidden_size", "width", "hidden_dim_", "output_dim_",
         "lru_width", "mm_hidden_size", "attention_hidden_size", "dim_model", "channels"), 32),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_key_value_heads", "num_encoder_attention_heads",
         "num_decoder_attention_heads", "encoder_num_attention_heads",
         "decoder_num_attention_heads", "heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "hidden_dim", "ffn_hidden_size", "moe_intermediate_size", "d_inner",
         "shared_expert_intermediate_size", "dense_intermediate_size",
         "shared_intermediate_size", "block_ff_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions",
         "max_target_positions", "n_ctx", "max_seq_length"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "head_dim": 16, "d_kv": 16, "qk_rope_head_dim": 8, "image_size": 32, "patch_size": 8,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "sliding_window": 8,
    "num_mel_bins": 16, "type_vocab_size": 2, "num_codebook_vectors": 16, "pixel_size": 8,
    "vocab_size_per_layer_input": 120, "hidden_size_per_layer_input": 8, "decoder_vocab_size": 120,
    "vocab_size": 120, "rotary_dim": 8, "num_groups": 4,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "hidden_size_": 32, "classifier_proj_size": 16, "tdnn_dim": [16, 16], "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 1], "xvector_output_dim": 16, "max_2d_position_embeddings": 64,
    "coordinate_size": 6, "shape_size": 4, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "mamba_n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "chunk_size": 8, "mamba_chunk_size": 8, "num_queries": 4,
    "num_labels": CLASSES, "n_mels": 16, "local_attention": 8, "bottleneck_size": 16,
}  # fmt: skip
LISTS: dict[str, Callable[[int], list[int]]] = {  # of a config, by what stands at each place
    "depths": lambda n: [2 + i % 2 for i in range(n)],
    "hidden_sizes": lambda n: [16 * (i + 1) for i in range(n)],
    "embed_dims": lambda n: [16 * (i + 1) for i in range(n)],
    "embed_dim": lambda n: [16 * (i + 1) for i in range(n)],
    "encoder_hidden_sizes": lambda n: [16] * n,
    "num_heads": lambda n: [2, *[4] * (n - 1)],
    "num_attention_heads": lambda n: [2, *[4] * (n - 1)],
    "conv_dim": lambda n: [16, 16],
    "conv_stride": lambda n: [5, 2],
    "conv_kernel": lambda n: [10, 3],
}
ALIKE = {"conv_dim": {"num_feat_extract_layers": 2}}
# A second and a third try, where the first does not build or run.
TRIES: tuple[Rules, ...] = (
    {},
    {"head_dim": None, "num_key_value_heads": None, "mrope_section": [1, 1, 2]},
    {"image_size": 64, "patch_size": 4, "window_size": 4},
    {"head_dim": 32, "num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 64},
    {"image_size": None, "patch_size": None, "vocab_size": None, "max_position_embeddings": None},
)
ODD: dict[str, Rules] = {  # by model type, what the rules do not see
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_embds": False, "num_buckets": 2,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "is_decoder": True,
    },
    "longformer": {"attention_window": [4, 4, 4, 4]},
    "led": {"attention_window": [4, 4, 4, 4]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "xlnet": {"d_head": 16, "d_inner": 48},
    "funnel": {"block_sizes": [2, 2], "block_repeats": None, "num_decoder_layers": 2},
    "albert": {"embedding_size": 16},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "canine": {"num_hash_buckets": 16, "local_transformer_stride": 4, "downsampling_rate": 4},
    "swin": {"window_size": 4, "patch_size": 2, "depths": [2, 3, 2], "num_heads": [2, 4, 4],
             "embed_dim": 16},
    "swinv2": {"window_size": 4, "patch_size": 2, "depths": [2, 3, 2], "num_heads": [2, 4, 4],
               "embed_dim": 16},
    "donut-swin": {"window_size": 4, "patch_size": 2, "depths": [2, 3, 2], "num_heads": [2, 4, 4],
                   "embed_dim": 16},
    "maskformer-swin": {"window_size": 4, "patch_size": 2, "depths": [2, 3], "num_heads": [2, 4],
                        "embed_dim": 16},
    "hubert": {"feat_extract_norm": "layer"},
    "codegen": {"n_head": 4, "n_embd": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4},
    "esm": {"vocab_size": 120},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 64},
}  # fmt: skip


class Member(NamedTuple):
    """A network of the zoo; `make()` returns (model, inputs) or raises ZooError."""

    library: str
    architecture: str
    head: str
    make: Callable[[], tuple[nn.Module, Any]]


class ZooError(Exception):
    """It could not be built small, or ran on no batch that was tried."""


def zoo() -> Iterator[Member]:
    """All of them; of a library that does not import one member that says so."""
    with suppress(Exception):
        _declared("torchvision")  # before transformers looks for it
    yield from _by_hand()
    yield from _of_transformers()
    yield from _of_torchvision()
    yield from _of_timm()


def sized(config_class: Any, tried: Rules, depth: int = 0) -> Any:
    """A configuration with what is in `SIZES`, `LISTS` and `ODD` set, its parts' likewise."""
    odd = ODD.get(getattr(config_class, "model_type", ""), {})
    rules = SIZES | tried | odd
    try:
        default = vars(config_class())
    except Exception:  # one that needs its parts
        default = {}
    names = getattr(config_class, "attribute_map", {})
    keys = {*default, *inspect.signature(config_class.__init__).parameters, *names.values()}
    settings: Rules = {}
    for key in keys:
        value = default.get(key)
        if isinstance(value, list | tuple) and key in LISTS and key not in odd:
            settings[key] = type(value)(LISTS[key](len(value)))
            settings |= ALIKE.get(key, {})
        elif key in rules and rules[key] is not None:
            fits = value is None or isinstance(value, type(rules[key])) or key in odd
            if fits and not (value is None and key not in odd and key not in NEEDED):
                settings[key] = rules[key]
        elif key == "rope_parameters":
            if isinstance(value, dict) and "mrope_section" in value:
                settings[key] = value | {"mrope_section": rules.get("mrope_section", [2, 3, 3])}
        elif key.endswith("_token_id") and isinstance(value, int):
            place = ("pad", "bos", "eos").index(key[:3]) if key[:3] in ("pad", "bos", "eos") else 3
            settings[key] = place
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        part = type(default[name]) if hasattr(default.get(name), "to_dict") else part
        if hasattr(part, "model_type") and depth < 3:
            with suppress(Exception):
                settings[name] = sized(part, tried, depth + 1).to_dict()
    config = config_class(**settings)
    if hasattr(config, "vocab_size") and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    two_parts = getattr(config, "is_encoder_decoder", False)
    if two_parts and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


NEEDED = {"head_dim", "num_key_value_heads", "pad_token_id"}  # also where the default is none


def shake(model: nn.Module) -> None:
    """Every block is to do something: norms, scales and what starts at zero are moved a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for theta in model.parameters():
            if not theta.is_floating_point() or not theta.numel():
                continue
            if not theta.isfinite().all() or float(theta.abs().max()) > 1e4:
                theta.copy_(torch.randn(theta.shape, generator=generator) * 0.1)
            flat = theta.dim() < 2 or float(theta.std()) < 1e-3
            scale = 0.1 if flat else 0.05
            theta.add_(scale * torch.randn(theta.shape, generator=generator).to(theta.dtype))


def runs(model: nn.Module, tried: Iterator[Any]) -> Any:
    """The first batch that the model runs on, with finite numbers."""
    reason = "no batch was made"
    for batch in tried:
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                out = model(**batch) if isinstance(batch, dict) else model(batch)
        except Exception as error:
            reason = one_line(error)
            continue
        parts = out.values() if isinstance(out, dict) else [out]
        if all(
            p.isfinite().all() for p in parts if isinstance(p, Tensor) and p.dtype.is_floating_point
        ):
            return batch
        reason = "its answers are not finite"
    raise ZooError(f"runs on no batch that was tried: {reason}")


def one_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:160]


def _of_transformers() -> Iterator[Member]:
    from transformers.models.auto import configuration_auto, modeling_auto

    tables = {
        head: getattr(modeling_auto, f"MODEL_{name}_MAPPING_NAMES".replace("__", "_"))
        for name, head in HEADS.items()
    }
    for kind in sorted(configuration_auto.CONFIG_MAPPING_NAMES):
        for head, table in tables.items():
            names = table.get(kind, ())
            for name in [names] if isinstance(names, str) else names[:1]:
                yield Member("transformers", kind, name, partial(_transformer, kind, name, head))


def _transformer(kind: str, name: str, head: str) -> tuple[nn.Module, Any]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_class, model_class = CONFIG_MAPPING[kind], getattr(transformers, name)
    except Exception as error:
        raise ZooError(f"does not import: {one_line(error)}") from error
    reason = ""
    for tried in TRIES:
        try:
            config = sized(config_class, tried)
            if head == "CausalLM" and hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
        except Exception as error:
            reason = reason or f"does not build: {one_line(error)}"
            continue
        if size > MOST_PARAMETERS:
            reason = (
                reason or f"has {size / 1e6:.0f} million parameters by the rules for small ones"
            )
            continue
        try:
            torch.manual_seed(0)
            model = model_class(config).float().eval()
            shake(model)
            return model, runs(model, batches(model, head))
        except Exception as error:
            reason = reason or (str(error) if isinstance(error, ZooError) else one_line(error))
    raise ZooError(reason)


def _by_hand() -> Iterator[Member]:
    from zoo_by_hand import NETWORKS

    for name, (make, inputs) in NETWORKS.items():

        def built(make: Any = make, inputs: Any = inputs) -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            model = make().eval()
            shake(model)
            return model, runs(model, iter([inputs()]))

        yield Member("torch", "by hand", name, built)


def _declared(name: str) -> Any:
    """A library of vision; operators that the installed torch has not are declared without code."""
    declared = []
    for _ in range(20):
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            missing = str(error).partition("operator torchvision::")[2].split(" ")[0]
            if not missing:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing}(Tensor a, Tensor b, float c) -> Tensor")
            declared.append(library)
            KEPT.append(library)
            _forget(name)
    raise ImportError(f"{name}: too many operators are missing")


KEPT: list[Any] = []  # a torch.library.Library takes its operators with it when it goes


def _forget(name: str) -> None:
    """Half-imported modules, so that the import starts anew."""
    import sys

    for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", name)]:
        del sys.modules[module]


def _absent(library: str, error: BaseException) -> Member:
    message = f"{library} does not import: {one_line(error)}"

    def make() -> tuple[nn.Module, Any]:
        raise ZooError(message)

    return Member(library, "—", "—", make)


TORCHVISION = (
    "alexnet", "vgg11", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1",
    "regnet_x_400mf", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t",
    "maxvit_t", "googlenet", "inception_v3",
)  # fmt: skip


def _of_torchvision() -> Iterator[Member]:
    try:
        models = _declared("torchvision").models
    except Exception as error:
        yield _absent("torchvision", error)
        return
    for name in TORCHVISION:
        yield Member("torchvision", name, "classifier", partial(_vision, models.get_model, name))


TIMM = (
    "resnet18", "resnet50", "resnetv2_50", "resnext50_32x4d", "seresnet18", "regnetx_002",
    "regnety_002", "convnext_atto", "convnextv2_atto", "efficientnet_b0", "mobilenetv3_small_050",
    "mobilenetv2_035", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "mixer_s16_224",
    "gmlp_ti16_224", "resmlp_12_224", "poolformer_s12", "caformer_s18", "convmixer_768_32",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "pvt_v2_b0", "maxvit_tiny_rw_224",
    "coat_tiny", "levit_128s", "mobilevit_xxs", "edgenext_xx_small", "davit_tiny",
    "twins_svt_small", "densenet121", "vgg11", "nfnet_f0", "hrnet_w18_small",
    "tiny_vit_5m_224", "repvgg_a0",
    "ghostnet_050", "fastvit_t8", "focalnet_tiny_srf", "efficientformer_l1", "crossvit_tiny_240",
    "volo_d1_224", "visformer_tiny", "inception_next_tiny",
)  # fmt: skip


def _of_timm() -> Iterator[Member]:
    try:
        _declared("torchvision")
        make = _declared("timm").create_model
    except Exception as error:
        yield _absent("timm", error)
        return
    for name in TIMM:
        yield Member("timm", name, "classifier", partial(_vision, make, name))


def _vision(make: Callable[..., nn.Module], name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    try:
        model = make(name, num_classes=CLASSES).eval()
    except Exception as error:
        raise ZooError(f"does not build: {one_line(error)}") from error
    shake(model)
    sizes = (64, 224, 240, 256)
    return model, runs(model, (torch.randn(2, 3, size, size) for size in sizes))
