"""Triton kernels of `Gpt.population.convolution`: implicit matrix products, one network per program.

A convolution of a small network is a product of a tall, narrow matrix (one row per output pixel and example, one column
per tap and channel) with a tiny one. No such matrix is ever stored: a program loops over the taps, gathers its rows
for one tap from the images, which stay in cache, and multiplies them on tensor cores into float32 sums. Images of few
channels, those of colours, are gathered for several taps at once, in "flat" columns k = (tap, channel): sixteen columns
are the least that tensor cores multiply. Memory is read and written once per image and feature map. Strides are
arguments, so any memory layout is right; channels last is the fast one.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 128  # rows of one tile
WARPS = 4  # of one program
SPLITS = 8  # programs that share one network's sum over pixels, for the gradient by kernels
LEAST_COLUMNS = 16  # of the matrices that tensor cores multiply
FLAT_COLUMNS = 32  # 3 x 3 taps of three channels are 27


def convolve(images: Tensor, kernels: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    """`out` [P, N, O, Y, Z] from images [P or 1, N, C, H, W] and kernels [P, O, C, h, w]."""
    taps = kernels.permute(0, 3, 4, 2, 1).contiguous()
    _launch(images, taps, out, stride, padding, transposed=False)


def convolve_transposed(
    gradient: Tensor, kernels: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> None:
    """`out` [P, N, C, H, W], gradient by images, from the gradient [P, N, O, Y, Z] by feature maps."""
    taps = kernels.permute(0, 3, 4, 1, 2).contiguous()
    _launch(gradient, taps, out, stride, padding, transposed=True)


def correlate(images: Tensor, gradient: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    """`out` [P, O, C, h, w], gradient by kernels, from images [P or 1, N, C, H, W] and gradient [P, N, O, Y, Z]."""
    networks, maps, channels, *taps = out.shape
    partial = out.new_empty(SPLITS, networks, *taps, channels, maps, dtype=torch.float32)
    flat = channels < LEAST_COLUMNS
    row = 3 if taps[1] == 3 and not flat else 1
    columns = channels * taps[0] * taps[1] if flat else channels
    block_c, block_o = _block(columns, FLAT_COLUMNS if flat else 64), _block(maps)
    pixels = gradient.shape[1] * gradient.shape[3] * gradient.shape[4]
    programs = (1 if flat else taps[0] * taps[1] // row) * triton.cdiv(columns, block_c) * triton.cdiv(maps, block_o)
    grid = (networks * SPLITS * programs,)
    _correlate[grid](
        images,
        gradient,
        partial,
        networks,
        pixels,
        *_strides(images, shared=len(images) == 1),
        *_strides(gradient),
        *images.shape[3:],
        *gradient.shape[3:],
        channels,
        maps,
        *taps,
        *stride,
        *padding,
        FLAT=flat,
        ROW=row,
        PRECISION=_precision(images),
        STEPS=triton.cdiv(pixels, SPLITS * PIXELS),
        SPLITS=SPLITS,
        PIXELS=PIXELS,
        BLOCK_C=block_c,
        BLOCK_O=block_o,
        num_warps=WARPS,
    )
    out.copy_(partial.sum(0).permute(0, 4, 3, 1, 2))


def _launch(
    source: Tensor, taps: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int], *, transposed: bool
) -> None:
    networks, height, width, channels, maps = taps.shape
    pixels = out.shape[1] * out.shape[3] * out.shape[4]
    flat = channels < LEAST_COLUMNS and not transposed
    block_c = _block(height * width * channels, FLAT_COLUMNS) if flat else _block(channels)
    block_o = _block(maps)
    grid = (networks * triton.cdiv(pixels, PIXELS) * triton.cdiv(maps, block_o),)
    _convolve[grid](
        source,
        taps,
        out,
        pixels,
        *_strides(source, shared=len(source) == 1),
        *_strides(out),
        *source.shape[3:],
        *out.shape[3:],
        channels,
        maps,
        height,
        width,
        *stride,
        *padding,
        TRANSPOSED=transposed,
        FLAT=flat,
        PRECISION=_precision(source),
        PIXELS=PIXELS,
        BLOCK_C=block_c,
        BLOCK_O=block_o,
        num_warps=WARPS,
    )


def _strides(maps: Tensor, shared: bool = False) -> tuple[int, ...]:
    return (0 if shared else maps.stride(0), *maps.stride()[1:])


def _block(columns: int, most: int = 64) -> int:
    """Columns that a program takes at once."""
    return min(max(triton.next_power_of_2(columns), LEAST_COLUMNS), most)


def _precision(tensor: Tensor) -> str:
    """As torch's own products: three of TensorFloat-32 are one of float32 to rounding, where that is asked for."""
    exact = tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


