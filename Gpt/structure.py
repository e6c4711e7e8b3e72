"""Everything about one architecture that does not depend on the values of its weights.

A `Structure` lists the tensors of a state_dict with their place in the flat vector, what each one is, and which of its
axes are permuted together when hidden units are renamed. Augmentation, alignment, tokenisation, storage and export all
read it; nothing else walks a state_dict.

Symmetry is written as `{tensor name: (group of axis 0, group of axis 1, …)}` with None for an axis that stays put. The
MLP 784-10-10 reads `{"fc1.weight": ("hidden", None), "fc1.bias": ("hidden",), "fc2.weight": (None, "hidden")}`. An axis
may be a whole multiple of its group (a convolution's channels flattened into a linear layer): each unit then owns one
contiguous block.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.errors import StructureError

Symmetry = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a state_dict and its place `[offset, offset + numel)` in the flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    offset: int
    groups: tuple[str | None, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True, eq=False)
class Structure:
    """The generated tensors of an architecture, in state_dict order, and what is copied instead of generated.

    Attributes:
        tensors: the floating-point tensors that make up the flat vector.
        keys: all state_dict keys in their order.
        aliases: tied tensors, `{alias: name of the tensor that holds the values}`.
        fixed: integer, boolean and empty tensors (counters, masks), copied verbatim into every written network: those
            of the network that the structure was read off.
        groups: `{group: number of units}` of the hidden-unit permutations.
    """

    tensors: tuple[TensorSpec, ...]
    keys: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """D, the length of the flat vector."""
        return self.tensors[-1].slice.stop

    @property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """Batch norm's running means and variances, which are measured and not learned."""
        return tuple(t for t in self.tensors if t.kind.startswith("running_"))

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of names, shapes and dtypes; structures with the same fingerprint share flat vectors."""
        description = [(t.name, t.shape, str(t.dtype)) for t in self.tensors]
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, source: nn.Module | Mapping[str, Tensor], symmetry: Symmetry | None = None) -> "Structure":
        """Read the structure of a module or of a state_dict.

        Raises:
            StructureError: there is nothing to generate, a tensor is complex, or `symmetry` names tensors, axes or
                sizes that do not fit.
        """
        state = source.state_dict() if isinstance(source, nn.Module) else source
        symmetry = symmetry or {}
        owners: dict[tuple, str] = {}
        tensors, aliases, fixed, offset = [], {}, {}, 0
        for name, value in state.items():
            storage = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if value.is_complex():
                raise StructureError(f"{name!r} is complex; generators write real weights, use torch.view_as_real")
            if not value.is_floating_point() or value.numel() == 0:
                fixed[name] = value.detach().clone()
            elif storage[0] and storage in owners:  # meta tensors have no storage, hence no ties
                aliases[name] = owners[storage]
            else:
                owners[storage] = name
                groups = tuple(symmetry.get(name, (None,) * value.dim()))
                if len(groups) != value.dim():
                    raise StructureError(f"symmetry of {name!r} names {len(groups)} axes, the tensor has {value.dim()}")
                tensors.append(TensorSpec(name, tuple(value.shape), value.dtype, _kind(name, value), offset, groups))
                offset += value.numel()
        if not tensors:
            raise StructureError("the network has no floating-point tensors, so there is nothing to generate")
        unknown = sorted(set(symmetry) - {t.name for t in tensors})
        if unknown:
            raise StructureError(f"symmetry names {unknown}, but the network has only {[t.name for t in tensors]}")
        return cls(tuple(tensors), tuple(state), aliases, fixed, _group_sizes(tensors))

    def flatten(self, state: Mapping[str, Tensor]) -> Float[Tensor, "*batch D"]:
        """Concatenate the tensors of one state_dict (or of a stack of them, with leading axes) into float32 rows.

        Raises:
            StructureError: a tensor is missing, unexpected, or of another shape; the message names it.
        """
        missing = [t.name for t in self.tensors if t.name not in state]
        unexpected = [name for name in state if name not in self.keys]
        if missing or unexpected:
            raise StructureError(
                f"these weights belong to another architecture: missing {_listed(missing)}, "
                f"unexpected {_listed(unexpected)}"
            )
        parts = []
        for t in self.tensors:
            value = state[t.name]
            lead = value.dim() - len(t.shape)
            if lead < 0 or tuple(value.shape[lead:]) != t.shape:
                raise StructureError(f"{t.name!r} has shape {tuple(value.shape)}, the architecture has {t.shape}")
            parts.append(value.reshape(*value.shape[:lead], t.numel).float())
        return torch.cat(parts, dim=-1)

    def check_fixed(self, state: Mapping[str, Tensor]) -> None:
        """Raises:
        StructureError: an integer or boolean tensor is not what this architecture copies into every network; the
            message names it. Batch norm's counters may differ: they count batches, and no network reads them.
        """
        for name, value in self.fixed.items():
            if name.rsplit(".", 1)[-1] != "num_batches_tracked" and not torch.equal(state.get(name, value), value):
                raise StructureError(
                    f"{name!r} ({value.dtype}) is not generated but copied, and differs from the constructor's; have "
                    "the task's constructor make the network with these values"
                )

    def unflatten(self, weights: Float[Tensor, "*batch D"]) -> dict[str, Tensor]:
        """Views `{name: [*batch, *shape]}` into flat rows, generated tensors only (what `functional_call` needs)."""
        if weights.shape[-1] != self.size:
            raise StructureError(f"flat weights have {weights.shape[-1]} entries, the architecture has {self.size}")
        lead = weights.shape[:-1]
        return {t.name: weights[..., t.slice].reshape([*lead, *t.shape]) for t in self.tensors}

    def state_dict(self, weights: Float[Tensor, " D"]) -> dict[str, Tensor]:
        """The complete state_dict of one network: original key order and dtypes, ties and fixed tensors restored."""
        values = self.unflatten(weights)
        dtypes = {t.name: t.dtype for t in self.tensors}
        state = {}
        for key in self.keys:
            owner = self.aliases.get(key, key)
            if owner in self.fixed:
                state[key] = self.fixed[owner].clone()
            else:
                state[key] = values[owner].to(dtypes[owner]).clone()
        return state

    def permutation_index(self, permutations: Mapping[str, Int[Tensor, "*batch n"]]) -> Int[Tensor, "*batch D"]:
        """Gather index that renames hidden units: `weights.gather(-1, index)` computes the same function.

        Args:
            permutations: for every group, new unit i is old unit `permutations[group][..., i]`.
        """
        first = next(iter(permutations.values()))
        lead = first.shape[:-1]
        blocks = []
        for t in self.tensors:
            index = torch.full((*lead, *t.shape), t.offset, dtype=torch.long, device=first.device)
            for axis, (length, group) in enumerate(zip(t.shape, t.groups, strict=True)):
                stride = math.prod(t.shape[axis + 1 :])
                coordinate = self._axis_coordinates(permutations, group, length, first.device)
                view = [*coordinate.shape[:-1]] + [1] * len(t.shape)
                view[len(coordinate.shape) - 1 + axis] = length
                index += stride * coordinate.reshape(view)
            blocks.append(index.reshape(*lead, t.numel))
        return torch.cat(blocks, dim=-1)

    def random_permutations(self, batch: int, rng: torch.Generator) -> dict[str, Int[Tensor, "batch n"]]:
        """One uniformly drawn permutation of every group for each of `batch` networks."""
        return {
            group: torch.rand(batch, n, generator=rng, device=rng.device).argsort(dim=-1)
            for group, n in self.groups.items()
        }

    def _axis_coordinates(self, permutations: Mapping, group: str | None, length: int, device: torch.device) -> Tensor:
        """Old coordinate of every new position along one axis: `[length]`, or `[*batch, length]` when permuted."""
        if group is None or group not in permutations:
            return torch.arange(length, device=device)
        block = length // self.groups[group]
        coordinate = permutations[group][..., None] * block + torch.arange(block, device=device)
        return coordinate.flatten(-2)


def _listed(names: Sequence[str], shown: int = 3) -> str:
    """The first of these names, and how many there are besides: a whole language model's fill a screen."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{list(names[:shown])}{more}"


def _kind(name: str, value: Tensor) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("running_mean", "running_var"):
        return leaf
    if value.numel() == 1:
        return "scalar"
    if leaf == "bias":
        return "bias"
    return "weight" if value.dim() >= 2 else "scale"


def _group_sizes(tensors: list[TensorSpec]) -> dict[str, int]:
    lengths: dict[str, set[int]] = {}
    for t in tensors:
        for length, group in zip(t.shape, t.groups, strict=True):
            if group is not None:
                lengths.setdefault(group, set()).add(length)
    for group, found in lengths.items():
        if any(length % min(found) for length in found):
            raise StructureError(
                f"axes of symmetry group {group!r} have lengths {sorted(found)}, not multiples of one size"
            )
    return {group: min(found) for group, found in lengths.items()}
