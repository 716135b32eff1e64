"""A wrong verb or option: the parser's own message, with the choices or the near names; code 2."""

from pathlib import Path

import pytest
from cli_commands import command, contents

WRONG = {
    "unknown verb": (
        ["trian", "digits"],
        ["trian", "train, profile, crop, heal, gradient, ode,"],
    ),
    "no verb": (
        [],
        ["demo, train, profile, crop, heal, gradient, ode, refine,", "report, verify, study"],
    ),
    "unknown study": (["study", "horizn"], ["horizn", "horizon"]),
    "no study": (["study"], ["horizon"]),
    "unknown option": (["train", "digits", "--dpeth", "3"], ["--dpeth", "--depth"]),
    "unknown option of crop": (["crop", "runs/x", "--two", "3"], ["--two", "--to"]),
    "word for a number": (["train", "--epochs", "many"], ["--epochs", "'many'"]),
    "fraction for a whole number": (["train", "--depth", "2.5"], ["--depth", "2.5"]),
    "option without its value": (["train", "--epochs"], ["--epochs"]),
    "unknown precision": (["train", "--precision", "16"], ["'16'", "bf16-mixed"]),
    "unknown kind": (["train", "--kind", "conv"], ["'conv'", "convolutional"]),
    "unknown strategy": (["train", "--strategy", "dp"], ["'dp'", "ddp", "fsdp"]),
    "crop to a word": (["crop", "runs/x", "--to", "shallow"], ["--to", "shallow", "auto"]),
    "two data sets": (["train", "digits", "spirals"], ["spirals"]),
    "no run": (["profile"], ["RUN"]),
    "seed that is no number": (["demo", "--seed", "x"], ["--seed", "'x'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, says = WRONG[name]
    done = command(*args)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    for said in [*says, "--help"]:
        assert said in done.err
    assert contents(tmp_path) == {}
