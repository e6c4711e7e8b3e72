"""CIFAR-10 classifiers that are written as a whole, by generators that are asked for nothing in particular.

Each of the CNNs has two zoos: many independent trainings, trained as one batch, and ("_trajectory") the constant-rate
tail of a single training, as p-diff and RPG are published. The large networks are trained one at a time, and the zoo's
settings say which of the two it holds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Gpt.data import sources
from Gpt.networks_whole import Cnn, cifar_resnet18, cifar_vit_tiny, medium_cnn, small_cnn
from Gpt.recipes import Recipe, SingleRecipe, SupervisedRecipe
from Gpt.scoring import classification_correct, classification_error

EXAMPLES = 1000  # of one forward pass of a large network
SMALL_SIDE = 28  # pixels, of the images of the small CNN


def large_error(
    x: Float[Tensor, "N C H W"], y: Int[Tensor, " N"], net: nn.Module
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(top-1 error in percent, mean cross-entropy in nats) of one network, in bounded memory."""
    return classification_error(x, y, _InParts(net))


def large_correct(x: Float[Tensor, "N C H W"], y: Int[Tensor, " N"], net: nn.Module) -> Bool[Tensor, " N"]:
    """Which examples are classified correctly, in bounded memory."""
    return classification_correct(x, y, _InParts(net))


class _InParts(nn.Module):
    """A network that sees `EXAMPLES` inputs at a time, channels last in memory: what convolutions are fast with."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N classes"]:
        parts = (part.contiguous(memory_format=torch.channels_last) for part in x.split(EXAMPLES))
        return torch.cat([self.net(part) for part in parts])


def _small(split: str) -> Callable[[], tuple[Tensor, Tensor]]:
    def resized() -> tuple[Tensor, Tensor]:
        images, labels = getattr(sources.load("cifar10"), split)
        return F.interpolate(images, size=SMALL_SIDE, mode="bilinear", antialias=True), labels

    return resized


def _full(split: str) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: getattr(sources.load("cifar10"), split)


def _cifar10(
    constructor: Callable[[], nn.Module],
    recipe: Recipe,
    *,
    images: Callable[[str], Callable] = _full,
    large: bool = False,
) -> dict[str, Any]:
    return {
        "task_test_fn": large_error if large else classification_error,
        "constructor": constructor,
        "data_fn": images("test"),
        "validation_data_fn": images("validation"),
        "train_data_fn": images("train"),
        "correct_fn": large_correct if large else classification_correct,
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "symmetry": None if large else Cnn.symmetry,  # the large ones' is read off them
        "metric": "error",
        "batched": not large,
        "recipe": recipe,
    }


_CNN_POPULATION = SupervisedRecipe(epochs=30, batch_size=500, learning_rate=0.05, augmentation="none")
# The published setting: 50 epochs of SGD at 0.01 with momentum 0.9 and batches of 500, then 50 saves.
_CNN_RUN = SingleRecipe(
    epochs=50, batch_size=500, learning_rate=0.01, nesterov=False, augmentation="none", warmup=0.0,
    tail_iterations=100, tail_learning_rate=1e-3,
)  # fmt: skip
_RESNET = SingleRecipe(
    epochs=30, batch_size=512, learning_rate=0.4, label_smoothing=0.1, cutout=8, tail_iterations=100,
    tail_learning_rate=1e-3,
)  # fmt: skip
_VIT = replace(
    _RESNET, epochs=100, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, warmup=0.1, tail_learning_rate=1e-5
)

TASKS: dict[str, dict[str, Any]] = {
    "cifar10_cnn_small": _cifar10(small_cnn, _CNN_POPULATION, images=_small),
    "cifar10_cnn_small_trajectory": _cifar10(small_cnn, _CNN_RUN, images=_small),
    "cifar10_cnn_medium": _cifar10(medium_cnn, _CNN_POPULATION),
    "cifar10_cnn_medium_trajectory": _cifar10(medium_cnn, _CNN_RUN),
    "cifar10_resnet18": _cifar10(cifar_resnet18, _RESNET, large=True),
    "cifar10_vit_tiny": _cifar10(cifar_vit_tiny, _VIT, large=True),
}
