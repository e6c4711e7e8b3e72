"""Per-tensor scales: what makes weights of different layers comparable to a generator."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.structure import Structure


class Normalizer(nn.Module):
    """`(weights - shift) / scale`, with one shift and one scale per tensor, expanded to `[D]` buffers.

    Starts as the identity.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, structure: Structure):
        super().__init__()
        self._slices = [t.slice for t in structure.tensors]
        self.register_buffer("shift", torch.zeros(structure.size))
        self.register_buffer("scale", torch.ones(structure.size))

    def fit(self, weights: Float[Tensor, "n D"]) -> None:
        """Read scales off sample networks; a tensor that never varies keeps the scale 1."""
        for where in self._slices:
            block = weights[:, where].double()
            std = block.std()
            self.shift[where] = block.mean().to(self.shift)
            self.scale[where] = (std if std > 1e-8 else torch.ones_like(std)).to(self.scale)

    def encode(self, weights: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return (weights - self.shift) / self.scale

    def decode(self, normalized: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return normalized * self.scale + self.shift
