"""A model whose layers are the residual branches of its blocks, each of which can be left out."""

import copy
import operator
import warnings
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, StateHook
from deeplimit._anatomy.block_call import BlockCall
from deeplimit._anatomy.branches import Branch, find_branches, linear_end, mixes_tokens, not_zero
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit._anatomy.injection import gap
from deeplimit._anatomy.inputs import FAILS
from deeplimit._anatomy.other_depths import check_rebuilt
from deeplimit._anatomy.stacks import Seen, Watch
from deeplimit._anatomy.stand_ins import said, state_among, state_of, with_state
from deeplimit.errors import InputError

ACROSS = ("key_value_states", "encoder_hidden_states")  # given to attention to another stack


class LeftOut(nn.Module):
    """Stands in a block where a branch was: it gives zeros, or its input, in no time.

    Its state_dict holds zeros of the shapes that were there, so that a saved model is one of the
    plain class, whose answers are the same: there the branch is computed, and adds zero. A cache of
    keys and values goes on counting tokens.
    """

    def __init__(self, module: nn.Module, call: Seen, *, zero: bool):
        """Made of the module that stood there and a call of it."""
        super().__init__()
        x, y = cast(Tensor, call.entered), cast(Tensor, call.left)
        axes = [k for k, (a, b) in enumerate(zip(x.shape, y.shape, strict=False)) if a != b]
        self.zero = zero
        self.resized = (axes[0] - y.dim(), y.shape[axes[0]]) if axes else None
        self.possible = x.dim() == y.dim() and len(axes) < 2
        several = isinstance(call.output, tuple | list)
        self.others = [said(value) for value in call.output[1:]] if several else None
        self.tensors = {k: (tuple(v.shape), v.dtype) for k, v in module.state_dict().items()}
        places = (getattr(m, "layer_idx", None) for m in module.modules())
        self.layer_idx = next((i for i in places if isinstance(i, int)), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of what stood there, or the input."""
        x = cast(Tensor, state_among(args, kwargs))
        cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
        across = any(kwargs.get(k) is not None for k in ACROSS)
        if cache is not None and self.layer_idx is not None and not across:
            none = x.new_zeros(len(x), 1, x.shape[1], 1)
            getattr(cache, "self_attention_cache", cache).update(none, none, self.layer_idx)
        if self.zero:
            shape = list(x.shape)
            if self.resized is not None:
                shape[self.resized[0]] = self.resized[1]
            x = x.new_zeros(shape)
        return x if self.others is None else (x, *self.others)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        for name, (shape, dtype) in self.tensors.items():
            destination[prefix + name] = torch.zeros(shape, dtype=dtype)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        given = [state[prefix + name] for name in self.tensors if prefix + name in state]
        if any(bool(value.any()) for value in given):
            args[-1].append(f"{prefix[:-1]} was left out, but there are weights for it")

    def extra_repr(self) -> str:
        """That nothing else is needed to load what is saved."""
        return "a branch left out; saved as zeros, which the plain class computes with"


class Part(NamedTuple):
    """A branch to be left out, with the names in the block of modules that work for it alone.

    It is called as the block's child that holds it, or a module in it; its kind is "attention" if
    it mixes tokens, "mlp" if it does not, else empty.
    """

    name: str
    kind: str
    branch: Branch
    dead: tuple[str, ...]


def check_granularity(name: str) -> None:
    """Raises InputError unless it is one: a misspelt one would remove whole layers."""
    if name not in ("layer", "branch"):
        raise InputError(f"granularity is {name!r}; expected 'layer' or 'branch'")


class ByBranch(Anatomy):
    """A model, read by its blocks, whose layers are branches, in order.

    What is left out is still one of its class. An InputError where no branch is found, or one block
    is several layers.
    """

    def __init__(self, structure: Anatomy):
        super().__init__(structure.model)
        self.structure, self.tokens = structure, structure.tokens
        self.like, self.example = structure.like, structure.example  # type: ignore[method-assign]
        name = type(self.model).__name__
        if len(structure.blocks) < structure.horizon or not all(s.adds for s in structure.stacks):
            raise InputError(
                f"the layers of {name} have no branches of their own; leave layers out"
            )
        if len(set(structure.blocks)) < len(structure.blocks):
            raise InputError(f"the layers of {name} are calls of one block; leave layers out")
        x = structure.fitting_example()
        with evaluating(self.model), torch.no_grad():
            self.parts: list[list[Part]] = []
            for n, layer in enumerate(structure.layers):
                with not_zero(layer.controls):  # as of zeros no branch is seen
                    call = BlockCall(structure, n, x) if layer.removable else None
                    self.parts.append([] if call is None else parts_of(call))
        if not any(self.parts):
            raise InputError(f"no branch is found in the blocks of {name}; leave layers out")

        self._every = [(n, part) for n, parts in enumerate(self.parts) for part in parts]
        self.pairs = tuple((n, part.name) for n, part in self._every)  # (layer, name), in order

    def numbers(self, wanted: Iterable[Any]) -> set[int]:
        """The numbers of branches, counted through the model."""
        found: set[int] = set()
        for one in wanted:
            n, name = one if isinstance(one, tuple | list) and len(one) == 2 else (one, None)
            try:
                n = operator.index(n)
                parts = self.parts[n] if 0 <= n < len(self.parts) else []
            except TypeError:
                parts = []
            kinds = [part.kind for part in parts]
            fits = [
                part.name
                for part in parts
                if name in (None, part.name) or (name == part.kind and kinds.count(name) == 1)
            ]
            if not fits:
                known = ", ".join(f"({n}, {part.name!r})" for part in parts) or "none"
                raise InputError(
                    f"branch {one!r} to be removed; expected pairs (layer, branch), of layers 0 … "
                    f"{len(self.parts) - 1}; in this layer: {known}"
                )
            found |= {self.pairs.index((n, fit)) for fit in fits}
        return found

    def whole(self, removed: Collection[int]) -> list[int]:
        """The layers all of whose branches go."""
        gone = [self.pairs[i][0] for i in removed]
        return [n for n, parts in enumerate(self.parts) if parts and gone.count(n) == len(parts)]

    def check_removable(self, removed: Iterable[SupportsIndex]) -> None:
        """As of layers; nor layers that the model needs, all of whose branches go."""
        removed = list(removed)
        super().check_removable(removed)
        self.structure.check_removable(self.whole({int(i) for i in removed}))

    def leave_out(self, removed: set[int]) -> nn.Module:
        """A copy less some branches; less a layer where all its branches go."""
        whole = self.whole(removed)
        model = self.structure.without(whole) if whole else copy.deepcopy(self.model)
        if whole:
            check_rebuilt(self.structure, model)
        blocks = self.structure.like(model).blocks if whole else None
        others = [n for n in range(self.structure.horizon) if n not in whole]
        names = {module: name for name, module in self.model.named_modules()}
        for n, part in (self._every[i] for i in sorted(removed)):
            if n in whole:
                continue
            block = self.structure.blocks[n]
            own = blocks[others.index(n)] if blocks else model.get_submodule(names[block])
            self._leave_out(model, own, block, part, n)
        return model

    def _leave_out(
        self, model: nn.Module, own: nn.Module, block: nn.Module, part: Part, n: int
    ) -> None:
        """Changes a copy in place: modules that do nothing, or a last projection of zeros."""
        path = {m: name for name, m in block.named_modules()}[part.branch.end]
        before = {name: own.get_submodule(name) for name in (path, *part.dead)}
        run = partial(self.structure.runner(model), self.structure.fitting_example())

        def silent(_: nn.Module, __: Any, output: Any) -> Any:
            return with_state(output, torch.zeros_like(cast(Tensor, state_of(output))))

        with evaluating(model), torch.no_grad():
            hook = before[path].register_forward_hook(silent)
            expected = (watch := Watch(before.values())).run(run)
            hook.remove()
            made = {
                name: LeftOut(m, watch.seen[m][-1], zero=m is before[path])
                for name, m in before.items()
            }
            if all(one.possible for one in made.values()):
                for name, one in made.items():
                    own.set_submodule(name, one)
                try:
                    if gap(run(), expected) is None:
                        return
                except FAILS:
                    pass
                for name, module in before.items():
                    own.set_submodule(name, module)
            self._zero(own, block, part, n)
            apart = gap(run(), expected)
        if apart is not None:
            raise InputError(
                f"branch {part.name} of layer {n} cannot be removed: with its last projection at "
                f"zero the answers differ {apart} from those without it"
            )
        warnings.warn(
            f"branch {part.name} of layer {n} is zero, but still computed: "
            f"{type(own).__name__} needs its modules as they are",
            stacklevel=2,
        )

    def _zero(self, own: nn.Module, block: nn.Module, part: Part, n: int) -> None:
        """Sets the parameters to zero in which a branch of a copy ends."""
        silent = [other.branch.end for other in self.parts[n] if other is not part]
        names = {p: name for name, p in block.named_parameters()}
        with evaluating(self.model), not_zero([block]):
            call = BlockCall(self.structure, n, self.structure.fitting_example())
            for p in linear_end(call, part.branch, silent):
                own.get_parameter(names[p]).zero_()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """A layer is a branch."""
        layers = self.structure.layers
        return tuple(Layer(layers[n].stage, layers[n].controls) for n, _ in self.pairs)

    @property
    def stages(self) -> int:
        """Those of the blocks."""
        return self.structure.stages

    def run(self, x: Any) -> Tensor:
        """The logits of the model's own forward."""
        return self.structure.run(x)

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """States are between blocks, not between branches."""
        raise InputError("a model read by its branches has no states between them")

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """As by blocks."""
        return self.structure.carry(stage, x, inputs)

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """As by blocks."""
        return self.structure.head(x, inputs)


def parts_of(call: BlockCall) -> list[Part]:
    """The branches of a block with their names, and what works for each alone."""
    names = {m: name for name, m in call.block.named_modules()}
    found = [(branch, _dead(call, branch)) for branch in find_branches(call)]
    full = [
        names[max([b.end, *dead], key=lambda m: sum(p.numel() for p in m.parameters()))]
        for b, dead in found
    ]
    short = [name.partition(".")[0] for name in full]
    parts = []
    for (branch, dead), name, first in zip(found, full, short, strict=True):
        kind = mixes_tokens(call, branch, [b.end for b, _ in found if b is not branch])
        own = first if short.count(first) == 1 else name
        parts.append(Part(own, kind, branch, tuple(names[m] for m in dead)))
    return parts


def _dead(call: BlockCall, branch: Branch) -> list[nn.Module]:
    """The outermost modules with parameters whose output changes nothing without the branch."""
    inside = set(branch.end.modules())
    around = {m for m in call.block.modules() if branch.end in m.modules()}
    expected = call.without([branch.end])
    dead: list[nn.Module] = []
    for module in call.order:
        if module in inside | around or next(module.parameters(), None) is None:
            continue
        m = call.outputs[module]
        noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(0)).to(m)
        if call.added(module, [branch.end], noise).equal(expected):
            dead.append(module)
    return [m for m in dead if not any(m in set(o.modules()) - {o} for o in dead)]
