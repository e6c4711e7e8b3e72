"""Attention of every token to every token, for the dozen tokens of a small network.

Libraries tile for thousands of tokens: on a GPU a head of 11 tokens costs them as much as one of 64, a third of a
training step. Where tokens are few, a GPU runs `Gpt.models.attention_kernels`, a CPU the formula; else torch chooses.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from Gpt.population.convolution import accelerated

FEW_ON_CPU = 128  # tokens up to which torch's fused CPU kernel takes longer than the formula, up to three times
FEW_ON_GPU = 64
WIDEST_HEAD = 128  # of which a program holds all tokens in registers


def attend(
    q: Float[Tensor, "B H T width"], k: Float[Tensor, "B H T width"], v: Float[Tensor, "B H T width"]
) -> Float[Tensor, "B H T width"]:
    """Softmax attention without mask; under autocast in its precision."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    tokens, width = q.shape[-2:]
    if kind == "cpu" and tokens <= FEW_ON_CPU:
        return (q @ k.mT * width**-0.5).softmax(-1).to(v.dtype) @ v
    few = tokens <= FEW_ON_GPU and width <= WIDEST_HEAD
    if few and q.dtype in (torch.float16, torch.bfloat16) and accelerated(q.device):
        return attention_of_few(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("gpt_weights::attention_of_few", mutates_args=())
def attention_of_few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernels' attention, `[B, H, T, width]` each; the result has a token's heads side by side in memory."""
    from Gpt.models import attention_kernels

    out = _heads_side_by_side(q)
    with torch.cuda.device_of(q):
        attention_kernels.attend(_readable(q), _readable(k), _readable(v), out)
    return out


@torch.library.custom_op("gpt_weights::attention_of_few_gradient", mutates_args=())
def attention_of_few_gradient(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_of_few` by queries, keys and values."""
    from Gpt.models import attention_kernels

    found = _heads_side_by_side(q), _heads_side_by_side(k), _heads_side_by_side(v)
    with torch.cuda.device_of(q):
        attention_kernels.attend_gradient(_readable(gradient), _readable(q), _readable(k), _readable(v), *found)
    return found


@attention_of_few.register_fake
def _(q, k, v):
    return _heads_side_by_side(q)


@attention_of_few_gradient.register_fake
def _(gradient, q, k, v):
    return _heads_side_by_side(q), _heads_side_by_side(k), _heads_side_by_side(v)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return attention_of_few_gradient(gradient, *ctx.saved_tensors)


attention_of_few.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.gpt_weights.attention_of_few)
def _(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.gpt_weights.attention_of_few_gradient)
def _(gradient, q, k, v, *_, **__):
    return sdpa_backward_flop_count(gradient, q, k, v)


def _heads_side_by_side(like: Tensor) -> Tensor:
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """The same, with the numbers of a token side by side."""
    return x if x.stride(3) == 1 else x.contiguous()
