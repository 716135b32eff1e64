"""The command `deeplimit`: from words to a call; what a verb does is in the other rooms.

Its exit code: 0 done, 1 the run failed, 2 wrong input, 128 + a signal.
"""

import errno
import io
import signal
import sys
from collections.abc import Sequence

from deeplimit.cli.verbs import parse
from deeplimit.errors import InputError, ProcessLost, RunError
from deeplimit.extras import missing
from deeplimit.interruption import Stopped, stoppable
from deeplimit.memory import ran_out
from deeplimit.terminal import is_first_process, stop_writing, tell

__all__ = ["main"]

# What a full, read-only or forbidden place answers: a line for the user, no traceback.
REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "use a place that can be written to",
    errno.EACCES: "use a place that you may write to, or change its permissions",
    errno.EPERM: "use a place that you may write to, or change its permissions",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        args: the command line without the program's name; the process's own by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # better a ? for γ than no answer
            stream.reconfigure(errors="replace")
    try:
        words = list(sys.argv[1:] if args is None else args)
        check_words(words)
        with stoppable():
            parse(words)()
    except SystemExit as stop:  # the parser's: 0 after --help, 2 after its message
        return stop.code if isinstance(stop.code, int) else 1
    except InputError as error:
        return _failed(2, str(error))
    except ModuleNotFoundError as error:
        refusal = missing(error)
        if refusal is None:
            raise
        return _failed(2, str(refusal))
    except ProcessLost as error:
        return _failed(1, str(error), aloud=error.aloud)
    except RunError as error:
        return _failed(1, str(error))
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        return _failed(128 + number, str(stop) or "stopped; run the same command again")
    except BrokenPipeError:  # nobody reads any more: there is no place to say anything
        stop_writing()
        return 1
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _failed(1, f"{place}{error.strerror}; {REMEDIES[error.errno]}, then run it again")
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return _failed(1, "the memory ran out; give smaller numbers or data, or a larger machine")
    return 0


def check_words(words: Sequence[str]) -> None:
    """Refuses bytes that are no characters: libraries that write files would, hours later.

    Raises:
        InputError: a word is not in UTF-8.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise InputError(
                f"{word!r} on the command line is not in UTF-8; give another name, or rename the "
                "file or folder"
            )


def _failed(code: int, message: str, *, aloud: bool | None = None) -> int:
    if is_first_process() if aloud is None else aloud:
        tell(" ".join(f"deeplimit: {message}".split()))
    return code
