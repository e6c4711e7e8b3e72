"""p-diff, the baseline of whole-network generation: a variational autoencoder and diffusion in its latent space.

Wang et al. 2024, "Neural Network Diffusion", arXiv 2402.13144. A network is one vector for them, without layers or
tokens, which one-dimensional convolutions compress. Different here, and why:

    weights in units of their deviation from the mean network   theirs are raw, and layers differ by orders of magnitude
    a residual MLP denoises the latent                          theirs is a convolution, but a latent has no neighbours
    both parts train at once, diffusion on detached latents     theirs one after the other; the loop knows one loss
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from Gpt.conditions import Conditions, fourier_features
from Gpt.diffusion.objectives import Objective
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.structure import Structure
from rpg.tokens import Latents

KERNEL = 7
TIME_OCTAVES = 8
MAX_FLAT = 2**18  # entries of the last feature map, which one matrix takes to the latent


@dataclass(frozen=True)
class PdiffConfig:
    """Sizes, and sampling defaults.

    Attributes:
        channels: of the encoder's convolutions, each of which shortens the vector by `stride`; the decoder mirrors it.
            The default is that of RPG's comparison on the medium CNN (arXiv 2501.11587).
        latent: entries of a latent.
        kl_weight: of the Kullback-Leibler term, per latent entry, beside the mean squared error per weight.
        width, depth: of the MLP that denoises latents.
        sampler, steps: default sampling.
    """

    channels: tuple[int, ...] = (64, 256, 384, 512, 64)
    stride: PositiveInt = 2
    latent: PositiveInt = 1024
    kl_weight: float = 1e-4
    width: PositiveInt = 512
    depth: PositiveInt = 4
    sampler: str = "ddpm"
    steps: PositiveInt = 1000


class Autoencoder(nn.Module):
    """A vector `[B, D]` <-> a Gaussian over latents `[B, latent]`.

    Raises:
        ConfigError: the vector is too long for these strides.
    """

    def __init__(self, size: int, channels: Sequence[int], stride: int, latent: int):
        super().__init__()
        factor = stride ** len(channels)
        self.size, self.length = size, -(-size // factor)
        if self.length * channels[-1] > MAX_FLAT:
            raise ConfigError(
                f"p-diff compresses the whole vector of {size:,} weights at once: its last feature map would have "
                f"{self.length * channels[-1]:,} entries, more than {MAX_FLAT:,}; set a larger generator.stride"
            )
        self.padding = self.length * factor - size
        flat = self.length * channels[-1]
        self.encoder = nn.Sequential(*(_down(i, o, stride) for i, o in pairwise((1, *channels))))
        self.posterior = nn.Linear(flat, 2 * latent)
        self.prior = nn.Linear(latent, flat)
        upward = tuple(pairwise((*reversed(channels), 1)))
        self.decoder = nn.Sequential(*(_up(i, o, stride, last=o == 1) for i, o in upward))

    def encode(self, x: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B latent"], Float[Tensor, "B latent"]]:
        """Mean and log-variance."""
        features = self.encoder(F.pad(x, (0, self.padding))[:, None])
        mean, log_variance = self.posterior(features.flatten(1)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def decode(self, z: Float[Tensor, "B latent"]) -> Float[Tensor, "B D"]:
        features = self.prior(z).unflatten(1, (-1, self.length))
        return self.decoder(features)[:, 0, : self.size].float()


def _down(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Shortens by `stride`, for lengths that it divides."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, KERNEL, stride, padding=KERNEL // 2), nn.GroupNorm(1, outputs), nn.SiLU()
    )


def _up(inputs: int, outputs: int, stride: int, last: bool) -> nn.Module:
    """Lengthens by `stride`."""
    layers = [nn.Upsample(scale_factor=stride), nn.Conv1d(inputs, outputs, KERNEL, padding=KERNEL // 2)]
    return nn.Sequential(*layers, *([] if last else [nn.GroupNorm(1, outputs), nn.SiLU()]))


class LatentDenoiser(nn.Module):
    """(noised latents, scales of the path) -> what the objective wants predicted `[B, latent]`."""

    def __init__(self, latent: int, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(latent, width)
        self.time = nn.Sequential(nn.Linear(1 + 2 * TIME_OCTAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, latent)

    def forward(
        self, z_t: Float[Tensor, "B latent"], alpha: Float[Tensor, " B"], sigma: Float[Tensor, " B"]
    ) -> Float[Tensor, "B latent"]:
        time = self.time(fourier_features(sigma / (alpha + sigma), TIME_OCTAVES))
        x = self.embed(z_t)
        for block in self.blocks:
            x = x + block(x + time)
        return self.head(x)


class Pdiff(Generator):
    """Writes networks from noise, unconditionally, through a latent of the whole network.

    Args:
        structure: architecture of the networks.
        conditions: must be empty.
        objective: of the latent diffusion; any.
        config: see `PdiffConfig`.

    Raises:
        ConfigError: there are conditions, or the network is too large.
    """

    needs_start = False

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: PdiffConfig):
        super().__init__(structure, objective, config.sampler, config.steps)
        if len(conditions.encoders):
            raise ConfigError(f"p-diff knows no conditions, not {sorted(conditions.encoders)}; use condition=none")
        self.config = config
        self.latents = Latents(structure)
        self.autoencoder = Autoencoder(structure.size, config.channels, config.stride, config.latent)
        self.scale = nn.BatchNorm1d(config.latent, affine=False)  # latents of unit variance for the diffusion
        self.denoiser = LatentDenoiser(config.latent, config.width, config.depth)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.config.latent,)

    def fit(self, batch: Batch) -> None:
        self.latents.fit(batch.target)

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Negative evidence bound of the autoencoder, plus the objective's loss on its latents."""
        x, device = self.latents.encode(batch.target), batch.target.device
        mean, log_variance = self.autoencoder.encode(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=rng, device=device)
        varies = self.latents.spread > 0
        error = ((self.autoencoder.decode(z) - x).square() * varies).sum(1) / varies.sum().clamp_min(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(1)
        t = self.objective.draw_times(len(z), rng, device)
        noise = torch.randn(z.shape, generator=rng, device=device)
        diffusion = self.objective.loss(self._network, self.scale(z.detach()), t, noise)
        return (error + self.config.kl_weight * divergence + diffusion).mean()

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B latent"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Latents out of noise, and networks out of latents.

        Raises:
            ConfigError: the prompt is not empty, or guidance is asked for.
        """
        if prompt or guidance != 1:
            raise ConfigError(f"p-diff takes no prompt and no guidance, not {sorted(prompt)} and guidance={guidance:g}")
        scaled = solve(self.objective.denoiser(self._network), noise)
        mean, variance = self.scale.get_buffer("running_mean"), self.scale.get_buffer("running_var")
        return self.latents.decode(self.autoencoder.decode(mean + (variance + self.scale.eps).sqrt() * scaled))

    def _network(self, z_t: Float[Tensor, "B latent"], t: Float[Tensor, " B"]) -> Float[Tensor, "B latent"]:
        return self.denoiser(z_t, *self.objective.alpha_sigma(t))
