"""What a block's forward pass met, so that it can be met again: arguments, parameters, buffers.

A replay must be the same function: the same random numbers (dropout), the same autocast, batch
norms whose running statistics do not move a second time, buffers as they were, no filled caches.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from deeplimit.errors import InputError
from deeplimit.gradient.meter import AdjointError
from deeplimit.gradient.private_torch import (
    NormBase,
    holds_compiled,
    is_scattered,
    shards,
    version_of,
)

Modes = tuple[bool, ...]
Buffer = tuple[nn.Module, str]

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
CHECKPOINTING = "gradient_checkpointing"  # transformers' own

_training, _is_meta = attrgetter("training"), attrgetter("is_meta")
_parameter_state = attrgetter("_version", "requires_grad")
_PLAIN = {Tensor, nn.Parameter}


class Arguments:
    """The arguments of one call, with a hole where the state was.

    Attributes:
        state: the first positional argument, or else the first tensor among the keywords; only
            until the forward pass is over.
        more: whether there are others.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        self._keyword = ""
        self.state: Tensor | None = None
        self._args, self._kwargs = args, dict(kwargs)
        if args and isinstance(args[0], Tensor):
            self.state, self._args = args[0], args[1:]
        elif not args:
            self._keyword = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), "")
            self.state = self._kwargs.pop(self._keyword, None)
        self.more = bool(self._args or self._kwargs)
        self._seen: list[tuple[Tensor, int]] = []

    def at(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with this state: as they came, or once complete without caches.

        A cache would grow by a replay.
        """
        if self._keyword:
            return (), {self._keyword: x, **self._kwargs}
        return (x, *self._args), self._kwargs

    def complete(self) -> None:
        """After the forward pass: forgets the state and caches, and lets go of the graph.

        What a replay needs of another tensor is its numbers. With its graph it would hold the
        graph of earlier blocks, which hold this call: memory that is never freed.
        """
        self.state = None
        if self.more:
            self._args, self._kwargs = without_graph((self._args, self._kwargs))
            self._kwargs |= dict.fromkeys(self._kwargs.keys() & CACHES)
            if self._kwargs.get("use_cache"):
                self._kwargs["use_cache"] = False
            self._seen = [(x, version_of(x)) for x in self.tensors()]

    def tensors(self) -> list[Tensor]:
        """The other tensors, also those in tuples, lists and dicts."""
        return tensors_in((self._args, self._kwargs))

    def filled_cache(self, layer: int | None) -> bool:
        """Tells whether a key-value cache already holds something of this layer."""
        for value in (*self._args, *self._kwargs.values()):
            if _is_cache(value) and (layer is None or value.get_seq_length(layer) > 0):
                return True
            if isinstance(value, tuple) and value and isinstance(value[0], tuple):
                return True  # the old form: a tuple of keys and values per layer
        return False

    def changed(self) -> bool:
        """Tells whether another tensor was changed in place since."""
        return any(version_of(x) != version for x, version in self._seen)


def _is_cache(value: Any) -> bool:
    """A key-value cache of transformers, by what it can do."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts."""
    return [v for v in tree_leaves(value, is_leaf=_is_cache) if isinstance(v, Tensor)]


def without_graph(value: Any) -> Any:
    """The same with its tensors as leaves, and without caches."""
    return tree_map(_leaf, value, is_leaf=_is_cache)


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return None if _is_cache(value) else value


class Modules:
    """The modules under a block: parameters, norms with statistics, other buffers.

    Read once, and again when a part has been replaced, added or parametrised.

    Attributes:
        parts: the modules, and what tells that they have to be read again.
        layer: which layer of a cache the block uses: transformers' modules know it as layer_idx.
        norms: batch norms with running statistics.
        buffers: the others' buffers, by their places.
        buffered: whether there are any at all.
        changing: for each mode those of the buffers that a forward pass was seen to change.
        checkpointing: those that transformers may run in checkpoints of its own.
        proven: modes in which a replay was seen to give the output of the forward pass.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        self._roots = roots
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        """The modules of a copy are read when it is first asked: before, they are not whole."""
        return {"_roots": self._roots}

    def __getattr__(self, name: str) -> Any:
        """Reads the modules of a copy."""
        if name.startswith("__") or "_roots" not in self.__dict__ or "parts" in self.__dict__:
            raise AttributeError(name)
        self._read()
        return getattr(self, name)

    def _read(self) -> None:
        roots = [root for root in self._roots if root is not None]  # left out of the copy
        self._all = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self.parts = [(m, dict(m._modules), len(m._parameters), len(m._buffers)) for m in self._all]
        indices = (getattr(m, "layer_idx", None) for m in self._all)
        self.layer = next((i for i in indices if isinstance(i, int)), None)
        self.checkpointing = [m for m in self._all if hasattr(m, CHECKPOINTING)]
        self.norms = [m for m in self._all if isinstance(m, NormBase) and m.track_running_stats]
        others = set(self._all).difference(self.norms)
        self.buffers = [(m, name) for m in self._all if m in others for name in m._buffers]
        self.buffered = bool(self.buffers or self.norms)
        self.changing: dict[Modes, set[Buffer]] = {}
        self.proven: set[Modes] = set()

    def refresh(self) -> None:
        """Reads the modules again if one has been replaced, added or parametrised."""
        for m, parts, count, buffers in self.parts:
            if m._modules != parts or len(m._parameters) != count or len(m._buffers) != buffers:
                return self._read()

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now: functional_call puts others in their place.

        Of those that FSDP2 manages the sharded ones: whole parameters come and go, and are
        filled without a trace in their version.
        """
        self.refresh()
        found, managed = shards(self._all)
        for module in self._all:  # twice for each block and step: no comprehension's frames
            for name, p in module._parameters.items():
                if p is not None and not (managed and (module, name) in managed):
                    found.append(p)
        return found

    def refuse_checkpoints(self, name: str) -> None:
        """With transformers' own checkpoints around blocks nothing would be saved, without a word.

        Raises:
            InputError: they are switched on.
        """
        if any(getattr(module, CHECKPOINTING) is True for module in self.checkpointing):
            raise InputError(
                f"{name} has gradient checkpointing on, which keeps every block's input and "
                "runs it again; call model.activation_checkpointing_disable() first (of older "
                "transformers gradient_checkpointing_disable())"
            )

    def trained(self) -> bool:
        """Tells whether some parameter requires a gradient."""
        return any(p.requires_grad for p in self.parameters())

    def compiled(self) -> bool:
        """Tells whether torch.compile has been at work on one of them."""
        return any(map(holds_compiled, self._all))

    def scattered(self) -> bool:
        """Tells whether parameters are divided among processes at this moment."""
        held = (p for module in self._all for p in module._parameters.values())
        return any(map(is_scattered, held))

    def modes(self) -> Modes:
        """Which of them are in training mode; a block in other modes is another function."""
        return tuple(map(_training, self._all))

    def constant(self, changing: set[Buffer]) -> list[Buffer]:
        """The buffers that a forward pass does not change."""
        evaluated = [norm for norm in self.norms if not norm.training]
        others = [place for place in self.buffers if place not in changing]
        return others + [(norm, name) for norm in evaluated for name in norm._buffers]


class _Seen(NamedTuple):
    """A buffer as it was."""

    place: Buffer
    buffer: Tensor
    version: int

    def moved(self) -> bool:
        """Tells whether it was changed in place, or another put in its place."""
        now = self.place[0]._buffers.get(self.place[1])
        return now is not self.buffer or now._version != self.version


def _see(places: Iterable[Buffer]) -> list[_Seen]:
    now = ((place, place[0]._buffers.get(place[1])) for place in places)
    return [_Seen(place, b, b._version) for place, b in now if b is not None]


class ReplayContext:
    """Taken before a forward pass of a block, completed after it, met again in `again`.

    Attributes:
        modes: of the block's modules.
    """

    def __init__(self, name: str, modules: Modules, arguments: Arguments, device: torch.device):
        self._name, self._modules, self._arguments, self._device = name, modules, arguments, device
        self._parameters = modules.parameters()
        _check_there(name, self._parameters)
        self._versions = list(map(_parameter_state, self._parameters))
        self._parts = modules.parts
        self.modes = modules.modes()
        self._kinds = ("cpu",) if device.type == "cpu" else (device.type, "cpu")
        on = list(filter(torch.is_autocast_enabled, self._kinds))
        self._autocast = dict(zip(on, map(torch.get_autocast_dtype, on), strict=True))
        self._random: tuple[Tensor, ...] = _random_state(device)
        self._copies: list[tuple[_Seen, Tensor]] = []  # buffers to be put back
        self._constant: list[_Seen] | None = None  # buffers that must not have changed
        self._bare = False  # whether there is nothing to be met again
        if modules.buffered:
            changing = modules.changing.get(self.modes)
            watched = _see(modules.buffers if changing is None else changing)
            self._copies = [(seen, seen.buffer.clone()) for seen in watched]
            if changing is not None:
                self._constant = _see(modules.constant(changing))

    def complete(self) -> None:
        """After the forward pass: keeps of the random state and the buffers what it used.

        Raises:
            AdjointError: a buffer has changed for the first time, and no copy was made before.
        """
        # 5 kB per layer would be kept; bytes are compared twice as fast as tensors.
        for before, now in zip(self._random, _random_state(self._device), strict=True):
            if before.numpy().tobytes() != now.numpy().tobytes():
                break
        else:
            self._random = ()
        modules = self._modules
        modules.refresh()  # should buffers have been registered
        self._parts = modules.parts
        if modules.buffered:
            moved = {seen.place for seen, _ in self._copies if seen.moved()}
            changing = modules.changing.setdefault(self.modes, moved)
            self._copies = [(seen, b) for seen, b in self._copies if seen.place in changing]
            if self._constant is None:
                self._constant = _see(modules.constant(changing))
            late = [seen.place for seen in self._constant if seen.moved()]
            changing.update(late)
            if late:
                raise self._error(
                    f"its buffer {late[0][1]} was changed by its forward pass, which it had not "
                    "done before, and what it was is gone; run the step again, from now on it is "
                    "remembered"
                )
        self._arguments.complete()
        self._bare = not (
            self._random or self._copies or self._autocast or any(map(_training, modules.norms))
        )

    def check_unchanged(self) -> None:
        """Raises AdjointError if a replay would meet something else than the forward pass did."""
        parameters, before = self._modules.parameters(), self._parameters
        same = len(parameters) == len(before) and all(map(operator.is_, parameters, before))
        if not same:
            _check_there(self._name, parameters)
        if not same or list(map(_parameter_state, parameters)) != self._versions:
            raise self._error(
                "its parameters were changed between forward and backward; states cannot be "
                "rebuilt with others. Run backward before the optimiser's step or "
                "requires_grad_(…), or functional_call around both"
            )
        what = ""
        for seen in self._constant or ():
            if seen.moved():
                what = f"its buffer {seen.place[1]} was changed"
        if self._modules.modes() != self.modes:
            what = "train() or eval() was called"
        if self._modules.parts is not self._parts:
            what = "one of its parts was replaced"
        if what:
            raise self._error(
                f"{what} between forward and backward; states cannot be rebuilt as they were. "
                "Do it after backward, or leave the block out of blocks="
            )
        if self._arguments.changed():
            raise self._error(
                "one of its other arguments (a mask, an embedding) was changed in place between "
                "forward and backward; change a copy of it"
            )

    def _error(self, message: str) -> AdjointError:
        return AdjointError(f"{self._name}: {message}")

    def again(self) -> AbstractContextManager[None]:
        """One evaluation as in the forward pass; afterwards everything is as it was."""
        bare = self._bare and not any(map(torch.is_autocast_enabled, self._kinds))
        return _NOTHING if bare else self._met_again()

    @contextmanager
    def _met_again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in self._kinds:
                dtype = self._autocast.get(kind)
                # No cache: a weight cast without gradients would be found in it with gradients on.
                cast = torch.autocast(kind, dtype, dtype is not None, cache_enabled=False)
                stack.enter_context(cast)
            if self._random:
                stack.callback(_set_random_state, self._device, _random_state(self._device))
                _set_random_state(self._device, self._random)
            for norm in self._modules.norms:
                if norm.training:
                    # With momentum 0 and no count the statistics stay; without tracking it raises.
                    _put(stack, norm._buffers, "num_batches_tracked", None)
                    _put(stack, norm.__dict__, "momentum", 0.0)
            for seen, b in self._copies:
                _put(stack, seen.place[0]._buffers, seen.place[1], b.clone())
            yield


_NOTHING = nullcontext()


def _check_there(name: str, parameters: list[Tensor]) -> None:
    """Raises AdjointError where the block of this name has not its parameters yet, or any more."""
    if any(map(_is_meta, parameters)):
        raise AdjointError(
            f"{name}: its parameters are taken away between runs (offloaded to CPU or "
            "disk, as by accelerate's hooks; they are on the device 'meta'): no gradient "
            "reaches them. Load the model as a whole, "
            "accelerate.hooks.remove_hook_from_submodules(model), to train it"
        )
    if not _PLAIN.issuperset(map(type, parameters)) and any(map(is_lazy, parameters)):
        raise AdjointError(
            f"{name}: its parameters have no shape yet (LazyLinear and its like); run one "
            "batch first: with torch.no_grad(): model(x)"
        )


def _put(stack: ExitStack, where: dict[str, Any], name: str, value: object) -> None:
    """Another value, until the stack is left."""
    stack.callback(where.__setitem__, name, where[name])
    where[name] = value


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.default_generator.get_state()
    if device.type == "cpu":
        return (cpu,)
    module: Any = torch.get_device_module(device)
    return cpu, module.get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        module: Any = torch.get_device_module(device)
        module.set_rng_state(state[1], device)
