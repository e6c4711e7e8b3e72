"""The two verbs of every generator, and what it is fed.

The training loop, the evaluation and the playground know only what is in this file.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.structure import Structure

Prompt = dict[str, Tensor]
"""What a user asks for, one tensor per condition with the batch as first axis, e.g. {"target_metric": [B, 2]}."""


@dataclass
class Batch:
    """Training examples.

    Attributes:
        target: `[B, D]` weights to learn to write.
        start: `[B, D]` weights to start from (G.pt), or None (RPG).
        prompt: what describes the target, see `Gpt.conditions` for names and shapes.
    """

    target: Float[Tensor, "B D"]
    start: Float[Tensor, "B D"] | None = None
    prompt: Prompt = field(default_factory=dict)


class Generator(nn.Module):
    """Base class: a network that learns from trained networks and writes new ones.

    Subclasses own normalisation, tokenisation and conditions; weights go in and come out as plain flat rows.
    """

    structure: Structure
    default_steps: int
    needs_start: bool
    @property
    def augment(self) -> bool:
        """Whether training must rename hidden units at random, because the network is not equivariant by itself."""
        return False

    def fit(self, batch: Batch) -> None:
        """Read scales off a sample of training examples, once, before training."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights of the hidden linear layers, which Muon may train; embeddings, heads and modulation stay out."""
        return []

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What the optimiser is given: parameters, and the weight decay of each group."""
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one network is made of, see `sample`."""
        return (self.structure.size,)

    def compile_networks(self) -> None:
        """Compile the expensive submodules in place (names in state_dict stay the same)."""

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Training loss of one batch; all randomness comes from `rng`, which lives on the batch's device."""
        raise TypeError(f"{type(self).__name__} does not define loss")

    def sample(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None = None,
        *,
        count: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        noise: Tensor | None = None,
    ) -> Float[Tensor, "B D"]:
        """Write networks.

        Args:
            prompt: wanted properties, one row per network; may be empty for an unconditional generator.
            start: networks to update, for generators that start from one.
            count: number of networks, where neither `prompt` nor `start` says it.
            steps: number of sampling steps; the generator's default when None.
            guidance: 1 samples the conditional model; above 1 strengthens the prompt.
            seed: names the noise; the same seed, prompt and start give the same networks.
            noise: the sampler's starting point instead of a seeded draw (latent walks), `[B, *noise_shape]`.
        """
        raise TypeError(f"{type(self).__name__} does not define sample")
