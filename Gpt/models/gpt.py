"""G.pt with neuron tokens: given a starting network and a prompt, write the updated network.

Data flow of one denoising step, for a batch of B networks:

    residual r = (target - start) / spread      per-tensor spread: every layer counts alike; r = 0 is "no change"
    r_t = alpha r + sigma noise                 the objective's path
    r_hat = transformer(r_t, start, prompt, t)  over hidden units and the weights between them, equivariant under
                                                renaming units at any depth, see Gpt.models.graph_transformer

The transformer's heads start at zero: before training, one sampling step gives the starting network back, and many give
it plus noise of the spread (the model then describes residuals as independent Gaussians).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.conditions import Conditions
from Gpt.cuda_graphs import Graphed
from Gpt.data.normalization import Normalizer
from Gpt.diffusion.objectives import Denoiser, Objective
from Gpt.diffusion.samplers import guided
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.models.graph_transformer import GraphTransformer
from Gpt.models.transformer import compile_blocks, hidden_matrices
from Gpt.neurons import NeuronGraph
from Gpt.structure import Structure


@dataclass(frozen=True)
class GptConfig:
    """Size and sampling defaults.

    Attributes:
        width, depth, heads: of the transformer.
        channels: of each weight between two hidden layers; without effect where there is but one.
        steps, sampler: default sampling.
    """

    width: int = 128
    depth: int = 6
    heads: int = 4
    channels: int = 32
    sampler: str = "euler"
    steps: int = 4


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
        self.conditions = conditions
        self.normalizer = Normalizer(structure)
        graph = NeuronGraph(structure)
        self.network = GraphTransformer(graph, config.width, config.depth, config.heads, config.channels)
        self._graphed = Graphed(self._estimate, self.network)

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
        return self.network(r_t, start, condition, alpha, sigma)
