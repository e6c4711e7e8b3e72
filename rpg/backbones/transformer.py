"""Multi-head softmax attention (Vaswani et al. 2017) with a key-value cache as its state."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt.errors import ConfigError
from rpg.backbones.base import Mixer, State


class Attention(Mixer):
    """softmax(q k^T / sqrt(width / heads)) v; with `causal`, token t attends to tokens 0 ... t alone.

    The state is the keys and the values of all tokens so far, each `[B, heads, T, width / heads]`.
    """

    mlp_ratio = 8 / 3  # three matrices of 8/3 width hold what two of 4 width do
    sequential = False

    def __init__(self, in_width: int, width: int, *, heads: int = 8, causal: bool = True) -> None:
        super().__init__(in_width, width)
        if width % heads:
            raise ConfigError(f"transformer: width {width} is no multiple of heads = {heads}; change one of them")
        self.heads = heads
        self.causal = causal
        self.qkv_proj = nn.Linear(in_width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        shape = (batch, self.heads, 0, self.width // self.heads)
        return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def forward(
        self, x: Float[Tensor, "batch length in_width"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch length width"], State]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if state is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            k, v = (torch.cat([past.to(new.dtype), new], dim=2) for past, new in zip(state, (k, v), strict=True))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(q.shape[2], k.shape[2], x.device))
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v)


def _visible(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which keys each of the last `queries` tokens may attend to."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
