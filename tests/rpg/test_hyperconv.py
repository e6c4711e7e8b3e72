"""The hyper-convolutional decoder against explicit loops, and its calculator against the published sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from Gpt.errors import ConfigError
from rpg.hyperconv import (
    PUBLISHED,
    DecoderCost,
    HyperConvDecoder,
    HyperConvLayer,
    ThreeBlockDecoder,
    cascade_cost,
    layer_cost,
)

SOURCE, TARGET, KERNEL = (3, 4, 5), (2, 3, 6), 3


def layer_by_loops(layer, x):
    """The published layer for one sample [N, H, W], every index written out."""
    norm = (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), unbiased=False, keepdim=True) + layer.norm.eps).sqrt()
    x = norm * layer.norm.weight + layer.norm.bias

    def over_width(x, kernel):  # channels W, spatial (H, N)
        n, h, _ = x.shape
        y = torch.zeros(n, h, len(kernel), dtype=x.dtype)
        for a, b, out in [(a, b, o) for a in range(n) for b in range(h) for o in range(len(kernel))]:
            for i, j in offsets(b, a, h, n):
                y[a, b, out] += x[a + j, b + i] @ kernel[out, :, 1 + i, 1 + j]
        return y

    def over_height(x, kernel):  # channels H, spatial (N, W)
        n, _, w = x.shape
        y = torch.zeros(n, len(kernel), w, dtype=x.dtype)
        for a, c, out in [(a, c, o) for a in range(n) for c in range(w) for o in range(len(kernel))]:
            for i, j in offsets(a, c, n, w):
                y[a, out, c] += x[a + i, :, c + j] @ kernel[out, :, 1 + i, 1 + j]
        return y

    def over_tokens(x, kernel, bias):  # channels N, spatial (H, W)
        _, h, w = x.shape
        y = bias[:, None, None].expand(-1, h, w).clone()
        for b, c, out in [(b, c, o) for b in range(h) for c in range(w) for o in range(len(kernel))]:
            for i, j in offsets(b, c, h, w):
                y[out, b, c] += x[:, b + i, c + j] @ kernel[out, :, 1 + i, 1 + j]
        return y

    def offsets(row, column, rows, columns):
        moves = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return [(i, j) for i, j in moves if 0 <= row + i < rows and 0 <= column + j < columns]

    width, height = (axis.convolution.weight for axis in layer.width_first)
    first = over_height(over_width(x, width), height)
    height, width = (axis.convolution.weight for axis in list(layer.height_first)[:2])
    second = over_width(over_height(x, height), width).tanh()
    last = layer.tokens.convolution
    return over_tokens((first + second + layer.bias) / 3, last.weight, last.bias)


@torch.no_grad()
def test_layer_is_the_published_formula():
    torch.manual_seed(0)
    layer = HyperConvLayer(SOURCE, TARGET, KERNEL).double()
    layer.norm.weight.normal_()
    layer.norm.bias.normal_()
    x = torch.randn(2, *SOURCE, dtype=torch.float64)
    expected = torch.stack([layer_by_loops(layer, sample) for sample in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "billions", "teraflops"),
    [
        ("0.5B common sense", 1.11, 8.3),
        ("1.5B coding", 1.72, 27),
        ("1.5B math", 1.78, 38),
        ("7B", 1.94, 53),
        ("3B vision", 2.41, 29),
    ],
)
def test_calculator_gives_the_published_sizes(name, billions, teraflops):
    kernel, grids = PUBLISHED[name]
    cost = cascade_cost(grids, kernel)
    assert cost.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert cost.flops / 1e12 == pytest.approx(teraflops, rel=0.02)


def test_calculator_counts_what_torch_counts():
    decoder = HyperConvDecoder([SOURCE, TARGET, (5, 2, 3)], KERNEL)
    with FlopCounterMode(display=False) as counter:
        decoder(torch.randn(1, *SOURCE))
    counted = DecoderCost(sum(p.numel() for p in decoder.parameters()), counter.get_total_flops())
    assert counted == cascade_cost([SOURCE, TARGET, (5, 2, 3)], KERNEL)
    assert layer_cost(SOURCE, TARGET, 1).parameters == 2 * 5 * 6 + 2 * 4 * 3 + 3 * 2 + 2 * 20 + 18 + 2


def test_a_sentence_becomes_tokens_that_depend_on_it():
    decoder = ThreeBlockDecoder(7, sequence=4, target=(6, 2, 8), kernel=3)
    tokens = decoder(torch.randn(3, 7))
    assert tokens.shape == (3, 6, 2, 8)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_samples_do_not_meet():
    decoder = HyperConvDecoder([SOURCE, TARGET], KERNEL)
    x = torch.randn(3, *SOURCE)
    torch.testing.assert_close(decoder(x)[1:2], decoder(x[1:2]), rtol=1e-5, atol=1e-6)


def test_wrong_sizes_are_told():
    with pytest.raises(ConfigError, match="odd"):
        HyperConvLayer(SOURCE, TARGET, 4)
    with pytest.raises(ConfigError, match="one grid to another"):
        HyperConvDecoder([SOURCE], 3)
