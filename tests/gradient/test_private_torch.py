"""PyTorch's private names, last seen in 2.13: each is there, and means what it is taken for.

One that fails here says what has to be looked up in the newer PyTorch before it is relied on.
"""

import copy
import gc
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy.stand_ins import standing_in
from deeplimit.errors import RunError
from deeplimit.gradient import private_torch as private
from deeplimit.gradient.node import LEFT

# owner of a name, the name: all that private_torch.py looks up when it is imported
NAMES: list[tuple[Any, str]] = [
    (torch._C, "_current_graph_task_id"),
    (torch._C._functorch, "peek_interpreter_stack"),
    (torch._C._functorch, "is_legacy_batchedtensor"),
    (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    (torch.utils.checkpoint, "_checkpoint_hook"),
    (torch.utils.checkpoint, "_recomputation_hook"),
    (torch.autograd.Variable, "_execution_engine"),
    (torch.autograd.forward_ad, "_current_level"),
    (torch.nn.modules.batchnorm, "_NormBase"),
    (torch.utils._python_dispatch, "TorchDispatchMode"),
    (nn.Module, "_compiled_call_impl"),
]


def imported_again() -> ModuleType:
    """A second copy of the file, run from its first line."""
    spec = importlib.util.spec_from_file_location("again", private.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_name_that_is_gone_is_said(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported_again()
    monkeypatch.delattr(owner, name)
    says = rf"private names of PyTorch 2\.13, one of which PyTorch .*{name}"
    with pytest.raises(ImportError, match=says):
        imported_again()


def test_the_graph_task_and_the_end_of_a_backward_pass() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)

    def look(_: Tensor) -> None:
        seen.append(private.graph_task())
        private.at_end_of_backward(lambda: seen.append(-2))

    for _ in range(2):
        y = x.sin().sum()
        y.register_hook(look)
        y.backward()
    first, end, second, last = seen
    assert -1 < first < second
    assert end == last == -2
    assert private.graph_task() == -1


def test_transforms_and_forward_mode() -> None:
    found: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        found.append((private.transform() is not None, private.forward_mode()))
        return x.sum()

    x = torch.ones(2)
    look(x)
    torch.func.grad(look)(x)
    with torch.autograd.forward_ad.dual_level():
        look(torch.autograd.forward_ad.make_dual(x, x))
    assert found == [(False, False), (True, False), (False, True)]


def test_a_checkpoint_around_is_seen_and_no_other_hook() -> None:
    found: list[object] = []

    def look(x: Tensor) -> Tensor:
        found.append(private.checkpoint_around())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False)
    private.checkpoint(look, x, use_reentrant=False)
    look(x)
    with torch.autograd.graph.save_on_cpu():
        look(x)
    assert [one is None for one in found] == [False, False, True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_repeats_is_seen_unless_it_is_reentrant(reentrant: bool) -> None:
    found: list[bool] = []

    def look(x: Tensor) -> Tensor:
        found.append(private.checkpoint_repeats())
        return x.sin()

    checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert found == [False, not reentrant]


def test_gradients_of_many_at_once_are_seen() -> None:
    found: list[bool] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2.0
    y.register_hook(lambda g: found.append(private.is_batched(g)))
    y.sum().backward(retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    assert found == [False, True]


def test_versions_count_changes_in_place() -> None:
    x = torch.zeros(4)
    before = private.version_of(x)
    x[:2].add_(1.0)
    assert private.version_of(x) == before + 1


def test_what_is_noted_at_a_storage_is_there_as_long_as_it_is() -> None:
    """By which blocks are linked: another Python object each time would know nothing of it."""
    x = torch.zeros(4, requires_grad=True) * 1.0
    setattr(x.untyped_storage(), LEFT, {1, 2})
    alive = weakref.ref(getattr(x.untyped_storage(), LEFT))
    gc.collect()
    assert getattr(x.view(2, 2)[1:].untyped_storage(), LEFT) == {1, 2}
    assert not hasattr(x.detach().clone().untyped_storage(), LEFT)
    y = x.sin()
    del x  # only the graph holds it now, whose C++ has no Python object
    assert getattr(y.grad_fn._saved_self.untyped_storage(), LEFT) == {1, 2}  # type: ignore[union-attr]
    del y
    assert alive() is None


def test_batch_norms_of_every_kind_are_known() -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d)
    assert all(isinstance(kind(3), private.NormBase) for kind in kinds)
    assert not isinstance(nn.GroupNorm(1, 3), private.NormBase)


def test_what_is_compiled_is_known() -> None:
    block, other, whole = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    assert not private.holds_compiled(block)
    block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]
    assert private.is_compiled(block.forward)
    other.compile(backend="eager")
    compiled = torch.compile(whole, backend="eager")
    assert all(private.holds_compiled(m) for m in (block, other, compiled))  # type: ignore[arg-type]
    assert not private.is_stood_in_for(other)
    with standing_in({whole: torch.neg}):
        assert private.is_stood_in_for(whole)
    assert not private.is_stood_in_for(whole)


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed = torch.distributed
    if distributed.is_initialized():
        pytest.skip("a process group is there")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.processes
def test_sharded_parameters_are_found_where_fsdp_keeps_them(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    plain, shared = nn.Linear(4, 4), nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = shared.weight
    block = nn.Sequential(shared, twin)
    assert private.shards(plain.modules()) == ([], set())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(block, mesh=mesh)
    found, places = private.shards(block.modules())
    assert {id(p) for p in found} == {id(p) for p in block.parameters()}
    assert places == {(m, name) for m in (shared, twin) for name in ("weight", "bias")}
    assert private.is_fully_sharded(block)
    assert not private.is_fully_sharded(plain)
    assert private.is_scattered(shared.weight)
    assert not private.is_scattered(plain.weight)
    monkeypatch.delattr(FSDPModule, "_get_fsdp_state")
    with pytest.raises(RunError, match=r"does not keep its parameters as that of 2\.13 did"):
        private.shards(block.modules())


@pytest.mark.slow
def test_the_room_imports_neither_the_compiler_nor_fsdp() -> None:
    """Seconds that a process without them need not wait."""
    names = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
    code = f"import sys, deeplimit.gradient; assert not sys.modules.keys() & {names}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_imported_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    block = copy.deepcopy(nn.Linear(2, 2))
    assert private.shards(block.modules()) == ([], set())
    assert not private.is_fully_sharded(block)
    assert not private.is_scattered(block.weight)
    assert "torch.distributed.fsdp" not in sys.modules
