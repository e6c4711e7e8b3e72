"""The loss of answers and its gradient as one CUDA graph, recorded at the first step and replayed at every other.

A pass through SmolLM2-135M with adapters, and back, is thousands of kernels, which the host takes longer to launch than
a GPU takes to run them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from Gpt.adapters.answers import Answers, answer_loss
from Gpt.adapters.base import BaseModel
from Gpt.adapters.spec import AdapterSpec
from Gpt.cuda_graphs import record


class AnswerLoss:
    """`answer_loss` of one base model and one form of adapters, differentiable in the adapters, for many steps.

    With gradients on a GPU it is recorded at its first call, and replayed for all batches of that call's shapes; they
    are not trimmed, so that they share them. Elsewhere (on a CPU, without gradients, under a counter of operations, for
    other shapes) and where recording fails, which it warns of, it is computed anew, on trimmed answers.
    """

    def __init__(self, base: BaseModel, spec: AdapterSpec):
        self.base, self.spec = base, spec
        self._shapes: list[torch.Size] | None = None
        self._recorded: _Recorded | None = None

    def __call__(self, weights: Float[Tensor, "P D"], answers: Answers) -> Float[Tensor, " P"]:
        """As `answer_loss`."""
        if _recordable(weights):
            inputs = [weights, answers.tokens, answers.positions, answers.valid]
            shapes = [x.shape for x in inputs]
            if self._shapes is None:
                self._shapes, self._recorded = shapes, self._record(inputs)
            if self._recorded is not None and shapes == self._shapes:
                return self._recorded(inputs)
        return answer_loss(self.base, self.spec, weights, answers.trimmed())

    def _record(self, inputs: list[Tensor]) -> "_Recorded | None":
        try:
            return _Recorded(lambda weights, *rest: answer_loss(self.base, self.spec, weights, Answers(*rest)), inputs)
        except RuntimeError as error:
            warnings.warn(f"adapters learn slower, as their loss is no CUDA graph: {error}", stacklevel=3)
            return None


class _Recorded:
    """Losses of rows, each of which depends on its own row alone, and their gradients.

    Args:
        losses_of: `(weights [P, D], *tensors) -> [P]`.
        inputs: weights and tensors, as in every call.
    """

    def __init__(self, losses_of: Callable[..., Tensor], inputs: list[Tensor]):
        self._own = [x.detach().clone() for x in inputs]
        weights = self._own[0].requires_grad_()

        def differentiate() -> tuple[Tensor, Tensor]:
            losses = losses_of(weights, *self._own[1:])
            return losses.detach(), torch.autograd.grad(losses.sum(), weights)[0]

        # Autocast would keep casts outside of the graph's memory; the language model has a precision of its own.
        with torch.autocast(weights.device.type, enabled=False):
            self._graph, (self._losses, self._gradient) = record(differentiate, weights.device)

    def __call__(self, inputs: list[Tensor]) -> Float[Tensor, " P"]:
        with torch.no_grad():
            torch._foreach_copy_(self._own, inputs)
        self._graph.replay()
        return _KnownGradient.apply(inputs[0], self._losses.clone(), self._gradient.clone())


class _KnownGradient(torch.autograd.Function):
    """Losses `[P]` whose gradients by their own rows are already there, `[P, D]`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None] * gradient, None, None


def _recordable(weights: Tensor) -> bool:
    return weights.is_cuda and weights.requires_grad and torch.is_grad_enabled() and not is_in_torch_dispatch_mode()
