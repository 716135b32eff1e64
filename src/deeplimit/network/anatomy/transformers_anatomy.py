"""Models of transformers: how they are called, and what a cut changes in their configuration."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.anatomy import layer_numbers
from deeplimit.network.anatomy.block_anatomy import BlockAnatomy
from deeplimit.network.anatomy.config_depth import set_layers
from deeplimit.network.modes import Inputs, to_precision

EXAMPLE_SIZE, EXAMPLE_TOKENS = 64, 4


class TransformersAnatomy(BlockAnatomy):
    """A model with a `config`. Nothing of transformers is imported: the model brings it along."""

    model: Any

    @property
    def backbone(self) -> Any:
        """The part under the head: model.vit, model.bert, …."""
        return getattr(self.model, self.model.base_model_prefix)

    def run(self, x: Inputs) -> Tensor:
        """The logits of the model's own forward; x is its main input, or inputs by name."""
        given = {self.model.main_input_name: x} if isinstance(x, Tensor) else dict(x)
        parameter = next(self.model.parameters())
        if not torch.is_autocast_enabled(parameter.device.type):
            given = dict(to_precision(given, parameter.dtype))
        if self.tokens:
            given["use_cache"] = False  # type: ignore[assignment]
        return cast(Tensor, self.model(**given, return_dict=True).logits)

    def example(self) -> Inputs | None:
        """A random image of the configured size, or a few tokens."""
        generator = torch.Generator().manual_seed(0)
        config = self.model.config
        if self.model.main_input_name == "input_ids":
            words = config.get_text_config().vocab_size
            return torch.randint(words, (2, EXAMPLE_TOKENS), generator=generator)
        size = getattr(config, "image_size", None) or EXAMPLE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return torch.randn(shape, generator=generator)

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """Whether the model can do without these layers.

        Raises:
            InputError: as for any model; it is quantised, or a layer's index matters.
        """
        removed = layer_numbers(removed)
        super().check_removable(removed)
        name = type(self.model).__name__
        if removed and getattr(self.model, "is_quantized", False):
            raise InputError(
                f"{name} is quantised; cut the model it was made from, then quantise the result"
            )
        why = self.index_matters(removed)
        if why is not None:
            raise InputError(f"{name}: {why}; only layers at the end can be removed")

    def shortened(self, model: nn.Module, kept: list[list[int]]) -> None:
        """The configuration's depth and what goes with it."""
        config = cast(Any, model).config
        self.set_depth(config, kept)
        if hasattr(config, "stage_names") and not hasattr(config, "depths"):
            _name_stages(config, *kept)

    @abstractmethod
    def set_depth(self, config: Any, kept: list[list[int]]) -> None:
        """Writes the new depth, or depths, into the configuration."""

    @classmethod
    def _unchecked(cls, model: nn.Module) -> "TransformersAnatomy":
        made = cls.__new__(cls)
        made.model = model
        return made


class OneStack(TransformersAnatomy):
    """One list of layers of one shape: `num_hidden_layers` of them."""

    stages = 1

    def control(self, n: int) -> list[nn.Parameter]:
        """All parameters of the layer: attention and MLP each add to the state."""
        return [p for block in self.layers[n].controls for p in block.parameters()]

    def set_depth(self, config: Any, kept: list[list[int]]) -> None:
        """`num_hidden_layers`, and every list that has an entry for each layer."""
        set_layers(config, kept[0], self.horizon)


def _name_stages(config: Any, kept: list[int]) -> None:
    """Where every layer is a stage: what a backbone puts out of those left, or the last stage."""
    before = len(config.stage_names)
    wanted = {index % before for index in config.out_indices}
    config.stage_names = ["stem", *(f"stage{n}" for n in range(1, len(kept) + 1))]
    # Of a layer that was repeated the last one puts out what it did.
    ends = {old: new for new, old in enumerate([0, *(n + 1 for n in kept)])}
    left = sorted(new for old, new in ends.items() if old in wanted)
    config.out_indices = left or [len(kept)]  # sets out_features too
