"""Prototypes: what each token of a network should hold, before a weight is seen.

    places [P]  --position code, token table, request-->  sequence model  -->  prototypes [B, P, width]

They depend on the request alone, so that sampling computes them once, however many steps it takes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rpg.backbones import build_backbone
from rpg.tokens import Layout, PositionCode

_BOTH_WAYS = {"transformer": {"causal": False}, "none": {}}


class Prototypes(nn.Module):
    """What each place should hold, given the request: `[B, width] -> [B, P, width]`, or `[1, …]` for one of all.

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

    def forward(self, request: Float[Tensor, "#B width"]) -> Float[Tensor, "#B P width"]:
        places = self.position() + self.table @ self.directions
        return self.backbone(places + request[:, None])
