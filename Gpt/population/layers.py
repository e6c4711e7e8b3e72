"""Layers that stand in for torch's under `torch.func.vmap` on a GPU, where torch's are slow or cannot be run at all.

Parameters, statistics and results are those of the layers they replace.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from Gpt.population.convolution import differentiable_conv2d, tell_compiler


def for_populations(net: nn.Module, example: Float[Tensor, "1 ..."]) -> nn.Module:
    """Let the layers of a network that have a stand-in, in place, be that; others are left to vmap.

    Feature maps then have channels last in memory, unless the network, run once on the example, needs the usual layout
    (because it calls `view` on them).
    """
    convolutions = []
    for module in net.modules():
        layer: Any = module  # whose class is about to change
        stand_in = next(
            (kind for kind in (PopulationConv2d, PopulationBatchNorm, GlobalAverage) if kind.fits(layer)), None
        )
        if stand_in is not None:
            layer.__class__ = stand_in
        if stand_in is PopulationConv2d:
            layer.channels_last = True
            convolutions.append(layer)
    if convolutions:
        tell_compiler()
    try:
        with torch.no_grad():
            net(example)
    except RuntimeError:
        for layer in convolutions:
            layer.channels_last = False
    return net


class PopulationConv2d(nn.Conv2d):
    """A convolution that is `population_conv2d` under vmap, instead of one grouped convolution."""

    channels_last: bool

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this is an ordinary convolution, zero-padded, not dilated."""
        return (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def forward(self, images: Float[Tensor, "*N C H W"]) -> Float[Tensor, "*N O Y Z"]:
        if images.dim() == 3:
            return self.forward(images[None])[0]
        kernels, kind = self.weight, images.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            images, kernels = images.to(dtype), kernels.to(dtype)
        assert not isinstance(self.padding, str)
        maps = differentiable_conv2d(images[None], kernels[None], self.stride, self.padding, self.channels_last)[0]
        return maps if self.bias is None else maps + self.bias.to(maps.dtype)[:, None, None]


class PopulationBatchNorm(_BatchNorm):
    """Batch norm of elementwise operations; on CUDA torch's own asks for the memory layout, which vmap cannot tell."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this is batch norm, but not with statistics that are averages over all of training."""
        return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and module.momentum is not None

    def forward(self, maps: Float[Tensor, "N C *size"]) -> Float[Tensor, "N C *size"]:
        variance, mean = self.running_var, self.running_mean
        if self.training or variance is None or mean is None:
            axes = [0, *range(2, maps.dim())]
            variance, mean = torch.var_mean(maps.float(), axes, correction=0)
            if self.training:
                self._keep(mean.detach(), variance.detach(), maps.numel() // maps.shape[1])
        shape = (-1, *[1] * (maps.dim() - 2))
        normed = (maps - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(maps.dtype)

    def _keep(self, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"], count: int) -> None:
        """Update the running statistics, if there are any."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
        self.running_var.mul_(1 - self.momentum).add_(self.momentum * variance * (count / (count - 1)))  # unbiased


class GlobalAverage(nn.AdaptiveAvgPool2d):
    """The average over all pixels: of maps with channels last, torch's own is taken network by network under vmap."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether one pixel is left."""
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))

    def forward(self, maps: Float[Tensor, "*N C H W"]) -> Float[Tensor, "*N C 1 1"]:
        return maps.mean((-2, -1), keepdim=True)
