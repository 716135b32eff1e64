"""The other processes of a training: started on the loopback, and missed when one is gone."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from torch.distributed.distributed_c10d import _get_default_store

from deeplimit.errors import InputError, ProcessLost

LOOPBACK = "127.0.0.1"
PARENT = "DEEPLIMIT_PARENT"  # the first process, in the environment of those that it started
TIMEOUT = "DEEPLIMIT_TIMEOUT"  # s without a sign of life after which a process counts as lost
PATIENCE = 120.0
BEAT = 0.5  # s between signs of life
SOON = 5.0  # s in which living processes surely give one, and an error is surely raised
AGAIN = "run the same command again"
COLLECTIVE = timedelta(minutes=30)  # others may wait so long while the first one evaluates


def join(fabric: Fabric) -> None:
    """Launches `fabric`, whose processes from then on watch one another.

    Where nobody else starts the processes (torchrun, SLURM) this one does, and they meet on the
    loopback: nothing listens on another address.

    Raises:
        InputError: DEEPLIMIT_TIMEOUT is no time.
        ProcessLost: one of them is gone.
    """
    patience = _patience()
    strategy: Any = fabric.strategy
    environment = getattr(strategy, "cluster_environment", None)
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if environment is None or there:
        fabric.launch()
        return
    world = int(os.environ.get("WORLD_SIZE", fabric.world_size))
    if os.environ.get("LOCAL_WORLD_SIZE", str(world)) == str(world):
        # All processes are on this machine: their connections too.
        for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    own = isinstance(environment, LightningEnvironment) and strategy.num_nodes == 1
    if own and (PARENT in os.environ or not environment.creates_processes_externally):
        children: list[subprocess.Popen[bytes]] = []
        store, rank = _meet(fabric.world_size, children)
        watch = Watch(store.clone(), rank, fabric.world_size, children, patience)
        with watch.at_work(AGAIN):
            backend = "nccl" if strategy.root_device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=fabric.world_size,
                timeout=COLLECTIVE,
                device_id=strategy.root_device if backend == "nccl" else None,
            )
            fabric.launch()
        return
    fabric.launch()
    if torch.distributed.is_initialized() and fabric.world_size > 1:
        shared: Any = _get_default_store()
        Watch(shared.clone(), fabric.global_rank, fabric.world_size, [], patience)


def _patience() -> float:
    given = os.environ.get(TIMEOUT, str(PATIENCE))
    with suppress(ValueError):
        if float(given) >= SOON:
            return float(given)
    raise InputError(f"{TIMEOUT} is {given!r}; expected seconds, at least {SOON:g}")


def _meet(world: int, children: list[subprocess.Popen[bytes]]) -> tuple[Any, int]:
    """Starts this command once more for each further process, or is one; store and rank."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    listening: dict[str, Any] = {}
    if PARENT not in os.environ:
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": "0"}
        for k in range(1, world):
            env = os.environ | {"LOCAL_RANK": str(k), PARENT: str(os.getpid())}
            env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack where the store is gone
            children.append(subprocess.Popen(_basic_subprocess_cmd(), env=env))
        listening = {"master_listen_fd": listener.detach()}
    elif os.getppid() != int(os.environ[PARENT]):
        raise ProcessLost(_told(0, world, "is gone", AGAIN), aloud=rank == 1)
    distributed: Any = torch.distributed
    address = (LOOPBACK, int(os.environ["MASTER_PORT"]), world, rank == 0)
    store = distributed.TCPStore(*address, timeout=COLLECTIVE, wait_for_workers=False, **listening)
    return store, rank


