"""Attention of few tokens is attention: the formula in double precision, whichever way it is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import Gpt.models
from Gpt.models import attention
from Gpt.seeds import rng

SHAPES = {"one neuron token a head": (2, 3, 1, 16), "a dozen": (3, 2, 11, 32), "a full tile": (1, 2, 32, 16)}
SHAPES["a width between"] = (1, 2, 6, 20)
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 4e-3, "atol": 4e-3}}


@pytest.fixture
def device(triton_kernels, monkeypatch):
    """Where the operators run: with the kernels, which a CPU interprets."""
    kernels, device = triton_kernels("Gpt.models.attention_kernels")
    monkeypatch.setattr(Gpt.models, "attention_kernels", kernels, raising=False)
    return device


def draw(shape, count, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, generator=rng("cpu", i)).to(device, dtype) for i in range(count)]


def expected_of(q, k, v, gradient):
    """Result and gradients in double precision."""
    inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    result = F.scaled_dot_product_attention(*inputs)
    return result.detach(), *torch.autograd.grad(result, inputs, gradient.cpu().double())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_match_double_precision(device, shape, dtype):
    *inputs, gradient = draw(shape, 4, dtype, device)
    inputs = [x.requires_grad_() for x in inputs]
    result = attention.attention_of_few(*inputs)
    found = result.detach(), *torch.autograd.grad(result, inputs, gradient)
    for ours, reference in zip(found, expected_of(*inputs, gradient), strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, **TOLERANCES[dtype])


def test_any_layout_is_read(device):
    """Slices of one projection; a gradient whose numbers lie apart, or are one number."""
    batch, heads, tokens, width = shape = 2, 2, 5, 16
    packed = draw((batch, tokens, 3, heads, width), 1, device=device)[0].requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    result = attention.attention_of_few(q, k, v)
    apart = draw((batch, width, heads, tokens), 1, device=device)[0].permute(0, 2, 3, 1)
    for gradient in (apart, torch.ones((), device=device).expand(shape)):
        (found,) = torch.autograd.grad(result, packed, gradient, retain_graph=True)
        _, *expected = expected_of(q, k, v, gradient)
        for ours, reference in zip(found.permute(2, 0, 3, 1, 4), expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), reference, **TOLERANCES[torch.float32])


def test_large_logits_stay_finite(device):
    q, k, v = draw((1, 1, 7, 16), 3, device=device)
    result = attention.attention_of_few(1e4 * q, 1e4 * k, v)
    assert result.isfinite().all()
    best = (q @ k.mT).argmax(-1)
    torch.testing.assert_close(result, v.gather(2, best[..., None].expand_as(v)))


def test_operators_are_described_to_the_compiler(device):
    q, k, v, gradient = draw((2, 2, 3, 16), 4, device=device)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(attention.attention_of_few, (q, k, v), test_utils=checks)
    torch.library.opcheck(attention.attention_of_few_gradient, (gradient, q, k, v), test_utils=checks)


def test_arithmetic_is_counted_as_that_of_the_library(device):
    q, k, v = (x.requires_grad_() for x in draw((2, 2, 3, 16), 3, device=device))
    counts = []
    for attend in (attention.attention_of_few, lambda q, k, v: (q @ k.mT).softmax(-1) @ v):
        with FlopCounterMode(display=False) as counter:
            forward = attend(q, k, v)
            counts.append(counter.get_total_flops())
            forward.sum().backward()
        counts.append(counter.get_total_flops())
    few, few_with_gradient, formula, formula_with_gradient = counts
    assert few == formula
    assert few_with_gradient == formula_with_gradient + formula / 2  # the gradient forms the logits anew


@pytest.mark.parametrize("tokens", [5, attention.FEW_ON_CPU + 1])
def test_any_number_of_tokens(tokens):
    *inputs, gradient = draw((1, 2, tokens, 16), 4)
    torch.testing.assert_close(
        attention.attend(*inputs).double(), expected_of(*inputs, gradient)[0], **TOLERANCES[torch.float32]
    )


def test_autocast_decides_the_precision():
    q, k, v = draw((1, 2, 5, 16), 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.attend(q, k, v).dtype == torch.bfloat16
    assert attention.attend(q, k, v).dtype == torch.float32
