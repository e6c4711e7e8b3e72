"""What every sequence model shares: the layer (`Mixer`), its run in both directions, and the stack of layers (`Backbone`)."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.errors import ConfigError

State = tuple[Tensor, ...]


def scan_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of recurrences and norms: at least float32, whatever the projections run in."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), computed in float32 or better."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = scan_dtype(x.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)


class Mixer(nn.Module, ABC):
    """One causal sequence layer, `[B, L, in_width] -> [B, L, width]`, that can stop anywhere and go on from its state."""

    # Ratio of the gated MLP that follows the layer in a residual stack; 0 means none.
    mlp_ratio: ClassVar[float] = 0.0
    # Whether the layer reads its tokens in order, so that reading them backwards as well tells it something new.
    directed: ClassVar[bool] = True

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.in_width = in_width
        self.width = width
        self.causal = True

    @classmethod
    def defaults(cls, layer: int, depth: int) -> dict[str, object]:
        """Options that depend on the place of the layer in a stack of `depth`."""
        return {}

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        """Read `x` from `state` on; without one, from the start. Only a pass that was given a state differentiates its last state."""

    @abstractmethod
    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token."""


class Bidirectional(nn.Module):
    """Sum of one mixer that reads forwards and of another that reads backwards; there is no state to continue from."""

    def __init__(self, forwards: Mixer, backwards: Mixer) -> None:
        super().__init__()
        self.forwards = forwards
        self.backwards = backwards
        self.causal = False

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        there, _ = self.forwards(x)
        back, _ = self.backwards(x.flip(1))
        return there + back.flip(1), ()


class Residual(nn.Module):
    """Pre-norm residual block: `x + mixer(norm(x))`, then, where there is one, `x + mlp(norm(x))`."""

    def __init__(self, mixer: Mixer | Bidirectional, width: int, mlp: Mixer | None) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = mixer
        self.causal = mixer.causal
        self.mlp = nn.Sequential() if mlp is None else nn.Sequential(RMSNorm(width), mlp)

    def forward(
        self, x: Float[Tensor, "batch length width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        mixed, state = self.mixer(self.norm(x).to(x.dtype), state)
        return self._feed_forward(x + mixed), state

    def _feed_forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        if not self.mlp:
            return x
        norm, mlp = self.mlp
        return x + mlp(norm(x).to(x.dtype))[0]

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return self.mixer.initial_state(batch, device, dtype)
