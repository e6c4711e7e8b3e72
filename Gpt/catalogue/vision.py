"""Image classification: loss and error tasks, and families of class masks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from Gpt.data import sources
from Gpt.masks import MaskSplit
from Gpt.networks import MLP, ConvNet, DeepMLP
from Gpt.recipes import Recipe, SupervisedRecipe
from Gpt.scoring import classification_correct, classification_error, classification_loss, mask_correct, mask_error


def _classification(
    data: str, metric: str, constructor: Callable[[], nn.Module], recipe: Recipe, best: float, recursive: float
) -> dict[str, Any]:
    """An entry for an image-classification task; loss and error tasks of one data set share a zoo."""
    return {
        "task_test_fn": classification_loss if metric == "loss" else classification_error,
        "constructor": constructor,
        "data_fn": lambda: sources.load(data).test,
        "validation_data_fn": lambda: sources.load(data).validation,
        "train_data_fn": lambda: sources.load(data).train,
        "correct_fn": classification_correct,
        "minimize": True,
        "best_prompt": best,
        "recursive_prompt": recursive,
        "symmetry": constructor().symmetry,
        "metric": metric,
        "batched": True,
        "recipe": recipe,
        "zoo": data,
    }


def _mask_family(
    data: str, constructor: Callable[[], nn.Module], recipe: Recipe, family: MaskSplit, vocabulary: str = "digits"
) -> dict[str, Any]:
    """An entry for all two-way splits of a data set's ten classes."""
    return _classification(data, "error", constructor, recipe, 0.0, 0.0) | {
        "task_test_fn": mask_error,
        "correct_fn": mask_correct,
        "family": family,
        "vocabulary": vocabulary,
        "zoo": None,
    }


def _digits_mlp() -> MLP:
    return MLP(64, 10, 10)


def _digits_mask_mlp() -> MLP:
    return MLP(64, 16, 2)


def _mnist_mask_mlp() -> MLP:
    return MLP(784, 16, 2)


def _cifar10_mask_net() -> ConvNet:
    return ConvNet(classes=2)


# Large batches make the trained network a cleaner function of its initialisation, which a generator has to learn.
_DIGITS_RECIPE = SupervisedRecipe(epochs=45, weight_decay=2e-3)
_CIFAR10_RECIPE = SupervisedRecipe(epochs=50, augmentation="flip_crop")
# One initialisation for all masks: hidden unit i then plays a similar part in every network, which is worth more than
# ten points of accuracy in a short training of the generator. It helps the trivial baselines (ridge, mean) as much.
_DIGITS_MASK_RECIPE = SupervisedRecipe(epochs=30, weight_decay=2e-3, shared_init=True)
_MNIST_MASK_RECIPE = SupervisedRecipe(epochs=10, shared_init=True)
_CIFAR10_MASK_RECIPE = replace(_CIFAR10_RECIPE, shared_init=True)
_COMPLEMENTS_OUT = MaskSplit(held_out=64, validation=32)
_COMPLEMENTS_IN = replace(_COMPLEMENTS_OUT, complements=True)  # what swapping two outputs is worth
_NEIGHBOURS_OUT = MaskSplit(held_out=32, validation=16, radius=1)  # more held-out masks would leave none to train on

TASKS: dict[str, dict[str, Any]] = {
    "digits_loss": _classification("digits", "loss", _digits_mlp, _DIGITS_RECIPE, 0.0, 0.0),
    "digits_error": _classification("digits", "error", _digits_mlp, _DIGITS_RECIPE, 3.0, 3.0),
    "digits_deep_loss": _classification("digits", "loss", DeepMLP, _DIGITS_RECIPE, 0.0, 0.0) | {"zoo": None},
    "mnist_loss": _classification("mnist", "loss", MLP, SupervisedRecipe(), 0.0, 0.0),
    "mnist_error": _classification("mnist", "error", MLP, SupervisedRecipe(), 5.0, 5.0),
    "fashion_mnist_loss": _classification("fashion_mnist", "loss", MLP, SupervisedRecipe(), 0.3, 0.3),
    "cifar10_loss": _classification("cifar10", "loss", ConvNet, _CIFAR10_RECIPE, 1.2, 1.4),
    "cifar10_error": _classification("cifar10", "error", ConvNet, _CIFAR10_RECIPE, 35.0, 45.0),
    "digits_mask": _mask_family("digits", _digits_mask_mlp, _DIGITS_MASK_RECIPE, _COMPLEMENTS_OUT),
    "digits_mask_near": _mask_family("digits", _digits_mask_mlp, _DIGITS_MASK_RECIPE, _COMPLEMENTS_IN),
    "digits_mask_far": _mask_family("digits", _digits_mask_mlp, _DIGITS_MASK_RECIPE, _NEIGHBOURS_OUT),
    "mnist_mask": _mask_family("mnist", _mnist_mask_mlp, _MNIST_MASK_RECIPE, _COMPLEMENTS_OUT),
    "mnist_mask_near": _mask_family("mnist", _mnist_mask_mlp, _MNIST_MASK_RECIPE, _COMPLEMENTS_IN),
    "mnist_mask_far": _mask_family("mnist", _mnist_mask_mlp, _MNIST_MASK_RECIPE, _NEIGHBOURS_OUT),
    "cifar10_mask": _mask_family("cifar10", _cifar10_mask_net, _CIFAR10_MASK_RECIPE, _COMPLEMENTS_OUT, "cifar10"),
    "cifar10_mask_near": _mask_family("cifar10", _cifar10_mask_net, _CIFAR10_MASK_RECIPE, _COMPLEMENTS_IN, "cifar10"),
    "cifar10_mask_far": _mask_family("cifar10", _cifar10_mask_net, _CIFAR10_MASK_RECIPE, _NEIGHBOURS_OUT, "cifar10"),
}
