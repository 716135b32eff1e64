"""A linear or convolutional layer as what its hidden neurons read or write."""

from typing import Any, cast

from torch import Tensor, nn

from deeplimit.errors import InputError


class NeuronLayer:
    """A linear or convolutional layer, by the hidden neurons on one side of it."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer
        self.transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        known = isinstance(layer, nn.Linear | nn.Conv2d) or self.transposed
        if not known or getattr(layer, "groups", 1) != 1:
            raise InputError(
                f"a hidden layer is {layer}; expected a linear layer or a convolution in one group"
            )
        if not cast(Tensor, layer.weight).is_floating_point():
            raise InputError(f"a hidden layer is quantised ({type(layer).__name__})")

    @property
    def rows(self) -> Tensor:
        """[M, *shape]: what each neuron reads."""
        weight = widened(self.layer.weight.detach())
        return weight.T if self.transposed else weight

    @property
    def columns(self) -> Tensor:
        """[M, d, …]: what each neuron writes."""
        weight = widened(self.layer.weight.detach())
        return weight if self.transposed else weight.transpose(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """That of the layer, if it has one."""
        return widened(self.layer.bias.detach()) if self.has_bias else None

    @property
    def has_bias(self) -> bool:
        """Whether it has one."""
        return getattr(self.layer, "bias", None) is not None

    def set_rows(self, rows: Tensor, bias: Tensor | None) -> None:
        """With M neurons; the sizes that the layer says of itself follow."""
        self._set(rows.T if self.transposed else rows, bias)
        for name in ("out_features", "out_channels", "nf"):
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(rows))

    def set_columns(self, columns: Tensor, bias: Tensor | None) -> None:
        """With M neurons."""
        self._set(columns if self.transposed else columns.transpose(0, 1), bias)
        for name in ("in_features", "in_channels", "nx"):
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(columns))

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        replace_value(self.layer, "weight", weight)
        if bias is not None and (self.has_bias or bool(bias.any())):
            replace_value(self.layer, "bias", bias)


def replace_value(module: nn.Module, name: str, value: Tensor) -> None:
    """A value of another size; in half precision where the parameter or buffer was."""
    old = getattr(module, name)
    dtype = value.dtype if old is None or is_wide(old) else old.dtype
    value = value.detach().to(dtype).contiguous().clone()
    if name in module._buffers:
        setattr(module, name, value)
    else:
        learns = old is None or old.requires_grad
        setattr(module, name, nn.Parameter(value, requires_grad=learns))


def is_wide(x: Tensor) -> bool:
    """Whether a tensor has more than half precision."""
    return x.dtype.itemsize >= 4


def widened(x: Tensor) -> Tensor:
    """In float32 what has half precision."""
    return x if is_wide(x) else x.float()
