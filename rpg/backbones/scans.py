"""Linear recurrences with a matrix-valued state, in chunks: matrix products inside a chunk, a loop from chunk to chunk.

Every exponential here is of a sum of log-decays over a stretch of time, so its argument is never positive: nothing
overflows, and a gate that shuts completely underflows to the zero that it means. Masked entries become -inf *before*
the exponential, which keeps their gradient 0 instead of inf * 0.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 64
BLOCK = 8


def state_space_dual(
    x: Float[Tensor, "batch length heads value"],
    log_decay: Float[Tensor, "batch length heads"],
    b: Float[Tensor, "batch length groups key"],
    c: Float[Tensor, "batch length groups key"],
    state: Float[Tensor, "batch heads value key"],
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "batch heads value key"]]:
    """S_t = exp(log_decay_t) S_{t-1} + x_t b_t^T and y_t = S_t c_t, one decay per head and step.

    Consecutive heads share the b and c of their group. Gives y and the last S. log_decay must not be positive. This is
    the block decomposition of Dao & Gu 2024, section 6.
    """
    groups, length = b.shape[2], x.shape[1]
    chunk = min(CHUNK, length)
    ragged = -length % chunk
    # A padded step has no input and decay 1: it leaves the state as it is. All chunks at once, but for their states.
    x, b, c = (F.pad(t, (0, 0, 0, 0, 0, ragged)).unflatten(1, (-1, chunk)) for t in (x, b, c))
    log_decay = F.pad(log_decay, (0, 0, 0, ragged)).unflatten(1, (-1, chunk))
    x, log_decay = x.unflatten(3, (groups, -1)), log_decay.unflatten(3, (groups, -1))  # r: heads of a group
    total = log_decay.movedim(2, -1).cumsum(-1)  # [batch, chunks, groups, r, time]: since the chunk began
    scores = torch.einsum("bmign,bmjgn->bmgij", c, b)[:, :, :, None] * _pairwise_decay(total)
    inside = torch.einsum("bmgrij,bmjgrp->bmigrp", scores, x)

    to_end = (total[..., -1:] - total).exp().movedim(-1, 2)[..., None]
    added = torch.einsum("bmjgrp,bmjgn->bmgrpn", x * to_end, b)
    kept = total[..., -1].exp()[..., None, None]
    state, states = state.unflatten(1, (groups, -1)), []
    for kept_, added_ in zip(kept.unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(added_, kept_, state)
    before = torch.einsum("bmign,bmgrpn->bmigrp", c, torch.stack(states, 1))
    y = inside + before * total.exp().movedim(-1, 2)[..., None]
    return y.flatten(1, 2)[:, :length].flatten(2, 3), state.flatten(1, 2)


def _pairwise_decay(total: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time time"]:
    """exp(total_i - total_j) for j <= i, else 0."""
    time = total.shape[-1]
    future = torch.ones(time, time, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()


def gated_linear_attention(
    q: Float[Tensor, "batch length heads key"],
    k: Float[Tensor, "batch length heads key"],
    v: Float[Tensor, "batch length heads value"],
    log_decay: Float[Tensor, "batch length heads key"],
    state: Float[Tensor, "batch heads key value"],
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "batch heads key value"]]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t, one decay per key channel and step.

    Gives y and the last S. log_decay must not be positive. With a decay G per channel the scores exp(G_i - G_j) split
    into exp(G_i) exp(-G_j), for the sake of a matrix product, only as long as both are finite. Hence two levels (Yang
    et al. 2023, arXiv 2312.06635, secondary chunking): a query block meets earlier blocks by way of the decay at its
    own start, and its own block pair by pair.
    """
    length = q.shape[1]
    block = min(BLOCK, length)
    ragged = -length % block
    # A padded step has no key and decay 1: it leaves the state as it is.
    q, k, v, log_decay = (F.pad(t.transpose(1, 2), (0, 0, 0, ragged)) for t in (q, k, v, log_decay))
    outputs = []
    for q_, k_, v_, decay_ in zip(*(t.split(CHUNK, dim=2) for t in (q, k, v, log_decay)), strict=True):
        total = decay_.cumsum(2)  # [batch, heads, time, key]
        inside = _block_scores(q_, k_, total, block) @ v_
        outputs.append(inside + (q_ * total.exp()) @ state)
        end = total[:, :, -1:]
        state = end.exp().mT * state + (k_ * (end - total).exp()).mT @ v_
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2), state


def _block_scores(
    q: Float[Tensor, "batch heads time key"],
    k: Float[Tensor, "batch heads time key"],
    total: Float[Tensor, "batch heads time key"],
    block: int,
) -> Float[Tensor, "batch heads time time"]:
    """sum_c q_ic k_jc exp(total_ic - total_jc) for j <= i, else 0; the time is a multiple of `block`."""
    time = q.shape[2]
    step = torch.arange(time, device=q.device)
    q_blocks, k_blocks, total_blocks = (t.unflatten(2, (-1, block)) for t in (q, k, total))

    start = F.pad(total_blocks[:, :, :-1, -1], (0, 0, 1, 0))  # log-decay up to each block, without its first step
    not_before = step >= step[::block, None]  # [blocks, time]
    from_start = q_blocks * (total_blocks - start[..., None, :]).exp()
    to_start = (start[..., None, :] - total[:, :, None]).masked_fill(not_before[..., None], -torch.inf).exp()
    earlier = (from_start @ (k[:, :, None] * to_start).mT).flatten(2, 3)

    between = total_blocks[..., :, None, :] - total_blocks[..., None, :, :]  # [batch, heads, blocks, block, block, key]
    future = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
    decay = between.masked_fill(future[..., None], -torch.inf).exp()
    own = (q_blocks[..., :, None, :] * k_blocks[..., None, :, :] * decay).sum(-1)
    same_block = step[:, None] // block == step // block
    return torch.where(same_block, own.flatten(2, 3).repeat(1, 1, 1, time // block), earlier)


def selective_scan(
    x: Float[Tensor, "batch length channels"],
    dt: Float[Tensor, "batch length channels"],
    a: Float[Tensor, "channels key"],
    b: Float[Tensor, "batch length key"],
    c: Float[Tensor, "batch length key"],
    state: Float[Tensor, "batch channels key"],
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels key"]]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T and y_t = h_t c_t (Gu & Dao 2023, equation 2a, algorithm 2).

    Gives y and the last h. a must not be positive. A decay per channel and key has no matrix-product form, so this
    walks through time; the chunks bound the memory that the discretised inputs take.
    """
    outputs = []
    for x_, dt_, b_, c_ in zip(*(t.split(CHUNK, dim=1) for t in (x, dt, b, c)), strict=True):
        decay = (dt_[..., None] * a).exp()
        inputs = (dt_ * x_)[..., None] * b_[:, :, None]
        states = []
        # unbind, not indexing: the gradient of an index is a zero tensor of full length, at every step
        for decay_t, input_t in zip(decay.unbind(1), inputs.unbind(1), strict=True):
            state = torch.addcmul(input_t, decay_t, state)
            states.append(state)
        outputs.append(torch.einsum("btdn,btn->btd", torch.stack(states, dim=1), c_))
    return torch.cat(outputs, dim=1), state
