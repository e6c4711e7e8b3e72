"""Distillation: a generator's estimate of a network is judged by what it does, beside what its weights are.

Squared error treats all weights alike, whatever they are worth to the network. Here the network that a denoiser
estimates and the one that it should have found get the same examples, and two terms join the training loss. One is how
far the answers of the one are from the other's: for classifiers the mean Kullback-Leibler divergence of their
predictions (Hinton et al. 2015, arXiv 1503.02531), which needs no labels. The other is how far the loss of the one is
from the other's: errors of many answers that cancel out in no single one, such as a lack of confidence, are what makes
an estimated network worse than the ones that it is estimated from, and miss the loss that a prompt asks for.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.func import functional_call, vmap

from Gpt.behaviour import Behaviour, prediction_divergence, prediction_loss
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Distillation
from Gpt.masks import label_map
from Gpt.population.functional import prepared
from Gpt.population.shared_inputs import with_shared_inputs
from Gpt.population.statistics import with_differentiable_statistics
from Gpt.recipes import SupervisedRecipe
from Gpt.scoring import classification_error, classification_loss
from Gpt.tasks import Task


@dataclass(frozen=True)
class DistillationConfig:
    """How much behaviour counts in training, beside the denoising loss.

    Attributes:
        weight: of the divergence; 0 to learn from weights alone.
        loss_weight: of the difference of the two losses, whatever its sign, as a multiple of `weight`.
        examples: drawn at random for every group of a batch's networks, which all see the same ones.
        groups: how many; a step compares behaviour on so many times as many examples, by the same arithmetic.
        after: share of the training that is spent on weights alone before; while estimates are far off, what they do
            says little about how to improve them, and its steep gradients are in the way.
    """

    weight: NonNegativeFloat = 0.0
    loss_weight: NonNegativeFloat = 0.0
    examples: PositiveInt = 128
    groups: PositiveInt = 8
    after: Annotated[float, Field(ge=0, lt=1)] = 0.5


def distillation(task: Task, config: DistillationConfig) -> Distillation:
    """The term of a task; its examples are read when it is first called.

    Raises:
        ConfigError: nothing says what the task's networks do, or how good it is.
    """
    behaviour, structure = _behaviour(task, config), task.structure

    @cache
    def network(device: torch.device) -> torch.nn.Module:
        example = behaviour.examples(1, torch.Generator(device))[0]
        return prepared(with_differentiable_statistics(with_shared_inputs(task.template)), example)[0]

    def differences(
        estimate: Float[Tensor, "B D"],
        target: Float[Tensor, "B D"],
        masks: Float[Tensor, "B classes"] | None,
        rng: torch.Generator,
    ) -> Float[Tensor, " B"]:
        net = network(estimate.device)
        inputs, *known = behaviour.examples(config.examples, rng)

        def outputs(weights: Tensor) -> Tensor:
            return functional_call(net, structure.unflatten(weights), (inputs,), tie_weights=True)

        found, wanted = vmap(outputs)(estimate), vmap(outputs)(target)
        terms = behaviour.divergence(found, wanted)
        if config.loss_weight:
            assert behaviour.loss is not None
            known = [_of_each_network(masks, each) for each in known]
            gap = behaviour.loss(found, *known) - behaviour.loss(wanted, *known)
            terms = terms + config.loss_weight * gap.abs()
        return terms

    def term(batch: Batch, estimate: Float[Tensor, "B D"], rng: torch.Generator) -> Float[Tensor, ""]:
        estimates, targets = estimate.chunk(config.groups), batch.target.chunk(config.groups)
        masks = [None] * len(estimates) if batch.masks is None else batch.masks.chunk(config.groups)
        groups = zip(estimates, targets, masks, strict=True)
        return config.weight * torch.cat([differences(e, t, m, rng) for e, t, m in groups]).mean()

    return term


def _behaviour(task: Task, config: DistillationConfig) -> Behaviour:
    behaviour = task.behaviour or _predictions(task)
    if behaviour is None:
        raise ConfigError(
            f"distillation.weight={config.weight:g} compares what networks do, which task {task.name!r} does not say; "
            "add its key 'behaviour' (of classifiers, 'train_data_fn' is enough), or set distillation.weight=0"
        )
    if config.loss_weight and behaviour.loss is None:
        raise ConfigError(
            f"distillation.loss_weight={config.loss_weight:g} compares losses, and the behaviour of task {task.name!r} "
            "names none; set distillation.loss_weight=0"
        )
    return behaviour


def _predictions(task: Task) -> Behaviour | None:
    measured_as_such = task.task_test_fn in (classification_loss, classification_error)
    if not isinstance(task.recipe, SupervisedRecipe) and not (measured_as_such and task.train_data_fn):
        return None

    def training_examples(count: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        inputs, labels = task.data("train", rng.device)
        chosen = torch.randint(len(inputs), (count,), generator=rng, device=rng.device)
        return inputs[chosen], labels[chosen]

    return Behaviour(training_examples, prediction_divergence, prediction_loss)


def _of_each_network(masks: Float[Tensor, "B classes"] | None, labels: Int[Tensor, " N"]) -> Int[Tensor, "#B N"]:
    """The labels that each network was trained on: those of its class mask, if it has one."""
    return labels[None] if masks is None else label_map(masks > 0.5)[:, labels]
