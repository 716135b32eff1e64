"""The columns of the coverage benchmark: the library against a calculation without it."""

import copy
import inspect
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, StageCost, anatomy, crop, use_adjoint
from deeplimit._anatomy import Anatomy
from zoo import one_line

LIMIT, SEED, WEIGHT = 1e-5, 0, 0.1
Found = tuple[float | str, str]
COUNTED = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "encoder_layers", "num_decoder_layers")  # fmt: skip


class NotApplicable(Exception):
    """A column that a model has not, and why."""


def answer(model: nn.Module, batch: Any) -> Tensor:
    """What a model answers, taken from its output here again, without the library."""
    torch.manual_seed(SEED)
    if isinstance(batch, Tensor):
        out = model(batch)
    else:
        takes = inspect.signature(type(model).forward).parameters
        out = model(**batch, **({"use_cache": False} if "use_cache" in takes else {}))
    if isinstance(out, Tensor):
        return out
    if "start_logits" in out and "end_logits" in out:
        return torch.stack([out["start_logits"], out["end_logits"]], -1)
    names = ("logits", "prediction_logits", "seq_relationship_logits", "last_hidden_state")
    first = next((out[n] for n in names if isinstance(out.get(n), Tensor)), None)
    floats = [v for n, v in out.items() if isinstance(v, Tensor) and v.is_floating_point()]
    return floats[0] if first is None else first


@contextmanager
def cut_by_hand(model: nn.Module, blocks: tuple[nn.Module, ...], depth: int) -> Iterator[None]:
    """The model's lists are without the blocks from a depth on; the parameters are the same.

    The count of layers in its config is the depth's while it is so, for those that loop over it.
    """
    gone = set(blocks[depth:]) - set(blocks[:depth])  # one may be called again and again
    lists = [m for m in model.modules() if gone & set(m.children())]
    before = [(one, one._modules) for one in lists]
    told = []
    around = [m for m in model.modules() if m not in blocks and blocks[0] in set(m.modules())]
    parts = {id(c): c for m in around if (c := getattr(m, "config", None))}
    for config in parts.values() if len(lists) < 2 else ():
        for key in COUNTED:
            if vars(config).get(key) == len(blocks):
                told.append((config, key))
                vars(config)[key] = depth
    if not lists and not told:
        raise RuntimeError("there is nothing to be cut")
    try:
        for one in lists:
            left = [(name, child) for name, child in one._modules.items() if child not in gone]
            if isinstance(one, nn.ModuleList):
                left = [(str(i), child) for i, (_, child) in enumerate(left)]
            one._modules = dict(left)
        yield
    finally:
        for one, modules in before:
            one._modules = modules
        for config, key in told:
            vars(config)[key] = len(blocks)


