"""Distillation: a generator's estimate of a network is judged by what it does, beside what its weights are.

Squared error treats all weights alike, whatever they are worth to the network. Here the network that a denoiser
estimates and the one that it should have found see the same training examples, and the mean Kullback-Leibler divergence
from the predictions of the latter (Hinton et al. 2015, arXiv 1503.02531) joins the training loss. Labels are not read.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.func import functional_call, vmap

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
        weight: of the divergence, in nats, beside the denoising loss; 0 to learn from weights alone.
        examples: drawn at random for every batch; all its networks see the same ones.
    """

    weight: NonNegativeFloat = 0.0
    examples: PositiveInt = 128


def distillation(task: Task, config: DistillationConfig) -> Distillation:
    """The term of a classification task. Examples are read when it is first called.

    Raises:
        ConfigError: the task's networks do not classify.
    """
    if not isinstance(task.recipe, SupervisedRecipe):
        raise ConfigError(
            f"distillation.weight={config.weight:g} compares class predictions, and networks of task {task.name!r} are "
            "not trained to classify; set distillation.weight=0"
        )
    structure = task.structure

    @cache
    def on(device: torch.device) -> tuple[Tensor, torch.nn.Module]:
        inputs = task.data("train")[0].to(device)
        return inputs, prepared(with_shared_inputs(task.constructor()), inputs[:1])[0]

    def divergence(estimate: Float[Tensor, "B D"], target: Float[Tensor, "B D"], rng: torch.Generator) -> Tensor:
        inputs, net = on(target.device)
        chosen = inputs[torch.randint(len(inputs), (config.examples,), generator=rng, device=target.device)]

        def predict(weights: Tensor) -> Tensor:
            return functional_call(net, structure.unflatten(weights), (chosen,), tie_weights=True)

        found, wanted = (vmap(predict)(rows).log_softmax(-1) for rows in (estimate, target))
        return config.weight * F.kl_div(found, wanted, log_target=True, reduction="sum") / wanted[..., 0].numel()

    return divergence
