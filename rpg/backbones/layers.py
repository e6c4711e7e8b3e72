"""Parts that several backbones are built from: norms, the causal convolution, the gated MLP."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rpg.backbones import kernels


def scan_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of recurrences and norms: at least float32, whatever the projections run in."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), inside in float32 or better."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = scan_dtype(x.dtype)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """`norm(x * silu(gate))` over each of `groups` equal parts of the last axis; Mamba-2 gates first."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "*batch width"], gate: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        wide = scan_dtype(x.dtype)
        gated = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (self.groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(wide)


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over time in which output t sees inputs t - kernel_size + 1 ... t, followed by SiLU.

    Its state is the last `kernel_size - 1` inputs, `[B, kernel_size - 1, channels]`.
    """

    KERNEL = "causal_conv1d.causal_conv1d_fn"
    bias: Tensor

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch length channels"], past: Float[Tensor, "batch memory channels"]
    ) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch memory channels"]]:
        memory = past.shape[1]
        window = torch.cat([past.to(x.dtype), x], dim=1)
        future = window[:, window.shape[1] - memory :]
        if x.is_cuda and self._fits_kernel(x) and (kernel := kernels.load(self.KERNEL)):
            weight, bias = self.weight.squeeze(1).to(x.dtype), self.bias.to(x.dtype)
            y = kernel(window.mT, weight, bias, activation="silu").mT[:, memory:]
        else:
            y = F.silu(super().forward(window.mT)).mT
        return y, future

    def _fits_kernel(self, x: Tensor) -> bool:
        """The kernel reads 16 bytes at a time along the channels, and has widths 2, 3 and 4."""
        return kernels.supports(x.dtype) and self.in_channels % 8 == 0 and 2 <= self.kernel_size[0] <= 4

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.kernel_size[0] - 1, self.in_channels, device=device, dtype=dtype)


class GatedMLP(nn.Module):
    """SwiGLU, `W_down (silu(W_gate x) * W_up x)`, token by token (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, in_width: int, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, round(ratio * width))
        self.gate_proj = nn.Linear(in_width, hidden, bias=False)
        self.up_proj = nn.Linear(in_width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch in_width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
