"""RPG, the generator of whole networks from noise: our default (`Rpg`); the published one is in `rpg.paper`.

Recurrent parameter generation (Wang et al. 2025, arXiv 2501.11587) lets a sequence model write one prototype per token
and denoises every token by itself, given its prototype. Kept here: tokens of a complete state_dict, positions,
prototypes, run identities. Different, and why:

    the sequence model is small and reads both ways    its input never depends on the data, and it took most of the time
    a low-rank table beside the sinusoids              neighbouring places are hard to tell apart by sinusoids alone
    latents are deviations from the mean checkpoint    what all networks share need not be learned
    tokens meet in a transformer as they are denoised  the weights of one network depend on each other
    x0-prediction on the straight path                 20 steps instead of 1,000
    the request reaches every token, and can be null   the published one reaches the head; guidance
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import Objective
from Gpt.diffusion.samplers import guided
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.models.graph_transformer import GraphTransformer
from Gpt.structure import Structure
from rpg.prototypes import Prototypes
from rpg.tokens import Latents, Layout

IDENTITY = "identity"


@dataclass(frozen=True)
class RpgConfig:
    """Tokens, size and sampling defaults.

    Attributes:
        policy, token_size: how the weights are cut, see `rpg.tokens`; neuron tokens have a size of their own. Choose
            "aligned_neuron" where networks share an initialisation or the zoo is aligned.
        position: code of a token's place: layer_chunk, index or learned.
        width, depth, heads: of the denoiser, a transformer; prototypes have the same width.
        channels: of each weight between two hidden layers, where tokens are neurons.
        backbone, backbone_depth, rank: what writes prototypes, see `rpg.backbones`, and the rank of its token table.
            "none" is a gated MLP: as tokens meet in the denoiser, a sequence model has not been worth its time.
        identities: how many training runs have an identity of their own (RPG's "permutation state"), which a prompt
            names as "identity", Int `[B]`; 0 for networks that share one basin, or tokens that do not mind.
        sampler, steps: default sampling.
        weights_per_pass: how many weights are denoised at once; bounds the memory of sampling. The tokens of a network
            meet, so that one with more weights is a pass of its own.
    """

    policy: str = "neuron"
    token_size: PositiveInt = 1024
    position: str = "layer_chunk"
    width: PositiveInt = 192
    depth: PositiveInt = 4
    heads: PositiveInt = 6
    channels: PositiveInt = 32
    backbone: str = "none"
    backbone_depth: PositiveInt = 2
    rank: PositiveInt = 32
    identities: NonNegativeInt = 0
    sampler: str = "euler"
    steps: PositiveInt = 20
    weights_per_pass: PositiveInt = 2**25


class Rpg(Generator):
    """Writes networks from noise, on request.

    Args:
        structure: architecture of the networks.
        conditions: what it can be prompted with; of width `config.width`.
        objective: any objective that predicts x0.
        config: see `RpgConfig`.

    Raises:
        ConfigError, StructureError: the parts do not fit together.
    """

    needs_start = False
    distils = True

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: RpgConfig):
        if objective.prediction != "x0":
            raise ConfigError(f"this generator predicts x0; objective.prediction={objective.prediction} does not fit")
        if config.width % config.heads:
            raise ConfigError(f"generator.width={config.width} is not a multiple of generator.heads={config.heads}")
        super().__init__(structure, objective, config.sampler, config.steps)
        self.config, self.conditions = config, conditions
        self.layout = Layout(structure, config.policy, config.token_size)
        self.latents = Latents(structure, shared=self.layout.shared)
        self.prototypes = Prototypes(
            self.layout, config.position, config.width, config.rank, config.backbone, config.backbone_depth
        )
        self.denoiser = GraphTransformer(self.layout.graph, config.width, config.depth, config.heads, config.channels)
        self.identities = nn.Embedding(config.identities, config.width) if config.identities else None

    def fit(self, batch: Batch) -> None:
        self.latents.fit(batch.target)
        self.conditions.fit(split_identity(batch.prompt)[0])

    def hidden_matrices(self) -> list[nn.Parameter]:
        return self.denoiser.hidden_matrices()

    def compile_networks(self) -> None:
        self.denoiser.compile_blocks()

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Squared error of the denoised latents; every weight that varies counts alike.

        Raises:
            ConfigError: the generator has identities and the batch does not say whose networks these are.
        """
        count, device = len(batch.target), batch.target.device
        prompt, identity = split_identity(batch.prompt)
        if self.identities is not None and identity is None:
            raise ConfigError(f'generator.identities={self.config.identities}: training needs prompt["{IDENTITY}"]')
        latents = self.latents.encode(batch.target)
        t = self.objective.draw_times(count, rng, device)
        noise = torch.randn(latents.shape, generator=rng, device=device)
        network = self._network(self._request(prompt, identity, count, self.conditions.keep(count, rng)))
        varies = self.latents.spread > 0
        loss, estimate = self.objective.loss_and_estimate(network, latents, t, noise, mask=varies)
        return loss.mean() + self._distilled(batch, lambda: self.latents.decode(estimate), rng)

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B D"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Networks out of noise. A network without an identity in the prompt draws one.

        Each pass denoises as many networks as `config.weights_per_pass` weights hold, one at least, which changes
        nothing but the memory taken, unless the sampler is stochastic: its draws follow the passes.
        """
        conditions, identity = split_identity(prompt)
        if self.identities is not None and identity is None:
            identity = torch.randint(self.config.identities, (len(noise),), generator=rng, device=noise.device)
        networks_per_pass = max(1, self.config.weights_per_pass // self.structure.size)
        written = []
        for rows in torch.arange(len(noise), device=noise.device).split(networks_per_pass):
            part = {name: value[rows] for name, value in conditions.items()}
            who = None if identity is None else identity[rows]
            latents = solve(self._guided(part, who, len(rows), guidance), noise[rows])
            written.append(self.latents.decode(latents))
        return torch.cat(written)

    def _guided(self, prompt: Prompt, identity: Tensor | None, count: int, guidance: float) -> Callable:
        with_prompt = self.objective.denoiser(self._network(self._request(prompt, identity, count)))
        if guidance == 1:
            return with_prompt
        without = self.objective.denoiser(self._network(self._request({}, identity, count)))
        return guided(with_prompt, without, guidance)

    def _request(
        self,
        prompt: Prompt,
        identity: Int[Tensor, " B"] | None,
        count: int,
        keep: Bool[Tensor, "conditions B"] | None = None,
    ) -> Float[Tensor, "B width"]:
        """What is asked for, as one vector: the conditions that `keep` leaves, and whose network it should resemble."""
        request = self.conditions(prompt, count, keep)
        return request if self.identities is None else request + self.identities(identity)

    def _network(self, request: Float[Tensor, "B width"]) -> Callable[[Tensor, Tensor], Tensor]:
        alike = self.identities is None and not self.conditions.encoders  # then one set of prototypes is for all
        prototypes = self.prototypes(request[:1] if alike else request)[:, self.layout.place]
        anchor = self.latents.anchor[None]

        def network(z_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.objective.alpha_sigma(t)
            return self.denoiser(z_t, anchor, request, alpha, sigma, codes=prototypes)

        return network


def split_identity(prompt: Prompt) -> tuple[Prompt, Int[Tensor, " B"] | None]:
    """The conditions of a prompt, and the identity it names, if any."""
    return {name: value for name, value in prompt.items() if name != IDENTITY}, prompt.get(IDENTITY)