@triton.jit
@no_type_check  # the tests' type checker would wrap the function, and Triton compiles its source
def _pixel(m, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Example, row and column of pixel m."""
    return m // (HEIGHT * WIDTH), m // WIDTH % HEIGHT, m % WIDTH


@triton.jit
@no_type_check
def _convolve(
    source,
    taps,
    out,
    pixels,
    source_p,
    source_n,
    source_c,
    source_y,
    source_x,
    out_p,
    out_n,
    out_c,
    out_y,
    out_x,
    SOURCE_HEIGHT: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAPS: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    blocks, tiles = (MAPS + BLOCK_O - 1) // BLOCK_O, (pixels + PIXELS - 1) // PIXELS
    tile = tl.program_id(0) // blocks
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    p = (tile // tiles).to(tl.int64)
    m = tile % tiles * PIXELS + tl.arange(0, PIXELS)
    n, y, x = _pixel(m, OUT_HEIGHT, OUT_WIDTH)
    images = source + p * source_p + n * source_n
    taps += p * (TAPS_Y * TAPS_X * CHANNELS * MAPS)
    total = tl.full((PIXELS, BLOCK_O), 0.0, tl.float32)
    if FLAT:
        for first in range(0, TAPS_Y * TAPS_X * CHANNELS, BLOCK_C):
            k = first + tl.arange(0, BLOCK_C)
            valid = k < TAPS_Y * TAPS_X * CHANNELS
            row, column = y * STRIDE_Y - PADDING_Y, x * STRIDE_X - PADDING_X
            a = _flat(images, m < pixels, row, column, k, source_c, source_y, source_x,
                      SOURCE_HEIGHT, SOURCE_WIDTH, CHANNELS, TAPS_Y, TAPS_X)  # fmt: skip
            b = tl.load(taps + k[:, None] * MAPS + o[None, :], valid[:, None] & (o < MAPS)[None, :], 0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        for tap in range(TAPS_Y * TAPS_X):
            i, j = tap // TAPS_X, tap % TAPS_X
            if TRANSPOSED:
                up, left = y + PADDING_Y - i, x + PADDING_X - j
                row, column = up // STRIDE_Y, left // STRIDE_X
                inside = (m < pixels) & (up >= 0) & (up % STRIDE_Y == 0) & (left >= 0) & (left % STRIDE_X == 0)
            else:
                row, column = y * STRIDE_Y - PADDING_Y + i, x * STRIDE_X - PADDING_X + j
                inside = (m < pixels) & (row >= 0) & (column >= 0)
            inside &= (row < SOURCE_HEIGHT) & (column < SOURCE_WIDTH)
            window = images + row * source_y + column * source_x
            for first in range(0, CHANNELS, BLOCK_C):
                c = first + tl.arange(0, BLOCK_C)
                a = tl.load(window[:, None] + c[None, :] * source_c, inside[:, None] & (c < CHANNELS)[None, :], 0.0)
                b = tl.load(
                    taps + (tap * CHANNELS + c[:, None]) * MAPS + o[None, :],
                    (c < CHANNELS)[:, None] & (o < MAPS)[None, :],
                    0.0,
                )
                total = tl.dot(a, b, total, input_precision=PRECISION)
    target = out + p * out_p + n * out_n + y * out_y + x * out_x
    tl.store(target[:, None] + o[None, :] * out_c, total.to(out.dtype.element_ty), (m < pixels)[:, None] & (o < MAPS))


@triton.jit
@no_type_check
def _correlate(
    images,
    gradient,
    partial,
    networks,
    pixels,
    image_p,
    image_n,
    image_c,
    image_y,
    image_x,
    gradient_p,
    gradient_n,
    gradient_c,
    gradient_y,
    gradient_x,
    IMAGE_HEIGHT: tl.constexpr,
    IMAGE_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAPS: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    FLAT: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # Programs that read the same pixels are neighbours, so that all but the first find them in the L2 cache.
    o_blocks: tl.constexpr = (MAPS + BLOCK_O - 1) // BLOCK_O
    COLUMNS: tl.constexpr = TAPS_Y * TAPS_X * CHANNELS if FLAT else CHANNELS
    c_blocks: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    rows: tl.constexpr = 1 if FLAT else TAPS_Y * TAPS_X // ROW
    program = tl.program_id(0)
    o = program % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    c = program // o_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = program // (o_blocks * c_blocks) % rows * ROW
    part = program // (o_blocks * c_blocks * rows)
    p, split = (part // SPLITS).to(tl.int64), part % SPLITS
    i, j = tap // TAPS_X, tap % TAPS_X
    images += p * image_p
    gradient += p * gradient_p
    total = tl.full((BLOCK_C, BLOCK_O), 0.0, tl.float32)
    second = total  # of the other taps of the row
    third = total
    for step in range(STEPS):
        m = (step * SPLITS + split) * PIXELS + tl.arange(0, PIXELS)
        n, y, x = _pixel(m, HEIGHT, WIDTH)
        target = gradient + n * gradient_n + y * gradient_y + x * gradient_x
        g = tl.load(target[:, None] + o[None, :] * gradient_c, (m < pixels)[:, None] & (o < MAPS)[None, :], 0.0)
        row, column = y * STRIDE_Y - PADDING_Y + i, x * STRIDE_X - PADDING_X + j
        inside = (m < pixels) & (row >= 0) & (row < IMAGE_HEIGHT)
        window = (images + n * image_n + row * image_y)[:, None] + c[None, :] * image_c
        if FLAT:
            a = _flat(images + n * image_n, m < pixels, row, column, c, image_c, image_y, image_x,
                      IMAGE_HEIGHT, IMAGE_WIDTH, CHANNELS, TAPS_Y, TAPS_X)  # fmt: skip
        else:
            a = _column(window, column, inside, c, image_x, IMAGE_WIDTH, CHANNELS)
        total = tl.dot(tl.trans(a), g, total, input_precision=PRECISION)
        if ROW == 3:
            a = _column(window, column + 1, inside, c, image_x, IMAGE_WIDTH, CHANNELS)
            second = tl.dot(tl.trans(a), g, second, input_precision=PRECISION)
            a = _column(window, column + 2, inside, c, image_x, IMAGE_WIDTH, CHANNELS)
            third = tl.dot(tl.trans(a), g, third, input_precision=PRECISION)
    sums = partial + ((split * networks + p) * (TAPS_Y * TAPS_X) + tap) * (CHANNELS * MAPS)
    place, valid = c[:, None] * MAPS + o[None, :], (c < COLUMNS)[:, None] & (o < MAPS)[None, :]
    tl.store(sums + place, total, valid)
    if ROW == 3:
        tl.store(sums + CHANNELS * MAPS + place, second, valid)
        tl.store(sums + 2 * CHANNELS * MAPS + place, third, valid)


@triton.jit
@no_type_check
def _column(window, column, inside, c, image_x, IMAGE_WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The image's channels under one tap, zero outside of it: `[pixels, channels]`."""
    inside &= (column >= 0) & (column < IMAGE_WIDTH)
    return tl.load(window + (column * image_x)[:, None], inside[:, None] & (c < CHANNELS)[None, :], 0.0)


@triton.jit
@no_type_check
def _flat(
    images,
    valid,
    row,
    column,
    k,
    image_c,
    image_y,
    image_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
):
    """Columns k of the images' windows whose first tap is at (row, column), zero outside: `[pixels, columns]`."""
    row = row[:, None] + (k // (TAPS_X * CHANNELS))[None, :]
    column = column[:, None] + (k // CHANNELS % TAPS_X)[None, :]
    inside = valid[:, None] & (k < TAPS_Y * TAPS_X * CHANNELS)[None, :]
    inside &= (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    source = images[:, None] + row * image_y + column * image_x + (k % CHANNELS * image_c)[None, :]
    return tl.load(source, inside, 0.0)
