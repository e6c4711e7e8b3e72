"""The test functions that built-in tasks share, for one network or a whole population.

`net` is a module, or a `Population` of P networks; results are then one number, or one row, per network.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Gpt.masks import label_map
from Gpt.population.functional import Population


def classification_loss(
    x: Float[Tensor, "N ..."], y: Int[Tensor, "*P N"], net: nn.Module | Population
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(mean cross-entropy in nats, top-1 error in percent), one number per network."""
    logits = net(x).float()
    chosen = logits.gather(-1, y.expand(logits.shape[:-1])[..., None]).squeeze(-1)
    loss = (logits.logsumexp(-1) - chosen).mean(-1)
    return loss, 100 * (logits.argmax(-1) != y).float().mean(-1)


def classification_error(
    x: Float[Tensor, "N ..."], y: Int[Tensor, "*P N"], net: nn.Module | Population
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(top-1 error in percent, mean cross-entropy in nats), one number per network."""
    loss, error = classification_loss(x, y, net)
    return error, loss


def classification_correct(
    x: Float[Tensor, "N ..."], y: Int[Tensor, "*P N"], net: nn.Module | Population
) -> Bool[Tensor, "... N"]:
    """Which examples are classified correctly."""
    return net(x).argmax(-1) == y


def mask_error(
    x: Float[Tensor, "N ..."], y: Int[Tensor, " N"], mask: Bool[Tensor, "*P classes"], net: nn.Module | Population
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(error in percent, mean cross-entropy in nats) of "is the image's class in the mask", one number per network."""
    return classification_error(x, label_map(mask)[..., y], net)


def mask_correct(
    x: Float[Tensor, "N ..."], y: Int[Tensor, " N"], mask: Bool[Tensor, "*P classes"], net: nn.Module | Population
) -> Bool[Tensor, "... N"]:
    """Which examples are told right."""
    return classification_correct(x, label_map(mask)[..., y], net)


METRIC_OF: dict[Callable[..., Any], str] = {
    classification_loss: "loss",
    classification_error: "error",
    mask_error: "error",
}
"""What each test function of this module returns first; the other is its second item."""


def metric_of(function: Callable[..., Any]) -> str | None:
    """As `METRIC_OF`; None for any other callable, hashable or not."""
    return METRIC_OF.get(function) if isinstance(function, FunctionType) else None
