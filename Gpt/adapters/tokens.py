"""An adapter as a grid of tokens, cut by the adapter's own shapes: any base model, rank and set of targets.

Every tensor is laid with its long axis (features) along the columns and its short axis (the rank) along the rows, and
cut along the columns: `lora_A [r, d_in]` as it is, `lora_B [d_out, r]` turned, a magnitude vector `[d_out]` as one row.
One piece is one token, as in Drag-and-Drop LLMs (Liang et al. 2025, arXiv 2506.16406); pieces that are smaller than
the grid are padded, and the padding is masked. Every number of an adapter has exactly one place.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from Gpt.errors import ConfigError, StructureError
from Gpt.structure import Structure

FORMAT = "adapter-tokens"


@dataclass(frozen=True)
class Piece:
    """One token: columns `[start, stop)` of a tensor that is laid with its long axis along the columns."""

    tensor: str
    turned: bool
    start: int
    stop: int


class AdapterTokens(nn.Module):
    """Weights `[B, D]` <-> tokens `[B, T, rows, columns]`, exactly.

    Args:
        structure: of the adapter.
        columns: of a token; by default the greatest common divisor of all long axes, but no less than the rank.

    Attributes:
        shape: `(T, rows, columns)`; the rows are the largest short axis, the rank.
        mask: True where a token holds a weight, False where it is padded.
        token: Int `[D]`, the token that each weight is in.

    Raises:
        StructureError: a tensor has more than two axes, as no LoRA adapter has.
        ConfigError: `columns` is not positive.
    """

    mask: Bool[Tensor, "T rows columns"]
    token: Int[Tensor, " D"]
    source: Int[Tensor, "T rows columns"]
    place: Int[Tensor, " D"]

    def __init__(self, structure: Structure, columns: int | None = None):
        super().__init__()
        sides = {spec.name: _sides(spec.name, spec.shape) for spec in structure.tensors}
        rows = max(short for short, _ in sides.values())
        if columns is None:
            columns = max(rows, math.gcd(*(long for _, long in sides.values())))
        if columns < 1:
            raise ConfigError(f"columns={columns}: a token has at least one column")
        self.structure = structure
        self.pieces = tuple(
            Piece(spec.name, spec.shape[0] > spec.shape[-1], start, min(start + columns, sides[spec.name][1]))
            for spec in structure.tensors
            for start in range(0, sides[spec.name][1], columns)
        )
        self.shape = (len(self.pieces), rows, columns)
        # Padding reads entry D, a zero that encode appends.
        source = torch.full(self.shape, structure.size)
        offsets = {spec.name: spec for spec in structure.tensors}
        for token, piece in enumerate(self.pieces):
            spec = offsets[piece.tensor]
            index = spec.offset + torch.arange(spec.numel).reshape(spec.shape if len(spec.shape) == 2 else (1, -1))
            laid = (index.T if piece.turned else index)[:, piece.start : piece.stop]
            source[token, : laid.shape[0], : laid.shape[1]] = laid
        mask = source < structure.size
        place = torch.empty(structure.size, dtype=torch.long)
        place[source[mask]] = mask.flatten().nonzero().squeeze(1)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("token", place // (rows * columns), persistent=False)

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.pieces)

    def encode(self, weights: Float[Tensor, "B D"]) -> Float[Tensor, "B T rows columns"]:
        """Flat rows to zero-padded tokens."""
        return F.pad(weights, (0, 1)).index_select(1, self.source.flatten()).unflatten(1, self.shape)

    def decode(self, tokens: Float[Tensor, "B T rows columns"]) -> Float[Tensor, "B D"]:
        """Tokens to flat rows; whatever stands in the padding is dropped. Exact inverse of `encode`."""
        return tokens.flatten(1).index_select(1, self.place)

    def mean(self, values: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch T"]:
        """Mean over the weights in every token."""
        count = torch.bincount(self.token, minlength=len(self))
        total = values.new_zeros(*values.shape[:-1], len(self)).index_add_(-1, self.token, values)
        return total / count

    def scale(self, deviations: Float[Tensor, "n D"], per: Literal["token", "module"]) -> Float[Tensor, " D"]:
        """Root mean square of every weight's token, or of its tensor, over n adapters; 1 where all of them are 0."""
        square = deviations.square().mean(0)
        if per == "token":
            square = self.mean(square)[self.token]
        else:
            square = torch.cat([square[t.slice].mean().expand(t.numel) for t in self.structure.tensors])
        return torch.where(square > 0, square.sqrt(), 1)

    def manifest(self) -> dict[str, Any]:
        """What a reader of the tokens needs, ready for JSON; `check_manifest` compares it."""
        _, rows, columns = self.shape
        tensors = [{"name": t.name, "shape": list(t.shape)} for t in self.structure.tensors]
        pieces = [asdict(piece) for piece in self.pieces]
        coverage = int(self.mask.sum()) / self.structure.size
        return {
            "format": FORMAT, "rows": rows, "columns": columns, "coverage": coverage, "tensors": tensors,
            "tokens": pieces,
        }  # fmt: skip

    def check_manifest(self, manifest: dict[str, Any]) -> None:
        """Whether tokens that came with this manifest are cut like these.

        Raises:
            StructureError: they are not; names the first difference.
        """
        own = self.manifest()
        for key, value in own.items():
            if manifest.get(key) != value:
                raise StructureError(
                    f"the tokens were cut for another adapter: {key} is {_short(manifest.get(key))} there and "
                    f"{_short(value)} here; use the base, rank and targets that they were made for"
                )


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(short, long) axis; a vector is one row."""
    if not 1 <= len(shape) <= 2:
        raise StructureError(f"{name!r} has shape {shape}; an adapter's tensors have one or two axes")
    return (min(shape), max(shape)) if len(shape) == 2 else (1, shape[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
