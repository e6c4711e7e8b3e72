"""The chunked scans against the recurrences that define them, step by step in float64: values and gradients."""

import pytest
import torch
from torch import Tensor

from rpg.backbones.scans import BLOCK, CHUNK, gated_linear_attention, selective_scan, state_space_dual

LENGTHS = [1, BLOCK - 1, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]


def ssd_recurrence(x, log_decay, b, c, state):
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(heads_per_group, dim=2) for t in (b, c))
    ys = []
    for t in range(x.shape[1]):
        state = log_decay[:, t].exp()[..., None, None] * state + x[:, t, :, :, None] * b[:, t, :, None]
        ys.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(ys, dim=1), state


def gla_recurrence(q, k, v, log_decay, state):
    ys = []
    for t in range(q.shape[1]):
        state = log_decay[:, t].exp()[..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        ys.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(ys, dim=1), state


def selective_recurrence(x, dt, a, b, c, state):
    ys = []
    for t in range(x.shape[1]):
        state = (dt[:, t, :, None] * a).exp() * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append((state * c[:, t, None]).sum(-1))
    return torch.stack(ys, dim=1), state


def ssd_inputs(length: int, gate_scale: float) -> list[Tensor]:
    batch, heads, groups, value, key = 2, 4, 2, 3, 5
    rng = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, heads, value, generator=rng)
    log_decay = -torch.nn.functional.softplus(gate_scale * torch.randn(batch, length, heads, generator=rng))
    b, c = torch.randn(2, batch, length, groups, key, generator=rng)
    return [x, log_decay, b, c, torch.randn(batch, heads, value, key, generator=rng)]


def gla_inputs(length: int, gate_scale: float) -> list[Tensor]:
    batch, heads, key, value = 2, 2, 5, 3
    rng = torch.Generator().manual_seed(length)
    q, k, gate = torch.randn(3, batch, length, heads, key, generator=rng)
    v = torch.randn(batch, length, heads, value, generator=rng)
    log_decay = torch.nn.functional.logsigmoid(gate_scale * gate)
    return [q, k, v, log_decay, torch.randn(batch, heads, key, value, generator=rng)]


def selective_inputs(length: int, gate_scale: float) -> list[Tensor]:
    batch, channels, key = 2, 6, 4
    rng = torch.Generator().manual_seed(length)
    x, gate = torch.randn(2, batch, length, channels, generator=rng)
    b, c = torch.randn(2, batch, length, key, generator=rng)
    dt = torch.nn.functional.softplus(gate_scale * gate)
    a = -torch.rand(channels, key, generator=rng) - 0.1
    return [x, dt, a, b, c, torch.randn(batch, channels, key, generator=rng)]


SCANS = {
    "ssd": (state_space_dual, ssd_recurrence, ssd_inputs),
    "gla": (gated_linear_attention, gla_recurrence, gla_inputs),
    "selective": (selective_scan, selective_recurrence, selective_inputs),
}


def outputs_and_gradients(scan, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    y, state = scan(*inputs)
    rng = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, generator=rng).to(dtype)).sum() for t in (y, state))
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close_in_norm(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-12)
        assert error < tolerance, f"tensor {i}: relative error {error:.1e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCANS)
def test_equals_float64_recurrence(name, length):
    scan, recurrence, make = SCANS[name]
    inputs = make(length, 1.0)
    expected = outputs_and_gradients(recurrence, inputs, torch.float64)
    assert_close_in_norm(outputs_and_gradients(scan, inputs, torch.float64), expected, 1e-12)
    assert_close_in_norm(outputs_and_gradients(scan, inputs, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("gate_scale", [8.0, 100.0])
@pytest.mark.parametrize("name", SCANS)
def test_gates_that_open_and_shut_completely(name, gate_scale):
    # Log-decays down to -300 a step: exp(-sum) over a chunk is inf even in float64.
    scan, recurrence, make = SCANS[name]
    inputs = make(2 * CHUNK, gate_scale)
    expected = outputs_and_gradients(recurrence, inputs, torch.float64)
    actual = outputs_and_gradients(scan, inputs, torch.float32)
    assert all(t.isfinite().all() for t in actual)
    assert_close_in_norm(outputs_and_gradients(scan, inputs, torch.float64), expected, 1e-11)
    assert_close_in_norm(actual, expected, 1e-3)


@pytest.mark.parametrize("cut", [1, 30, CHUNK, 100])
@pytest.mark.parametrize("name", SCANS)
def test_continues_from_its_state(name, cut):
    scan, _, make = SCANS[name]
    *inputs, state = (t.double() for t in make(2 * CHUNK + 3, 1.0))
    whole, last = scan(*inputs, state)
    parts = []
    for piece in (slice(None, cut), slice(cut, None)):
        y, state = scan(*(t[:, piece] if t.ndim > 2 else t for t in inputs), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_scalar_gate_makes_gated_linear_attention_a_state_space_dual():
    x, log_decay, b, c, state = (t.double() for t in ssd_inputs(100, 1.0))
    groups = [t.repeat_interleave(2, dim=2) for t in (c, b)]
    y, last = gated_linear_attention(*groups, x, log_decay[..., None].expand(-1, -1, -1, 5), state.mT)
    expected, expected_last = state_space_dual(x, log_decay, b, c, state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last.mT, expected_last)


def test_decay_of_one_accumulates_and_of_zero_forgets():
    q, k, v, _, state = (t.double() for t in gla_inputs(70, 1.0))
    kept, _ = gated_linear_attention(q, k, v, torch.zeros_like(q), torch.zeros_like(state))
    sums = torch.einsum("blhk,blhv->blhkv", k, v).cumsum(1)
    torch.testing.assert_close(kept, torch.einsum("blhk,blhkv->blhv", q, sums))
    forgotten, _ = gated_linear_attention(q, k, v, torch.full_like(q, -1e4), state)
    torch.testing.assert_close(forgotten, (q * k).sum(-1, keepdim=True) * v)
