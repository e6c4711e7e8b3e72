"""A complete state_dict as tokens: where it is cut, in which units its numbers are, where each token says it stands.

    weights [D]  <-Latents->  latents [D], unit variance  <-a cut->  tokens [T, K] and a mask of what is padding

Counters, empty tensors and ties are no part of the flat vector; `Gpt.structure.Structure` restores them, with the order
of the keys and the dtypes. Learned scalars are weights like any other. The policies are those of RPG (Wang et al. 2025,
arXiv 2501.11587, section 3.1) and the neuron tokens of `Gpt.neurons`:

    flat            pieces of `token_size` entries of everything in a row
    within_layer    the same, begun afresh at every tensor
    by_channel      whole output channels, as many as fit; a channel that does not fit is cut by its own first axis
    neuron          every weight that touches one hidden unit alone, in no order, and those between two in a joint
    aligned_neuron  the same, where unit i plays one part in all networks (one initialisation, or an aligned zoo)
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.data.normalization import RunningVariances
from Gpt.errors import ConfigError, StructureError
from Gpt.neurons import Graph, Joints, NeuronGraph, Tokens
from Gpt.structure import Structure
from Gpt.tokens import Tokenization, split_sizes

CUTS = ("flat", "within_layer", "by_channel")
POLICIES = (*CUTS, "neuron", "aligned_neuron")
CODES = ("layer_chunk", "index", "learned")


def token_sizes(structure: Structure, policy: str, token_size: int) -> list[int]:
    """Entries of each token, in the order of the flat vector, for the three policies that cut it.

    Raises:
        ConfigError: the policy is none of `CUTS`, or `token_size` is not positive.
    """
    if policy not in CUTS:
        raise ConfigError(f"generator.policy={policy!r} does not cut weights in a row; choose from {', '.join(CUTS)}")
    if token_size < 1:
        raise ConfigError(f"generator.token_size={token_size}: a token holds at least one weight")
    if policy == "by_channel":
        return [size for spec in structure.tensors for size in _channel_sizes(spec.shape, token_size)]
    name = "chunk" if policy == "flat" else "chunk_within_layer"
    return list(split_sizes([[spec.numel for spec in structure.tensors]], name, token_size))


def cut(structure: Structure, policy: str, token_size: int) -> Tokenization:
    """`encode` flat rows `[B, D]` to tokens `[B, T, K]`, and back, exactly; `mask [T, K]` is False in the padding.

    Raises:
        ConfigError: see `token_sizes`.
    """
    return Tokenization(pairwise(accumulate(token_sizes(structure, policy, token_size), initial=0)))


def token_coordinates(structure: Structure, sizes: Sequence[int]) -> Int[Tensor, "T 2"]:
    """(layer, chunk) of each token of a cut: the tensor it begins in, and how many tokens began there before."""
    offsets = [spec.offset for spec in structure.tensors]
    layers = [bisect_right(offsets, start) - 1 for start in accumulate(sizes[:-1], initial=0)]
    chunks, seen = [], dict.fromkeys(layers, 0)
    for layer in layers:
        chunks.append(seen[layer])
        seen[layer] += 1
    return torch.tensor([layers, chunks]).T


class Layout(nn.Module):
    """Where the tokens of every policy stand.

    Attributes:
        graph: latents `[B, D]` <-> tokens and joints. A cut is a graph with one type of token and without joints.
        coordinates: Int `[P, 2]`, (layer, chunk) of each place. Interchangeable tokens share a place: with policy
            "neuron", the units of a layer do.
        place: Int `[T]`, the place of each token.
        shared: what `Latents` takes: None where every weight has a place of its own.

    Raises:
        ConfigError, StructureError: the policy or the token size does not exist, or does not fit the structure.
    """

    coordinates: Int[Tensor, "P 2"]
    place: Int[Tensor, " T"]

    def __init__(self, structure: Structure, policy: str, token_size: int):
        super().__init__()
        if policy not in POLICIES:
            raise ConfigError(f"generator.policy={policy!r} does not exist; choose one of {', '.join(POLICIES)}")
        self.shared: Callable[[Tensor], Tensor] | None = None
        if policy not in CUTS:
            graph = NeuronGraph(structure)
            self.graph: Graph = graph
            self.shared = graph.without_order if policy == "neuron" else None
            coordinates, place = _unit_places(graph, policy == "aligned_neuron")
        else:
            self.graph = CutGraph(cut(structure, policy, token_size))
            coordinates = token_coordinates(structure, token_sizes(structure, policy, token_size))
            place = torch.arange(len(coordinates))
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.register_buffer("place", place, persistent=False)


class CutGraph(Graph):
    """A cut: tokens of one type, all of one padded size, and no joints."""

    def __init__(self, tokens: Tokenization):
        super().__init__()
        self.tokens = tokens
        self.shapes = ((len(tokens), tokens.width),)

    def encode(self, flat: Float[Tensor, "B D"]) -> tuple[Tokens, Joints]:
        return [self.tokens.encode(flat)], []

    def decode(self, tokens: Tokens, joints: Joints) -> Float[Tensor, "B D"]:
        return self.tokens.decode(tokens[0])


def _unit_places(graph: NeuronGraph, ordered: bool) -> tuple[Int[Tensor, "P 2"], Int[Tensor, " T"]]:
    """Coordinates of the places, and the place of each token: one per unit, or one per hidden layer."""
    layers = torch.arange(len(graph.shapes))
    units = torch.tensor([n for n, _ in graph.shapes])
    layer = layers.repeat_interleave(units)
    if not ordered:
        return torch.stack([layers, torch.zeros_like(layers)], dim=1), layer
    unit = torch.cat([torch.arange(n) for n, _ in graph.shapes])
    return torch.stack([layer, unit], dim=1), torch.arange(len(layer))


class PositionCode(nn.Module):
    """A vector `[P, width]` for each (layer, chunk).

    "layer_chunk" gives the first half of the width to sinusoids of the chunk and the second to those of the layer;
    "index" numbers the places through; "learned" starts as "layer_chunk" and is trained.

    Raises:
        ConfigError: there is no such code, or the width does not divide into its sines and cosines.
    """

    def __init__(self, name: str, coordinates: Int[Tensor, "P 2"], width: int):
        super().__init__()
        if name not in CODES:
            raise ConfigError(f"generator.position={name!r} does not exist; choose one of {', '.join(CODES)}")
        if width % 4:
            raise ConfigError(f"generator.width={width} is no multiple of 4, as the sines and cosines of two axes need")
        layer, chunk = coordinates.unbind(1)
        if name == "index":
            code = sinusoids(torch.arange(len(layer), device=layer.device), width)
        else:
            code = torch.cat([sinusoids(chunk, width // 2), sinusoids(layer, width // 2)], dim=1)
        if name == "learned":
            self.code = nn.Parameter(code)
        else:
            self.register_buffer("code", code, persistent=False)

    def forward(self) -> Float[Tensor, "P width"]:
        return self.code


def sinusoids(position: Int[Tensor, " n"] | Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """sin and cos of position / 10000^(2i / width), alternating (Vaswani et al. 2017, section 3.5)."""
    exponents = torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width
    angles = position[:, None].float() * 10000.0**-exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Latents(nn.Module):
    """Weights `[B, D]` <-> latents of unit variance around a centre: (u - center) / spread.

    u is the weight itself, or of a running variance the logarithm that `RunningVariances` makes of it. Spreads are per
    tensor. What never varies among the training networks is not generated: it has spread 0, latent 0, and is
    written as it was, to the bit.

    Args:
        residual: the centre is the mean checkpoint, so that only what tells networks apart remains; otherwise it is one
            number per tensor, as in RPG.
        shared: what of a mean checkpoint `[1, D]` is no accident of these networks; where hidden units have no common
            order, `NeuronGraph.without_order`.

    Attributes:
        anchor: `[D]` mean checkpoint in units of each tensor's standard deviation: where a residual starts from. It
            says nothing of hidden units that have no common order, and which weight is which where they have one.
    """

    center: Float[Tensor, " D"]
    spread: Float[Tensor, " D"]
    anchor: Float[Tensor, " D"]

    def __init__(self, structure: Structure, residual: bool = True, shared: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.residual, self._shared = residual, shared
        self._slices = [spec.slice for spec in structure.tensors]
        self.variances = RunningVariances(structure)
        self.register_load_state_dict_pre_hook(_with_former_names)
        self.register_buffer("center", torch.zeros(structure.size))
        self.register_buffer("spread", torch.ones(structure.size))
        self.register_buffer("anchor", torch.zeros(structure.size))

    @torch.no_grad()
    def fit(self, weights: Float[Tensor, "n D"]) -> None:
        """Read centre and spreads off training networks.

        Raises:
            StructureError: a weight is not finite.
        """
        if not weights.isfinite().all():
            raise StructureError("training networks hold NaN or infinite weights; leave such networks out of the zoo")
        self.variances.fit(weights)
        self.spread.fill_(1)
        values = self._log(weights)
        mean = values.mean(0, keepdim=True, dtype=torch.float64)
        mean = mean if self._shared is None else self._shared(mean)
        for where in self._slices:
            self._fit_tensor(where, values[:, where].double(), weights[:, where].double(), mean[0, where])

    def encode(self, weights: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        varies = self.spread > 0
        scale = torch.where(varies, self.spread, 1)
        return torch.where(varies, (self._log(weights) - self.center) / scale, 0)

    def decode(self, latents: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return self._exp(self.center + latents * self.spread)

    def _fit_tensor(self, where: slice, values: Tensor, weights: Tensor, mean: Tensor) -> None:
        """Centre, spread and anchor of one tensor; `values` and their `mean` are in the units of the centre, `weights`
        are plain."""
        rows = weights if self.residual else weights.reshape(-1, 1)
        varies = (rows.amax(0) > rows.amin(0)).expand(weights.shape[1])
        center = mean if self.residual else values.mean().expand(weights.shape[1])
        deviation = (values - center)[:, varies]
        spread = deviation.square().mean().sqrt() if deviation.numel() else 0.0
        std = (values - values.mean()).square().mean().sqrt()
        self.center[where] = torch.where(varies, center, weights[0]).to(self.center)
        self.spread[where] = torch.where(varies, spread, 0.0).to(self.spread)
        self.anchor[where] = ((center - values.mean()) / torch.where(std > 0, std, 1)).to(self.anchor)

    def _log(self, weights: Tensor) -> Tensor:
        """Running variances that vary to their logarithms; all else stays."""
        return self.variances.log(weights, self.spread[self.variances.place] > 0)

    def _exp(self, values: Tensor) -> Tensor:
        return self.variances.exp(values, self.spread[self.variances.place] > 0)


def _with_former_names(latents: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Earlier checkpoints have the scales of running variances under another name, and where there are none, too."""
    scale = state.pop(f"{prefix}variance_scale", None)
    if scale is not None and scale.numel():
        state[f"{prefix}variances.scale"] = scale


def _channel_sizes(shape: tuple[int, ...], limit: int) -> list[int]:
    """Token sizes of one tensor: whole rows of axis 0, in as few tokens as hold them, filled as evenly as can be."""
    entries = 1
    for length in shape:
        entries *= length
    if entries <= limit:
        return [entries]
    row = entries // shape[0]
    if row > limit:
        return _channel_sizes(shape[1:], limit) * shape[0]
    tokens = -(-shape[0] // (limit // row))
    rows = -(-shape[0] // tokens)
    full, rest = divmod(shape[0], rows)
    return [rows * row] * full + [rest * row] * (rest > 0)
