"""The two networks of the generator: prototypes, which never see a weight, and the denoiser, in which tokens meet.

    places [P]  --position code, token table, request-->  sequence model  -->  prototypes [B, P, width]
    noised latents, mean checkpoint  --tokens [B, T, width], plus the prototype of each-->  transformer  -->  latents

Prototypes depend on the request alone, so that sampling computes them once, however many steps it takes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.conditions import fourier_features
from Gpt.models.transformer import Block, norm
from rpg.backbones import build_backbone
from rpg.tokens import Layout, PositionCode

TIME_OCTAVES = 8
_BOTH_WAYS = {"transformer": {"causal": False}, "none": {}}


class Prototypes(nn.Module):
    """What each place should hold, given the request: `[B, width] -> [B, P, width]`.

    Neighbouring sinusoids are nearly parallel; the token table, of rank `rank`, gives every place a direction of its
    own. A sequence model reads them both ways, so that early layers know of late ones.
    """

    def __init__(self, layout: Layout, position: str, width: int, rank: int, backbone: str, depth: int):
        super().__init__()
        places = len(layout.coordinates)
        self.position = PositionCode(position, layout.coordinates, width)
        self.table = nn.Parameter(torch.randn(places, rank))
        self.directions = nn.Parameter(torch.randn(rank, width) * rank**-0.5)
        both_ways = _BOTH_WAYS.get(backbone, {"bidirectional": True})
        self.backbone = build_backbone(backbone, width, depth=depth, **both_ways)

    def forward(self, request: Float[Tensor, "B width"]) -> Float[Tensor, "B P width"]:
        places = self.position() + self.table @ self.directions
        return self.backbone(places + request[:, None])


class Denoiser(nn.Module):
    """(noised latents, prototypes, request, noise level) -> estimate of the latents `[B, D]`.

    A transformer over all tokens of a network (adaLN-zero, Peebles & Xie 2023), wrapped in the preconditioning of
    Karras et al. 2022, table 1, for unit-variance data. The heads start at zero: an untrained denoiser is the best one
    that looks at each number alone.
    """

    def __init__(self, layout: Layout, width: int, depth: int, heads: int):
        super().__init__()
        self.layout = layout
        self.embed = nn.ModuleList(nn.Linear(entries, width) for _, entries in layout.shapes)
        self.embed_anchor = nn.ModuleList(nn.Linear(entries, width, bias=False) for _, entries in layout.shapes)
        self.time = nn.Sequential(nn.Linear(1 + 2 * TIME_OCTAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = nn.Linear(width, 2 * width)
        self.heads = nn.ModuleList(nn.Linear(width, entries) for _, entries in layout.shapes)
        for layer in (self.final, *self.heads):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        z_t: Float[Tensor, "B D"],
        anchor: Float[Tensor, " D"],
        prototypes: Float[Tensor, "B P width"],
        request: Float[Tensor, "B width"],
        alpha: Float[Tensor, " B"],
        sigma: Float[Tensor, " B"],
    ) -> Float[Tensor, "B D"]:
        """`anchor`: the mean checkpoint, which latents are deviations from; alpha, sigma: the scales of the path."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        unit = (alpha.square() + sigma.square()).rsqrt()
        x = self._embed(self.embed, z_t * unit) + self._embed(self.embed_anchor, anchor[None])
        x = x + prototypes[:, self.layout.place]
        level = (sigma / (alpha + sigma)).squeeze(1)
        condition = request + self.time(fourier_features(level, TIME_OCTAVES))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = norm(x) * (1 + scale) + shift
        parts = x.split([tokens for tokens, _ in self.layout.shapes], dim=1)
        change = self.layout.decode([head(part) for head, part in zip(self.heads, parts, strict=True)])
        return alpha * unit.square() * z_t + sigma * unit * change

    def _embed(self, layers: nn.ModuleList, latents: Float[Tensor, "B D"]) -> Float[Tensor, "B T width"]:
        blocks = self.layout.encode(latents)
        return torch.cat([layer(block) for layer, block in zip(layers, blocks, strict=True)], dim=1)
