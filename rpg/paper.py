"""RPG as published: prototypes from Mamba-2, and a 1-D convolutional DDPM that denoises every token by itself.

Wang et al. 2025, "Recurrent Parameter Generation", arXiv 2501.11587; sizes and details as in the authors' code. It
differs from that code where the code fails, and in what else is listed here, and only there:

    padding is a boolean mask, not NaN; a layer that never varies is restored to the bit, not by way of 0/0
    learned scalars are generated like other weights; only counters are copied
    tokens are cut and joined in one key order, and tied tensors once
    DDIM begins at the last time and ends on clean data (theirs begins at 945 of 1,000 and leaves 1 % of noise), and is
        deterministic (theirs has eta 0.05)
    a layer's scale is the spread of all its weights in all checkpoints (theirs is the mean of each checkpoint's), and a
        written variance is 0 at least (theirs 0.001)
    tokens are as long as the longest tensor at most, for networks smaller than one published token
    sampling is seeded; identities are initialised apart (theirs all at the same constant)

Their trainer for unseen tasks lost its optimizer step; `Gpt.training` steps. Where there is no condition they add the
bias of its layer to every position; here nothing is added. Kept as it is: no residual connection and no norm between
the two Mamba-2 layers, a forward scan alone, batch statistics that see the padding (noised zeros).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import Objective
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve, evaluating
from Gpt.structure import Structure
from rpg.backbones import build_backbone
from rpg.backbones.layers import GatedRMSNorm
from rpg.generator import IDENTITY, split_identity
from rpg.tokens import Latents, PositionCode, cut, token_coordinates, token_sizes

BASE_CHANNELS = (1, 32, 64, 128, 64, 32, 1)
LARGE_CHANNELS = (1, 64, 96, 64, 1)
KERNEL = 7
TIME_FEATURES = 256
CONDITION_FEATURES = 1024
STATE_SPACES = ("mamba2", "mamba")  # whose states are as large as the published sizes say
HEAD_TOKENS = 8  # at a token size of 8192: the last norm and the head of the published ViT-Tiny


@dataclass(frozen=True)
class PaperSize:
    """Entries per token (fewer where no tensor has as many), widths of the two Mamba-2 layers, convolution channels."""

    token_size: int
    width: int
    prototype_width: int
    d_state: int = 128
    channels: tuple[int, ...] = BASE_CHANNELS


PAPER_SIZES = {
    "tiny": PaperSize(256, 256, 256, d_state=32),
    "small": PaperSize(4096, 4096, 4096),
    "base": PaperSize(8192, 8192, 8192),
    "large": PaperSize(16384, 12288, 16384, channels=LARGE_CHANNELS),
}


@dataclass(frozen=True)
class RpgPaperConfig:
    """One published configuration.

    Attributes:
        size: a key of `PAPER_SIZES`.
        policy, position: see `rpg.tokens`; the paper's are within_layer and layer_chunk.
        condition: how a class mask enters: "none", "head" (the last 8 tokens alone, the published model) or "full" (a
            condition of its own for each token).
        identities: number of checkpoints (or runs) with an identity of their own; 0 with a condition.
        token_batch: how many tokens of a batch are denoised in a training step (None: all), and at once in sampling.
        sampler, steps: ddpm with 1,000 steps, or ddim with 60 for the large size.
        backbone: what reads the positions, a key of `rpg.backbones.BACKBONES`. In the paper's ablation of structures
            LSTM, transformer and the first Mamba write as well as Mamba-2, and "none" (no recurrence) fails.
    """

    size: str = "base"
    policy: str = "within_layer"
    position: str = "layer_chunk"
    condition: str = "none"
    identities: NonNegativeInt = 0
    token_batch: PositiveInt | None = 1024
    sampler: str = "ddpm"
    steps: PositiveInt = 1000
    backbone: str = "mamba2"


class TokenDenoiser(nn.Module):
    """Noise in each of N tokens, given their prototypes: `[N, K], [N], [N, width] -> [N, K]`.

    A token is a signal of one channel and length K. Every convolution reads (x + condition) * time, both of length K;
    the outputs of the first layers are added again before the last ones.

    Signals are images of height one, `[N, C, 1, K]`, with their channels last in memory: forward and backward, cuDNN
    takes 22 ms for the convolutions of 1,024 tokens of 8,192 then, and 49 ms with signals `[N, C, K]` (H200, bfloat16).
    """

    def __init__(self, token_size: int, width: int, channels: tuple[int, ...]):
        super().__init__()
        self.condition = nn.Linear(width, token_size)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, token_size), nn.SiLU(), nn.Linear(token_size, token_size))
        *hidden, last = pairwise(channels)
        blocks = [nn.Sequential(SignalConv(i, o), nn.BatchNorm2d(o), nn.ELU()) for i, o in hidden]
        self.convolutions = nn.ModuleList([*blocks, SignalConv(*last)])

    def forward(
        self, x: Float[Tensor, "N K"], t: Float[Tensor, " N"], prototypes: Float[Tensor, "N width"]
    ) -> Float[Tensor, "N K"]:
        condition, time = self.condition(prototypes)[:, None, None], self.time(time_features(t))[:, None, None]
        x = x[:, None, None].contiguous(memory_format=torch.channels_last)
        layers = len(self.convolutions)
        outputs: list[Tensor] = []
        for i, convolution in enumerate(self.convolutions):
            if i > layers // 2:
                x = x + outputs[layers - 1 - i]
            x = convolution((x + condition) * time)
            outputs.append(x)
        return x[:, 0, 0]


class SignalConv(nn.Conv1d):
    """A convolution along signals that are images of height one: `[N, I, 1, K] -> [N, O, 1, K]`, channels last."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, KERNEL, padding=KERNEL // 2)

    def forward(self, x: Float[Tensor, "N I 1 K"]) -> Float[Tensor, "N O 1 K"]:
        kernels = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, kernels, self.bias, padding=(0, KERNEL // 2))


class HeadGate(nn.Module):
    """A class mask for the last 8 tokens; the others know nothing of it: `[B, classes] -> [B, T, width]`."""

    gate: Float[Tensor, " T"]

    def __init__(self, classes: int, tokens: int, width: int):
        super().__init__()
        features = CONDITION_FEATURES
        self.net = nn.Sequential(nn.Linear(classes, features), nn.SiLU(), nn.Linear(features, width))
        self.register_buffer("gate", (torch.arange(tokens) >= tokens - HEAD_TOKENS).float(), persistent=False)

    def forward(self, mask: Float[Tensor, "B classes"]) -> Float[Tensor, "B T width"]:
        return self.net(mask)[:, None] * self.gate[:, None]


class FullCondition(nn.Module):
    """A condition of its own for each token, by convolutions over the width: `[B, classes] -> [B, T, width]`."""

    def __init__(self, classes: int, tokens: int, width: int):
        super().__init__()
        features = CONDITION_FEATURES
        self.net = nn.Sequential(nn.Linear(classes, features), nn.LayerNorm(features), nn.Linear(features, width))
        self.spread = nn.Sequential(
            nn.Conv1d(1, tokens, 9, padding=4), nn.GroupNorm(1, tokens), nn.Conv1d(tokens, tokens, 9, padding=4)
        )

    def forward(self, mask: Float[Tensor, "B classes"]) -> Float[Tensor, "B T width"]:
        return self.spread(self.net(mask)[:, None])


CONDITIONERS: dict[str, type[nn.Module]] = {"head": HeadGate, "full": FullCondition}


class RpgPaper(Generator):
    """The published generator of whole networks.

    Args:
        structure: architecture of the networks.
        conditions: empty, or the class mask alone; only its prompt's size is read, as RPG embeds it in its own way.
        objective: DDPM, predicting the noise.
        config: see `RpgPaperConfig`.

    Raises:
        ConfigError: the parts do not fit together.
    """

    needs_start = False

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: RpgPaperConfig):
        if objective.prediction != "eps":
            raise ConfigError(
                f"published RPG predicts noise; objective.prediction={objective.prediction} does not fit, "
                "objective=ddpm_eps does"
            )
        size = PAPER_SIZES.get(config.size)
        if size is None:
            raise ConfigError(f"generator.size={config.size!r} does not exist; choose one of {', '.join(PAPER_SIZES)}")
        super().__init__(structure, objective, config.sampler, config.steps)
        self.config = config
        self.latents = Latents(structure, residual=False)
        self.tokens = cut(structure, config.policy, size.token_size)
        coordinates = token_coordinates(structure, token_sizes(structure, config.policy, size.token_size))
        self.position = PositionCode(config.position, coordinates, size.width)
        self.conditioner = _conditioner(config.condition, conditions, len(self.tokens), size.width)
        self.identities = nn.Embedding(config.identities, size.width) if config.identities else None
        state = {"d_state": size.d_state} if config.backbone in STATE_SPACES else {}
        bare = config.backbone != "transformer"  # of which theirs, too, are residual blocks
        self.backbone = build_backbone(
            config.backbone, size.width, out_width=size.prototype_width, bare=bare, depth=2, **state
        )
        self.denoiser = TokenDenoiser(self.tokens.width, size.prototype_width, size.channels)

    def fit(self, batch: Batch) -> None:
        self.latents.fit(batch.target)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (len(self.tokens), self.tokens.width)

    def compile_networks(self) -> None:
        self.denoiser.compile()
        for module in self.backbone.modules():
            if isinstance(module, GatedRMSNorm):  # the widest tensors, in float32: one pass instead of seven
                module.compile()

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """Squared error of the noise in `token_batch` tokens of the batch; every weight in them counts alike.

        Raises:
            ConfigError: the prompt lacks the class mask or the identity that the generator is built for.
        """
        latents = self.latents.encode(batch.target)
        tokens = self.tokens.encode(latents).flatten(0, 1)
        chosen = torch.randperm(len(tokens), generator=rng, device=tokens.device)[: self.config.token_batch]
        prototypes = self._prototypes(batch.prompt, len(latents)).flatten(0, 1)[chosen]
        kept = self._kept()[chosen % len(self.tokens)]
        t = self.objective.draw_times(len(chosen), rng, tokens.device)
        noise = torch.randn(tokens[chosen].shape, generator=rng, device=tokens.device)
        errors = self.objective.loss(self._network(prototypes), tokens[chosen], t, noise, mask=kept)
        weights = kept.sum(1)
        return (errors * weights).sum() / weights.sum().clamp(min=1)

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B T K"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Networks out of noise. Without an identity in the prompt, each network draws one.

        `config.token_batch` tokens are denoised at once, on batch statistics gathered in training; the sequence model
        reads as many networks at once as have so many tokens, one at least. With ddim this bounds the memory and
        changes nothing else; the draws of ddpm follow the batches.

        Raises:
            ConfigError: guidance is asked for; the published model has no null condition.
        """
        if guidance != 1:
            raise ConfigError(f"guidance={guidance}: published RPG has no null condition to be guided by; use 1")
        count = len(noise)
        if self.identities is not None and IDENTITY not in prompt:
            drawn = torch.randint(self.config.identities, (count,), generator=rng, device=noise.device)
            prompt = prompt | {IDENTITY: drawn}
        with evaluating(self):
            prototypes = self._prototypes_in_parts(prompt, count).flatten(0, 1)
            tokens = noise.flatten(0, 1)
            passes = torch.arange(len(tokens), device=noise.device).split(self.config.token_batch or len(tokens))
            denoised = [
                solve(self.objective.denoiser(self._network(prototypes[rows])), tokens[rows]) for rows in passes
            ]
        return self.latents.decode(self.tokens.decode(torch.cat(denoised).unflatten(0, (count, -1))))

    def _prototypes(self, prompt: Prompt, count: int) -> Float[Tensor, "B T width"]:
        """One for each token of each network; where nothing tells networks apart, they are computed once for all."""
        conditions, identity = split_identity(prompt)
        x = self.position()[None]
        if self.conditioner is not None:
            if "class_mask" not in conditions:
                raise ConfigError(f'generator.condition={self.config.condition}: give prompt["class_mask"]')
            x = x + self.conditioner(conditions["class_mask"].float())
        if self.identities is not None:
            if identity is None:
                raise ConfigError(f'generator.identities={self.config.identities}: training needs prompt["{IDENTITY}"]')
            x = x + self.identities(identity)[:, None]
        return self.backbone(x).expand(count, -1, -1)

    def _prototypes_in_parts(self, prompt: Prompt, count: int) -> Float[Tensor, "B T width"]:
        """The same, from as many networks at once as `config.token_batch` tokens hold, one at least."""
        if not prompt or self.config.token_batch is None:
            return self._prototypes(prompt, count)
        rows = torch.arange(count, device=self.latents.spread.device)
        parts = rows.split(max(1, self.config.token_batch // len(self.tokens)))
        told = [{name: value[part] for name, value in prompt.items()} for part in parts]
        return torch.cat([self._prototypes(p, len(part)) for p, part in zip(told, parts, strict=True)])

    def _network(self, prototypes: Float[Tensor, "N width"]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: self.denoiser(x, t, prototypes)

    def _kept(self) -> Bool[Tensor, "T K"]:
        """Which entries of the tokens are weights that vary."""
        return self.tokens.encode((self.latents.spread > 0).float()[None])[0] > 0


def time_features(t: Float[Tensor, " N"] | Int[Tensor, " N"]) -> Float[Tensor, "N features"]:
    """cos and sin of the step at 128 frequencies from 1 down to 1/10000 (Ho et al. 2020)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _conditioner(name: str, conditions: Conditions, tokens: int, width: int) -> nn.Module | None:
    found = {condition: encoder.features for condition, encoder in conditions.encoders.items()}
    if name == "none" and not found:
        return None
    if name not in CONDITIONERS or set(found) != {"class_mask"}:
        raise ConfigError(
            f"generator.condition={name!r} with the conditions {sorted(found)}: published RPG is either unconditional "
            f"(none, no conditions), or reads a class mask alone ({' or '.join(CONDITIONERS)})"
        )
    return CONDITIONERS[name](found["class_mask"], tokens, width)
