"""Runs of the smallest generators, as training leaves them; shared by the tests beside this file."""

import torch

from Gpt.checkpoint import TrainingState
from Gpt.generator import Batch, Prompt
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment
from Gpt.seeds import rng

TINY = ("generator.width=32", "generator.depth=1", "generator.heads=2", "device=cpu", "run.name=tiny")


MASKED = (
    "generator.width=32", "generator.depth=1", "generator.heads=2", "generator.rank=4", "device=cpu", "run.name=masked",
)  # fmt: skip


LORA = (
    "generator.width=16", "generator.depth=1", "generator.heads=2", "generator.latents=2", "device=cpu",
    "zoo.recipe={iterations: 7}",
)  # fmt: skip


SHORT = {"count": 3, "keyframes": 2, "frames": 2}


EVEN = "1010101010"


def experiment(*arguments: str, name: str = "digits_loss") -> Experiment:
    return Experiment(compose(name, list(arguments)), name)


def masked_experiment(*arguments: str) -> Experiment:
    return experiment(*MASKED, *arguments, name="digits_mask_rpg")


def store_generator(trained: Experiment) -> None:
    """What training leaves, without the training: no weight is zero."""
    noise = rng("cpu", 0, "trained")
    with torch.no_grad():
        for parameter in trained.generator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    optimizer = torch.optim.SGD(trained.generator.parameters())
    trained.checkpoints.save(TrainingState(step=1), trained.generator, trained.generator, optimizer)


def store_rpg(trained: Experiment, prompt: Prompt) -> None:
    """The same of a generator that writes from noise, which learned from networks that were described by `prompt`."""
    networks = torch.randn(8, trained.task.structure.size, generator=rng("cpu", 0, "zoo"))
    trained.generator.fit(Batch(networks, prompt=prompt))
    store_generator(trained)
