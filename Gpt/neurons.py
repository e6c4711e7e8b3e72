"""Neuron tokens: one token per hidden unit, holding every weight that touches it.

A unit of the MLP 784-10-10 becomes its 784 incoming weights, its bias and its 10 outgoing weights; what belongs to no
unit (the output bias) is one more token: 11 tokens instead of 26. Renaming hidden units only reorders such tokens.
Where every tensor has at most one permuted axis, a transformer without positional code is therefore exactly equivariant
and needs no augmentation. A tensor between two hidden layers appears in the tokens of both its ends, ordered by the
index of the other end; then unit positions must be embedded and the permutations drawn as augmentation (`entangled`
says which case it is).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.errors import StructureError
from Gpt.structure import Structure


class NeuronTokens(nn.Module):
    """Flat rows `[B, D]` <-> one `[B, units, entries]` block per token type.

    Each symmetry group is a type; what touches no unit is the only token of one more type, the last.

    Attributes:
        shapes: `(units, entries)` of each type, in the order of the structure's groups.
        entangled: True when a tensor joins two hidden layers.

    Raises:
        StructureError: the structure has no symmetry, so there are no hidden units to make tokens of.
    """

    weight: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, structure: Structure):
        super().__init__()
        if not structure.groups:
            raise StructureError(
                "neuron tokens need the hidden-unit symmetry of the network; give the task a `symmetry` key, "
                "or choose a generator that does without (generator=gpt_paper_mnist, or generator=rpg "
                "generator.policy=within_layer)"
            )
        blocks = [_unit_entries(structure, group, units) for group, units in structure.groups.items()]
        touched = torch.cat([block.flatten() for block in blocks])
        rest = torch.ones(structure.size, dtype=torch.bool)
        rest[touched] = False
        if rest.any():
            blocks.append(rest.nonzero().T)
        self.shapes = tuple((block.shape[0], block.shape[1]) for block in blocks)
        self.entangled = len(touched) + int(rest.sum()) > structure.size
        for i, block in enumerate(blocks):
            self.register_buffer(f"index_{i}", block, persistent=False)
        slots = torch.cat([block.flatten() for block in blocks])
        order = slots.argsort(stable=True)
        counts = slots.bincount(minlength=structure.size)
        first = counts.cumsum(0) - counts
        self.register_buffer("weight", slots, persistent=False)
        self.register_buffer("first", order[first], persistent=False)
        self.register_buffer("last", order[first + counts - 1], persistent=False)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(units for units, _ in self.shapes)

    def encode(self, flat: Float[Tensor, "B D"]) -> list[Float[Tensor, "B _ _"]]:
        """Gather the entries of every token."""
        return [flat[:, getattr(self, f"index_{i}")] for i in range(len(self.shapes))]

    def decode(self, blocks: list[Float[Tensor, "B _ _"]]) -> Float[Tensor, "B D"]:
        """Put entries back in place; a weight that two tokens hold becomes their mean."""
        slots = torch.cat([block.flatten(1) for block in blocks], dim=1)
        flat = _Gather.apply(slots, self.first, self.weight)
        if not self.entangled:
            return flat
        return (flat + _Gather.apply(slots, self.last, self.weight)) / 2


class _Gather(torch.autograd.Function):
    """`slots[:, choice]`, where `choice[w]` is one of the slots s with `weight[s] == w`.

    Its gradient is a gather too. The one that torch would take adds into places that could be the same, for which it
    sorts all indices; on a GPU that took longer than the rest of a training step.
    """

    @staticmethod
    def forward(ctx: Any, slots: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(choice, weight)
        return slots.index_select(1, choice)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        choice, weight = ctx.saved_tensors
        chosen = choice.index_select(0, weight) == torch.arange(len(weight), device=weight.device)
        return gradient.index_select(1, weight) * chosen, None, None


def _unit_entries(structure: Structure, group: str, units: int) -> Int[Tensor, "units entries"]:
    """Flat positions of every weight that touches each unit of a group, in the same order for every unit."""
    parts = []
    for t in structure.tensors:
        position = torch.arange(t.offset, t.slice.stop).reshape(t.shape)
        axes = [axis for axis, name in enumerate(t.groups) if name == group]
        if len(axes) > 1:
            raise StructureError(
                f"{t.name!r} has the symmetry group {group!r} on two axes, which neuron tokens cannot hold"
            )
        if axes:
            parts.append(position.movedim(axes[0], 0).reshape(units, -1))
    return torch.cat(parts, dim=1)
