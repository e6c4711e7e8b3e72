"""Mamba (Gu & Dao 2023, arXiv 2312.00752); parameters are named and shaped as in the mamba_ssm package."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rpg.backbones import kernels
from rpg.backbones.base import Mixer, State
from rpg.backbones.layers import CausalConv1d, scan_dtype
from rpg.backbones.mamba2 import inverse_softplus_of_time_steps
from rpg.backbones.scans import selective_scan

KERNEL = "mamba_ssm.ops.selective_scan_interface.selective_scan_fn"


class Mamba(Mixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = (h_t C_t + D x_t) silu(z_t), with dt, B and C functions of x_t.

    The state is the last `d_conv - 1` inputs of the convolution, and h, `[B, expand * width, d_state]`, in float32 or
    better.
    """

    def __init__(self, in_width: int, width: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__(in_width, width)
        inner, rank = expand * width, math.ceil(width / 16)
        self.splits = (rank, d_state, d_state)
        self.in_proj = nn.Linear(in_width, 2 * inner, bias=False)  # x, z
        self.conv1d = CausalConv1d(inner, d_conv)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)  # dt, B, C
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus_of_time_steps(inner))

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        memory = torch.zeros(batch, *self.A_log.shape, device=device, dtype=scan_dtype(dtype))
        return self.conv1d.initial_state(batch, device, dtype), memory

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        past, memory = self.initial_state(len(x), x.device, x.dtype) if state is None else state
        inner, gate = self.in_proj(x).chunk(2, dim=-1)
        inner, past = self.conv1d(inner, past)
        dt, b, c = self.x_proj(inner).split(self.splits, dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        with torch.autocast(x.device.type, enabled=False):
            # the kernel can neither start from a state nor differentiate the last one
            scan = self._fused_scan if state is None else self._scan
            y, memory = scan(inner, dt, b, c, memory)
            y = (y * F.silu(gate.to(y.dtype))).to(x.dtype)
        return self.out_proj(y), (past, memory)

    def _scan(
        self,
        x: Float[Tensor, "batch length inner"],
        dt: Float[Tensor, "batch length inner"],
        b: Float[Tensor, "batch length key"],
        c: Float[Tensor, "batch length key"],
        memory: Float[Tensor, "batch inner key"],
    ) -> tuple[Float[Tensor, "batch length inner"], Float[Tensor, "batch inner key"]]:
        wide = scan_dtype(x.dtype)
        x, b, c = x.to(wide), b.to(wide), c.to(wide)
        dt = F.softplus(dt.to(wide) + self.dt_proj.bias.to(wide))
        y, memory = selective_scan(x, dt, -self.A_log.to(wide).exp(), b, c, memory)
        return y + self.D.to(wide) * x, memory

    def _fused_scan(
        self,
        x: Float[Tensor, "batch length inner"],
        dt: Float[Tensor, "batch length inner"],
        b: Float[Tensor, "batch length key"],
        c: Float[Tensor, "batch length key"],
        memory: Float[Tensor, "batch inner key"],
    ) -> tuple[Float[Tensor, "batch length inner"], Float[Tensor, "batch inner key"]]:
        if not (x.is_cuda and kernels.supports(x.dtype) and (kernel := kernels.load(KERNEL))):
            return self._scan(x, dt, b, c, memory)
        y, memory = kernel(
            x.mT,
            dt.mT,
            -self.A_log.float().exp(),
            b.mT,
            c.mT,
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
        )
        return y.mT, memory
