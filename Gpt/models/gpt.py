"""G.pt with neuron tokens: given a starting network and a prompt, write the updated network.

Data flow of one denoising step, for a batch of B networks:

    x = (target - mean) / std                   per tensor: every layer counts alike
    x_t = alpha x + sigma noise                 the objective's path
    x_hat = transformer(x_t, start, x_hat before, prompt, t)
                                                over hidden units and the weights between them, equivariant under
                                                renaming units at any depth, see Gpt.models.graph_transformer

What is estimated is where training arrives, not how far that is from the start: such steps would add up when an update
is updated again, and the networks grow with every one. And as no snapshot of any training looks like what a generator
wrote, training starts from that, too (`WRITTEN_SHARE`), as imitation learning visits the states that its own policy
leads to (Ross et al. 2011, arXiv 1011.0686).

The transformer reads what it estimated before (self-conditioning, Chen et al. 2022, arXiv 2208.04202): for half of the
training examples that is its estimate without one, in sampling its last, at every noise level `rounds` times, as in the
recycling of protein structures (Jumper et al. 2021). One update then improves its own network as several updates would.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from Gpt.conditions import Conditions
from Gpt.cuda_graphs import Graphed
from Gpt.data.normalization import Normalizer
from Gpt.diffusion.objectives import Denoiser, Objective
from Gpt.diffusion.samplers import SAMPLERS, guided
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.models.graph_transformer import GraphTransformer
from Gpt.neurons import NeuronGraph
from Gpt.structure import Structure

WRITTEN_SHARE = 0.125
"""Share of the training examples that start from what the generator wrote."""

RECALLED_SHARE = 0.5
"""Share of the training examples of which the generator reads an estimate that it made before."""


@dataclass(frozen=True)
class GptConfig:
    """Size and sampling defaults.

    Attributes:
        width, depth, heads: of the transformer.
        channels: of each weight between two hidden layers; without effect where there is but one.
        steps, sampler: default sampling.
        rounds: evaluations of the transformer at each of these steps, every one of which reads the last one's estimate.
    """

    width: PositiveInt = 128
    depth: PositiveInt = 6
    heads: PositiveInt = 4
    channels: PositiveInt = 32
    sampler: str = "euler"
    steps: PositiveInt = 4
    rounds: PositiveInt = 1


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
        if config.width % config.heads:
            raise ConfigError(f"generator.width={config.width} is not a multiple of generator.heads={config.heads}")
        if objective.prediction != "x0":
            found = objective.prediction
            raise ConfigError(f"the G.pt generator predicts x0; objective.prediction={found} does not fit")
        super().__init__(structure, objective, config.sampler, config.steps)
        self.conditions, self.rounds = conditions, config.rounds
        self.normalizer = Normalizer(structure)
        graph = NeuronGraph(structure)
        self.network = GraphTransformer(graph, config.width, config.depth, config.heads, config.channels, recalls=True)
        self._graphed = Graphed(self._estimate, self.network)

    def fit(self, batch: Batch) -> None:
        self.normalizer.fit(batch.target)
        self.conditions.fit(batch.prompt)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return self.network.hidden_matrices()

    def compile_networks(self) -> None:
        self.network.compile_blocks()
        self.graphs = True

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        assert batch.start is not None, "G.pt learns from pairs: batches need a start"
        count, device = len(batch.target), batch.target.device
        start, target = self.normalizer.encode(batch.start), self.normalizer.encode(batch.target)
        condition = self.conditions(batch.prompt, count, self.conditions.keep(count, rng))
        start = self._partly_written(start, condition, rng)
        t = self.objective.draw_times(count, rng, device)
        noise = torch.randn(target.shape, generator=rng, device=device)
        previous = self._partly_recalled(self.objective.noised(target, t, noise), t, start, condition)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return self._estimate(x_t, t, start, condition, previous)

        loss, estimate = self.objective.loss_and_estimate(network, target, t, noise)
        return loss.mean() + self._distilled(batch, lambda: self.normalizer.decode(estimate), rng)

    def _partly_written(
        self, start: Float[Tensor, "B D"], condition: Float[Tensor, "B width"], rng: torch.Generator
    ) -> Float[Tensor, "B D"]:
        """The starts, the first of them replaced by what one sampling step makes of them."""
        count = math.ceil(WRITTEN_SHARE * len(start))
        given, wish = start[:count], condition[:count]
        noise = torch.randn(given.shape, generator=rng, device=start.device)
        blank = torch.zeros_like(given)
        denoise = self.objective.denoiser(lambda x_t, t: self._estimate(x_t, t, given, wish, blank))
        with _beside_training(start.device):
            written = SAMPLERS[self.sampler](denoise, self.objective, noise, 1, rng)
        return torch.cat([written, start[count:]])

    def _partly_recalled(
        self,
        x_t: Float[Tensor, "B D"],
        t: Float[Tensor, " B"],
        start: Float[Tensor, "B D"],
        condition: Float[Tensor, "B width"],
    ) -> Float[Tensor, "B D"]:
        """What the last of the examples are taken for at first; zeros, the mean of all weights, of the others."""
        blank = torch.zeros_like(x_t)
        rows = slice(len(x_t) - int(RECALLED_SHARE * len(x_t)), None)
        with _beside_training(x_t.device):
            first = self._estimate(x_t[rows], t[rows], start[rows], condition[rows], blank[rows])
        return torch.cat([blank[: rows.start], first])

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
        with_prompt = self.objective.denoiser(self._recalling(begin, self.conditions(prompt, len(start))))
        without = self.objective.denoiser(self._recalling(begin, self.conditions({}, len(start))))
        return self.normalizer.decode(solve(guided(with_prompt, without, guidance), noise))

    def _recalling(self, start: Tensor, condition: Tensor) -> Denoiser:
        """The transformer as a sampler calls it, once for every noise level, from the noisiest on."""
        estimate = self._graphed if self.graphs else self._estimate
        previous = torch.zeros_like(start)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal previous
            for _ in range(self.rounds):
                previous = estimate(x_t, t, start, condition, previous)
            return previous

        return network

    def _estimate(self, x_t: Tensor, t: Tensor, start: Tensor, condition: Tensor, previous: Tensor) -> Tensor:
        alpha, sigma = self.objective.alpha_sigma(t)
        return self.network(x_t, start, condition, alpha, sigma, previous=previous)


@contextmanager
def _beside_training(device: torch.device) -> Iterator[None]:
    """For what a training step reads and does not learn from, of fewer examples than it has."""
    mixed, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    # Older autocasts keep casts of the weights from here, which have no gradient, for the step's own pass; and one more
    # batch size would be one more compilation.
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False):
        with torch.compiler.set_stance("force_eager"):
            yield
