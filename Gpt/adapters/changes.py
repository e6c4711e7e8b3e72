"""Adapters compared by the changes B A that they make to the base model, all layers in one vector.

The inner product of B A and B' A' is the sum over the rank's pairs of (Bᵀ B') (A A'ᵀ), so no change is formed, and of
the base model nothing is needed but the shapes of its layers. Magnitudes (DoRA) are left out. An adapter that changes
nothing has cosine 0 with all.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.adapters.base import BaseModel
from Gpt.adapters.spec import PREFIX, AdapterSpec, adapter_structure, draw_a, target_shapes

TINY = 1e-30


def delta_cosine(
    base: BaseModel | str, spec: AdapterSpec, first: Float[Tensor, "P D"], second: Float[Tensor, "n D"]
) -> Float[Tensor, "P n"]:
    """Cosine of the changes of every pair of adapters, in double precision."""
    inner, x, y = _inner("pmr,nms->pnrs", base, spec, first, second)
    return inner / (x[:, None] * y).sqrt().clamp_min(TINY)


def apart(
    base: BaseModel | str, spec: AdapterSpec, written: Float[Tensor, "P D"], own: Float[Tensor, "P D"]
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """How far each adapter is from its own counterpart, in double precision.

    Returns:
        1 - cosine of both changes, from 0 (the same direction) to 2; and the length of their difference over that of
        the counterpart's change, which is 1 for the base model and tells apart changes of the same direction too.
    """
    inner, x, y = _inner("pmr,pms->prs", base, spec, written, own)
    cosine = inner / (x * y).sqrt().clamp_min(TINY)
    return (1 - cosine).clamp_min(0), (x + y - 2 * inner).clamp_min(0).sqrt() / y.sqrt().clamp_min(TINY)


def _inner(
    pairs: str, base: BaseModel | str, spec: AdapterSpec, first: Float[Tensor, "P D"], second: Float[Tensor, "n D"]
) -> tuple[Tensor, Float[Tensor, " P"], Float[Tensor, " n"]]:
    """Inner products of the changes of the pairs of adapters that the equation says, and squared lengths of both."""
    inner, x, y = [], [], []
    for (bx, ax), (by, ay) in zip(_layers(base, spec, first), _layers(base, spec, second), strict=True):
        inner.append((torch.einsum(pairs, bx, by) * torch.einsum(pairs, ax.mT, ay.mT)).sum((-2, -1)))
        x.append((bx.mT @ bx * (ax @ ax.mT)).sum((1, 2)))
        y.append((by.mT @ by * (ay @ ay.mT)).sum((1, 2)))
    return torch.stack(inner).sum(0), torch.stack(x).sum(0).clamp_min(0), torch.stack(y).sum(0).clamp_min(0)


def _layers(
    base: BaseModel | str, spec: AdapterSpec, weights: Float[Tensor, "P D"]
) -> Iterator[tuple[Float[Tensor, "P outputs r"], Float[Tensor, "_ r inputs"]]]:
    """B and A of one adapted layer after the other, in double precision; an A that all adapters share is there once."""
    tensors = adapter_structure(base, spec).unflatten(weights)
    for name, (_, inputs) in target_shapes(base, spec.targets).items():
        own = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        a = draw_a(name, inputs, spec)[None].to(weights.device) if own is None else own
        yield tensors[f"{PREFIX}{name}.lora_B.weight"].double(), a.double()
