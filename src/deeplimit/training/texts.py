"""Models of text in a run: what is measured of them, their tokenizer, what they are checked for."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.inputs import call
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_files import RunFiles, as_vouched

RISE = 0.05  # nats a token by which a cut may raise the loss: a perplexity 5 % higher
PREFIXES = ("text:", "table:")  # of data that a tokenizer reads
CAUSAL = 1e-3  # of the largest logit; more is no rounding


class WindowLoss(nn.Module):
    """The mean cross-entropy of each window's next tokens, in nats: [B, L, C] and [B, L] give [B].

    A sample is a window then: its tokens are not independent of each other.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the tokens of a window whose target is not −100."""
        values = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        counts = (targets != IGNORED).sum(1).clamp(min=1)
        return values.view_as(targets).sum(1) / counts


def reader_of(recipe: Recipe, run: RunFiles | None = None) -> str | None:
    """The folder, or the hub's name, of the model whose tokenizer reads a recipe's texts.

    It is the run's own, once there is one, so that the folder which it came from may go.
    """
    if not recipe.data.startswith(PREFIXES):
        return None
    own = None if run is None else run.find("model")
    if own is not None and own.path.is_dir():
        return str(own.path)
    kind, _, name = (recipe.model or "").partition(":")
    if kind != "transformers":
        found = Path(recipe.model or "") / "model"  # of a run
        return str(as_vouched(found)) if found.is_dir() else None
    return str(as_vouched(Path(name))) if Path(name).is_dir() else name


def task_of(data: DataSet) -> str:
    """What transformers calls that which a model of these data does."""
    if data.vocabulary is not None:
        return "CAUSAL_LM"
    return "SEQUENCE_CLASSIFICATION" if data.is_text else "IMAGE_CLASSIFICATION"


@torch.no_grad()
def check_causal(model: nn.Module, x: Tensor, logits: Tensor, spec: str) -> None:
    """Refuses a model whose answer to a token depends on those after it; x is [1, L].

    Raises:
        InputError: so it does, as an encoder's: it would read what it is to predict.
    """
    other = x.clone()
    other[:, -1] = (x[:, -1] + 1) % logits.shape[-1]
    apart = (call(model, other) - logits)[:, :-1].abs().max()
    if apart > CAUSAL * logits.abs().max():
        raise InputError(
            f"{spec} looks at the tokens that follow, so it is an encoder and no model of the next "
            "token; give a decoder such as Llama or GPT-2, or a text classifier and --data "
            "table:FILE"
        )


def check_words(model: Any, data: DataSet, spec: str) -> None:
    """Refuses labels in words that a trained classifier does not know: in which order, none says.

    Raises:
        InputError: so it is.
    """
    names = [str(name) for name in getattr(model.config, "id2label", {}).values()]
    words = not all(name.isdigit() for name in data.class_names)
    if data.vocabulary is None and words and names != [*data.class_names]:
        raise InputError(
            f"{data.name}: labels {', '.join(data.class_names[:4])}, while {spec} calls its "
            f"classes {', '.join(names[:4])}; number them in the model's order, from 0 on"
        )
