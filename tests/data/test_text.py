"""Texts as tokens: windows that do not overlap, tables, and what is refused."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from small_texts import LENGTH, WORDS, bert, llama, table, text

from deeplimit.data import iter_batches, load_dataset
from deeplimit.errors import InputError

pytest.importorskip("transformers", reason="the extra `hub` is not installed")
datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")


def test_windows_are_the_text_in_order_and_each_token_is_predicted_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, path = llama(tmp_path), text(tmp_path)
    data = load_dataset(f"text:{path}", model=str(model), length=8)
    splits = (data.train, data.validation, data.test)
    words = path.read_text().split()
    tokenizer = AutoTokenizer.from_pretrained(model)
    place = 0
    for split in splits:
        said = tokenizer.convert_ids_to_tokens(split.y.flatten().tolist())
        while words[place : place + 3] != said[:3]:  # what the part before has left over
            place += 1
        assert words[place : place + len(said)] == said
        place += len(said)
        assert torch.equal(split.x[:, 1:], split.y[:, :-1])
        assert bool((split.x[:, 0] == tokenizer.bos_token_id).all())
    assert len(words) - place < 8
    assert [len(split) for split in splits] == [240, 30, 30]
    assert data.vocabulary == data.classes == len(WORDS) + 3
    x, y = next(iter(iter_batches(data.train, 4, seed=0)))
    assert x.shape == y.shape == (4, 8)


def test_without_a_token_for_the_beginning_the_first_one_is_not_predicted(tmp_path: Path) -> None:
    data = load_dataset(f"text:{text(tmp_path)}", model=str(bert(tmp_path)))
    assert data.shape == (LENGTH,)  # as many as the model reads
    assert torch.equal(data.test.x[:, 1:], data.test.y[:, :-1])
    assert bool((data.test.y[:, -1] == -100).all())


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path)
    rows = datasets.Dataset.from_csv(str(path), cache_dir=str(tmp_path / "cache"))
    if suffix != "csv":
        write = rows.to_json if suffix == "jsonl" else rows.to_parquet
        path = tmp_path / f"news.{suffix}"
        write(str(path))
    data = load_dataset(f"table:{path}", model=str(bert(tmp_path)))
    assert data.class_names == ("bad", "good")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [72, 24, 24]
    x, y = next(iter(iter_batches(data.test, 24)))
    lengths = x["attention_mask"].sum(1)
    assert lengths.min() < lengths.max() == x["input_ids"].shape[1]
    assert bool((x["input_ids"][x["attention_mask"] == 0] == 0).all())
    last = x["input_ids"].gather(1, lengths[:, None] - 1).squeeze(1)
    assert len({(int(t), int(c)) for t, c in zip(last, y, strict=True)}) == 2


def test_a_classifier_has_its_classes_in_its_own_order(tmp_path: Path) -> None:
    names = {0: "GOOD", 1: "unsure", 2: "Bad"}
    model = bert(tmp_path, id2label=names, label2id={v: k for k, v in names.items()})
    data = load_dataset(f"table:{table(tmp_path)}", model=str(model))
    assert data.class_names == ("GOOD", "unsure", "Bad")
    assert sorted(set(data.train.y.tolist())) == [0, 2]


def test_what_is_refused(tmp_path: Path) -> None:
    model, short = llama(tmp_path), tmp_path / "short.txt"
    path = text(tmp_path)
    short.write_text("the small dog saw a red house")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "other.csv").write_text("words,label\nthe dog,1\na house,0\n")
    (tmp_path / "empty.csv").write_text("text,label\nthe dog,1\n,0\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    small = tmp_path / "small"
    small.mkdir()
    for file in model.iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    for name, reader, length, said in (
        (f"text:{path}", None, None, "which a model has to read"),
        (f"text:{path}", bare, None, "no tokenizer that can be read"),
        (f"text:{path}", model, 17, "length is 17, but .* reads 16 tokens at most"),
        (f"text:{path}", small, None, "its tokenizer gives the token"),
        (f"text:{short}", model, None, "too short: its train part"),
        (f"text:{tmp_path / 'bytes.txt'}", model, None, "no text in UTF-8"),
        (f"text:{tmp_path / 'none.txt'}", model, None, "cannot be read"),
        (f"table:{path}", model, None, "expected a table, .csv"),
        (f"table:{tmp_path / 'other.csv'}", model, None, "no column of texts among words, label"),
        (f"table:{tmp_path / 'empty.csv'}", model, None, "row 2 has an empty cell"),
    ):
        with pytest.raises(InputError, match=said) as error:
            load_dataset(name, model=None if reader is None else str(reader), length=length)
        assert "\n" not in str(error.value)


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    model, path = llama(tmp_path), text(tmp_path)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: ...\n")
    for name, kind in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")):
        said = json.loads((model / name).read_text())
        named = ["evil.Tokenizer", None] if kind == "AutoTokenizer" else "evil.Tokenizer"
        said |= {"auto_map": {kind: named}, "tokenizer_class": "Tokenizer", "model_type": "evil"}
        (model / name).write_text(json.dumps(said))
        with contextlib.suppress(InputError):
            load_dataset(f"text:{path}", model=str(model))
    assert not (tmp_path / "ran").exists()
