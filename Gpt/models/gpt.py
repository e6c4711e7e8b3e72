"""G.pt with neuron tokens: given a starting network and a prompt, write the updated network.

Data flow of one denoising step, for a batch of B networks:

    residual r = (target - start) / spread      per-tensor spread: every layer counts alike; r = 0 is "no change"
    r_t = alpha r + sigma noise                 the objective's path
    tokens [B, T, width] = embed(r_t, start)    one token per hidden unit, see Gpt.neurons
    blocks with adaLN-zero (Peebles, Xie 2023)  time and prompt enter every block; positional code only where needed
    r_hat = c_skip r_t + c_out head(tokens)     EDM preconditioning (Karras et al. 2022, table 1), unit-variance data

The head starts at zero: before training, one sampling step gives the starting network back, and many give it plus noise
of the spread (the model then describes residuals as independent Gaussians).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.conditions import Conditions, fourier_features
from Gpt.cuda_graphs import Graphed
from Gpt.data.normalization import Normalizer
from Gpt.diffusion.objectives import Denoiser, Objective
from Gpt.diffusion.samplers import guided
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.models.transformer import Block, compile_blocks, hidden_matrices, norm
from Gpt.neurons import NeuronTokens
from Gpt.structure import Structure


@dataclass(frozen=True)
class GptConfig:
    """Size and sampling defaults.

    Attributes:
        width, depth, heads: of the transformer.
        steps, sampler: default sampling.
    """

    width: int = 128
    depth: int = 6
    heads: int = 4
    sampler: str = "euler"
    steps: int = 4


class NeuronTransformer(nn.Module):
    """(r_t, start, noise level, condition) -> estimate of the residual r, on normalised weights `[B, D]`."""

    def __init__(self, tokens: NeuronTokens, width: int, depth: int, heads: int):
        super().__init__()
        if width % heads:
            raise ConfigError(f"generator.width={width} is not a multiple of generator.heads={heads}")
        self.tokens = tokens
        self.embed = nn.ModuleList(nn.Linear(2 * entries, width) for _, entries in tokens.shapes)
        places = tokens.count if tokens.entangled else len(tokens.shapes)
        self.position = nn.Parameter(0.02 * torch.randn(places, width))
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = nn.Linear(width, 2 * width)
        self.heads = nn.ModuleList(nn.Linear(width, entries) for _, entries in tokens.shapes)
        for layer in (self.final, *self.heads):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        r_t: Float[Tensor, "B D"],
        start: Float[Tensor, "B D"],
        alpha: Float[Tensor, " B"],
        sigma: Float[Tensor, " B"],
        condition: Float[Tensor, "B width"],
    ) -> Float[Tensor, "B D"]:
        alpha, sigma = alpha[:, None], sigma[:, None]
        power = alpha.square() + sigma.square()
        noised = self.tokens.encode(r_t * power.rsqrt())
        given = self.tokens.encode(start)
        x = torch.cat(
            [embed(torch.cat(pair, -1)) for embed, *pair in zip(self.embed, noised, given, strict=True)], dim=1
        )
        x = x + self._positions()
        condition = condition + self.time(fourier_features((sigma / (alpha + sigma)).squeeze(1), _TIME_OCTAVES))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = norm(x) * (1 + scale) + shift
        parts = x.split([units for units, _ in self.tokens.shapes], dim=1)
        change = self.tokens.decode([head(part) for head, part in zip(self.heads, parts, strict=True)])
        return alpha / power * r_t + sigma * power.rsqrt() * change

    def _positions(self) -> Float[Tensor, "T width"]:
        """One code per token type, or one per token where units of two layers meet in a tensor."""
        if self.tokens.entangled:
            return self.position
        kinds = zip(self.position, self.tokens.shapes, strict=True)
        return torch.cat([code.expand(units, -1) for code, (units, _) in kinds])


class Gpt(Generator):
    """The loss-, error- or return-prompted generator of network updates.

    Args:
        structure: architecture of the networks.
        conditions: what it can be prompted with; of width `config.width`.
        objective: any objective that predicts x0.
    """

    needs_start = True
    distils = True

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: GptConfig):
        if objective.prediction != "x0":
            found = objective.prediction
            raise ConfigError(f"the G.pt generator predicts x0; objective.prediction={found} does not fit")
        super().__init__(structure, objective, config.sampler, config.steps)
        self.conditions = conditions
        self.normalizer = Normalizer(structure)
        self.network = NeuronTransformer(NeuronTokens(structure), config.width, config.depth, config.heads)
        self._graphed = Graphed(self._estimate, self.network)

    @property
    def augment(self) -> bool:
        return self.network.tokens.entangled

    def fit(self, batch: Batch) -> None:
        self.normalizer.fit(batch.target, batch.start)
        self.conditions.fit(batch.prompt)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return hidden_matrices(self.network.blocks)

    def compile_networks(self) -> None:
        compile_blocks(self.network.blocks)
        self.graphs = True

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        assert batch.start is not None, "G.pt learns from pairs: batches need a start"
        count, device = len(batch.target), batch.target.device
        start = self.normalizer.encode(batch.start)
        residual = (self.normalizer.encode(batch.target) - start) / self.normalizer.spread
        t = self.objective.draw_times(count, rng, device)
        noise = torch.randn(residual.shape, generator=rng, device=device)
        condition = self.conditions(batch.prompt, count, self.conditions.keep(count, rng))
        loss, estimate = self.objective.loss_and_estimate(self._network(start, condition), residual, t, noise)
        return loss.mean() + self._distilled(batch, lambda: self._updated(start, estimate), rng)

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B D"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        assert start is not None
        begin = self.normalizer.encode(start)
        with_prompt = self.objective.denoiser(self._network(begin, self.conditions(prompt, len(start))))
        without = self.objective.denoiser(self._network(begin, self.conditions({}, len(start))))
        residual = solve(guided(with_prompt, without, guidance), noise)
        return self._updated(begin, residual)

    def _updated(self, start: Float[Tensor, "B D"], residual: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Plain weights out of an encoded start and an update in units of the usual one."""
        return self.normalizer.decode(start + residual * self.normalizer.spread)

    def _network(self, start: Tensor, condition: Tensor) -> Denoiser:
        estimate = self._graphed if self.graphs else self._estimate
        return lambda r_t, t: estimate(r_t, t, start, condition)

    def _estimate(self, r_t: Tensor, t: Tensor, start: Tensor, condition: Tensor) -> Tensor:
        alpha, sigma = self.objective.alpha_sigma(t)
        return self.network(r_t, start, alpha, sigma, condition)


_TIME_OCTAVES = 8
_TIME_FEATURES = 1 + 2 * _TIME_OCTAVES
