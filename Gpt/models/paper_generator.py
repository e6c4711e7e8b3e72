"""G.pt as published (Peebles et al. 2022, arXiv 2209.12892) behind the two verbs of every generator.

One factor scales all weights; metrics reach the network as they are; hidden units are renamed at random in training.
The diffusion is DDPM with x0-prediction and 1,000 ancestral steps. There is no null prompt, hence no guidance.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from Gpt.conditions import Conditions
from Gpt.cuda_graphs import Graphed
from Gpt.data.zoo import UPSTREAM_STD
from Gpt.diffusion.objectives import DDPM, Objective
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.models.gpt_paper import GptPaper
from Gpt.models.upstream import load_upstream_checkpoint
from Gpt.structure import Structure

PROMPT = "target_metric"


@dataclass(frozen=True)
class PaperConfig:
    """Size, tokens, weight scale and sampling; the defaults are those of the MNIST models.

    Attributes:
        width, layers, heads: of the transformer.
        policy, chunk: how weights are cut into tokens, see `Gpt.tokens.split_sizes`.
        weight_scale: factor from plain weights to those the network reads; None brings the training weights to a
            standard deviation of 0.538, as the published factors do.
        sampler, steps: default sampling, "ddpm" or "ddim".
    """

    width: PositiveInt = 1536
    layers: PositiveInt = 12
    heads: PositiveInt = 16
    policy: str = "chunk_within_layer"
    chunk: PositiveInt | None = 1000
    weight_scale: float | None = None
    sampler: str = "ddpm"
    steps: PositiveInt = 1000


class PaperGpt(Generator):
    """The published generator of network updates.

    Args:
        structure: architecture of the networks.
        conditions: must be the target metric alone, without dropout; its embedding is not used.
        objective: must be DDPM with x0-prediction.
        config: see `PaperConfig`.

    Raises:
        ConfigError: another condition, objective or sampler, or sizes that do not fit together.
    """

    needs_start = True
    augment = True
    weight_scale: Tensor

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: PaperConfig):
        if set(conditions.encoders) != {PROMPT} or conditions.dropout:
            asked = f"{sorted(conditions.encoders)} with dropout {conditions.dropout:g}"
            raise ConfigError(
                f"published G.pt is prompted with {PROMPT} alone, and always, not with {asked}; "
                f"set condition.names=[{PROMPT}] condition.dropout=0"
            )
        if not isinstance(objective, DDPM) or objective.prediction != "x0":
            raise ConfigError("published G.pt is trained by DDPM with x0-prediction; set objective=ddpm")
        if config.sampler not in ("ddpm", "ddim"):
            raise ConfigError(f"published G.pt is sampled by ddpm or ddim, not generator.sampler={config.sampler}")
        super().__init__(structure, objective, config.sampler, config.steps)
        self.config = config
        self.network = GptPaper(
            [t.numel for t in structure.tensors],
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            policy=config.policy,
            chunk=config.chunk,
            seed=int(torch.randint(2**31, (), device="cpu")),  # so that torch's random state names the initial weights
        )
        self.register_buffer("weight_scale", torch.tensor(config.weight_scale or 1.0))
        self._compiled = False

    def load_published(self, path: Path) -> None:
        """Take the weights of a published checkpoint.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another configuration.
            ConfigError: the factor that those weights expect is not configured.
        """
        if self.config.weight_scale is None:
            raise ConfigError(f"{path}: generator.weight_scale must be given, see the *_paper configurations")
        load_upstream_checkpoint(path, self.network)

    def fit(self, batch: Batch) -> None:
        """Read the weight scale off the networks of a batch, unless the configuration gives it."""
        if self.config.weight_scale is None:
            assert batch.start is not None
            self.weight_scale.copy_(UPSTREAM_STD / torch.cat([batch.start, batch.target]).double().std())

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Weights of linear layers decay; biases, norms and positions do not."""
        linear = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        decaying = {id(weight) for weight in linear}
        others = [p for p in self.parameters() if id(p) not in decaying]
        return [{"params": linear, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def compile_networks(self) -> None:
        self._compiled = self.graphs = True
        self.network.compile_blocks()

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Squared error of the estimated weights, in normalised units."""
        assert batch.start is not None
        count, device = len(batch.target), batch.target.device
        target = self.weight_scale * batch.target
        t = self.objective.draw_times(count, rng, device)
        noise = torch.randn(target.shape, generator=rng, device=device)
        known = self._known(batch.start, batch.prompt)
        return self.objective.loss(lambda x_t, t: self.network(x_t, t, *known), target, t, noise).mean()

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B D"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Networks out of noise.

        Raises:
            ConfigError: there is no prompt, or guidance is asked for.
        """
        assert start is not None
        if guidance != 1:
            raise ConfigError(f"published G.pt has no null prompt for guidance: it must be 1, not {guidance:g}")
        model = self._half_precision_copy() if self.mixed_precision else self.network
        known = self._known(start, prompt)
        known = *known, model.constant_tokens(*known)
        step = Graphed(model, model) if self.graphs else model
        return solve(self.objective.denoiser(lambda x_t, t: step(x_t, t, *known)), noise) / self.weight_scale

    def _half_precision_copy(self) -> GptPaper:
        """The network with its linear layers in bfloat16: the numbers of autocast, to the bit.

        Autocast would read all weights and write them in bfloat16 once more in every compiled step, of a thousand.
        """
        model = copy.deepcopy(self.network)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
        if self._compiled:
            model.compile_blocks()
        return model

    def _known(self, start: Float[Tensor, "B D"], prompt: Prompt) -> tuple[Tensor, ...]:
        """What the network reads beside noised weights and time: start in normalised units, its metric, the wanted."""
        if set(prompt) != {PROMPT} or prompt[PROMPT].shape != (len(start), 2):
            found = {name: list(value.shape) for name, value in prompt.items()}
            raise ConfigError(f"published G.pt takes the prompt {PROMPT} [{len(start)}, 2] and no other, not {found}")
        before, wanted = prompt[PROMPT].unbind(1)
        return self.weight_scale * start, before, wanted
