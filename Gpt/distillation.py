"""Distillation: a generator's estimate of a network is judged by what it does, beside what its weights are.

Squared error treats all weights alike, whatever they are worth to the network. Here the network that a denoiser
estimates and the one that it should have found get the same inputs, and how far the answers of the one are from the
other's joins the training loss. For classifiers that is the mean Kullback-Leibler divergence of their predictions on
training examples (Hinton et al. 2015, arXiv 1503.02531), whose labels are not read; a task can say otherwise.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.func import functional_call, vmap

from Gpt.behaviour import Behaviour, prediction_divergence
from Gpt.errors import ConfigError
from Gpt.generator import Distillation
from Gpt.population.functional import prepared
from Gpt.population.shared_inputs import with_shared_inputs
from Gpt.recipes import SupervisedRecipe
from Gpt.tasks import Task


@dataclass(frozen=True)
class DistillationConfig:
    """How much behaviour counts in training.

    Attributes:
        weight: of the divergence beside the denoising loss; 0 to learn from weights alone.
        examples: inputs drawn at random for every batch; all its networks see the same ones.
    """

    weight: NonNegativeFloat = 0.0
    examples: PositiveInt = 128


def distillation(task: Task, config: DistillationConfig) -> Distillation:
    """The term of a task; its inputs are read when it is first called.

    Raises:
        ConfigError: nothing says what the task's networks do.
    """
    behaviour, structure = _behaviour(task, config), task.structure

    @cache
    def network(device: torch.device) -> torch.nn.Module:
        example = behaviour.inputs(1, torch.Generator(device))
        return prepared(with_shared_inputs(task.constructor()), example)[0]

    def divergence(estimate: Float[Tensor, "B D"], target: Float[Tensor, "B D"], rng: torch.Generator) -> Tensor:
        net, inputs = network(target.device), behaviour.inputs(config.examples, rng)

        def answer(weights: Tensor) -> Tensor:
            return functional_call(net, structure.unflatten(weights), (inputs,), tie_weights=True)

        return config.weight * behaviour.divergence(vmap(answer)(estimate), vmap(answer)(target)).mean()

    return divergence


def _behaviour(task: Task, config: DistillationConfig) -> Behaviour:
    if task.behaviour is not None:
        return task.behaviour
    if not isinstance(task.recipe, SupervisedRecipe):
        raise ConfigError(
            f"distillation.weight={config.weight:g} compares what networks do, and task {task.name!r} neither trains "
            "classifiers nor has the key 'behaviour'; add it, or set distillation.weight=0"
        )

    def training_inputs(count: int, rng: torch.Generator) -> Tensor:
        inputs = task.data("train", rng.device)[0]
        return inputs[torch.randint(len(inputs), (count,), generator=rng, device=rng.device)]

    return Behaviour(training_inputs, prediction_divergence)
