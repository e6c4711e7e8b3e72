"""What networks do: the inputs they are compared on, and how far apart two answers are.

Distillation reads it. Classifiers need none of their own: they are compared by their predictions on training inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Behaviour:
    """A comparison of networks by what they do.

    Attributes:
        inputs: `(count, rng)` -> `[count, ...]`, random inputs for the networks, on the generator's device.
        divergence: `(found, wanted)` -> `[P]`: of P pairs of outputs `[P, count, ...]`, how far the first is from the
            second; zero where they do the same, and differentiable by the first.
    """

    inputs: Callable[[int, torch.Generator], Shaped[Tensor, "N ..."]]
    divergence: Callable[[Float[Tensor, "P N ..."], Float[Tensor, "P N ..."]], Float[Tensor, " P"]]


def prediction_divergence(
    found: Float[Tensor, "P N classes"], wanted: Float[Tensor, "P N classes"]
) -> Float[Tensor, " P"]:
    """Mean Kullback-Leibler divergence, in nats, of the predictions of logits `found` from those of `wanted`."""
    terms = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return terms.sum(-1).mean(-1)


def action_divergence(found: Float[Tensor, "P N A"], wanted: Float[Tensor, "P N A"]) -> Float[Tensor, " P"]:
    """Mean Kullback-Leibler divergence, in nats, of Gaussian policies with these mean actions and spread `ACTION_STD`.

    Actions beyond -1 and 1 are cut off by the environment; tanh stands in for that and still has a slope there.
    """
    return ((found.tanh() - wanted.tanh()) / ACTION_STD).square().sum(-1).mean(-1) / 2


ACTION_STD = 0.1  # of the range -1 to 1
