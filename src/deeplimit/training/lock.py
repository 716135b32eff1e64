"""One process at a time writes into a run folder."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from deeplimit.errors import InputError, RunError
from deeplimit.files import cannot_write, remove
from deeplimit.rank import is_first_process
from deeplimit.training.remedies import elsewhere

LOCK = ".lock"
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run folder for writing. A process that has it may take it again.

    Who only reads need not hold it. The operating system gives it back when a process ends, however
    that ends. Of several processes that train together the first one holds it.

    Raises:
        InputError: the folder is read-only.
        RunError: another process holds it, or the disk is full.
    """
    lock = FileLock(folder.resolve() / LOCK, timeout=0, is_singleton=True)
    first = is_first_process()
    try:
        held = lock.acquire() if first else nullcontext()
    except Timeout:
        raise RunError(
            f"{folder}: another process is working on this run; wait until it is done, then run "
            "the same command again"
        ) from None
    except OSError as error:
        if error.errno in READ_ONLY:
            raise InputError(
                f"{folder} cannot be written to ({error.strerror}); {elsewhere(folder)}"
            ) from error
        raise cannot_write(folder / LOCK, error) from error
    with held:
        try:
            yield
        finally:
            if first and lock.lock_counter == 1:  # held still: who has opened it looks again
                remove(folder / LOCK)
