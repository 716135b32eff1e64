"""`text:FILE` and `table:FILE`: texts as the tokens that a model of transformers reads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from deeplimit.data import splitting
from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.registry import Request
from deeplimit.data.tables import opened_parquet
from deeplimit.errors import InputError, describe_error, several
from deeplimit.memory import require
from deeplimit.reading import reading

IGNORED = -100  # the target of a token that predicts nothing
LENGTH = 256  # tokens of a window, if the model takes so many
TENTHS = {"train": 8, "validation": 1, "test": 1}
BYTES = 200  # that tokenizers take for each letter of a text
TEXT, LABEL = ("text", "sentence"), ("label", "labels")
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
REMEDY = "give a model of transformers with its tokenizer: transformers:FOLDER"


@dataclass(frozen=True)
class TokenSplit(Split):
    """Texts as tokens.

    Attributes:
        x: int64 [n, L].
        y: int64 [n], the class of each text; or [n, L], the token that follows each one, −100
            where that does not count.
        padding: the token that fills up short texts, whose places in x are −1; None where all texts
            are as long. With it a batch is tensors by name, input_ids and attention_mask.
        vocabulary: how many tokens there are where they are the targets; None for classes.
    """

    x: Int64[Tensor, "samples tokens"]
    y: Int64[Tensor, " labels"] | Int64[Tensor, "samples tokens"]
    padding: int | None = None
    vocabulary: int | None = None

    def batch(self, indices: Tensor | np.ndarray | Sequence[int]) -> tuple[Any, Tensor]:
        """Tokens and targets at `indices`."""
        x, y = super().batch(indices)
        if self.padding is None:
            return x, y
        there = x >= 0
        tokens = x.masked_fill(~there, self.padding)
        return {"input_ids": tokens, "attention_mask": there.long()}, y


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, and what its config says of texts."""

    name: str
    tokenizer: Any
    config: Any

    @classmethod
    def of(cls, request: Request) -> Reader:
        """Makes that of the model which is to read the data; runs no code of the folder's."""
        if request.model is None:
            raise InputError(
                f"data set {request.name!r} is text, which a model has to read; {REMEDY}"
            )
        try:
            import transformers
        except ImportError as error:
            raise InputError(
                f"data set {request.name!r} needs transformers: pip install deeplimit[hub]"
            ) from error
        where: Any = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(request.model, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(request.model, **where)
        except Exception as error:  # the library's own and its parsers': all mean unread
            raise InputError(
                f"{request.model}: no tokenizer that can be read "
                f"({describe_error(error)}); {REMEDY}"
            ) from error
        return cls(request.model, tokenizer, config.get_text_config())

    def length(self, asked: int | None) -> int:
        """Tokens of a window: what is asked for, or what the model takes, 256 at most."""
        most = getattr(self.config, "max_position_embeddings", None) or LENGTH
        most = min(most, self.tokenizer.model_max_length)
        if asked is not None and asked > most:
            raise InputError(
                f"length is {asked}, but {self.name} reads {most} tokens at most; give fewer"
            )
        return asked or min(LENGTH, most)

    def tokens(self, text: str) -> np.ndarray:
        """Of a long text, int64 [T], without what marks its beginning and end."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.checked(np.array(found, dtype=np.int64))

    def checked(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens, all of which the model has."""
        if len(tokens) and tokens.max() >= self.config.vocab_size:
            raise InputError(
                f"{self.name}: its tokenizer gives the token {tokens.max()}, the model has "
                f"{self.config.vocab_size}; give the tokenizer that the model was trained with"
            )
        return tokens


def load_text(request: Request) -> DataSet:
    """Loads a text file in windows of one length: 80 % of it for training, then 10 % and 10 %.

    The parts are cut where a line ends, before anything is tokenised, so that none has a token of
    another. A window begins with the token for that, where the tokenizer has one; it predicts each
    of its other tokens once. What is left of a part behind its last window is left out.
    """
    reader, path = Reader.of(request), Path(request.target).expanduser()
    with reading(path, "no text in UTF-8", "give a text file"):
        require(BYTES * path.stat().st_size, str(path), "give a part of it")
        text = path.read_text(encoding="utf-8")
    length, splits, start = reader.length(request.length), {}, 0
    for (part, tenths), done in zip(TENTHS.items(), accumulate(TENTHS.values()), strict=True):
        end = len(text) if done == 10 else _line_end(text, len(text) * done // 10)
        tokens = reader.tokens(text[start:end])
        if len(tokens) < length:
            raise InputError(
                f"{path}: too short: its {part} part, {tenths * 10} % of the text, has "
                f"{several(len(tokens), 'token')}, a window {length}; give a longer text, or a "
                "smaller length"
            )
        splits[part] = _windows(tokens, length, reader)
        start = end
    return DataSet(request.name, (), **splits)


def _line_end(text: str, place: int) -> int:
    """The first place behind the end of a line, from this one on; without any, of a word."""
    for mark in ("\n", " "):
        found = text.find(mark, place)
        if 0 <= found < place + len(text) // 20:
            return found + 1
    return place


def _windows(tokens: np.ndarray, length: int, reader: Reader) -> TokenSplit:
    y = torch.from_numpy(tokens[: len(tokens) // length * length]).view(-1, length)
    begin = reader.tokenizer.bos_token_id
    if begin is None:  # the first token of a window is read, and predicted by nothing
        x, end = y, y.new_full((len(y), 1), IGNORED)
        return TokenSplit(x, torch.cat([y[:, 1:], end], 1), vocabulary=reader.config.vocab_size)
    x = torch.cat([y.new_full((len(y), 1), begin), y[:, :-1]], 1)
    return TokenSplit(x, y, vocabulary=reader.config.vocab_size)


def load_table(request: Request) -> DataSet:
    """Loads a table of texts and their labels, .csv, .jsonl or .parquet; 60/20/20, stratified.

    The texts are in the column `text` or `sentence`, the labels, numbers or words, in `label`.
    Where the model is a classifier already they are numbered as it numbers its classes.
    """
    reader, path = Reader.of(request), Path(request.target).expanduser()
    texts, labels = _columns(path)
    y, names = _numbered(np.array(labels), reader, f"{path}: label")
    length = reader.length(request.length)
    require(16 * BYTES + 4 * 8 * length * len(texts), str(path), "give a part of it")
    found = reader.tokenizer(texts, truncation=True, max_length=length, verbose=False)["input_ids"]
    x = np.full((len(texts), max(map(len, found))), -1, dtype=np.int64)
    for row, tokens in zip(x, found, strict=True):
        row[: len(tokens)] = tokens
    padding = reader.tokenizer.pad_token_id
    padding = getattr(reader.config, "pad_token_id", None) if padding is None else padding
    if padding is None:
        raise InputError(
            f"{reader.name}: its tokenizer has no padding token, so texts of several lengths make "
            "no batch; set one (tokenizer.pad_token = …) and save both tokenizer and config"
        )
    x, rows = reader.checked(x), splitting.sixty_twenty_twenty(y, names, str(path))
    parts = splitting.splits_of(x, y, rows)
    splits = {p: TokenSplit(split.x, split.y, padding=padding) for p, split in parts.items()}
    return DataSet(request.name, names, **splits)


def _columns(path: Path) -> tuple[list[str], list[Any]]:
    """Texts and labels."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: expected a table, {', '.join(FORMATS)}, with a column for texts")
    import datasets

    with reading(path, f"no table in {kind}", "write it again"):
        if kind == "parquet":
            opened_parquet(path)
        bar = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            with tempfile.TemporaryDirectory() as at:
                read = getattr(datasets.Dataset, f"from_{kind}")
                table = read(str(path), cache_dir=at, keep_in_memory=True)
        finally:
            if not bar:
                datasets.enable_progress_bars()
        found = [next((c for c in names if c in table.column_names), "") for names in (TEXT, LABEL)]
        for column, names, missing in zip(found, (TEXT, LABEL), ("texts", "labels"), strict=True):
            if not column:
                raise InputError(
                    f"{path}: no column of {missing} among {', '.join(table.column_names)}; "
                    f"expected {' or '.join(names)}: rename it"
                )
        texts, labels = (table[column][:] for column in found)
    empty = [n for n, row in enumerate(zip(texts, labels, strict=True)) if None in row]
    if empty or not texts or not all(isinstance(text, str) for text in texts):
        what = f"row {empty[0] + 1} has an empty cell" if empty else "its texts are no words"
        raise InputError(f"{path}: {what if texts else 'no rows'}; give a text and a label in each")
    return texts, labels


def _numbered(
    labels: np.ndarray, reader: Reader, source: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as classes, numbered as the model numbers them where it is a classifier already."""
    config = reader.config
    trained = any("ForSequenceClassification" in a for a in config.architectures or ())
    names = [str(config.id2label[n]) for n in range(config.num_labels)] if trained else []
    if labels.dtype.kind in "iu":
        numbers = splitting.integer_labels(labels, source)
        declared = names if numbers.max(initial=0) < len(names) else None
        classes, called = splitting.number_classes({"train": numbers}, declared, source)
        return classes["train"], called
    words = [str(label) for label in labels]
    called = tuple(sorted(set(words)))
    known = {name.lower(): n for n, name in enumerate(names)}
    if len(called) < 2:
        raise InputError(f"{source}: only one class ({called[0]}); give labels of several")
    if {word.lower() for word in called} <= set(known):
        return np.array([known[word.lower()] for word in words]), tuple(names)
    return np.array([called.index(word) for word in words]), called
