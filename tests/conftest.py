"""Shared fixtures; annotations, and shapes in them, are checked while the suite runs."""

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from bare_process import BareProcess
from beartype import BeartypeConf
from beartype.claw import beartype_package
from beartype.claw._ast import _clawaststar
from jaxtyping import install_import_hook
from sparing_checks import sparing

# Annotations are checked at every call: types by beartype, and shapes by jaxtyping where a file has
# some. Its check costs tens of times as much; it bears names that only a type checker imports.
SOURCE = Path(__file__).resolve().parents[1] / "src"
SHAPED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if any(mark in path.read_text("utf-8") for mark in ("from jaxtyping", "if TYPE_CHECKING:"))
]
jaxtyping.jaxtyped = sparing(jaxtyping.jaxtyped)
_clawaststar.__beartype__ = sparing(_clawaststar.__beartype__)  # where beartype 0.23 takes it from
beartype_package("deeplimit", conf=BeartypeConf(claw_is_pep526=False))
install_import_hook(SHAPED, "beartype.beartype")

# A suite that runs in the background has Ctrl-C ignored, its children too; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


LONG = {"study", "objective"}  # fixtures that train for seconds: what asks for one is slow
# Files of half a minute or more: begun first, for a worker that began one last would work alone.
LONGEST = {"test_processes", "test_cli_processes", "test_demo_study", "test_readme"}


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist's order, by the number of tests


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LONG & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of floats are then the same in every process, and small tensors do not wait for threads
    that a busy machine has no place for."""
    torch.set_num_threads(1)


LATENCY = [f"deeplimit.control.{file}.LATENCY_SECONDS" for file in ("verifying", "depth_table")]


@pytest.fixture(scope="session", autouse=True)
def _short_latencies() -> Iterator[None]:
    """Latencies are measured for a tenth as long; who judges them asks for `long_latencies`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LATENCY:
            patch.setattr(name, 0.002)
        yield


@pytest.fixture
def long_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies are measured over as long a time as at a user's."""
    for name in LATENCY:
        monkeypatch.setattr(name, 0.02)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real MNIST, CIFAR-10 and pretrained weights beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data at {SHARED_DATA}")
    return SHARED_DATA


CALLED = """
from deeplimit.errors import InputError
for call in calls:
    try:
        call()
    except InputError as error:
        print(str(error).replace("\\n", "\\\\n"))
print(len(calls), "calls")
"""


@pytest.fixture(scope="session")
def bare_process() -> Iterator[BareProcess]:
    """Runs scripts, each in a process of its own in which nothing checks annotations."""
    with BareProcess() as process:
        yield process


@pytest.fixture
def refused_calls(bare_process: BareProcess) -> Callable[[str], None]:
    """Runs a script that makes a list `calls`, each of which is to be an InputError of one line."""

    def check(script: str) -> None:
        *lines, counted = bare_process.run(script + CALLED).stdout.splitlines()
        assert counted == f"{len(lines)} calls"
        assert lines
        assert all(line.strip() and "\\n" not in line for line in lines)

    return check