@contextmanager
def passed_by_hand(model: nn.Module, blocks: tuple[nn.Module, ...], depth: int) -> Iterator[None]:
    """Calls of blocks from the depth-th on give back what they were given."""
    calls = 0

    def instead(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= depth:
            return out
        given = [*args, *kwargs.values()]
        state = next(v for v in given if isinstance(v, Tensor) and v.is_floating_point())
        return state if isinstance(out, Tensor) else type(out)([state, *out[1:]])

    hooks = [b.register_forward_hook(instead, with_kwargs=True) for b in dict.fromkeys(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def truth(a: Anatomy, depth: int, batch: Any) -> tuple[Tensor, str]:
    """The answer of the model with its first blocks; "cut", or "passed" where that does not run."""
    try:
        with cut_by_hand(a.model, a.blocks, depth):
            return answer(a.model, batch), "cut"
    except TimeoutError:
        raise
    except Exception:
        with passed_by_hand(a.model, a.blocks, depth):
            return answer(a.model, batch), "passed"


def _depths(a: Anatomy) -> list[int]:
    """A few depths below N at which all layers that follow can be taken out."""
    removable = [layer.removable for layer in a.layers]
    free = [k for k in range(a.horizon) if all(removable[k:])]
    return sorted({free[0], free[len(free) // 2], free[-1]}) if free else []


def _apart(mine: Tensor, other: Tensor) -> float:
    if mine.shape != other.shape:
        return float("inf")
    largest = float(other.abs().max()) if other.numel() else 0.0
    return float((mine - other).abs().max()) / max(largest, 1e-6)


@torch.no_grad()
def logits(a: Anatomy, batch: Any) -> Found:
    """The largest relative difference of z_k; of how many depths, and how these were made."""
    torch.manual_seed(SEED)
    states, own = a.states(batch)
    torch.manual_seed(SEED)
    z = a.logits(states, x=batch)
    whole = answer(a.model, batch)
    worst, at = max(_apart(own, whole), _apart(z[-1], whole)), f"k={a.horizon}"
    ways, moved = [], False
    for k in _depths(a):
        expected, way = truth(a, k, batch)
        ways.append(way)
        moved |= not torch.equal(expected, whole)
        if not (error := _apart(z[k], expected)) <= worst:
            worst, at = error, f"k={k}"
    told = ", ".join(f"{ways.count(way)} {way}" for way in ("cut", "passed") if way in ways)
    told += "" if moved or not ways else ", none of which changes the answer"
    return worst, told if worst <= LIMIT else f"{told} at {at}"


def _half(a: Anatomy) -> tuple[nn.Module, int]:
    depths = [k for k in _depths(a) if k]
    if not depths:
        raise NotApplicable("no layer goes")
    k = depths[len(depths) // 2]
    return crop(a, k), k


def saved(a: Anatomy, batch: Any) -> Found:
    """The relative difference of a crop that was saved and read again."""
    smaller, k = _half(a)
    with torch.no_grad():
        mine, expected = answer(smaller, batch), truth(a, k, batch)[0]
    error = _apart(mine, expected)
    if error > LIMIT or not hasattr(smaller, "save_pretrained"):
        return error, "crop against cut by hand"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        smaller.save_pretrained(folder)
        again = type(smaller).from_pretrained(folder).eval()
        error = max(error, _apart(answer(again, batch), mine))
        if error > LIMIT:  # positions that are made anew, and not what the zoo made of them
            a.model.save_pretrained(folder)
            whole = type(a.model).from_pretrained(folder).eval()
            if _apart(answer(whole, batch), answer(a.model, batch)) > LIMIT:
                return 0.0, "nor is the whole model what is read again"
        return error, ""


def generated(a: Anatomy, batch: Any) -> Found:
    """Whether a crop writes with its cache and without what the model cut by hand does."""
    model = a.model
    can = getattr(model, "can_generate", None)
    if can is None or not can() or not isinstance(batch, dict):
        raise NotApplicable("—")
    given = {k: v[:1] for k, v in batch.items() if k not in ("attention_mask", "decoder_input_ids")}
    smaller, k = _half(a)
    try:
        with cut_by_hand(model, a.blocks, k):
            expected = _texts(model, given)
    except TimeoutError:
        raise
    except Exception as error:
        raise NotApplicable("cut by hand it does not write") from error
    if not torch.equal(*expected):
        raise NotApplicable("with its cache it writes otherwise")
    mine = _texts(smaller, given)
    same = torch.equal(mine[0], mine[1]) and torch.equal(mine[0], expected[0])
    return ("agrees" if same else "differs"), ""


def _texts(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """Five tokens more, with a cache of keys and values and without."""
    texts = []
    for cached in (True, False):
        torch.manual_seed(SEED)
        with torch.no_grad():
            text = model.generate(
                **given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1,
                use_cache=cached,
            )  # fmt: skip
        texts.append(text)
    return texts


def stage_cost(a: Anatomy, batch: Any) -> Found:
    """The relative error of the gradient of Σ_k γ·ℓ(z_k) + ℓ(z_N)."""
    head = type(a.model).__name__
    sure = ("Classification", "CausalLM", "LMHead")
    if hasattr(a.model, "config") and not any(word in head for word in sure):
        raise NotApplicable("—")
    if len(_depths(a)) == 0 or not all(layer.removable for layer in a.layers):
        raise NotApplicable("no layer goes" if not _depths(a) else "not every layer goes")
    with torch.no_grad():  # a model may keep a state, with its graph
        whole = answer(a.model, batch)
    if whole.dim() not in (2, 3) or whole.shape[-1] < 2:
        raise NotApplicable("—")
    model, x = _doubled(a.model, batch)
    structure = anatomy(model, example=x)
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(whole.shape[-1], whole.shape[:-1], generator=draw)
    loss = SoftCrossEntropy(whole.shape[-1])
    torch.manual_seed(SEED)
    StageCost(structure, loss, WEIGHT)(x, y)[0].backward()
    mine = _gradients(model)
    (loss.mean(answer(model, x), y)).backward()
    for k in range(structure.horizon):
        (WEIGHT * loss.mean(truth(structure, k, x)[0], y)).backward()
    return _off(mine, _gradients(model)), f"in {next(model.parameters()).dtype}"


def adjoint(model: nn.Module, batch: Any) -> str:
    """The relative error of the gradients, or the line with which it was refused."""
    try:
        copied, x = _doubled(model, batch)
        _project(answer(copied, x))
        expected = _gradients(copied)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            use_adjoint(copied)
            _project(answer(copied, x))
        error = _off(_gradients(copied), expected)
        drifted = any("gradient" in str(one.message) for one in said)
        return f"{error:.1e}" + (" (warned)" if drifted else "")
    except InputError as error:
        return " ".join(f"refused: {error}".split())[:90]
    except TimeoutError:
        raise
    except Exception as error:
        return f"crash: {one_line(error)}"[:90]


def _project(z: Tensor) -> None:
    draw = torch.Generator().manual_seed(4)
    (z * torch.randn(z.shape, generator=draw).to(z.dtype)).sum().backward()


def _doubled(model: nn.Module, batch: Any) -> tuple[nn.Module, Any]:
    """A copy in float64, or in float32 where the model does not run in it."""
    other = copy.deepcopy(model).double()
    x = _floats(batch, torch.float64)
    try:
        with torch.no_grad():
            if answer(other, x).dtype == torch.float64:
                return other, x
    except Exception:
        pass
    return copy.deepcopy(model), batch


def _floats(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return {k: _floats(v, dtype) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _gradients(model: nn.Module) -> list[Tensor]:
    """Those of all parameters, which are then without."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def _off(mine: list[Tensor], expected: list[Tensor]) -> float:
    square = sum(
        float((a - b).double().square().sum()) for a, b in zip(mine, expected, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in expected)
    return (square / max(size, 1e-30)) ** 0.5
