"""Linear layers that notice when all networks of a population read the same inputs.

`torch.vmap` gives every network its own product `[N, I] x [I, O]`. With one input for all P of them, that is a single
product with the `P O` outputs of all networks side by side: twice as fast on a CPU; on a GPU, ten columns of output
leave most of a tile idle, and every network reads the inputs anew.
"""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def with_shared_inputs(template: nn.Module) -> nn.Module:
    """A copy whose linear layers batch over weights in one product; for `vmap`, with gradients taken outside of it."""
    net = copy.deepcopy(template)
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = _SharedInputLinear
    return net


class _SharedInputLinear(nn.Linear):
    def forward(self, input: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return _Linear.apply(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """`F.linear` with a batching rule of its own."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        """Nothing is kept: gradients are those of the product in `vmap`."""

    @staticmethod
    def vmap(info, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        if in_dims[0] is not None or in_dims[1] != 0 or (bias is not None and in_dims[2] != 0):
            return torch.vmap(F.linear, in_dims)(x, weight, bias), 0
        side_by_side = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return side_by_side.unflatten(-1, weight.shape[:2]), side_by_side.dim() - 1
