"""Per-tensor scales: what makes weights of different layers comparable to a generator."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt.structure import Structure

VARIANCE_FLOOR = 0.05  # of a layer's typical variance: keeps the logarithm of a dead channel finite


class RunningVariances(nn.Module):
    """Running variances v of batch norms <-> log(v / m + 0.05), for a layer of mean variance m / 0.95; starts as m = 1.

    Channels differ by orders of magnitude, and what a generator writes is to be no negative variance.
    """

    place: Tensor
    scale: Tensor

    def __init__(self, structure: Structure):
        super().__init__()
        self._slices = [t.slice for t in structure.tensors if t.kind == "running_var"]
        places = [torch.arange(where.start, where.stop) for where in self._slices]
        self.register_buffer("place", torch.cat([torch.empty(0, dtype=torch.long), *places]), persistent=False)
        # Checkpoints of generators for networks without batch norm know nothing of it.
        self.register_buffer("scale", torch.ones(len(self.place)), persistent=bool(places))

    def fit(self, weights: Float[Tensor, "n D"]) -> None:
        """Read the mean variance of every layer off sample networks."""
        means = [weights[:, where].double().mean().expand(where.stop - where.start) for where in self._slices]
        if means:
            self.scale.copy_((1 - VARIANCE_FLOOR) * torch.cat(means))
            self.scale[self.scale <= 0] = 1

    def log(
        self, weights: Float[Tensor, "*batch D"], chosen: Bool[Tensor, " V"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Weights with their V running variances, or the chosen ones of these, as logarithms."""
        return self._mapped(weights, lambda v: (v / self.scale + VARIANCE_FLOOR).log(), chosen)

    def exp(
        self, values: Float[Tensor, "*batch D"], chosen: Bool[Tensor, " V"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Inverse of `log`; a variance is never negative."""
        return self._mapped(values, lambda u: (u.exp() - VARIANCE_FLOOR).clamp_min(0) * self.scale, chosen)

    def _mapped(self, rows: Tensor, function: Callable[[Tensor], Tensor], chosen: Tensor | None) -> Tensor:
        if not len(self.place):
            return rows
        given = rows[..., self.place]
        mapped = function(given) if chosen is None else torch.where(chosen, function(given), given)
        return rows.index_copy(-1, self.place, mapped)


class Normalizer(nn.Module):
    """`(weights - shift) / scale`, with one shift and one scale per tensor, expanded to `[D]` buffers.

    Running variances are logarithms before that, see `RunningVariances`. Starts with shift 0 and scale 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, structure: Structure):
        super().__init__()
        self._slices = [t.slice for t in structure.tensors]
        self.variances = RunningVariances(structure)
        self.register_buffer("shift", torch.zeros(structure.size))
        self.register_buffer("scale", torch.ones(structure.size))

    def fit(self, weights: Float[Tensor, "n D"]) -> None:
        """Read scales off sample networks; a tensor that never varies keeps the scale 1."""
        self.variances.fit(weights)
        values = self.variances.log(weights)
        for where in self._slices:
            block = values[:, where].double()
            std = block.std()
            self.shift[where] = block.mean().to(self.shift)
            self.scale[where] = (std if std > 1e-8 else torch.ones_like(std)).to(self.scale)

    def encode(self, weights: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return (self.variances.log(weights) - self.shift) / self.scale

    def decode(self, normalized: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.variances.exp(normalized * self.scale + self.shift)
