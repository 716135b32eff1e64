"""What a block's forward pass met besides its input, so that it can be met again.

A replay must be the same function: the same random numbers (dropout), the same autocast, batch
norms whose running statistics do not move a second time, buffers as they were, no filled caches.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from deeplimit.gradient.refusals import FLAG
from deeplimit.gradient.residual import is_compiled

Modes = tuple[bool, ...]
Buffer = tuple[nn.Module, str]
Snapshot = tuple[nn.Module, str, Tensor, int, Tensor]


class Modules:
    """The modules under a block: parameters, norms with statistics, other buffers.

    Read once, and again when a part has been replaced, added or parametrised.

    Attributes:
        parts: the modules, and what tells that they have to be read again.
        norms: batch norms with running statistics.
        checkpointing: those that transformers may run in checkpoints of its own.
        proven: modes in which a replay was seen to give the output of the forward pass.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        self._roots = roots
        self._read()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Modules":
        """Of the copied modules, read when first asked: now they are not whole yet.

        Those that are left out of the copy are None in it.
        """
        copied = Modules.__new__(Modules)
        memo[id(self)] = copied
        roots = [copy.deepcopy(root, memo) for root in self._roots]
        copied._roots = [root for root in roots if root is not None]
        return copied

    def __getattr__(self, name: str) -> Any:
        """Reads the modules of a copy."""
        if name.startswith("__") or "_roots" not in self.__dict__ or "parts" in self.__dict__:
            raise AttributeError(name)
        self._read()
        return getattr(self, name)

    def _read(self) -> None:
        modules = list(dict.fromkeys(m for root in self._roots for m in root.modules()))
        self._all = modules
        self.parts = [(m, dict(m._modules), len(m._parameters), len(m._buffers)) for m in modules]
        self._parameters = [(m, name) for m in modules for name in m._parameters]
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
        self.checkpointing = [m for m in modules if hasattr(m, FLAG)]
        norms = set(self.norms)
        self._buffers = [(m, name) for m in modules if m not in norms for name in m._buffers]
        self._changing: dict[Modes, set[Buffer]] = {}
        self.proven: set[Modes] = set()

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now: functional_call puts others in their place.

        Of those that FSDP2 manages the sharded ones: whole parameters come and go, and are
        filled without a trace in their version.
        """
        self.refresh()
        sharded = [p for m in self._all if isinstance(m, FSDPModule) for p in _shards(m)]
        places = self._parameters
        if sharded:
            managed = {place for _, its in sharded for place in its}
            places = [place for place in places if place not in managed]
        found = [p for m, name in places if (p := m._parameters.get(name)) is not None]
        return found + [shard for shard, _ in sharded]

    def refresh(self) -> None:
        """Reads the modules again if one has been replaced, added or parametrised."""
        for module, parts, parameters, buffers in self.parts:
            if (
                module._modules != parts
                or len(module._parameters) != parameters
                or len(module._buffers) != buffers
            ):
                return self._read()

    def trained(self) -> bool:
        """Whether some parameter requires a gradient."""
        found = (m._parameters.get(name) for m, name in self._parameters)
        return any(p is not None and p.requires_grad for p in found)

    def compiled(self) -> bool:
        """Whether torch.compile has been at work on one of them."""
        return any(
            type(m).__name__ == "OptimizedModule"
            or m._compiled_call_impl is not None
            or any(is_compiled(value) for value in m.__dict__.values())
            for m in self._all
        )

    def scattered(self) -> bool:
        """Whether parameters are divided among processes at this moment."""
        return any(isinstance(m._parameters.get(name), DTensor) for m, name in self._parameters)

    def modes(self) -> Modes:
        """Which of them are in training mode; a block in other modes is another function."""
        return tuple([m.training for m in self._all])

    def snapshot(self, modes: Modes) -> list[Snapshot]:
        """Copies of the buffers that a forward pass changes; before the first one, of all."""
        watched = self._changing.get(modes, self._buffers)
        now = ((m, name, m._buffers.get(name)) for m, name in watched)
        return [(m, name, b, b._version, b.clone()) for m, name, b in now if b is not None]

    def changed(self, before: list[Snapshot], modes: Modes) -> list[tuple[nn.Module, str, Tensor]]:
        """Of a snapshot, the copies of those that the forward pass did change."""
        moved = {(m, name) for m, name, b, v, _ in before if _moved(m, name, b, v)}
        keep = self._changing.setdefault(modes, moved)
        return [(m, name, copy) for m, name, _, _, copy in before if (m, name) in keep]

    def remember(self, late: Sequence[Buffer], modes: Modes) -> None:
        """Counts these among the buffers that a forward pass changes."""
        self._changing.get(modes, set()).update(late)

    def constant(self, modes: Modes) -> list[tuple[nn.Module, str, Tensor, int]] | None:
        """The buffers that a forward pass does not change; None before the first one."""
        changing = self._changing.get(modes)
        if changing is None:
            return None
        names: list[Buffer] = [key for key in self._buffers if key not in changing]
        names += [(norm, n) for norm in self.norms if not norm.training for n in norm._buffers]
        now = ((m, name, m._buffers.get(name)) for m, name in names)
        return [(m, name, b, b._version) for m, name, b in now if b is not None]


def _shards(module: FSDPModule) -> Iterator[tuple[Tensor, list[Buffer]]]:
    """The sharded parameters that a module of FSDP2 manages, each with its places."""
    state: Any = module._get_fsdp_state()
    for group in state._fsdp_param_groups:
        for managed in group.fsdp_params:
            at = managed._module_info
            names = [at.param_name, *at.shared_param_names]
            places = list(zip([at.module, *at.shared_modules], names, strict=True))
            yield managed.sharded_param, places


def _moved(module: nn.Module, name: str, before: Tensor, version: int) -> bool:
    """Whether a buffer was changed in place, or another put in its place."""
    now = module._buffers.get(name)
    return now is not before or now._version != version


_NOTHING = nullcontext()


class Circumstances:
    """Taken before a forward pass, completed after it, met again in `again`."""

    __slots__ = (
        "_autocast",
        "_bare",
        "_buffers",
        "_constant",
        "_device",
        "_modes",
        "_modules",
        "_parts",
        "_random",
        "_snapshot",
    )

    def __init__(self, modules: Modules, device: torch.device):
        self._modules = modules
        self._device = device
        kinds = dict.fromkeys((device.type, "cpu"))
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
        ]
        self._random: tuple[Tensor, ...] | None = _random_state(device)
        self._modes, self._parts = modules.modes(), modules.parts
        self._snapshot = modules.snapshot(self._modes)
        self._constant = modules.constant(self._modes)
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._bare = False  # whether there is nothing to be met again

    def complete(self) -> str | None:
        """After the forward pass: keeps of the random state and the buffers what it used.

        Returns:
            A buffer that has changed for the first time, so that no copy was made before.
        """
        now = _random_state(self._device)
        before = self._random
        if before is not None and all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
            self._random = None  # nothing random was drawn, or 5 kB per layer would be kept
        self._modules.refresh()  # should buffers have been registered
        self._parts = self._modules.parts
        self._buffers = self._modules.changed(self._snapshot, self._modes)
        self._snapshot = []
        if self._constant is None:
            self._constant = self._modules.constant(self._modes)
        late = [(m, name) for m, name, b, v in self._constant or () if _moved(m, name, b, v)]
        self._modules.remember(late, self._modes)
        self._bare = (
            self._random is None
            and not self._buffers
            and not any(enabled for _, _, enabled in self._autocast)
            and not any(norm.training for norm in self._modules.norms)
        )
        return late[0][1] if late else None

    def difference(self) -> str | None:
        """What a replay would meet otherwise than the forward pass did; None if nothing."""
        if self._modules.parts is not self._parts:
            return "one of its parts was replaced"
        if self._modules.modes() != self._modes:
            return "train() or eval() was called"
        for module, name, buffer, version in self._constant or ():
            if _moved(module, name, buffer, version):
                return f"its buffer {name} was changed"
        return None

    def again(self) -> AbstractContextManager[None]:
        """One evaluation as in the forward pass; afterwards everything is as it was."""
        if self._bare and not any(torch.is_autocast_enabled(kind) for kind, _, _ in self._autocast):
            return _NOTHING
        return self._met_again()

    @contextmanager
    def _met_again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                # No cache: a weight cast without gradients would be found in it with gradients on.
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            if self._random is not None:
                stack.callback(_set_random_state, self._device, _random_state(self._device))
                _set_random_state(self._device, self._random)
            for norm in self._modules.norms:
                if norm.training:
                    _freeze(norm, stack)
            for module, name, copy in self._buffers:
                stack.callback(module._buffers.__setitem__, name, module._buffers[name])
                module._buffers[name] = copy.clone()
            yield


def _freeze(norm: _NormBase, stack: ExitStack) -> None:
    """With momentum 0 and no count the statistics stay; switching the tracking off would raise."""
    stack.callback(setattr, norm, "momentum", norm.momentum)
    stack.callback(norm._buffers.__setitem__, "num_batches_tracked", norm.num_batches_tracked)
    norm.momentum = 0.0
    norm._buffers["num_batches_tracked"] = None


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    if device.type == "cpu":
        return (cpu,)
    module: Any = torch.get_device_module(device)
    return cpu, module.get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        module: Any = torch.get_device_module(device)
        module.set_rng_state(state[1], device)
