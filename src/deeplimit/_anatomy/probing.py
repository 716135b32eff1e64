"""Runs that try a model out: on examples made for it, and its head on other inputs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit._anatomy.injection import by_stage, devices_of, gap
from deeplimit._anatomy.inputs import (
    FAILS,
    TOKENS,
    call,
    first_sample,
    first_token,
    main_input,
    others,
    parameters_of,
    placed,
    small,
    told,
)
from deeplimit._anatomy.stacks import Watch
from deeplimit.errors import InputError

BATCH, SIZES = 2, (64, 32, 224, 28)


def examples(model: nn.Module) -> Iterator[Inputs]:
    """Small batches that the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    if main_input(model) is not None:
        yield from _configured(cast(Any, model), generator)
        return
    weights = ((m, getattr(m, "weight", None)) for m in model.modules())
    first, weight = next(
        ((m, w) for m, w in weights if isinstance(w, Tensor) and w.dim() > 1), (None, None)
    )
    if isinstance(first, nn.Embedding):
        yield torch.randint(first.num_embeddings, (BATCH, TOKENS), generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() >= 3:  # of a convolution
        groups = getattr(first, "groups", 1)
        own = getattr(model, "image_size", None) or _patched(model)
        sizes = [own, *SIZES] if isinstance(own, int | tuple) else list(SIZES)
        for size in sizes:
            sides = size if isinstance(size, tuple) else (size,) * (weight.dim() - 2)
            shape = (BATCH, weight.shape[1] * groups, *cast(tuple[int, ...], sides))
            yield torch.randn(shape, generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() == 2:
        yield torch.randn(BATCH, weight.shape[1], generator=generator)
        yield torch.randn(BATCH, TOKENS, weight.shape[1], generator=generator)
    widths = {p.shape[-1] for p in model.parameters() if p.dim()}
    for width in sorted(widths)[:4]:
        yield torch.randn(BATCH, width, generator=generator)
        yield torch.randn(BATCH, TOKENS, width, generator=generator)


def _patched(model: nn.Module) -> Any:
    return getattr(getattr(model, "patch_embed", None), "img_size", None)


def _configured(model: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Inputs by the names that a model of transformers gives to them."""
    config, main, takes = model.config, model.main_input_name, parameters_of(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None) or 2
    special = {
        getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "decoder_start")
    }
    allowed = [i for i in range(min(words, 1000)) if i not in special] or [0]
    chosen = torch.randint(len(allowed), (BATCH, TOKENS), generator=generator)
    ids = torch.tensor(allowed)[chosen]
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or SIZES[0]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or 3
    made: dict[str, Tensor] = {}
    if main == "input_ids" or (hasattr(config, "text_config") and "input_ids" in takes):
        made["input_ids"] = ids
    if main == "pixel_values" or (hasattr(config, "vision_config") and "pixel_values" in takes):
        shape = (BATCH, channels, cast(int, height), cast(int, width))
        made["pixel_values"] = torch.randn(shape, generator=generator)
    if main == "input_values":
        strides = math.prod(getattr(config, "conv_stride", None) or [1])
        made[main] = torch.randn(BATCH, max(12 * strides, 400), generator=generator)
    if main == "input_features":
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        length = 2 * (getattr(config, "max_source_positions", None) or 50)
        made[main] = torch.randn(BATCH, bands, length, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = ids
    if made:
        yield made
    elif isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield dict(model.dummy_inputs)


@contextmanager
def alike(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and one random state for every run."""
    with torch.random.fork_rng(devices_of(model)), evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        yield


def watched(model: nn.Module, example: Any) -> tuple[Watch, Any, Tensor]:
    """What was seen in a run on the example, which is made where none was given.

    Raises:
        InputError: something else is given, or the model does not run on it.
    """
    if example is not None and not isinstance(example, Tensor | Mapping | tuple | list):
        raise InputError(
            f"{shown(example)} given as the example; expected a batch of the model's inputs: a "
            "tensor, tensors by name, or a tuple"
        )
    reason = ""
    for given in examples(model) if example is None else [example]:
        x, watch = placed(model, given), Watch(model)
        try:
            with alike(model):
                return watch, x, watch.run(partial(call, model, x))
        except FAILS as error:
            reason = reason or told(error)  # of the likeliest
    what = "the example" if example is not None else "an example made for it"
    raise InputError(
        f"{type(model).__name__} does not run on {what} ({reason or 'none could be made'}); give a "
        "batch of its inputs: anatomy(model, example=…), and that in place of the model"
    )


def small_part(
    x: Any, states: Callable[[Any], tuple[list[Tensor], Tensor]]
) -> tuple[Any, list[Tensor], Tensor]:
    """A small part of a batch, or all of one that cannot be cut; its states and its logits."""
    part = small(x)
    try:
        return part, *states(part)
    except FAILS:
        return x, *states(x)


def check_answer(model: nn.Module, own: Tensor) -> None:
    """Raises InputError for an answer that is no logits."""
    name = type(model).__name__
    if not own.is_floating_point() or not own.dim():
        raise InputError(
            f"{name} answers {shown(own)}; expected logits: numbers with a fraction, of each sample"
        )
    if bool(own.isnan().any()):
        raise InputError(
            f"{name} answers NaN to its example, with which no reading agrees: its parameters are "
            "not finite, or the example does not fit; give a batch of its inputs: "
            "anatomy(model, example=…)"
        )


class HeadProbe:
    """Injects the last state while the model runs on other inputs than it is of.

    Args:
        model: whose head is tried.
        injected: (states by stage, inputs to run on) ↦ logits.
        x: a small batch.
        own: the model's own logits of it.
    """

    def __init__(
        self,
        model: nn.Module,
        injected: Callable[[dict[int, Tensor], Any], Tensor],
        x: Any,
        own: Tensor,
    ):
        self.model, self.x, self.own = model, x, own
        self._injected = injected
        self._why = ""

    def reads_tokens(self, last: Tensor) -> bool:
        """Whether each token is read by itself, whatever the inputs."""
        if last.shape[1] < 2 or self.own.shape[:-1] != last.shape[:-1]:  # one tells nothing
            return False
        each, expected = last.flatten(0, 1)[:, None], self.own.flatten(0, 1)[:, None]
        return self._whatever({0: each}, [first_token(o) for o in self._others()], expected)

    def reads_states(self, states: Sequence[Tensor], stages: Sequence[int]) -> bool:
        """Whether states of many layers are read at once, whatever the inputs."""
        if stages[-1] == 0:  # nothing but the head to be tried
            states, stages = [states[0], states[-1]], stages[-2:]
        drivers = [first_sample(o) for o in self._others()]
        return self._whatever(by_stage(states, stages), drivers, self.own)

    def check(self, at: dict[int, Tensor], name: str | None) -> None:
        """Raises InputError unless the last state has the model's own logits on its own inputs."""
        z = self._tried(at, self.x)
        apart = gap(z, self.own)
        if apart is None:
            return
        how = f"the logits of its last state differ from its own {apart}"
        if z is None:
            how = f"it does not run ({self._why})"
        raise InputError(
            f"{type(self.model).__name__} cannot be read: with its blocks bypassed, {how}, so that "
            f"something but the last block's state decides them; the blocks read are those of "
            f"{name or 'the list given'}"
        )

    def _others(self) -> list[Any]:
        return others(self.model, self.x)

    def _whatever(self, at: dict[int, Tensor], drivers: Sequence[Any], own: Tensor) -> bool:
        """Whether the last states' logits are `own` on all inputs; the first the model must take.

        The others may be such as it does not.
        """
        rows = sum(map(len, at.values()))
        for n, driver in enumerate(drivers):
            z = self._tried(at, driver)
            if z is None and n:
                continue
            if z is None or len(z) != rows or gap(z[-len(own) :], own) is not None:
                return False
        return True

    def _tried(self, at: dict[int, Tensor], x: Any) -> Tensor | None:
        try:
            return self._injected(at, x)
        except (InputError, *FAILS) as error:
            self._why = told(error)
            return None
