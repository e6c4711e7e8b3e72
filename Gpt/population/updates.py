"""In-place updates of many networks at once; each is torch.optim's rule of that name, network by network."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.structure import Structure

State = dict[str, Tensor]
"""`weights` [P, D], `momentum` [P, D], `iteration` [] (int64, counted by the caller); Adam's also `square` [P, D]."""

Update = Callable[[State, Tensor, Tensor | float], None]
"""(state, gradient [P, D], learning rate: one number or one per network [P, 1]) -> None, changing the state."""


def initial_state(weights: Float[Tensor, "P D"], *, square: bool) -> dict[str, Float[Tensor, "P D"] | Int[Tensor, ""]]:
    """The state before the first update; `square` for Adam's second moment."""
    state = {
        "weights": weights,
        "iteration": torch.zeros((), dtype=torch.long, device=weights.device),
        "momentum": torch.zeros_like(weights),
    }
    return state | {"square": torch.zeros_like(weights)} if square else state


def trainable(template: nn.Module, structure: Structure) -> Float[Tensor, " D"]:
    """1 for entries of parameters, 0 for frozen ones and for buffers (running statistics)."""
    parameters = {name for name, p in template.named_parameters(remove_duplicate=False) if p.requires_grad}
    return torch.cat([torch.full((t.numel,), float(t.name in parameters)) for t in structure.tensors])


def sgd(
    trainable: Float[Tensor, " D"], *, momentum: float, nesterov: bool = False, weight_decay: float = 0.0
) -> Update:
    """`torch.optim.SGD` of the entries where `trainable` is 1."""
    decay = weight_decay * trainable

    def update(state: State, gradient: Tensor, learning_rate: Tensor | float) -> None:
        weights, velocity = state["weights"], state["momentum"]
        gradient = gradient * trainable + decay * weights
        velocity.mul_(momentum).add_(gradient)
        weights -= learning_rate * (gradient + momentum * velocity if nesterov else velocity)

    return update


def adam(trainable: Float[Tensor, " D"], *, decoupled: bool = False, weight_decay: float = 0.0) -> Update:
    """`torch.optim.Adam`, or `AdamW` when the decay is decoupled, of the entries where `trainable` is 1."""
    decay = weight_decay * trainable
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8  # torch.optim's defaults

    def update(state: State, gradient: Tensor, learning_rate: Tensor | float) -> None:
        weights, mean, square, step = state["weights"], state["momentum"], state["square"], state["iteration"] + 1
        gradient = gradient * trainable
        if decoupled:
            weights *= 1 - learning_rate * decay
        else:
            gradient = gradient + decay * weights
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt() + epsilon
        weights -= learning_rate / (1 - beta1**step) * mean / denominator

    return update
