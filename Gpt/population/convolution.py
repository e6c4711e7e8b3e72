"""Convolutions of many small networks at once, each with kernels of its own, on a GPU.

`torch.func.vmap` turns them into one grouped convolution, of which cuDNN makes a few percent of what a GPU can do. Here
they are operators that vmap calls instead: implicit matrix products with one program per network and tile, see
`Gpt.population.convolution_kernels`. On a CPU vmap is left alone: passes of one network are fast there.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


@torch.compiler.assume_constant_result
def accelerated(device: torch.device) -> bool:
    """Whether there are Triton and what its kernels are written for: the tensor cores of Ampere and later."""
    return _accelerated(device)


@cache  # which the compiler would rather not look into
def _accelerated(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


# --- gradients --------------------------------------------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    """`population_conv2d` with its gradients; a formula registered with the operator is not known to `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], channels_last: bool):
        return population_conv2d(images, kernels, stride, padding, channels_last)

    @staticmethod
    def setup_context(context, inputs, output) -> None:
        images, kernels, *context.geometry = inputs
        context.save_for_backward(images, kernels)

    @staticmethod
    @torch.no_grad()  # there are no gradients of gradients, which torch.func would ask the operators for
    def backward(context, gradient: Tensor):
        images, kernels = context.saved_tensors
        by_images = by_kernels = None
        if context.geometry[-1]:  # gradients of averages over pixels come otherwise, which both kernels read slowly
            gradient = gradient.movedim(2, -1).contiguous().movedim(-1, 2)
        if context.needs_input_grad[0]:
            by_images = images_gradient(gradient, kernels, images.shape[-2:], *context.geometry)
        if context.needs_input_grad[1]:
            by_kernels = kernels_gradient(images, gradient, kernels.shape[-2:], *context.geometry[:2])
        return by_images, by_kernels, None, None, None


def differentiable_conv2d(
    images: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], channels_last: bool
) -> Tensor:
    """`population_conv2d` for `torch.func` transformations, ordinary autograd and, once it is told, `torch.compile`."""
    return _Convolution.apply(images, kernels, stride, padding, channels_last)


@cache
def tell_compiler() -> None:
    """Have `differentiable_conv2d` compiled as one operator: the compiler would look inside, and miss `backward`.

    Not done on import, because it loads the compiler, for seconds.
    """
    torch.compiler.allow_in_graph(differentiable_conv2d)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gpt_weights::population_conv2d", mutates_args=())
def population_conv2d(
    images: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], channels_last: bool
) -> Tensor:
    """Network p's kernels on its own images, or on images that all networks share.

    Args:
        images: `[P, N, C, H, W]`, or `[1, N, C, H, W]` for shared ones.
        kernels: `[P, O, C, h, w]`.
        channels_last: how the result lies in memory.

    Returns:
        `[P, N, O, Y, Z]`.
    """
    out = _maps(images, kernels, stride, padding, channels_last)
    if _has_kernels(images):
        from Gpt.population import convolution_kernels

        with torch.cuda.device(images.device):
            convolution_kernels.convolve(images, kernels, out, stride, padding)
    else:
        for x, w, y in zip(images.expand(len(kernels), *images.shape[1:]), kernels, out, strict=True):
            y.copy_(F.conv2d(x, w, None, stride, padding))
    return out


@torch.library.custom_op("gpt_weights::population_conv2d_images_gradient", mutates_args=())
def images_gradient(
    gradient: Tensor,
    kernels: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """Gradient `[P, N, C, H, W]` of `population_conv2d` by images of `size` H, W, every network's own."""
    out = _empty(gradient, (*gradient.shape[:2], kernels.shape[2], *size), channels_last)
    if _has_kernels(gradient):
        from Gpt.population import convolution_kernels

        with torch.cuda.device(gradient.device):
            convolution_kernels.convolve_transposed(gradient, kernels, out, stride, padding)
    else:
        for g, w, x in zip(gradient, kernels, out, strict=True):
            x.copy_(conv2d_input(x.shape, w, g, stride, padding))
    return out


@torch.library.custom_op("gpt_weights::population_conv2d_kernels_gradient", mutates_args=())
def kernels_gradient(
    images: Tensor, gradient: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient `[P, O, C, h, w]` of `population_conv2d` by kernels of `size` h, w."""
    out = gradient.new_empty(len(gradient), gradient.shape[2], images.shape[2], *size)
    if _has_kernels(gradient):
        from Gpt.population import convolution_kernels

        with torch.cuda.device(images.device):
            convolution_kernels.correlate(images, gradient, out, stride, padding)
    else:
        for x, g, w in zip(images.expand(len(gradient), *images.shape[1:]), gradient, out, strict=True):
            w.copy_(conv2d_weight(x, w.shape, g, stride, padding))
    return out


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.dtype != torch.float64 and accelerated(tensor.device)


def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    networks, examples, channels, height, width = shape
    return like.new_empty(networks, examples, height, width, channels).movedim(-1, 2)


@population_conv2d.register_fake
def _maps(images, kernels, stride, padding, channels_last):
    sides = zip(images.shape[3:], kernels.shape[3:], stride, padding, strict=True)
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in sides]
    return _empty(images, (len(kernels), images.shape[1], kernels.shape[1], *size), channels_last)


@images_gradient.register_fake
def _(gradient, kernels, size, stride, padding, channels_last):
    return _empty(gradient, (*gradient.shape[:2], kernels.shape[2], *size), channels_last)


@kernels_gradient.register_fake
def _(images, gradient, size, stride, padding):
    return gradient.new_empty(len(gradient), gradient.shape[2], images.shape[2], *size)


# --- vmap: the networks of all calls become the networks of one -------------------------------------------------------


@population_conv2d.register_vmap
def _(info, in_dims, images, kernels, *geometry):
    kernels, networks = _folded(kernels, in_dims[1], info.batch_size)
    images = _folded_images(images, in_dims[0], networks)
    return population_conv2d(images, kernels, *geometry).unflatten(0, networks), 0


@images_gradient.register_vmap
def _(info, in_dims, gradient, kernels, *geometry):
    gradient, networks = _folded(gradient, in_dims[0], info.batch_size)
    kernels, _ = _folded(kernels, in_dims[1], info.batch_size)
    return images_gradient(gradient, kernels, *geometry).unflatten(0, networks), 0


@kernels_gradient.register_vmap
def _(info, in_dims, images, gradient, *geometry):
    gradient, networks = _folded(gradient, in_dims[1], info.batch_size)
    images = _folded_images(images, in_dims[0], networks)
    return kernels_gradient(images, gradient, *geometry).unflatten(0, networks), 0


def _folded(tensor: Tensor, axis: int | None, calls: int) -> tuple[Tensor, tuple[int, int]]:
    """The networks of all calls as one axis, and that axis' (calls, networks of each)."""
    tensor = tensor.expand(calls, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.flatten(0, 1), (tensor.shape[0], tensor.shape[1])


def _folded_images(images: Tensor, axis: int | None, networks: tuple[int, int]) -> Tensor:
    """The same of images; what all networks share stays one copy."""
    if axis is None and len(images) == 1:
        return images
    calls, each = networks
    images = images.expand(calls, *images.shape) if axis is None else images.movedim(axis, 0)
    return images.expand(calls, each, *images.shape[2:]).flatten(0, 1)
