"""A residual network as a measure on depth × particles, and back ([BPV24] arXiv 2403.12887)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit.errors import InputError, several
from deeplimit.meanfield.frame import Frame, frame_of, grid_of, lengths
from deeplimit.meanfield.particles import Move, Norms, moved_norms

ROUNDING = 1e-5  # of the sum of a layer's weights, in float32


class LayerwiseMeasure:
    """A network as a measure μ = ∫ μ(·|s) ds on [0, 1] × Ω, with uniform marginal in depth.

    Layer n is the law of its particles, constant on the cell [s_n, s_{n+1}) of depth,

        μ(·|s) = Σ_i m_{n,i} δ_{ω_{n,i}},      φ_s(x) = ∫ ψ(x, ω) dμ(ω|s),      ẋ(s) = φ_s(x(s)),

    with ω = (u, w, b) and ψ(x, ω) = u σ(w·x + b). A finite network is N layers of M equal atoms.
    The horizon is normalised to 1: a layer h Σ_i V_i σ(w_i·x + b_i) in a cell of length Δ_n has the
    particles u_i = M h V_i / Δ_n, which is N·M·h·V_i where the layers have equal lengths.
    Source: [BPV24] arXiv 2403.12887.

        >>> measure = LayerwiseMeasure.of(model)
        >>> measure
        LayerwiseMeasure(2 layers of [4] particles of [7] numbers)
        >>> bool((measure.network()(x) - model(x)).abs().max() < 1e-12)
        True

    Args:
        particles: [N, M, p], or a list of N tensors [M_n, p_n]; floating point, finite. The order
            of the numbers of a particle is u, w, b, each flattened (`frame.layouts`); of gated MLPs
            u, the gate's w and b, then v and c of what the gate multiplies, biases where the layer
            has them.
        weights: [N, M] or a list of [M_n], m_{n,i} ≥ 0, of sum 1 in each layer; 1/M by default.
        breakpoints: s_0 = 0 < … < s_N = 1; n/N by default.
        frame: what the network is besides its particles: a model that `of` can read, whose layers
            and width do not matter, or the `frame` of another measure; without it there is no
            `network`.
        norms: `norms` of another measure of as many particles: of each layer what its batch norms
            are in training mode; by default their statistics do nothing.

    Raises:
        InputError: tensors of other shapes, whole numbers, values not finite, weights that are
            negative or have another sum, breakpoints that do not rise from 0 to 1, particles of
            another size than the frame's.
    """

    def __init__(
        self,
        particles: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor] | None = None,
        breakpoints: Iterable[float] | None = None,
        *,
        frame: Frame | nn.Module | Anatomy | None = None,
        norms: Sequence[Norms] | None = None,
    ):
        self.layers = _checked_particles(particles)
        self.masses = _checked_weights(weights, self.layers)
        count = len(self.layers)
        self.breakpoints = grid_of(breakpoints, count)
        if frame is not None and not isinstance(frame, Frame):
            frame = frame_of(frame)[0]
        self.frame = frame = None if frame is None else frame.on(self.breakpoints)
        self.norms = tuple(norms) if norms is not None else (Norms(),) * count
        widths = [None if norm.inner is None else len(norm.inner) for norm in self.norms]
        if any(w not in (None, len(x)) for w, x in zip(widths, self.layers, strict=True)):
            raise InputError(f"norms of {widths} particles given for {list(map(len, self.layers))}")
        for n, layout in enumerate(frame.layouts if frame is not None else ()):
            given, size = self.layers[n].shape[1], sum(layout.sizes)
            if given != size:
                raise InputError(
                    f"layer {n}: particles of {given} numbers given, the frame has {layout}, "
                    f"{size} numbers"
                )

    @classmethod
    def of(cls, model: nn.Module | Anatomy) -> "LayerwiseMeasure":
        """Reads the measure of a network, an independent copy of its values.

        Of chains and classifiers of two-layer residuals (`TwoLayerResidual`, or modules with the
        same parts, `ConvolutionalResidual`) a particle is a hidden neuron or channel with its
        incoming and outgoing weights, filters and bias; of models of transformers (ViT, DINOv2,
        GPT-2, Llama and others) a hidden neuron of an MLP with its row and column, in a gated MLP
        its two rows: attention, norms and embeddings are the frame, as is a layer's output bias.
        Batch norms inside a residual function are folded into the particles, as they are in
        evaluation mode; what they are in training mode is carried beside (`norms`) and is no part
        of d. Stage k of K lies in [k/K, (k + 1)/K].

        Raises:
            InputError: a network that is not a mean of particles: linear residuals, a group norm
                inside, Heun's method, blocks of other kinds; parameters that are not finite; a
                model without layers.
        """
        frame, layers, norms = frame_of(model)
        return cls(layers, breakpoints=frame.breakpoints, frame=frame, norms=norms)

    def network(self) -> nn.Module:
        """Builds the network, a new one: the layers' sums V_i = Δ_n m_i u_i / h in the frame.

        `LayerwiseMeasure.of(model).network()` computes what the model does, in both modes. Weights
        are folded into the output weights; read by `of` it then is another measure, with equal
        weights and longer u. A model has one width (of several stages, one that doubles): narrower
        layers are filled up with neurons of zeros. Batch norms inside residual functions come back
        with γ > 0; a channel of γ = 0 with statistics that do nothing, mean 0 and variance 1.

        Raises:
            InputError: the measure has no frame.
        """
        if self.frame is None:
            raise InputError(
                "this measure was made from particles alone; give frame=model, a network whose "
                "stem, head and activation it shall have"
            )
        return self.frame.network(self.layers, self.masses, self.norms)

    @property
    def particles(self) -> Tensor | list[Tensor]:
        """[N, M, p]; the list of [M_n, p_n] where layers differ."""
        return _stacked(self.layers)

    @property
    def weights(self) -> Tensor | list[Tensor]:
        """[N, M], or a list of [M_n]; in float64, on the CPU."""
        return _stacked(self.masses)

    @property
    def lengths(self) -> tuple[float, ...]:
        """Δ_n = s_{n+1} − s_n."""
        return lengths(self.breakpoints)

    @property
    def depth(self) -> int:
        """N."""
        return len(self.layers)

    def is_uniform(self, n: int) -> bool:
        """True where the atoms of layer n have equal weights."""
        return bool((self.masses[n] == self.masses[n][0]).all())

    def same_as(self, other: "LayerwiseMeasure") -> bool:
        """True of the same particles and weights at the same breakpoints."""
        if self.breakpoints != other.breakpoints:
            return False
        mine, theirs = ((*m.layers, *m.masses) for m in (self, other))
        pairs = zip(mine, theirs, strict=True)
        return all(x.shape == y.shape and bool((x.cpu() == y.cpu()).all()) for x, y in pairs)

    def __repr__(self) -> str:
        """Depth, widths and sizes."""
        widths = sorted({len(layer) for layer in self.layers})
        sizes = sorted({layer.shape[1] for layer in self.layers})
        depth = several(self.depth, "layer")
        return f"LayerwiseMeasure({depth} of {widths} particles of {sizes} numbers)"


Network = LayerwiseMeasure | nn.Module | Anatomy
# What a layer is made of, (measure, n), the weights of their last norms, and how.
Cell = tuple[Sequence[tuple[LayerwiseMeasure, int]], Sequence[float], Move]


def as_measure(network: Network) -> LayerwiseMeasure:
    """A measure, or that of a network."""
    return network if isinstance(network, LayerwiseMeasure) else LayerwiseMeasure.of(network)


def remade(
    cells: Iterable[Cell],
    masses: Sequence[Tensor],
    breakpoints: Iterable[float],
    frame: Frame | None,
) -> LayerwiseMeasure:
    """A measure of layers made of others: what becomes of particles becomes of their norms."""
    layers, norms = [], []
    for sources, weights, move in cells:
        layers.append(move([measure.layers[n] for measure, n in sources]))
        norms.append(moved_norms([measure.norms[n] for measure, n in sources], weights, move))
    return LayerwiseMeasure(layers, masses, breakpoints, frame=frame, norms=norms)


def _checked_particles(given: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    layers = tuple(layer.detach() for layer in given)
    if not layers:
        raise InputError("no layers given; expected particles [N, M, p] with N ≥ 1")
    for n, layer in enumerate(layers):
        if layer.dim() != 2 or 0 in layer.shape or not layer.is_floating_point():
            raise InputError(
                f"layer {n}: {layer.dtype} of shape {list(layer.shape)} given; expected particles "
                "[N, M, p], or a list of [M_n, p], of floating point, M ≥ 1"
            )
        if not bool(layer.isfinite().all()):
            raise InputError(f"layer {n} has particles that are not finite")
    return layers


def _checked_weights(
    given: Tensor | Sequence[Tensor] | None, layers: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    if given is None:
        return tuple(torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in layers)
    if len(given) != len(layers):
        raise InputError(f"weights of {len(given)} layers given for {len(layers)}")
    masses = []
    for n, (mass, layer) in enumerate(zip(given, layers, strict=True)):
        fits = mass.shape == layer.shape[:1]
        total = float(mass.double().sum())
        if not (fits and bool((mass >= 0).all()) and abs(total - 1) <= ROUNDING):
            what = f"shape {list(mass.shape)}"
            if fits:
                what = f"sum {total:.6g}, the least {float(mass.min()):.3g}"
            raise InputError(
                f"layer {n}: weights of {what} for {len(layer)} particles; expected weights ≥ 0 of "
                "sum 1"
            )
        masses.append(mass.detach().cpu().double() / total)
    return tuple(masses)


def _stacked(rows: Sequence[Tensor]) -> Tensor | list[Tensor]:
    alike = len({row.shape for row in rows}) == 1
    return torch.stack(list(rows)) if alike else list(rows)
