"""The GPU kernels, on a GPU where there is one, and in Triton's interpreter: NumPy in its place."""

import pytest
import torch
import torch.nn.functional as F

from Gpt.seeds import rng


@pytest.fixture(scope="module")
def kernels(triton_kernels):
    """The module and the device that it runs on."""
    return triton_kernels("Gpt.population.convolution_kernels")


def channels_last(maps):
    return maps.movedim(2, -1).contiguous().movedim(-1, 2)


def contiguous(maps):
    return maps.contiguous()


CASES = {  # networks, examples, channels, maps, size, taps, stride, padding, shared images, layout, precision
    "first layer": (2, 3, 3, 5, (8, 7), (3, 3), (2, 2), (1, 1), False, channels_last, torch.float32),
    "second layer, half": (2, 3, 16, 20, (6, 6), (3, 3), (1, 1), (1, 1), False, channels_last, torch.float16),
    "shared images": (3, 2, 5, 4, (7, 9), (2, 3), (1, 2), (0, 2), True, contiguous, torch.float32),
    "a wide window": (2, 3, 3, 5, (8, 7), (5, 4), (1, 2), (2, 1), False, channels_last, torch.float32),
    "several blocks": (1, 9, 70, 66, (4, 4), (1, 1), (1, 1), (0, 0), False, contiguous, torch.float32),
    "stride beyond the taps": (2, 2, 4, 3, (9, 9), (2, 2), (3, 3), (1, 0), False, channels_last, torch.float32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_match_double_precision(kernels, case):
    module, device = kernels
    networks, examples, channels, maps, size, taps, stride, padding, shared, layout, dtype = case
    draw = rng("cpu", 0)
    images = torch.randn(1 if shared else networks, examples, channels, *size, generator=draw).to(device, dtype)
    weights = torch.randn(networks, maps, channels, *taps, generator=draw).to(device, dtype)
    x, w = images.double().requires_grad_(), weights.double().requires_grad_()
    inputs = x.expand(networks, *x.shape[1:])
    expected = torch.stack([F.conv2d(i, k, None, stride, padding) for i, k in zip(inputs, w, strict=True)])
    gradient = torch.randn(expected.shape, generator=draw).to(device, dtype)
    by_images, by_kernels = torch.autograd.grad(expected, (x, w), gradient.double())
    tolerance = {"rtol": 1e-5, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-2}

    out = layout(torch.full_like(expected, torch.nan, dtype=dtype))
    module.convolve(layout(images), weights, out, stride, padding)
    torch.testing.assert_close(out.double(), expected.detach(), **tolerance)
    out = torch.full_like(weights, torch.nan)
    module.correlate(layout(images), layout(gradient), out, stride, padding)
    torch.testing.assert_close(out.double(), by_kernels, **tolerance)
    if not shared:
        out = layout(torch.full_like(images, torch.nan))
        module.convolve_transposed(layout(gradient), weights, out, stride, padding)
        torch.testing.assert_close(out.double(), by_images, **tolerance)


def test_an_expanded_gradient_needs_no_copy(kernels):
    """What averaging hands back: one number for all pixels, strides of zero."""
    module, device = kernels
    images = torch.randn(2, 3, 4, 5, 5, generator=rng("cpu", 1)).to(device)
    gradient = torch.randn(2, 3, 6, 1, 1, generator=rng("cpu", 2)).to(device).expand(2, 3, 6, 5, 5)
    found, expected = torch.empty(2, 2, 6, 4, 3, 3, device=device).unbind()
    module.correlate(images, gradient, found, (1, 1), (1, 1))
    module.correlate(images, gradient.contiguous(), expected, (1, 1), (1, 1))
    assert torch.equal(found, expected)
