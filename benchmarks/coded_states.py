"""States coded in b bits: errors of the gradient and of the states, memory, time, and a hunt.

errors: relative error of all parameter gradients against exact backpropagation, for b = 2, 4, 8
with error feedback in depth and without, and of the adjoint where it converges. states: the error
of x̂_n over depths 8 … 128. memory and time: of a step, against torch's checkpoint around each
block; time by the processor's clock, since other programs may run beside. budget: torch's own
budget of activations under torch.compile. calibration: error over
response on the families of networks_tried.py and on blocks that the adjoint cannot invert. hunt:
random stacks (tests/helpers/random_stacks.py), of which none may be wrong by more than was said.

    PYTHONPATH=tests/helpers python benchmarks/coded_states.py errors states memory time calibration
        hunt --data-dir ../shared/data --out benchmarks/results/coded_states.json
"""

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit import use_adjoint, use_backprop
from deeplimit.data import load_dataset
from deeplimit.gradient.accuracy import peak_memory
from deeplimit.gradient.codes import BITS, Feedback
from deeplimit.gradient.meter import CODED, CODED_KINKED
from deeplimit.gradient.stand_ins import engines
from deeplimit.network import CifarResNet
from deeplimit.report.gradient_cost import method_name
from deeplimit.studies import measure_gradient_cost
from deeplimit.studies.harness import machine
from gradient_methods import convolutional_chain
from networks_tried import FAMILIES, _free_loss

Loss = Callable[[nn.Module], Tensor]
Network = tuple[nn.Module, Loss, nn.ModuleList | nn.Sequential]
WIDTH, TOKENS, BATCH = 128, 32, 4
CLOCK = time.process_time
BUDGETS = (1.0, 0.5, 0.25, 0.1, 0.0)
ROUNDS = 5


def bert(depth: int = 12) -> Network:
    """BERT's encoder, norms after the addition, without dropout; a linear head on all tokens."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=512,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    encoder = hf.BertModel(config).encoder
    x = F.layer_norm(torch.randn(BATCH, TOKENS, WIDTH), (WIDTH,))
    return encoder, _classified(lambda m: m(x).last_hidden_state), encoder.layer


def llama(dtype: torch.dtype = torch.float32, depth: int = 24) -> Network:
    """Llama as it is initialised, on random states."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=100, use_cache=False,
    )  # fmt: skip
    model = hf.LlamaModel(config)
    model.norm = nn.Identity()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    loss = _classified(lambda m: m(inputs_embeds=x.to(dtype)).last_hidden_state)
    return (
        model.to(torch.bfloat16).to(dtype) if dtype != torch.float32 else model,
        loss,
        model.layers,
    )


def resnet(data_dir: Path, twice: bool = False) -> Network:
    """Stage 1 of the pretrained ResNet-56: nine blocks with a ReLU after the addition.

    It standardises images itself. Twice standardised ones it does not know: the loss is large, as
    early in a training, and so is the gradient that errors are relative to.
    """
    model = CifarResNet.from_weights(data_dir / "weights/cifar10-resnet56.safetensors").eval()
    train = load_dataset("cifar10", data_dir=data_dir).train
    x, y = train.x[:32].float() / 255, train.y[:32]
    x = (x - model.mean) / model.std if twice else x
    return model, lambda m: F.cross_entropy(m(x), y), model.layer1


def _classified(states: Callable[[nn.Module], Tensor]) -> Loss:
    weights = torch.randn(WIDTH, 10)
    classes = torch.randint(10, (BATCH * TOKENS,))
    return lambda m: F.cross_entropy((states(m).float() @ weights).flatten(0, 1), classes)


def gradient(network: Network, dtype: torch.dtype = torch.float64) -> Tensor:
    """All gradients of the blocks' parameters, one after another."""
    model, loss, blocks = network
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    return torch.cat([g.flatten().to(dtype) for g in torch.autograd.grad(loss(model), parameters)])


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def switched(network: Network, **settings: Any) -> Tensor:
    """The gradient with the blocks switched; the first run is where they are found."""
    use_adjoint(network[2], on_drift="ignore", **settings)
    gradient(network)
    found = gradient(network)
    use_backprop(network[2])
    return found


CODE = Feedback.code


def without_feedback(self: Feedback, y: Tensor, bits: int) -> Any:
    """In place of Feedback.code: each update by itself, so that errors add up."""
    code = CODE(self, y, bits)
    self._rebuilt = self._groups(y.detach())
    return code


