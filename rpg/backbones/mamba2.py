"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 7); parameters are named and shaped as in the mamba_ssm package."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.errors import ConfigError
from rpg.backbones import kernels
from rpg.backbones.base import Mixer, State
from rpg.backbones.layers import CausalConv1d, GatedRMSNorm, scan_dtype
from rpg.backbones.scans import state_space_dual

KERNEL = "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"
KERNEL_CHUNK = 256


def inverse_softplus_of_time_steps(count: int) -> Tensor:
    """Biases whose softplus is log-uniform in [0.001, 0.1], so that states live for one token or for hundreds."""
    time_steps = torch.exp(torch.empty(count).uniform_(math.log(1e-3), math.log(0.1)))
    return time_steps + torch.log(-torch.expm1(-time_steps))


class Mamba2(Mixer):
    """S_t = exp(-dt_t exp(A_log)) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, per head, then a gated norm.

    x, B and C come out of a short causal convolution. The state is the last `d_conv - 1` inputs of that convolution,
    and S, `[B, heads, headdim, d_state]`, in float32 or better. Raises ConfigError where `expand * width` is no
    multiple of `headdim`, or the number of heads none of `ngroups`.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
    ) -> None:
        super().__init__(in_width, width)
        inner = expand * width
        if inner % headdim or inner // headdim % ngroups:
            raise ConfigError(
                f"mamba2: expand * width = {inner} channels do not split into heads of headdim = {headdim} channels "
                f"in ngroups = {ngroups} equal groups; change one of them"
            )
        heads = inner // headdim
        self.d_state, self.headdim, self.ngroups = d_state, headdim, ngroups
        self.splits = (inner, inner + 2 * ngroups * d_state, heads)
        self.in_proj = nn.Linear(in_width, sum(self.splits), bias=False)  # z, (x, B, C), dt
        self.conv1d = CausalConv1d(inner + 2 * ngroups * d_state, d_conv)
        self.dt_bias = nn.Parameter(inverse_softplus_of_time_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner, ngroups)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        shape = (batch, len(self.A_log), self.headdim, self.d_state)
        memory = torch.zeros(shape, device=device, dtype=scan_dtype(dtype))
        return self.conv1d.initial_state(batch, device, dtype), memory

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        past, memory = self.initial_state(len(x), x.device, x.dtype) if state is None else state
        gate, convolved, dt = self.in_proj(x).split(self.splits, dim=-1)
        convolved, past = self.conv1d(convolved, past)
        with torch.autocast(x.device.type, enabled=False):
            y, memory = self._recurrence(convolved, dt, memory)
            y = self.norm(y, gate).to(x.dtype)
        return self.out_proj(y), (past, memory)

    def _recurrence(
        self,
        convolved: Float[Tensor, "batch length channels"],
        dt: Float[Tensor, "batch length heads"],
        memory: Float[Tensor, "batch heads value key"],
    ) -> tuple[Float[Tensor, "batch length inner"], Float[Tensor, "batch heads value key"]]:
        wide = scan_dtype(convolved.dtype)
        bc = self.ngroups * self.d_state
        x, b, c = convolved.split((self.splits[0], bc, bc), dim=-1)
        x = x.unflatten(-1, (-1, self.headdim))
        b, c = b.unflatten(-1, (self.ngroups, -1)), c.unflatten(-1, (self.ngroups, -1))
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        a, skip = -self.A_log.to(wide).exp(), self.D.to(wide)
        if x.is_cuda and kernels.supports(x.dtype) and (kernel := kernels.load(KERNEL)):
            y, memory = kernel(x, dt, a, b, c, KERNEL_CHUNK, D=skip, initial_states=memory, return_final_states=True)
            return y.flatten(2), memory
        x, b, c = x.to(wide), b.to(wide), c.to(wide)
        y, memory = state_space_dual(x * dt[..., None], dt * a, b, c, memory)
        return (y + skip[:, None] * x).flatten(2), memory
