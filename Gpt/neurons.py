"""Neuron tokens: one token per hidden unit, holding every weight that touches it alone.

A unit of the MLP 784-10-10 becomes its 784 incoming weights, its bias and its 10 outgoing weights; what belongs to no
unit (the output bias) is one more token: 11 tokens instead of 26. Renaming hidden units only reorders such tokens. A
weight between two hidden layers belongs to two units; those are joints, with a row for each unit of the one layer and a
column for each of the other.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.errors import StructureError
from Gpt.structure import Structure, TensorSpec

Tokens = list[Float[Tensor, "B _ _"]]
Joints = list[Float[Tensor, "B _ _ _"]]


class Joint(NamedTuple):
    """A tensor between two hidden layers: the types of its units, how many there are, and weights for each pair."""

    types: tuple[int, int]
    units: tuple[int, int]
    entries: int


class Graph(nn.Module):
    """Flat rows `[B, D]` <-> tokens `[B, count, entries]` of one or more types and joints between their tokens.

    Attributes:
        shapes: `(count, entries)` of each type of token.
        joints: see `Joint`.
    """

    shapes: tuple[tuple[int, int], ...]
    joints: tuple[Joint, ...] = ()

    def encode(self, flat: Float[Tensor, "B D"]) -> tuple[Tokens, Joints]:
        """One block for each type of token and one for each joint."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def decode(self, tokens: Tokens, joints: Joints) -> Float[Tensor, "B D"]:
        """Put entries back in place."""
        raise TypeError(f"{type(self).__name__} does not define decode")


class NeuronGraph(Graph):
    """Flat rows `[B, D]` <-> one block `[B, units, entries]` per token type and one `[B, units, units, entries]` per
    joint.

    Tokens hold what touches one unit alone; a tensor between two hidden layers is a joint, with the weights of each
    pair of units as its last axis (nine of a 3x3 convolution). Every weight has one place, and renaming hidden units
    reorders tokens, rows and columns and nothing else, at any depth.

    Attributes:
        shapes: `(units, entries)` of each token type, in the order of the structure's groups; what touches no unit is
            the only token of one more type, the last.
        joints: in the order of the structure's tensors.

    Raises:
        StructureError: the structure has no symmetry, or a tensor between three hidden layers.
    """

    place: Tensor
    order: Tensor

    def __init__(self, structure: Structure):
        super().__init__()
        if not structure.groups:
            raise StructureError(_NO_UNITS)
        types = {group: i for i, group in enumerate(structure.groups)}
        alone: list[list[Tensor]] = [[] for _ in types]
        rest, joined, joints = [], [], []
        for t in structure.tensors:
            position, ends = _units_first(structure, t)
            if not ends:
                rest.append(position.flatten())
            elif len(ends) == 1:
                alone[types[ends[0]]].append(position)
            else:
                outputs, inputs, entries = position.shape
                joints.append(Joint((types[ends[0]], types[ends[1]]), (outputs, inputs), entries))
                joined.append(position)
        units = zip(structure.groups.values(), alone, strict=True)
        blocks = [torch.cat([torch.empty(count, 0, dtype=torch.long), *parts], dim=1) for count, parts in units]
        if rest:
            blocks.append(torch.cat(rest)[None])
        self.shapes = tuple((block.shape[0], block.shape[1]) for block in blocks)
        self.joints = tuple(joints)
        self._sizes = [block.numel() for block in (*blocks, *joined)]
        place = torch.cat([block.flatten() for block in (*blocks, *joined)])
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("order", place.argsort(), persistent=False)

    def encode(self, flat: Float[Tensor, "B D"]) -> tuple[Tokens, Joints]:
        parts = _Gather.apply(flat, self.place, self.order).split(self._sizes, dim=1)
        tokens = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=False)]
        joined = parts[len(self.shapes) :]
        return tokens, [part.unflatten(1, (*j.units, j.entries)) for part, j in zip(joined, self.joints, strict=True)]

    def decode(self, tokens: Tokens, joints: Joints) -> Float[Tensor, "B D"]:
        slots = torch.cat([block.flatten(1) for block in (*tokens, *joints)], dim=1)
        return _Gather.apply(slots, self.order, self.place)

    def without_order(self, flat: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Every weight replaced by the mean of those that a renaming could put in its place."""
        tokens, joints = self.encode(flat)
        tokens = [block.mean(1, keepdim=True).expand_as(block) for block in tokens]
        return self.decode(tokens, [block.mean((1, 2), keepdim=True).expand_as(block) for block in joints])


class _Gather(torch.autograd.Function):
    """`rows[:, order]` of a permutation, whose gradient is a gather too.

    The one that torch would take adds into places that could be the same, for which it sorts all indices; on a GPU that
    took longer than the rest of a training step.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(1, inverse), None, None


def _units_first(structure: Structure, tensor: TensorSpec) -> tuple[Int[Tensor, "..."], list[str]]:
    """Flat positions of a tensor's entries, `[units of each permuted axis, entries]`, and the groups of those axes."""
    ends = [(axis, group) for axis, group in enumerate(tensor.groups) if group is not None]
    if len(ends) > 2:
        raise StructureError(f"{tensor.name!r} joins three hidden layers, {[group for _, group in ends]}; at most two")
    position = torch.arange(tensor.offset, tensor.slice.stop).reshape(tensor.shape)
    for moved, (axis, group) in enumerate(reversed(ends)):
        # An axis may be a multiple of its group: a block of entries for each unit.
        position = position.unflatten(axis + moved, (structure.groups[group], -1)).movedim(axis + moved, 0)
    return position.reshape(*position.shape[: len(ends)], -1), [group for _, group in ends]


_NO_UNITS = (
    "neuron tokens need hidden units that may be renamed, and none of this network are known; name them (key "
    "`symmetry`), or choose a generator that does without (generator=gpt_paper_mnist, or generator=rpg "
    "generator.policy=within_layer)"
)