def errors(options: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    networks: dict[str, Callable[[], Network]] = {
        "ResNet-56 pretrained, stage 1": partial(resnet, options.data_dir),
        "ResNet-56, stage 1, images standardised twice": partial(resnet, options.data_dir, True),
        "BERT, 12 layers": bert,
        "Llama, 24 layers as initialised": llama,
    }
    found: dict[str, Any] = {}
    for name, make in networks.items():
        network = make()
        exact = gradient(network)
        row: dict[str, float] = {}
        for bits in BITS:
            row[f"b = {bits}"] = relative(switched(network, bits=bits), exact)
        Feedback.code = without_feedback  # type: ignore[method-assign]
        for bits in BITS:
            row[f"b = {bits}, no feedback"] = relative(switched(network, bits=bits), exact)
        Feedback.code = CODE  # type: ignore[method-assign]
        if "Llama" in name:
            for e in (1, 2, 3):
                row[f"adjoint, e = {e}"] = relative(switched(network, evaluations=e), exact)
                row[f"b = 4, e = {e}"] = relative(switched(network, bits=4, evaluations=e), exact)
        found[name] = row
        print(name, {k: f"{v:.2g}" for k, v in row.items()}, flush=True)
    half, whole = llama(torch.bfloat16), llama()
    whole[0].load_state_dict({k: v.float() for k, v in half[0].state_dict().items()})
    exact = gradient(whole)
    row = {"exact backpropagation in bfloat16": relative(gradient(half), exact)}
    row |= {f"b = {bits}": relative(switched(half, bits=bits), exact) for bits in BITS}
    found["Llama, 24 layers, bfloat16 against float32"] = row
    print(row, flush=True)
    return found


class PostNorm(nn.Module):
    """LN(x + W₂ GELU(W₁ x))."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.norm(x + self.branch(x))
        return y


def states(_: argparse.Namespace) -> dict[str, Any]:
    """Largest relative error ‖x̂_n − x_n‖/‖x_{n+1} − x_n‖ over n, from depth 8 to 128."""
    depths = (8, 16, 32, 64, 128)
    found: dict[str, Any] = {"depths": depths}
    torch.manual_seed(0)
    with torch.no_grad():
        path = [torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)]
        for _ in range(max(depths)):
            path.append(PostNorm(WIDTH).double()(path[-1]))
    for bits in BITS:
        for name, code in (("feedback", CODE), ("no feedback", without_feedback)):
            column = []
            for depth in depths:
                feedback, worst = Feedback(path[0]), 0.0
                for y in path[1 : depth + 1]:
                    code(feedback, y, bits)
                for n in reversed(range(depth)):
                    off = (feedback.state(n) - path[n]).norm() / (path[n + 1] - path[n]).norm()
                    worst = max(worst, float(off))
                column.append(worst)
            found[f"b = {bits}, {name}"] = {"errors": column, "slope": _slope(depths, column)}
            print(bits, name, [f"{v:.2g}" for v in column], f"{_slope(depths, column):.2f}")
    return found


def _slope(depths: tuple[int, ...], values: list[float]) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (depths, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _checkpointed(blocks: Any) -> None:
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _post_norm_chain(depth: int) -> Network:
    """Blocks of 32 numbers a token on states of 512 KiB: what is kept between them counts."""
    torch.manual_seed(0)
    model = nn.Sequential(*(PostNorm(32) for _ in range(depth)))
    x = torch.randn(32, 128, 32)
    return model, lambda m: m(x).square().mean(), model


def memory(_: argparse.Namespace) -> dict[str, Any]:
    """Peak MiB of a step, of 8 and 64 post-norm blocks, and what one block more adds."""
    found: dict[str, Any] = {}
    ways: dict[str, Callable[[nn.Sequential], Any]] = {
        "plain": lambda m: m,
        "checkpoint": _checkpointed,
    }
    ways |= {f"b = {b}": partial(use_adjoint, bits=b, on_drift="ignore") for b in BITS}
    for name, switch in ways.items():
        peaks = []
        for depth in (8, 64):
            model, loss, blocks = _post_norm_chain(depth)
            switch(blocks)

            def step(model: nn.Module = model, loss: Loss = loss) -> None:
                loss(model).backward()

            step()
            peaks.append(peak_memory(step, model, torch.device("cpu")) / 2**20)
        state = 32 * 128 * 32 * 4 / 2**20
        found[name] = {
            "8": peaks[0],
            "64": peaks[1],
            "per block, of a state": (peaks[1] - peaks[0]) / 56 / state,
        }
        print(name, {k: f"{v:.3g}" for k, v in found[name].items()}, flush=True)
    return found


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by the processor's clock, least of all, and ratios to a checkpoint."""
    found: dict[str, Any] = {"clock": "process_time", "rounds": options.rounds}
    for name in ("convolutional chain, 24 blocks", "BERT, 24 layers"):
        steps: dict[str, Callable[[], None]] = {}
        for way in ("plain", "checkpoint", *BITS):
            if "conv" in name:
                model, loss = convolutional_chain("cpu", 24)
                wrapped: Any = model
                if way == "checkpoint":
                    for step in model.steps:
                        save = partial(checkpoint, step.forward, use_reentrant=False)
                        step.forward = save  # type: ignore[method-assign]
            else:
                model, loss, wrapped = bert(24)
                if way == "checkpoint":
                    _checkpointed(wrapped)
            if isinstance(way, int):
                use_adjoint(wrapped, bits=way, on_drift="ignore")
            steps[str(way)] = partial(_step, model, loss)
        taken: dict[str, list[float]] = {way: [] for way in steps}
        for round_ in range(options.rounds + 2):
            for way, step in steps.items():
                start = CLOCK()
                step()
                if round_ >= 2:
                    taken[way].append(CLOCK() - start)
        row = {way: min(column) for way, column in taken.items()}
        for bits in BITS:
            pairs = zip(taken[str(bits)], taken["checkpoint"], strict=True)
            row[f"{bits} / checkpoint"] = median(a / b for a, b in pairs)
        found[name] = row
        print(name, {k: f"{v:.3g}" for k, v in row.items()}, flush=True)
    return found


def _step(model: nn.Module, loss: Loss) -> None:
    loss(model).backward()


class ReluAfter(nn.Module):
    """relu(x + BN(conv(relu(BN(conv x)))))."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
            for _ in range(2)
        )
        nn.init.constant_(self.second[1].weight, scale)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return (x + self.second(self.first(x).relu())).relu()


def _relu_after(depth: int, scale: float, seed: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(ReluAfter(6, scale) for _ in range(depth))).double()
    return model, partial(_free_loss, torch.randn(4, 6, 8, 8, dtype=torch.float64))


def _post_norm(depth: int, scale: float, seed: int) -> tuple[nn.Module, Loss]:
    torch.manual_seed(seed)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=16, initializer_range=scale, num_labels=5,
    )  # fmt: skip
    tokens, labels = torch.randint(50, (4, 8)), torch.randint(5, (4,))
    model = hf.BertForSequenceClassification(config).double().train()
    return model, lambda m: m(input_ids=tokens, labels=labels).loss


TRIED = {
    **FAMILIES,
    "BERT, norm after": (_post_norm, (0.02, 0.15, 0.3)),
    "convolutional, ReLU after": (_relu_after, (0.1, 0.4, 1.0)),
}


def calibration(options: argparse.Namespace) -> dict[str, Any]:
    """Error over response, and over the bound that a warning goes by, per family."""
    found: dict[str, Any] = {"coded": CODED, "kinked": CODED_KINKED}
    for family, (make, scales) in TRIED.items():
        rows = []
        for depth in options.depths:
            for scale in scales:
                for seed in range(2 if depth < 48 else 1):
                    model, loss = make(depth, scale, seed)
                    rows += _calibrated(model, loss, seed)
        telling = [r for r in rows if 1e-11 < r[0] < 1 and r[1] > 0]
        ratios = sorted(error / response for error, response, _ in telling)
        found[family] = {
            "cases": len(rows),
            "error/response, median": median(ratios),
            "largest": ratios[-1],
            "error/bound, largest": max(error / bound for error, _, bound in telling),
            "silent": {
                f"{t:g}": sum(not e <= t and b <= t for e, _, b in rows)
                for t in (0.3, 0.1, 1e-2, 1e-3, 1e-4)
            },
            "warned needlessly at 1e-1": sum(e <= 0.1 < b for e, _, b in rows),
        }
        print(family, found[family], flush=True)
    return found


def _calibrated(model: nn.Module, loss: Loss, seed: int) -> list[tuple[float, float, float]]:
    """(error, response, bound) for each b and e."""

    def all_of() -> Tensor:
        torch.manual_seed(seed)
        wanted = [p for p in model.parameters() if p.requires_grad]
        got = torch.autograd.grad(loss(model), wanted, allow_unused=True)
        return torch.cat([g.flatten() for g in got if g is not None])

    exact, rows = all_of(), []
    for bits in BITS:
        for e in (1, 2):
            use_adjoint(model, bits=bits, evaluations=e, on_drift="ignore")
            all_of()
            error = relative(all_of(), exact)
            meters = [engine.meter for engine in engines(model)]
            rows.append((error, max(m.response for m in meters), max(m.bound for m in meters)))
        use_backprop(model)
    use_backprop(model)
    return rows


def hunt(options: argparse.Namespace) -> dict[str, Any]:
    """Random stacks: how many gradients were wrong, and how many of these nobody was told of."""
    from random_stacks import hunted

    found: Counter[str] = Counter()
    for seed in range(*options.seeds):
        one = hunted(seed)
        found["stacks"] += 1
        found["silent"] += one.silent
        if one.silent:
            print(one, flush=True)
        for tolerance in (0.1, 0.01):
            found[f"error > {tolerance:g}"] += one.error > tolerance
            found[f"of these bound ≤ {tolerance:g}"] += one.error > tolerance >= one.bound
            found[f"warned needlessly at {tolerance:g}"] += one.error <= tolerance < one.bound
    print(dict(found), flush=True)
    return {"seeds": options.seeds, **found}


def dinov2() -> Network:
    """DINOv2 with a layer scale, which makes updates small."""
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=24, num_attention_heads=4, image_size=56,
        layerscale_value=0.1, num_labels=10,
    )  # fmt: skip
    x, y = torch.randn(BATCH, 3, 56, 56), torch.randint(10, (BATCH,))
    model = hf.Dinov2ForImageClassification(config)
    return model, lambda m: m(pixel_values=x, labels=y).loss, model.dinov2.encoder.layer


def which(options: argparse.Namespace) -> dict[str, Any]:
    """Memory and error of every way to the gradient, and of the plan for 1 %, on four networks."""
    networks: dict[str, Callable[[], Network]] = {
        "DINOv2 with layer scale, 24 layers": dinov2,
        "Llama as initialised, 24 layers": llama,
        "BERT, norm after the addition, 12 layers": bert,
        "CIFAR ResNet-56 pretrained, BatchNorm, ReLU after": partial(resnet, options.data_dir),
    }
    found: dict[str, Any] = {}
    for name, make in networks.items():
        model, loss, _ = make()
        cost = measure_gradient_cost(model, lambda m, _, loss=loss: loss(m), None, steps=1)
        found[name] = [
            {"method": method_name(m), "memory": m.memory, "error": m.error} for m in cost.methods
        ]
        print(name, *found[name], sep="\n", flush=True)
    return found


def budget(_: argparse.Namespace) -> dict[str, Any]:
    """Peak and time of a step of the BERT of `which`, compiled under torch's own memory budget.

    Of plain backpropagation, checkpoints and codes, which are not compiled, too. A budget is the
    part that may be kept of what a compiled step would save (torch._functorch.config). What is
    compiled is cut into forward and backward by it, and run by PyTorch's own kernels: on a CPU
    others would take minutes to make, and keep the same.
    """
    functorch: Any = torch._functorch.config
    rows: list[dict[str, Any]] = []

    def add(method: str, model: nn.Module, loss: Loss) -> None:
        def step() -> None:
            _step(model, loss)

        step()  # in which it is compiled, or blocks are found
        step()
        spent = []
        for _ in range(ROUNDS):
            start = CLOCK()
            step()
            spent.append(CLOCK() - start)
        peak = peak_memory(step, model, torch.device("cpu"))
        rows.append({"method": method, "memory": peak, "seconds": median(spent)})
        print(rows[-1], flush=True)

    for method in ("plain", "checkpointed", "coded in 4 bits"):
        model, loss, blocks = bert()
        if method == "checkpointed":
            _checkpointed(blocks)
        elif method != "plain":
            use_adjoint(model, bits=4, on_drift="ignore")
        add(method, model, loss)
    for part in BUDGETS:
        torch._dynamo.reset()
        model, loss, _ = bert()
        with functorch.patch(activation_memory_budget=part):
            model.compile(backend="aot_eager_decomp_partition")
            add(f"compiled, budget {part:g}", model, loss)
    return {"network": "BERT, norm after the addition, 12 layers", "rows": rows}


PARTS = {
    "errors": errors, "states": states, "memory": memory, "time": times,
    "calibration": calibration, "hunt": hunt, "which": which, "budget": budget,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--seeds", type=int, nargs=2, default=[60, 560])
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*loss_type.*")
    known = options.out is not None and options.out.exists()
    result = json.loads(options.out.read_text()) if known else {}
    for part in options.parts:
        result[part] = PARTS[part](options)
        result["machine"] = machine() | {"transformers": hf.__version__}
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
