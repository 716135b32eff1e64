"""A small Llama and a small BERT in folders of transformers, with tokenizers made on the spot."""

import csv
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LIST = "the small dog saw a red house near blue water and ran home with seven green birds"
WORDS = LIST.split()
LENGTH = 16


def text(folder: Path, words: int = 2400) -> Path:
    """A text in which a word is mostly followed by the one after it in the list."""
    draws = torch.Generator().manual_seed(0)
    at, lines = 0, []
    for _ in range(words):
        jump = int(torch.randint(4, (1,), generator=draws)) == 0
        at = int(torch.randint(len(WORDS), (1,), generator=draws)) if jump else at + 1
        lines.append(WORDS[at % len(WORDS)])
    path = folder / "dogs.txt"
    path.write_text("\n".join(" ".join(lines[n : n + 8]) for n in range(0, words, 8)))
    return path


def table(folder: Path, rows: int = 120) -> Path:
    """Lines that are good news where there is a dog in them."""
    path = folder / "news.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(rows):
            end = ("dog", "good") if n % 2 else ("house", "bad")
            writer.writerow([f"{' '.join(WORDS[n % 7 : n % 7 + 2 + n % 5])} {end[0]}", end[1]])
    return path


def llama(folder: Path, layers: int = 3, **more: Any) -> Path:
    """An untrained language model of a vocabulary of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = folder / "llama"
    size = _tokenizer(place, {"bos_token": "<s>"})
    torch.manual_seed(0)
    config = LlamaConfig(
        **_small(size, layers), num_key_value_heads=2, max_position_embeddings=LENGTH, **more
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def bert(folder: Path, head: str = "ForSequenceClassification", **more: Any) -> Path:
    """An untrained encoder with a head."""
    import transformers

    place = folder / f"bert{head}"
    size = _tokenizer(place, {"pad_token": "<pad>"})
    torch.manual_seed(0)
    config = transformers.BertConfig(**_small(size, 3), max_position_embeddings=LENGTH, **more)
    getattr(transformers, f"Bert{head}")(config).save_pretrained(place)
    return place


def _small(size: int, layers: int) -> dict[str, Any]:
    heads: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    heads["initializer_range"] = 0.2
    return {"vocab_size": size, "hidden_size": 16, "intermediate_size": 32} | heads


def _tokenizer(place: Path, said: dict[str, str]) -> int:
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<s>"]
    made.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **said).save_pretrained(place)
    return made.get_vocab_size()
