"""What a class mask's network is guessed from, without a generator, where one formula says it all."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from Gpt.masks import hamming

KERNEL_SETTINGS = [{"rate": rate, "penalty": penalty} for rate in (0.2, 0.4, 0.8) for penalty in (1e-3, 1e-2, 0.1, 1.0)]


def kernel_ridge_networks(
    wanted: Bool[Tensor, "B classes"],
    seen: Bool[Tensor, "n classes"],
    weights: Float[Tensor, "n D"],
    *,
    rate: float,
    penalty: float,
) -> Float[Tensor, "B D"]:
    """Networks by kernel ridge regression from mask to weights, around the mean network.

    The kernel is exp(-rate h) for masks that differ in h classes: a product over classes, whose features are the
    products of any number of classes, the longer the less they weigh. Networks of the same mask count as their mean,
    penalised the less the more they are, which gives the same solution.

    Args:
        penalty: added to the kernel's diagonal.
    """
    masks, place = seen.cpu().unique(dim=0, return_inverse=True)
    place, counts = place.to(weights.device), place.bincount().to(weights.device)
    mean = weights.double().mean(0)
    sums = torch.zeros(len(masks), weights.shape[1], dtype=mean.dtype, device=mean.device)
    targets = sums.index_add(0, place, weights - mean) / counts[:, None]
    known, asked = (torch.exp(-rate * hamming(rows.cpu(), masks).to(mean)) for rows in (masks, wanted))
    coefficients = torch.linalg.solve(known + torch.diag(penalty / counts), targets)
    return (mean + asked @ coefficients).to(weights.dtype)
