"""Conditions turn what a user asks for into one embedding `[B, width]`.

Every condition has a learned null value, which stands in when a prompt leaves it out, when training drops it (so that
guidance has an unconditional model to lean against), and for the unconditional half of guided sampling. Embeddings of
several conditions are added.

    name            prompt tensor    meaning
    target_metric   [B, 2]           (metric of the start, wanted metric), plain units of the task
    class_mask      [B, classes]     1 for the classes that count as positive
    text            [B, features]    sentence embedding, as long as the run's sentence encoder has it
"""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt.errors import ConfigError, nearest
from Gpt.generator import Prompt


def fourier_features(x: Float[Tensor, "*batch"], octaves: int = 6) -> Float[Tensor, "*batch features"]:
    """(x, sin 2^k pi x, cos 2^k pi x) for k = -1 … octaves - 2; smooth in x at the scale of the unit interval."""
    angles = x[..., None] * math.pi * 2.0 ** torch.arange(-1, octaves - 1, device=x.device, dtype=x.dtype)
    return torch.cat([x[..., None], angles.sin(), angles.cos()], dim=-1)


class MetricScale(nn.Module):
    """Metrics on a scale that resolves them where the zoo has networks.

    A value becomes its quantile among the zoo's metrics (linear between knots) and its standard score. Values beyond
    the zoo, unreachable prompts among them, keep their order: quantiles continue linearly outside [0, 1].
    """

    knots: Tensor
    center: Tensor
    spread: Tensor

    def __init__(self, knots: int = 64):
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 1, knots))
        self.register_buffer("center", torch.tensor(0.5))
        self.register_buffer("spread", torch.tensor(0.3))

    def fit(self, values: Float[Tensor, "..."]) -> None:
        """Read the scale off the metrics of training networks."""
        values = values[torch.isfinite(values)].double().flatten().sort().values
        positions = torch.linspace(0, len(values) - 1, len(self.knots), dtype=torch.float64)
        knots = values[positions.round().long().to(values.device)]
        # Equal knots are moved up, one gap after the other: a step of zero width would have no inverse, in float32 too.
        # A few runs that went astray must not widen it for all others, hence the inner knots.
        edge = len(knots) // 16
        gaps = torch.maximum((knots[-1 - edge] - knots[edge]) * 1e-4, knots.abs() * 1e-6).clamp_min(1e-10).cumsum(0)
        self.knots.copy_(torch.cummax(knots - gaps, dim=0).values + gaps)
        self.center.copy_(values.mean())
        self.spread.copy_(values.std().clamp_min(1e-6))

    def forward(self, value: Float[Tensor, "*batch"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """(quantile, standard score)."""
        upper = torch.searchsorted(self.knots, value.contiguous()).clamp(1, len(self.knots) - 1)
        low, high = self.knots[upper - 1], self.knots[upper]
        inside = (upper - 1 + (value - low) / (high - low)) / (len(self.knots) - 1)
        score = (value - self.center) / self.spread
        first, last = self.knots[0], self.knots[-1]
        below, above = (value - first) / self.spread, 1 + (value - last) / self.spread
        return torch.where(value < first, below, torch.where(value > last, above, inside)), score


class TargetMetric(nn.Module):
    """(start metric, wanted metric) `[B, 2]` -> embedding.

    The start's metric may be NaN: unknown, as for networks from noise.
    """

    features = 2

    def __init__(self, width: int):
        super().__init__()
        self.scale = MetricScale()
        per_value = fourier_features(torch.zeros(1)).shape[-1] + 1
        self.mlp = nn.Sequential(nn.Linear(3 * per_value, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Float[Tensor, "B 2"]) -> Float[Tensor, "B width"]:
        known = torch.isfinite(value)
        quantile, score = self.scale(torch.where(known, value, self.scale.center))
        quantile = torch.cat([quantile, quantile[:, 1:] - quantile[:, :1]], dim=1)
        score = torch.cat([score, score[:, 1:] - score[:, :1]], dim=1)
        known = torch.cat([known, known.all(dim=1, keepdim=True)], dim=1)
        features = torch.cat([fourier_features(quantile), score[..., None]], dim=-1) * known[..., None]
        return self.mlp(features.flatten(1))


class Features(nn.Module):
    """A feature vector `[B, features]` (sentence embedding) -> embedding."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Float[Tensor, "B features"]) -> Float[Tensor, "B width"]:
        return self.mlp(value.float())


class ClassMask(Features):
    """A class mask `[B, classes]` of zeros and ones -> embedding; classes that are out count as much as those in."""

    def forward(self, value: Float[Tensor, "B classes"]) -> Float[Tensor, "B width"]:
        return super().forward(2 * value.float() - 1)


PROMPT_FEATURES = {"target_metric": 2, "class_mask": 10, "text": 384}
"""Size of each condition's prompt tensor: (start, wanted) metric; classes; embedding by the default encoder."""


class Conditions(nn.Module):
    """The conditions of one generator: `{name: size of its prompt tensor}`; empty for an unconditional generator."""

    def __init__(self, features: dict[str, int], width: int, dropout: float = 0.1):
        super().__init__()
        self.width, self.dropout = width, dropout
        kinds = {"class_mask": ClassMask, "text": Features}
        self.encoders = nn.ModuleDict(
            {
                name: TargetMetric(width) if name == "target_metric" else kinds[name](width, size)
                for name, size in features.items()
            }
        )
        self.null = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in features})
        self.bias = nn.Parameter(torch.zeros(width))

    def fit(self, prompt: Prompt) -> None:
        """Read scales off a sample of training prompts."""
        if "target_metric" in self.encoders:
            cast(TargetMetric, self.encoders["target_metric"]).scale.fit(prompt["target_metric"])

    def keep(self, batch: int, rng: torch.Generator) -> Bool[Tensor, "conditions batch"]:
        """Which conditions training keeps: all are dropped with probability `dropout`, for guidance is from a model
        without any; of several, each on its own besides (Brooks et al. 2023, arXiv 2211.09800, section 3.2)."""
        count = len(self.encoders)
        kept = torch.rand(1 if count == 1 else 1 + count, batch, generator=rng, device=rng.device) >= self.dropout
        return kept if count == 1 else kept[:1] & kept[1:]

    def forward(
        self, prompt: Prompt, batch: int, keep: Bool[Tensor, "conditions batch"] | None = None
    ) -> Float[Tensor, "batch width"]:
        """Sum of the embeddings; a condition that the prompt leaves out or `keep` drops counts as its null value.

        Raises:
            ConfigError: the prompt names a condition this generator was not trained with, or one of the wrong size.
        """
        unknown = sorted(set(prompt) - set(self.encoders))
        if unknown:
            raise ConfigError(f"this generator knows the conditions {sorted(self.encoders)}, not {unknown}")
        total = self.bias.repeat(batch, 1)  # a view would claim gradients under no_grad, which flop counters trip over
        for i, (name, encoder) in enumerate(self.encoders.items()):
            null = self.null[name].expand(batch, -1)
            if name not in prompt:
                total = total + null
                continue
            value = prompt[name]
            if value.shape != (batch, encoder.features):
                raise ConfigError(f"condition {name!r} takes [{batch}, {encoder.features}], got {list(value.shape)}")
            embedding = encoder(value)
            total = total + (embedding if keep is None else torch.where(keep[i, :, None], embedding, null))
        return total


def prompt_features(names: tuple[str, ...], text: int = PROMPT_FEATURES["text"]) -> dict[str, int]:
    """Size of each named condition's prompt tensor.

    Args:
        text: length of a sentence embedding.

    Raises:
        ConfigError: there is no such condition; names the nearest.
    """
    for name in names:
        if name not in PROMPT_FEATURES:
            raise ConfigError(f"condition.names: there is no condition {name!r}; {nearest(name, PROMPT_FEATURES)}")
    known = PROMPT_FEATURES | {"text": text}
    return {name: known[name] for name in names}
