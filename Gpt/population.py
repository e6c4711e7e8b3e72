"""Many networks of one architecture as one callable."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from Gpt.structure import Structure


class Population:
    """P networks that share an architecture, applied in one batched call (`torch.func.vmap` over their weights).

    Args:
        template: a module of the architecture, used in eval mode; its own values are ignored.
        structure: its structure.
        weights: `[P, D]`, one flat row per network.
    """

    def __init__(self, template: nn.Module, structure: Structure, weights: Float[Tensor, "P D"]):
        self.structure = structure
        self.weights = weights
        self._template = copy.deepcopy(template).to(weights.device).eval()

    def __len__(self) -> int:
        return self.weights.shape[0]

    def __call__(self, inputs: Tensor) -> Tensor:
        """All networks on the same inputs `[N, ...]` -> `[P, N, ...]`."""
        return self._apply(inputs, None)

    def each(self, inputs: Float[Tensor, "P ..."]) -> Tensor:
        """Network p on its own inputs: `[P, N, ...]` -> `[P, N, ...]`."""
        return self._apply(inputs, 0)

    def _apply(self, inputs: Tensor, inputs_axis: int | None) -> Tensor:
        def one(weights: Tensor, x: Tensor) -> Tensor:
            return functional_call(self._template, self.structure.unflatten(weights), (x,), tie_weights=True)

        return vmap(one, in_dims=(0, inputs_axis), randomness="error")(self.weights, inputs)


def stack_initial(constructor, structure: Structure, seeds: list[int]) -> Float[Tensor, "P D"]:
    """Freshly constructed networks, one per seed, as flat rows on the CPU; the global random state stays as it is."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(structure.flatten(constructor().state_dict()))
    return torch.stack(rows)
