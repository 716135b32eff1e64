"""Whether something fits into memory: asked before the memory is taken."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deeplimit.errors import InputError

# What a packed file may become: anything up to FLOOR bytes, beyond that EXPANSION times its size.
# Images and tables shrink to a fiftieth at most; what shrinks more was made to fill the memory.
FLOOR, EXPANSION = 2**30, 100
OBJECTS = 3000  # bytes of Python's that a layer takes at least, whatever its numbers

_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = (  # of control groups, version 2 and 1: limit, usage, what of it can be given back
    (_CGROUP, "memory.max", "memory.current", "inactive_file"),
    (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available() -> float:
    """Bytes that this process may still take; infinite where the system does not say.

    The least of what the machine has free, what the control group (a container) leaves, and what
    the process's own limit of address space (ulimit -v) leaves.
    """
    return max(min([_free(), *_left_by_groups(), _left_by_limit()]), 0.0)


def require(needed: int, what: str, remedy: str) -> None:
    """Refuses `what` needs more bytes, with all copies, than there are; says the `remedy`."""
    there = available()
    if needed > there:
        raise InputError(
            f"{what}: {_shown(needed)} of memory needed, {_shown(there)} are free; {remedy}"
        )


def require_unpacked(size: int, packed: int, what: str, remedy: str) -> None:
    """Refuses to unpack what was made to fill the memory, whatever there is of it.

    It gives more than 1 GiB, and more than a hundred times the bytes of the packed file.
    """
    if size > max(FLOOR, EXPANSION * packed):
        raise InputError(
            f"{what}: {_shown(size)} unpacked from {_shown(packed)}; expected at most "
            f"{EXPANSION} times as much, or 1 GiB; {remedy}"
        )


def ran_out(error: BaseException) -> bool:
    """Tells errors that say that the system gave no memory: Python's own, or torch's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _shown(size: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.2g} {unit}" if size < 10 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"


def _free() -> float:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    with suppress(AttributeError, OSError, ValueError):  # not Linux: all that is built in
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float("inf")


def _left_by_groups() -> Iterator[float]:
    for folder, limit, usage, idle in _GROUPS:
        with suppress(OSError, ValueError):  # no such group, or one without a limit
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield float(most - used + int(stat.get(idle, 0)))


def _left_by_limit() -> float:
    if sys.platform == "win32":
        return float("inf")
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return float("inf")
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return float(most - pages * os.sysconf("SC_PAGE_SIZE"))
    return float(most)
