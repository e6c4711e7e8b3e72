"""The two verbs of every generator, and what it is fed.

The training loop, the evaluation and the playground know only what is in this file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.diffusion.objectives import Denoiser, Objective
from Gpt.diffusion.samplers import SAMPLERS, check_sampler
from Gpt.errors import ConfigError
from Gpt.seeds import rng as seeded
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
        progress: share of the training steps that are done, for losses that change on the way.
        masks: `[B, classes]`, 0 or 1, the class mask that each target was trained on, whatever the prompt says of it;
            None for networks of one task.
    """

    target: Float[Tensor, "B D"]
    start: Float[Tensor, "B D"] | None = None
    prompt: Prompt = field(default_factory=dict)
    progress: float = 1.0
    masks: Float[Tensor, "B classes"] | None = None


Distillation = Callable[[Batch, Tensor, torch.Generator], Tensor]
"""A term of the training loss: (examples, estimates of their targets [B, D], randomness on their device) -> scalar."""

Solve = Callable[[Denoiser, Tensor], Tensor]
"""A sampler with its settings: (denoiser, noise) -> data."""


class Generator(nn.Module):
    """Base class: a network that learns from trained networks and writes new ones.

    Subclasses own normalisation, tokenisation and conditions; weights go in and come out as plain flat rows. They
    define `loss` and `write`.

    Args:
        structure: architecture of the networks.
        objective: what the network is trained for; goes with the sampler.
        sampler, steps: default sampling.

    Raises:
        ConfigError: the sampler does not exist, or does not go with the objective.

    Attributes:
        needs_start: whether it updates given networks instead of writing them from noise.
        augment: whether training must rename hidden units at random, because the network is not equivariant by itself.
        distils: whether `loss` can include a distillation term; then `distillation` may be set, which joins after the
            share `distils_after` of the training.
        mixed_precision: sample under bfloat16 autocast, as trained.
        graphs: replay `loss` and the steps of sampling as CUDA graphs (`Gpt.cuda_graphs`); `compile_networks` sets it
            where they do the same device work at every call.
        reads_prompt_sets: whether prompt["text"] are sets of prompts `[B, N, L, features]`, rather than one `[B,
            features]` each.
        translates: whether prompts are put into the library's words before they are read (`Gpt.adapters.phrases`).
        conditions: the `Gpt.conditions.Conditions` that embed a prompt, and say how often it was left out for
            guidance; None where a subclass has its own way.
        identities: one embedding for every training run, which prompt["identity"] names; None where networks are
            nobody's.
    """

    needs_start: bool
    distils: bool = False
    augment: bool = False
    distillation: Distillation | None = None
    distils_after: float = 0.0
    mixed_precision: bool = False
    graphs: bool = False
    reads_prompt_sets: bool = False
    translates: bool = False

    def __init__(self, structure: Structure, objective: Objective, sampler: str, steps: int):
        super().__init__()
        check_sampler(sampler, objective, steps)
        self.structure, self.objective = structure, objective
        self.sampler, self.default_steps = sampler, steps
        # Set here and not in the class, where they would hide the modules that subclasses register.
        self.conditions: Any = None
        self.identities: nn.Embedding | None = None

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that one network is made of, see `sample`."""
        return (self.structure.size,)

    @property
    def smooth_sampler(self) -> str:
        """The sampler that networks are a smooth function of the noise with; used where the noise is given."""
        return "ddim" if self.sampler == "ddpm" else self.sampler

    @property
    def needs_answers(self) -> bool:
        """Whether `loss` reads the examples of adapters' tasks, see `Gpt.data.adapter_batches`."""
        return False

    def fit(self, batch: Batch) -> None:
        """Read scales off a sample of training examples, once, before training."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights of the hidden linear layers, which Muon may train; embeddings, heads and modulation stay out."""
        return []

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What the optimiser is given: parameters, and the weight decay of each group."""
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def compile_networks(self) -> None:
        """Compile the expensive submodules in place (names in state_dict stay the same)."""

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Training loss of one batch; all randomness comes from `rng`, which lives on the batch's device."""
        raise TypeError(f"{type(self).__name__} does not define loss")

    @property
    def turns(self) -> tuple[float, ...]:
        """Shares of the training at which the loss becomes another, in order: distillation joins, if there is any."""
        return () if self.distillation is None else (self.distils_after,)

    def phase(self, batch: Batch) -> int:
        """How many of its turns the training has taken."""
        return sum(batch.progress >= turn for turn in self.turns)

    def _distilled(self, batch: Batch, decode: Callable[[], Tensor], rng: torch.Generator) -> Tensor | float:
        """The distillation term of `loss`, if there is to be one by now, for estimated weights `decode()`."""
        if self.distillation is None or not self.phase(batch):
            return 0.0
        return self.distillation(batch, decode(), rng)

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B ..."],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Networks out of noise `[B, *noise_shape]`: what a subclass does between the sampler and plain weights."""
        raise TypeError(f"{type(self).__name__} does not define write")

    @torch.no_grad()
    def sample(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None = None,
        *,
        count: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        noise: Float[Tensor, "B ..."] | None = None,
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

        Raises:
            ConfigError: nothing says how many networks to write, or two things disagree; a start is missing or given
                to a generator that needs none; the sampler does not go with that many steps.
        """
        count = self._count(prompt, start, count, noise)
        device = next(self.parameters()).device
        rng = seeded(device, seed, "sample")
        sampler = SAMPLERS[self.sampler if noise is None else self.smooth_sampler]
        if noise is None:
            noise = torch.randn(count, *self.noise_shape, generator=rng, device=device)

        steps = self.default_steps if steps is None else steps

        def solve(denoise: Denoiser, noise: Tensor) -> Tensor:
            return sampler(denoise, self.objective, noise, steps, rng)

        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision):
            return self.write(prompt, start, noise, solve, guidance, rng)

    def _count(self, prompt: Prompt, start: Tensor | None, count: int | None, noise: Tensor | None) -> int:
        """How many networks to write: what everything that says it agrees on."""
        if self.needs_start and start is None:
            raise ConfigError("this generator updates networks: sampling needs the starting networks `start`")
        if not self.needs_start and start is not None:
            raise ConfigError("this generator writes networks from noise: leave out `start`")
        given = {"count": count, "start": start, "noise": noise, **prompt}
        lengths = {k: len(v) if isinstance(v, Tensor) else v for k, v in given.items() if v is not None}
        if not lengths:
            raise ConfigError(
                "sampling must know how many networks to write: give `count`, or a prompt with one row each"
            )
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"sampling is asked for different numbers of networks: {lengths}")
        return next(iter(lengths.values()))


@contextmanager
def evaluating(generator: Generator) -> Iterator[None]:
    """Eval mode inside, the previous mode afterwards."""
    was_training = generator.training
    generator.eval()
    try:
        yield
    finally:
        generator.train(was_training)
