"""Which block's output a tensor is: the proof that one block's input is the last one's output."""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from deeplimit.gradient.node import Node

CROWDED = 64


@dataclass(frozen=True)
class _Exit:
    """A block's output at the moment it left the block. Keeps neither it nor its node alive."""

    node: "weakref.ref[Node]"
    storage: StorageWeakRef  # while it exists no other storage can have this address
    form: tuple[object, ...]


def _form(x: Tensor) -> tuple[object, ...]:
    """All that must be equal beside the storage: a slice, a view or an edited tensor differs.

    Neither the address (a slice has it too, and memory is used again) nor the Python object (FSDP2
    passes aliases) would prove that it is the same state.
    """
    return (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)


class Exits:
    """The outputs that no block has taken yet."""

    def __init__(self) -> None:
        self._exits: dict[int, _Exit] = {}

    def leave(self, node: "Node", y: Tensor) -> None:
        """Notes that y is the state that left `node`."""
        if len(self._exits) >= CROWDED:
            self._exits = {k: e for k, e in self._exits.items() if not e.storage.expired()}
        storage = StorageWeakRef(y.untyped_storage())
        self._exits[storage.cdata] = _Exit(weakref.ref(node), storage, _form(y))

    def enter(self, x: Tensor) -> "Node | None":
        """The node whose output x is, once: a second block that takes it starts a new chain."""
        found = self._exits.get(x.untyped_storage()._cdata)
        if found is None or found.form != _form(x):
            return None
        del self._exits[found.storage.cdata]
        return found.node()
