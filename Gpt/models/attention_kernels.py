"""Triton kernels of `Gpt.models.attention`: one program holds all tokens of one head, nothing is stored between steps.

    P = softmax(Q K^T / sqrt(width)),  O = P V                                        (Vaswani et al. 2017, eq. 1)
    dV = P^T dO,  dS = P * (dO V^T - rowsum(P * dO V^T)),  dQ = dS K / sqrt(width),  dK = dS^T Q / sqrt(width)

Flash attention covers such a head with tiles of 64 tokens or more, nearly all of them padding, and its gradient takes
three kernels. Here a tile is the next power of two both ways, the gradient forms P anew, and every tensor passes memory
once.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = 16  # rows that a tensor core multiplies


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """`out` [B, H, T, W] from queries, keys and values of that shape."""
    _attend[(q.shape[0] * q.shape[1],)](q, k, v, out, *_strides(q, k, v, out), **_sizes(q))


def attend_gradient(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, by_q: Tensor, by_k: Tensor, by_v: Tensor
) -> None:
    """`by_q`, `by_k` and `by_v` [B, H, T, W] from the gradient of that shape by the output."""
    tensors = gradient, q, k, v, by_q, by_k, by_v
    _attend_gradient[(q.shape[0] * q.shape[1],)](*tensors, *_strides(*tensors), **_sizes(q))


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch, head and token, tensor by tensor; a token's numbers are neighbours."""
    assert all(t.stride(3) == 1 for t in tensors)
    return [stride for t in tensors for stride in t.stride()[:3]]


def _sizes(q: Tensor) -> dict:
    _, heads, tokens, width = q.shape
    block = max(triton.next_power_of_2(tokens), SMALLEST)
    columns = max(triton.next_power_of_2(width), SMALLEST)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {
        "HEADS": heads,
        "TOKENS": tokens,
        "WIDTH": width,
        "BLOCK": block,
        "COLUMNS": columns,
        "SCALE": width**-0.5,
        "PRECISION": precision,
        "num_warps": max(1, block * columns // 2048),
    }


@triton.jit
@no_type_check  # the tests' type checker would wrap the function, and Triton compiles its source
def _tile(start, by_batch, by_head, by_token, HEADS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses [BLOCK, COLUMNS] of this program's head."""
    program = tl.program_id(0).to(tl.int64)
    start += program // HEADS * by_batch + program % HEADS * by_head
    return start + tl.arange(0, BLOCK)[:, None] * by_token + tl.arange(0, COLUMNS)[None, :]


@triton.jit
@no_type_check
def _probabilities(q, k, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """P [BLOCK, BLOCK] in float32, with zeros in the columns beyond the tokens."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    logits = tl.where(tl.arange(0, BLOCK)[None, :] < TOKENS, logits, -float("inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
@no_type_check
def _attend(
    q,
    k,
    v,
    out,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    real = (tl.arange(0, BLOCK)[:, None] < TOKENS) & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    queries = tl.load(_tile(q, q_b, q_h, q_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    keys = tl.load(_tile(k, k_b, k_h, k_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    values = tl.load(_tile(v, v_b, v_h, v_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    p = _probabilities(queries, keys, TOKENS, BLOCK, SCALE, PRECISION).to(values.dtype)
    mixed = tl.dot(p, values, input_precision=PRECISION)
    tl.store(_tile(out, out_b, out_h, out_t, HEADS, BLOCK, COLUMNS), mixed.to(values.dtype), real)


@triton.jit
@no_type_check
def _attend_gradient(
    gradient,
    q,
    k,
    v,
    by_q,
    by_k,
    by_v,
    gradient_b,
    gradient_h,
    gradient_t,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    by_q_b,
    by_q_h,
    by_q_t,
    by_k_b,
    by_k_h,
    by_k_t,
    by_v_b,
    by_v_h,
    by_v_t,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    real = (tl.arange(0, BLOCK)[:, None] < TOKENS) & (tl.arange(0, COLUMNS)[None, :] < WIDTH)
    queries = tl.load(_tile(q, q_b, q_h, q_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    keys = tl.load(_tile(k, k_b, k_h, k_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    values = tl.load(_tile(v, v_b, v_h, v_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    by_mixed = tl.load(_tile(gradient, gradient_b, gradient_h, gradient_t, HEADS, BLOCK, COLUMNS), real, 0.0)
    p = _probabilities(queries, keys, TOKENS, BLOCK, SCALE, PRECISION)
    by_values = tl.dot(tl.trans(p.to(values.dtype)), by_mixed, input_precision=PRECISION)
    tl.store(_tile(by_v, by_v_b, by_v_h, by_v_t, HEADS, BLOCK, COLUMNS), by_values.to(values.dtype), real)
    by_p = tl.dot(by_mixed, tl.trans(values), input_precision=PRECISION)
    by_logits = p * (by_p - tl.sum(p * by_p, 1)[:, None]) * SCALE
    by_logits = by_logits.to(values.dtype)
    by_queries = tl.dot(by_logits, keys, input_precision=PRECISION)
    tl.store(_tile(by_q, by_q_b, by_q_h, by_q_t, HEADS, BLOCK, COLUMNS), by_queries.to(values.dtype), real)
    by_keys = tl.dot(tl.trans(by_logits), queries, input_precision=PRECISION)
    tl.store(_tile(by_k, by_k_b, by_k_h, by_k_t, HEADS, BLOCK, COLUMNS), by_keys.to(values.dtype), real)
