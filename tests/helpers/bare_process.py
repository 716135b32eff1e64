"""Scripts in processes of their own, forked from one that has imported what most of them need.

Nothing checks annotations there, as at a user's, and nothing was computed before.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn, Self

IMPORTED = (
    "sklearn.model_selection",
    "torch.distributed.fsdp",
    "torch.multiprocessing",
    "deeplimit.training.loop",
    "deeplimit.training.processes",
)
TWO = """
import os, runpy, sys
import torch.multiprocessing

def work(rank, port):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2}
    ranks |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in ranks.items()} | {"TORCHELASTIC_RUN_ID": "forked"}
    runpy.run_path(sys.argv[0], run_name="__main__")

if __name__ == "__main__":
    port, *sys.argv = sys.argv[1:]
    torch.multiprocessing.start_processes(work, args=(port,), nprocs=2, start_method="fork")
"""


class BareProcess:
    """A process that imports once and forks for each script."""

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory()
        self.server: subprocess.Popen[str] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.communicate()  # at the end of its input it goes
        self.folder.cleanup()

    def run(self, script: str | Path, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs a script, a file or its text; it must succeed."""
        own, out, err = (Path(self.folder.name, name) for name in ("own.py", "out", "err"))
        if isinstance(script, str):
            own.write_text(script)
            script = own
        out.write_text("")
        err.write_text("")
        code = self._answer(json.dumps([str(script), str(out), str(err), *args]))
        done = subprocess.CompletedProcess([script, *args], code, out.read_text(), err.read_text())
        assert code == 0, done.stderr
        return done

    def run_two(self, script: Path, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs a script in two processes as torchrun starts them; they must succeed.

        For where the launcher is not what is tested.
        """
        return self.run(TWO, free_port(), str(script), *args)

    def _answer(self, request: str, timeout: float = 280) -> int:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-P", __file__],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        server, self.server = self.server, None  # not asked again where it did not answer
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            print(request, file=server.stdin, flush=True)
            assert select.select([server.stdout], [], [], timeout)[0], f"no answer to {request}"
            code = int(server.stdout.readline())
        except BaseException:
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()
            raise
        self.server = server
        return code


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def become(script: str, out: str, err: str, *args: str) -> NoReturn:
    """Runs the script in this process, and leaves."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    sys.argv = [script, *args]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Forks for each line of input, and says how the fork ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
