"""The few statistics that an evaluation reports; pure functions of tensors, in double precision."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from Gpt import seeds
from Gpt.evaluation.results import Interval, Trace


def bootstrap_interval(values: Float[Tensor, " n"], seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean with its 95 % percentile-bootstrap interval (Efron 1979) over independent networks, tasks or seeds.

    Infinite values stay what they are: the mean is then infinite, and so are the bounds that resamples reach.
    """
    values = values.detach().double().cpu()
    count = len(values)
    draws = torch.randint(count, (resamples, count), generator=seeds.rng("cpu", seed, "bootstrap"))
    # The nearest order statistic, since interpolating between infinite ones would give NaN.
    low, high = np.quantile(values[draws].mean(1).numpy(), [0.025, 0.975], method="nearest")
    return Interval(float(values.mean()), float(low), float(high), count)


def trace(name: str, kind: str, x: Sequence[int], values: Sequence[Float[Tensor, " n"]], seed: int = 0) -> Trace:
    """The mean of n networks at every x, with its bootstrap interval."""
    intervals = [bootstrap_interval(at_x, seed) for at_x in values]
    mean, low, high = ([getattr(interval, bound) for interval in intervals] for bound in ("mean", "low", "high"))
    return Trace(name, kind, [float(place) for place in x], mean, low, high)


def prompt_alignment(prompted: Float[Tensor, "n p"], achieved: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """R² of achieved against prompted metrics, for each network over its p prompts (Peebles et al. 2022).

    1 - sum (prompted - achieved)² / (sum (prompted - mean prompted)² + 1e-8): 1 when every wish is met, 0 when the mean
    wish always comes out, without a lower bound.
    """
    prompted, achieved = prompted.double(), achieved.double()
    residual = (prompted - achieved).square().sum(1)
    total = (prompted - prompted.mean(1, keepdim=True)).square().sum(1)
    return 1 - residual / (total + 1e-8)


def data_copying_z(generated: Float[Tensor, " n"], held_out: Float[Tensor, " m"]) -> float:
    """Data-copying score Z_U (Meehan et al. 2020, "A non-parametric test to detect data-copying", one cell).

    The z-score of the Mann-Whitney U statistic of two samples of distances to the nearest training point. Far below
    zero: generated networks lie nearer to the training networks than held-out ones do, so they are copies. Around
    zero: alike. Above: further away.
    """
    n, m = len(generated), len(held_out)
    ranks = rankdata(torch.cat([generated, held_out]).double().cpu().numpy())
    u = ranks[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def overlap(a: Bool[Tensor, "n N"], b: Bool[Tensor, "m N"]) -> Float[Tensor, "n m"]:
    """Intersection over union of every pair of sets of examples; two empty sets overlap completely."""
    a, b = a.float(), b.float()
    intersection = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - intersection
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))