class Watch(threading.Thread):
    """Gives signs of life, and ends this process where another one gives none.

    The first process listens to all, the others to the first. What keeps a main thread busy, such
    as an evaluation, does not keep this one. Where a process is gone the main thread's next
    collective usually fails at once, and it says so itself (`at_work`); where it is stuck, this
    thread says it and ends the process.
    """

    current: "Watch | None" = None

    def __init__(
        self, store: Any, rank: int, world: int, children: list[Any], patience: float
    ) -> None:
        super().__init__(daemon=True, name="deeplimit-watch")
        self.store, self.rank, self.world, self.children = store, rank, world, children
        self.patience = int(patience / BEAT)
        self.remedy = ""  # something only while the main thread works together with the others
        self.stopping = threading.Event()
        self.silent = dict.fromkeys(range(1, world) if rank == 0 else [0], (0, 0))
        self.gone: dict[int, str] = {}
        Watch.current = self
        # The first sign comes before the first collective: who is stopped right after that is
        # missed like anybody else.
        self.look()
        self.start()
        # At its end Python drops threads wherever they are; in the store's C++ that is an abort.
        atexit.register(self.stop)

    def run(self) -> None:
        """Until the process ends."""
        missed = 0
        while not self.stopping.wait(BEAT):
            self.look()
            missed = missed + 1 if self.gone and self.remedy else 0
            if missed * BEAT > SOON:
                self._end()

    def stop(self) -> None:
        """Ends the watch, where the process ends."""
        self.stopping.set()
        self.join(SOON)

    def look(self) -> None:
        """Gives a sign of life and looks for those of others."""
        for k, child in enumerate(self.children, 1):
            if child.poll():
                self.gone[k] = _ended(child.returncode)
        try:
            self.store.add(f"deeplimit/{self.rank}", 1)
            for k, (last, since) in self.silent.items():
                now = self.store.add(f"deeplimit/{k}", 0)
                # From the first sign on: before it, data are loaded. Counted in own beats: while
                # all of them are stopped (Ctrl-Z) none is missed.
                self.silent[k] = (now, since + 1 if now == last > 0 else 0)
                if self.silent[k][1] > self.patience:
                    self.gone.setdefault(k, f"gave no sign of life for {self.patience * BEAT:g} s")
        except RuntimeError:  # the store went with the process that held it
            self.gone.setdefault(0, "is gone")

    @contextmanager
    def at_work(self, remedy: str) -> Iterator[None]:
        """The main thread works together with the other processes.

        Raises:
            ProcessLost: a collective failed, and one of them is gone.
        """
        before, self.remedy = self.remedy, remedy
        try:
            yield
        except KeyboardInterrupt:
            self._end_children()
            raise
        except RuntimeError as error:
            collective = isinstance(error, torch.distributed.DistError)
            if not (collective or "gloo" in str(error).lower()) or not self._missed():
                raise  # this process's own work failed
            lost = self._lost()
            self._end_children()
            raise lost from None
        finally:
            self.remedy = before

    def _end_children(self) -> None:
        """Ends the processes that this one started."""
        for child in self.children:
            child.terminate()
        until = time.monotonic() + 2.0
        for child in self.children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:  # in a collective, or stopped
                child.kill()
                child.wait()

    def _missed(self) -> bool:
        """Looks for a process that is gone until it is known; says whether there is one."""
        for _ in range(int(SOON / BEAT) + 2):
            if self.gone:
                return True
            time.sleep(BEAT)
        for k, (_, since) in self.silent.items():
            if since * BEAT >= SOON - 1:
                self.gone.setdefault(k, "is gone")
        return bool(self.gone)

    def _lost(self) -> ProcessLost:
        k = min(self.gone)
        aloud = self.rank == 0 or (self.rank == 1 and 0 in self.gone)
        return ProcessLost(_told(k, self.world, self.gone[k], self.remedy or AGAIN), aloud=aloud)

    def _end(self) -> None:
        lost = self._lost()
        if lost.aloud:
            shown = "\033[?25h\n" if sys.stderr.isatty() else ""  # the cursor that a bar hid
            print(f"{shown}deeplimit: {lost}", file=sys.stderr, flush=True)
        for child in self.children:
            child.kill()
            child.wait()
        os._exit(1)


def together(remedy: str) -> AbstractContextManager[None]:
    """Work that all processes share; `remedy` says how to go on where one of them is lost.

    Raises:
        ProcessLost: by its with statement: one is.
    """
    return nullcontext() if Watch.current is None else Watch.current.at_work(remedy)


def _ended(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _told(k: int, world: int, what: str, remedy: str) -> str:
    return f"process {k + 1} of {world} (rank {k}) {what}; {remedy}"
