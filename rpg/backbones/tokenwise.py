"""No recurrence at all: what a backbone is compared with to see whether tokens need to know of each other."""

import torch
from jaxtyping import Float
from torch import Tensor

from rpg.backbones.base import Mixer, State
from rpg.backbones.layers import GatedMLP


class Tokenwise(Mixer):
    """One gated MLP of hidden width `expand * width` for every token; no token sees another (ablation of RPG)."""

    sequential = False

    def __init__(self, in_width: int, width: int, *, expand: float = 2.0) -> None:
        super().__init__(in_width, width)
        self.mlp = GatedMLP(in_width, width, expand)

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return ()

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        return self.mlp(x), ()
