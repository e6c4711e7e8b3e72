"""Muon: momentum whose update is orthogonalised, for the hidden matrices of a network (Jordan et al. 2024).

torch.optim.Muon computes the same update one matrix at a time and always in bfloat16, which on a CPU without bfloat16
instructions takes longer than the backward pass. Here equal shapes go through Newton-Schulz together, in float32 on a
CPU.
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.sharding import like, local, whole_of

# Quintic iteration that drives singular values into about [0.7, 1.2] in five steps (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with `muon=True`: matrices whose Nesterov momentum is orthogonalised.

    A Muon group's `lr` is the spectral norm of one update, times sqrt(rows / columns) where a matrix is taller than
    wide; it takes `momentum` (0.95) and `weight_decay` from its group. Of sharded matrices every process
    orthogonalises all, whole, and keeps its part.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._orthogonal_step(group)

    @torch.no_grad()
    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                shapes[p.shape].append(p)
        momentum = group.get("momentum", MOMENTUM)
        for params in shapes.values():
            gradients = [local(p.grad) for p in params if p.grad is not None]
            buffers = [local(self._momentum(p)) for p in params]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            parts = torch._foreach_lerp(gradients, buffers, momentum)
            directions = torch.stack([whole_of(part, p) for part, p in zip(parts, params, strict=True)])
            orthogonal = orthogonalize(directions).to(params[0].dtype).unbind()
            updates = [local(like(update, p)) for update, p in zip(orthogonal, params, strict=True)]
            rows, columns = params[0].shape
            values: list[Tensor] = [local(p) for p in params]
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(values, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if not state:
            # AdamW looks for a step in the state of every parameter when it is loaded.
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        return state["momentum_buffer"]


def orthogonalize(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Replace the singular values of each matrix by values near one, keeping its singular vectors."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
