"""Decoders of stacked convolutions: from a grid of prompt features to a grid of adapter tokens, in one pass.

`HyperConvLayer` is the layer of Drag-and-Drop LLMs (Liang et al. 2025, arXiv 2506.16406): N prompts become the tokens,
their H x W features the numbers in each token, by convolutions that take each of the three axes as channels in turn.
`PlainBlock` is the simpler block of one branch that `ThreeBlockDecoder` is made of. Nothing here is random: a decoder
is a regressor, and what it gives for a condition that does not tell tasks apart is the mean of their adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.errors import ConfigError

Grid = tuple[int, int, int]
"""(N, H, W): prompts or tokens, rows, columns."""

PUBLISHED: dict[str, tuple[int, tuple[Grid, ...]]] = {
    "0.5B common sense": (
        9,
        (
            (128, 384, 384), (128, 200, 300), (128, 100, 256), (256, 50, 200), (512, 50, 200), (1024, 25, 200),
            (1024, 10, 200), (2048, 10, 200), (4296, 10, 130),
        ),
    ),
    "1.5B coding": (
        11,
        (
            (16, 1000, 384), (64, 500, 300), (256, 125, 300), (512, 64, 300), (1024, 64, 256), (2048, 32, 256),
            (4508, 18, 258),
        ),
    ),
    "1.5B math": (
        11,
        (
            (32, 1000, 384), (64, 500, 300), (256, 500, 300), (512, 125, 300), (1024, 64, 256), (2048, 32, 256),
            (4508, 18, 258),
        ),
    ),
    "7B": (
        11,
        (
            (16, 1000, 384), (64, 500, 384), (256, 125, 400), (512, 64, 400), (1024, 64, 400), (2048, 32, 400),
            (4928, 18, 514),
        ),
    ),
    "3B vision": (
        11,
        ((16, 1536, 384), (64, 500, 300), (256, 125, 300), (1024, 64, 300), (2048, 16, 256), (7308, 18, 258)),
    ),
}  # fmt: skip
"""Kernel and grids of the published decoders; tokens of their grids have two rows and columns more, for scales."""


@dataclass(frozen=True)
class DecoderCost:
    """Parameters, and the floating-point operations of one forward pass on one sample, two per multiply-add."""

    parameters: int
    flops: int

    def __add__(self, other: "DecoderCost") -> "DecoderCost":
        return DecoderCost(self.parameters + other.parameters, self.flops + other.flops)


def layer_cost(source: Grid, target: Grid, kernel: int) -> DecoderCost:
    """What one `HyperConvLayer` takes; operations of the convolutions alone."""
    (n, h, w), (tokens, rows, columns) = source, target
    kernels = 2 * w * columns + 2 * h * rows + n * tokens
    rest = 2 * h * w + rows * columns + tokens  # norm, bias of the sum, bias of the last convolution
    width_first = w * columns * n * h + h * rows * n * columns
    height_first = h * rows * n * w + w * columns * n * rows
    return DecoderCost(
        kernel**2 * kernels + rest, 2 * kernel**2 * (width_first + height_first + n * tokens * rows * columns)
    )


def cascade_cost(grids: Sequence[Grid], kernel: int) -> DecoderCost:
    """What a `HyperConvDecoder` takes."""
    return sum((layer_cost(a, b, kernel) for a, b in pairwise(grids)), DecoderCost(0, 0))


class AxisConvolution(nn.Module):
    """A convolution of `[B, N, H, W]` that takes one of the last three axes as channels and slides over the others."""

    ORDERS = {"width": (0, 3, 2, 1), "height": (0, 2, 1, 3), "tokens": None}  # its own inverse, each

    def __init__(self, axis: str, inputs: int, outputs: int, kernel: int, bias: bool = False):
        super().__init__()
        self.order = self.ORDERS[axis]
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        if self.order is None:  # blocks end here: hooks of sharded training want no view, as of a permutation
            return self.convolution(x)
        return self.convolution(x.permute(self.order)).permute(self.order)


class HyperConvLayer(nn.Module):
    """(N, H, W) -> (n, h, w), as published.

    Layer norm over (H, W); the sum of two branches, width then height, and height then width through tanh, with a bias
    `[h, w]`, divided by three; then the convolution over tokens.

    Raises:
        ConfigError: the kernel is even, so that it has no centre.
    """

    def __init__(self, source: Grid, target: Grid, kernel: int):
        super().__init__()
        _check_kernel(kernel)
        (n, h, w), (tokens, rows, columns) = source, target
        self.norm = nn.LayerNorm((h, w))
        self.width_first = nn.Sequential(
            AxisConvolution("width", w, columns, kernel), AxisConvolution("height", h, rows, kernel)
        )
        self.height_first = nn.Sequential(
            AxisConvolution("height", h, rows, kernel), AxisConvolution("width", w, columns, kernel), nn.Tanh()
        )
        self.bias = nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) / (rows * columns))
        self.tokens = AxisConvolution("tokens", n, tokens, kernel, bias=True)

    def forward(self, x: Float[Tensor, "B N H W"]) -> Float[Tensor, "B n h w"]:
        x = self.norm(x)
        return self.tokens((self.width_first(x) + self.height_first(x) + self.bias) / 3)


class HyperConvDecoder(nn.Sequential):
    """A cascade of `HyperConvLayer`: `[B, *grids[0]] -> [B, *grids[-1]]`.

    Raises:
        ConfigError: there are fewer than two grids, or the kernel is even.
    """

    def __init__(self, grids: Sequence[Grid], kernel: int):
        if len(grids) < 2:
            raise ConfigError(f"a decoder leads from one grid to another, got {list(grids)}")
        super().__init__(*(HyperConvLayer(a, b, kernel) for a, b in pairwise(grids)))


class PlainBlock(nn.Sequential):
    """(N, H, W) -> (n, h, w): norm, then the convolutions over width, height and tokens, with a GELU before the last.

    Raises:
        ConfigError: the kernel is even.
    """

    def __init__(self, source: Grid, target: Grid, kernel: int):
        _check_kernel(kernel)
        (n, h, w), (tokens, rows, columns) = source, target
        super().__init__(
            nn.LayerNorm((h, w)),
            AxisConvolution("width", w, columns, kernel),
            AxisConvolution("height", h, rows, kernel),
            nn.GELU(),
            AxisConvolution("tokens", n, tokens, kernel, bias=True),
        )


class ThreeBlockDecoder(nn.Module):
    """One pooled sentence `[B, features]` -> tokens `[B, *target]`: a projection, an expander, three plain blocks.

    The expander gives every one of `sequence` places a scale and a shift of its own; without the scales, the place and
    the sentence would only add up.
    """

    def __init__(self, features: int, sequence: int, target: Grid, kernel: int):
        super().__init__()
        tokens, rows, columns = target
        self.project = nn.Linear(features, columns)
        self.scale = nn.Parameter(torch.randn(sequence, 1, columns))
        self.shift = nn.Parameter(torch.randn(sequence, 1, columns))
        middle = max(1, round((sequence * tokens) ** 0.5))
        grids = ((sequence, 1, columns), (sequence, rows, columns), (middle, rows, columns), target)
        self.blocks = nn.Sequential(*(PlainBlock(a, b, kernel) for a, b in pairwise(grids)))

    def forward(self, sentence: Float[Tensor, "B features"]) -> Float[Tensor, "B n h w"]:
        return self.blocks(self.project(sentence)[:, None, None] * self.scale + self.shift)


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"generator.kernel={kernel}: a convolution that keeps sizes has an odd kernel")
