"""What cannot be seen of a block: its shortcut where it changes the shape, its branches' ends."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

ACTIVATIONS = ("act3", "act2", "act", "relu", "activation")  # a block's last one, whatever its name
# A row per kind of block: modules or parameters, all of which it has, in which its residual
# branches end. The first row that fits is taken; norms that end a branch come before what is
# inside it.
ENDS: tuple[tuple[str, ...], ...] = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("layer_scale1", "layer_scale2"),
    ("ls1.gamma", "ls2.gamma"),
    ("layer_scale_parameter",),
    ("layer_scale",),
    ("gamma",),
    ("self_attn.o_proj", "mlp.down_proj"),
    ("self_attn.o_proj", "mlp.c_proj"),
    ("self_attn.dense", "mlp.fc2"),
    ("self_attn.out_proj", "mlp.fc2"),
    ("attn.c_proj", "mlp.c_proj"),
    ("attn.proj", "mlp.fc2"),
    ("attention.o_proj", "mlp.fc2"),
    ("attention.output.dense", "output.dense"),
    ("self_attention.out_proj", "mlp.3"),
    ("self_attn.out_proj", "linear2"),
    ("bn3",),
    ("bn2",),
    ("layer.2.normalization",),
    ("layer.1.normalization",),
    ("pwconv2",),
    ("mlp.fc2",),
)


def shortcut_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """σ(projection(x)) of a residual block that changes the shape; None where it has no such."""
    for name in ("downsample", "shortcut"):
        projection = getattr(block, name, None)
        if not isinstance(projection, nn.Module) or isinstance(projection, nn.Identity):
            continue
        activation = next(
            (getattr(block, n) for n in ACTIVATIONS if callable(getattr(block, n, None))), None
        )
        if activation is not None:
            return lambda x: cast(Any, activation)(projection(x))
    return None


def ends_of(block: nn.Module) -> list[nn.Parameter] | None:
    """The parameters in which the residual branches of a block end; None of an unknown kind."""
    for paths in ENDS:
        found = [_parameters(block, path) for path in paths]
        if all(found):
            return [p for part in found for p in part]
    return None


def _parameters(block: nn.Module, path: str) -> list[nn.Parameter]:
    place: Any = block
    for name in path.split("."):
        place = getattr(place, name, None)
    if isinstance(place, nn.Parameter):
        return [place]
    return list(place.parameters()) if isinstance(place, nn.Module) else []
