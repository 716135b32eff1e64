"""What a block's forward pass met besides its input, so that it can be met again.

A replay must be the same function: the same random numbers (dropout), the same autocast, batch
norms whose running statistics do not move a second time, buffers as they were, no filled caches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Modules:
    """The modules under a block, read once: parameters, norms with statistics, other buffers."""

    def __init__(self, roots: Sequence[nn.Module]):
        modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self._parameters = [(m, name) for m in modules for name in m._parameters]
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
        norms = set(self.norms)
        self._buffers = [(m, name) for m in modules if m not in norms for name in m._buffers]
        self._changing: list[tuple[nn.Module, str]] | None = None

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now: FSDP2 and functional_call put others in their place."""
        found = (m._parameters.get(name) for m, name in self._parameters)
        return [p for p in found if p is not None]

    def snapshot(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Copies of the buffers that a forward pass changes; before the first one, of all."""
        watched = self._buffers if self._changing is None else self._changing
        now = ((m, name, m._buffers.get(name)) for m, name in watched)
        return [(m, name, b.clone(), b._version) for m, name, b in now if b is not None]

    def changed(
        self, before: list[tuple[nn.Module, str, Tensor, int]]
    ) -> list[tuple[nn.Module, str, Tensor]]:
        """Of a snapshot, the copies of those that the forward pass did change."""
        if self._changing is None:
            self._changing = [(m, name) for m, name, _, v in before if _moved(m, name, v)]
        keep = set(self._changing)
        return [(m, name, copy) for m, name, copy, _ in before if (m, name) in keep]


def _moved(module: nn.Module, name: str, version: int) -> bool:
    buffer = module._buffers.get(name)
    return buffer is None or buffer._version != version


class Circumstances:
    """Taken before a forward pass, completed after it, met again in `again`."""

    __slots__ = ("_autocast", "_buffers", "_device", "_modules", "_random", "_snapshot")

    def __init__(self, modules: Modules, device: torch.device):
        self._modules = modules
        self._device = device
        kinds = dict.fromkeys((device.type, "cpu"))
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
        ]
        self._random: tuple[Tensor, ...] | None = _random_state(device)
        self._snapshot = modules.snapshot()
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []

    def complete(self) -> None:
        """After the forward pass: keeps of the random state and the buffers what it used."""
        now = _random_state(self._device)
        before = self._random
        if before is not None and all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
            self._random = None  # nothing random was drawn, or 5 kB per layer would be kept
        self._buffers = self._modules.changed(self._snapshot)
        self._snapshot = []

    @contextmanager
    def again(self) -> Iterator[None]:
        """One evaluation as in the forward pass; afterwards everything is as it was."""
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
