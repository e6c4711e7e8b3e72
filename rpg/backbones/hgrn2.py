"""HGRN2 (Qin et al. 2024, arXiv 2404.07904); parameters are named as in flash-linear-attention's HGRN2Attention."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.errors import ConfigError
from rpg.backbones import kernels
from rpg.backbones.base import Mixer, State
from rpg.backbones.layers import RMSNorm, scan_dtype
from rpg.backbones.scans import gated_linear_attention

# Token by token within one kernel. The package's chunked kernels choose among some two hundred variants that have to
# be compiled first: minutes before the first gradient, and none of them compiles for heads of fewer than 16 channels.
KERNEL = "fla.ops.gla.fused_recurrent_gla"


class HGRN2(Mixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T and y_t = W_o norm(S_t^T silu(W_q x_t)), per head.

    f_t = b + (1 - b) sigmoid(W_f x_t) and i_t = W_i x_t. The state is S, `[B, heads, e, e]`, in float32 or better.

    expand_ratio e: every head has e key and e value channels, so the state is `width * e` numbers while the parameters
    stay 4 width^2; e = 1 is the recurrence of HGRN (Qin et al. 2023). None means min(128, width), as in the paper.
    lower_bound b: the least share of a state that outlives a token. In a stack, layer l of n has b = l / n, where the
    paper's learned, growing bounds start: lower layers look near, upper layers far.
    """

    def __init__(self, in_width: int, width: int, *, expand_ratio: int | None = None, lower_bound: float = 0.0) -> None:
        super().__init__(in_width, width)
        self.expand_ratio = min(128, width) if expand_ratio is None else expand_ratio
        if width % self.expand_ratio:
            raise ConfigError(f"hgrn2: width {width} is no multiple of expand_ratio {self.expand_ratio}; change either")
        if not 0 <= lower_bound < 1:
            raise ConfigError(f"hgrn2: lower_bound is a share, at least 0 and below 1, not {lower_bound}")
        self.lower_bound = lower_bound
        self.q_proj = nn.Linear(in_width, width, bias=False)
        self.f_proj = nn.Linear(in_width, width, bias=False)
        self.i_proj = nn.Linear(in_width, width, bias=False)
        self.g_norm = RMSNorm(width)
        self.o_proj = nn.Linear(width, width, bias=False)

    @classmethod
    def defaults(cls, layer: int, depth: int) -> dict[str, Any]:
        return {"lower_bound": layer / depth}

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        heads, size = self.width // self.expand_ratio, self.expand_ratio
        return (torch.zeros(batch, heads, size, size, device=device, dtype=scan_dtype(dtype)),)

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        (memory,) = self.initial_state(len(x), x.device, x.dtype) if state is None else state
        q, f, i = (proj(x).unflatten(-1, (-1, self.expand_ratio)) for proj in (self.q_proj, self.f_proj, self.i_proj))
        with torch.autocast(x.device.type, enabled=False):
            y, memory = self._recurrence(F.silu(q), f, i, memory)
            y = self.g_norm(y.flatten(2)).to(x.dtype)
        return self.o_proj(y), (memory,)

    def _recurrence(
        self,
        q: Float[Tensor, "batch length heads key"],
        f: Float[Tensor, "batch length heads key"],
        i: Float[Tensor, "batch length heads key"],
        memory: Float[Tensor, "batch heads key key"],
    ) -> tuple[Float[Tensor, "batch length heads key"], Float[Tensor, "batch heads key key"]]:
        wide = scan_dtype(f.dtype)
        k, log_decay = self._gate(f.to(wide))
        if q.is_cuda and kernels.supports(q.dtype) and (kernel := kernels.load(KERNEL)):
            return kernel(q, k.to(q.dtype), i, gk=log_decay, scale=1.0, initial_state=memory, output_final_state=True)
        return gated_linear_attention(q.to(wide), k, i.to(wide), log_decay, memory)

    def _gate(self, f: Float[Tensor, "*batch"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """1 - f_t and log f_t, neither by way of the other where that would cancel to 0 or -inf."""
        k = (1 - self.lower_bound) * torch.sigmoid(-f)
        return k, (torch.log1p(-k) if self.lower_bound else F.logsigmoid(f))
