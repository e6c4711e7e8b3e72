"""The transformer block of our denoisers: attention over all tokens, modulated by what is asked for (adaLN-zero)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.models.attention import attend


class Block(nn.Module):
    """Pre-norm attention and MLP, modulated by the condition; gates start at zero: the block starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Float[Tensor, "B T width"], condition: Float[Tensor, "B width"]) -> Float[Tensor, "B T width"]:
        parts = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self._attend(norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.down(F.gelu(self.up(norm(x) * (1 + scale_m) + shift_m)))

    def _attend(self, x: Float[Tensor, "B T width"]) -> Float[Tensor, "B T width"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = norm(q), norm(k)  # keeps logits bounded at any width (Dehghani et al. 2023)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def matrices(block: nn.Module) -> list[nn.Parameter]:
    """Weights of all linear layers of a block but those of modulations: what Muon may train."""
    return [p for name, p in block.named_parameters() if p.dim() == 2 and "modulation" not in name]


def norm(x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    return F.layer_norm(x, x.shape[-1:])
