"""Tokens: flat weight vectors <-> padded sequences a transformer can read.

`Tokenization` cuts the flat vector into consecutive pieces, one token each, by one of G.pt's four policies (Peebles
et al. 2022, arXiv 2209.12892). What a transformer reads may be several vectors in a row (noised weights, starting
weights, scalar codes), each made of tensors; `groups` lists the tensor sizes vector by vector:

    chunk                pieces of `chunk` entries of everything in a row; a token can straddle tensors and vectors
    chunk_within_input   the same, begun afresh at every vector; a token can straddle tensors only
    chunk_within_layer   the same, begun afresh at every tensor; nothing is straddled
    layer_by_layer       one token per tensor, however large

The last piece of a vector, tensor or row is shorter where `chunk` does not divide it. For a single vector `chunk` and
`chunk_within_input` are the same cut.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from Gpt.errors import ConfigError
from Gpt.structure import Structure

POLICIES = ("chunk", "chunk_within_input", "chunk_within_layer", "layer_by_layer")


def split_sizes(groups: Sequence[Sequence[int]], policy: str, chunk: int | None = None) -> tuple[int, ...]:
    """Number of entries in each token.

    Args:
        groups: tensor sizes of every vector, e.g. `[[7840, 10, 100, 10]]` for one MNIST MLP.
        policy: one of `POLICIES`.
        chunk: entries per full token; "layer_by_layer" has none.

    Raises:
        ConfigError: the policy is unknown, or `chunk` is missing or not positive.
    """
    if policy not in POLICIES:
        raise ConfigError(f"tokens: policy is {policy!r}; choose one of {', '.join(POLICIES)}")
    tensors = [size for group in groups for size in group]
    if policy == "layer_by_layer":
        return tuple(tensors)
    if chunk is None or chunk < 1:
        raise ConfigError(f"tokens: policy {policy!r} needs chunk, a positive number of weights per token, not {chunk}")
    blocks = {
        "chunk": [sum(tensors)],
        "chunk_within_input": [sum(group) for group in groups],
        "chunk_within_layer": tensors,
    }[policy]
    return tuple(size for block in blocks for size in _chunks(block, chunk))


class Tokenization(nn.Module):
    """A cut of the flat vector `[D]` into T tokens of at most K entries, shorter ones padded with zeros.

    Neighbouring tokens of one size are cut and padded in one piece, so that nothing here is as long as the vector: an
    index table would be eight bytes per weight, twice, and its gradient a scatter.

    Args:
        splits: `(start, stop)` of every token, consecutive and without gaps: they begin at 0 and end at D.
    """

    sizes: Int[Tensor, " T"]

    def __init__(self, splits: Iterable[tuple[int, int]]):
        super().__init__()
        self.splits = tuple(splits)
        starts, stops = zip(*self.splits, strict=True)
        if starts != (0, *stops[:-1]) or any(start >= stop for start, stop in self.splits):
            raise ValueError(f"token splits must be consecutive, non-empty and begin at 0, not {self.splits}")
        sizes = [stop - start for start, stop in self.splits]
        self.size = stops[-1]
        self.width = max(sizes)
        self._runs = [(len(list(run)), size) for size, run in groupby(sizes)]
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)

    @classmethod
    def of(cls, structure: Structure, policy: str, chunk: int | None = None) -> "Tokenization":
        """Cut one network's flat vector by `policy`; see `split_sizes` for what is raised."""
        sizes = split_sizes([[spec.numel for spec in structure.tensors]], policy, chunk)
        return cls(pairwise(accumulate(sizes, initial=0)))

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.splits)

    @property
    def mask(self) -> Bool[Tensor, "T K"]:
        """True where a token holds a weight and False where it is padded."""
        return torch.arange(self.width, device=self.sizes.device) < self.sizes[:, None]

    def encode(self, weights: Float[Tensor, "B D"]) -> Float[Tensor, "B T K"]:
        """Flat rows to zero-padded tokens."""
        runs = weights.split([count * size for count, size in self._runs], dim=1)
        pieces = [
            F.pad(run.unflatten(1, (count, size)), (0, self.width - size))
            for run, (count, size) in zip(runs, self._runs, strict=True)
        ]
        return torch.cat(pieces, dim=1)

    def decode(self, tokens: Float[Tensor, "B T K"]) -> Float[Tensor, "B D"]:
        """Tokens to flat rows; whatever stands in the padding is dropped. Exact inverse of `encode`."""
        runs = tokens.split([count for count, _ in self._runs], dim=1)
        return torch.cat([run[..., :size].flatten(1) for run, (_, size) in zip(runs, self._runs, strict=True)], dim=1)


def _chunks(size: int, chunk: int) -> list[int]:
    full, remainder = divmod(size, chunk)
    return [chunk] * full + [remainder] * (remainder > 0)
