"""What networks do: the examples they are compared on, how far apart two answers are, and how good one is.

Distillation reads it. Classifiers need none of their own: they are compared by their predictions on training examples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Behaviour:
    """A comparison of networks by what they do.

    Attributes:
        examples: `(count, rng)` -> random inputs `[count, ...]` for the networks, on the generator's device, and after
            them what `loss` has to know of each, `[count, ...]`, such as labels.
        divergence: `(found, wanted)` -> `[P]`: of P pairs of outputs `[P, count, ...]`, how far the first is from the
            second; zero where they do the same, and differentiable by the first.
        loss: `(found, *known)` -> `[P]`: how bad the outputs are, given what is known of the examples, alike
            for all networks `[1, count, ...]` or not `[P, count, ...]`; None where outputs have no loss.
    """

    examples: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    divergence: Callable[[Float[Tensor, "P N ..."], Float[Tensor, "P N ..."]], Float[Tensor, " P"]]
    loss: Callable[..., Float[Tensor, " P"]] | None = None


def prediction_divergence(
    found: Float[Tensor, "P N classes"], wanted: Float[Tensor, "P N classes"]
) -> Float[Tensor, " P"]:
    """Mean Kullback-Leibler divergence, in nats, of the predictions of logits `found` from those of `wanted`."""
    terms = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return terms.sum(-1).mean(-1)


def prediction_loss(found: Float[Tensor, "P N classes"], labels: Int[Tensor, "#P N"]) -> Float[Tensor, " P"]:
    """Mean cross-entropy, in nats."""
    terms = F.cross_entropy(found.movedim(-1, 1), labels.expand(found.shape[:2]), reduction="none")
    return terms.mean(-1)


def action_divergence(found: Float[Tensor, "P N A"], wanted: Float[Tensor, "P N A"]) -> Float[Tensor, " P"]:
    """Mean Kullback-Leibler divergence, in nats, of Gaussian policies with these mean actions and spread `ACTION_STD`.

    Actions beyond -1 and 1 are cut off by the environment; tanh stands in for that and still has a slope there.
    """
    return ((found.tanh() - wanted.tanh()) / ACTION_STD).square().sum(-1).mean(-1) / 2


ACTION_STD = 0.1  # of the range -1 to 1
