"""What does not fit is refused before it is taken."""

import subprocess
import sys

import numpy as np
import pytest

from deeplimit import memory
from deeplimit.errors import InputError


@pytest.mark.slow
def test_what_is_available_is_less_than_the_machine_has_and_shrinks_as_it_is_taken() -> None:
    before = memory.available()
    taken = np.ones(2**26)  # 512 MiB, every page of it written
    left = before - memory.available()
    assert taken.sum() == 2**26
    assert left > 2**27  # others on the machine give and take too


def test_the_process_s_own_limit_counts() -> None:
    ask = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from deeplimit.memory import available; print(available())"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 2**30


def test_the_control_group_s_limit_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory.max", 9000), ("memory.current", 5000)):
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 700\n")
    group = (tmp_path, "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "_GROUPS", (group,))
    assert memory.available() == 9000 - 5000 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 9000


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2.0**33)
    memory.require(2**33, "x", "give less")
    with pytest.raises(InputError, match=r"^x: 8\.6 GB of memory needed, 8\.6 GB .*; give less$"):
        memory.require(2**33 + 1, "x", "give less")
    with pytest.raises(InputError, match=r"^x: 4,612 PB of memory needed"):
        memory.require(2**62, "x", "give less")


def test_what_shrank_too_much_is_refused() -> None:
    memory.require_unpacked(2**30, 1, "x", "give less")  # small in any case
    memory.require_unpacked(2**40, 2**40 // 100 + 1, "x", "give less")
    with pytest.raises(InputError, match=r"^x: 1\.1 GB unpacked from 11 MB; .*; give less$"):
        memory.require_unpacked(2**30 + 100, 2**30 // 100, "x", "give less")
