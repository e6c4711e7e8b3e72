"""Weight matching: permute a network's hidden units until its weights lie as near as possible to another network's.

Follows Ainsworth et al. 2022, "Git Re-Basin" (arXiv 2209.04836), section 3.2: the units of one group at a time are
assigned by the Hungarian algorithm while all others stay, until nothing improves. Where no tensor touches two groups
(any network with one hidden layer) a single pass is exact; else the result is a local optimum.

Batch norm's running statistics are renamed with their units and do not count: they follow from weights and data, and a
few variances of hundreds would outweigh millions of weights, in which unit is like which as in a distance.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from Gpt.structure import Structure, TensorSpec

Permutations = dict[str, Int[Tensor, "R n"]]
Tensors = dict[str, Float[Tensor, "R ..."]]
MAX_SWEEPS = 30
# Weights of one batch of pairs on a CPU: keeps its few copies in tens of megabytes, where a network is smaller.
PAIR_ELEMENTS = 2**22
# Weights that are aligned at once: half a GiB, of which there are a few copies.
ELEMENTS = 2**27
# Assignments of fewer units take less time than handing them to a thread.
THREADED_UNITS = 64


def is_exact(structure: Structure) -> bool:
    """Whether `align` finds the global optimum: no tensor has two permuted axes, so the groups are independent."""
    return all(sum(group is not None for group in t.groups) <= 1 for t in structure.tensors)


def align(
    weights: Float[Tensor, "R D"], reference: Float[Tensor, "*one_or_R D"], structure: Structure
) -> tuple[Float[Tensor, "R D"], Permutations]:
    """Permute the hidden units of every network such that it comes as near to its reference as weight matching finds.

    The networks compute the same functions as before, are never further from the reference than before, and aligning
    them again changes nothing.

    Args:
        weights: networks to permute.
        reference: one network `[D]` for all, or one for each `[R, D]`.

    Returns:
        The permuted networks, and the permutations as `Structure.permutation_index` takes them.
    """
    pieces = zip(*(_pieces(networks, structure) for networks in (weights, reference.expand_as(weights))), strict=True)
    aligned, orders = [], []
    for rows, references in pieces:
        orders.append(_best_match(_learned(rows, structure), _learned(references, structure), structure).permutations)
        renamed = _Matching.identity(rows, references, structure)
        for group, order in orders[-1].items():
            renamed = renamed.permuted(group, order)
        aligned.append(structure.flatten(renamed.current))
    permutations = {group: torch.cat([order[group] for order in orders]) for group in structure.groups}
    return torch.cat(aligned), permutations


def networks_at_once(structure: Structure) -> int:
    """How many networks are in memory for alignment, a few copies of each."""
    return max(1, ELEMENTS // structure.size)


def _pieces(networks: Float[Tensor, "R D"], structure: Structure) -> Sequence[Float[Tensor, "r D"]]:
    """As many as are aligned at once."""
    return networks.split(networks_at_once(structure))


def _best_match(weights: Float[Tensor, "R D"], reference: Float[Tensor, "R D"], structure: Structure) -> "_Matching":
    matching = _match(weights, reference, structure)
    if is_exact(structure):
        return matching
    # A second start, the network as it is: aligning never makes things worse.
    direct = _descend(_Matching.identity(weights, reference, structure))
    better = direct.similarity(structure.tensors) > matching.similarity(structure.tensors)
    return matching.where(better, direct)


def permutation_distance(
    a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], structure: Structure, candidates: int | None = None
) -> Float[Tensor, "n m"]:
    """L2 distance of every pair of networks, minimum over permutations of hidden units; of what is learned alone.

    Exact where `is_exact` holds, else the upper bound that weight matching finds: the least of both networks aligned to
    one reference, of one aligned to the other, and of the two as they are.

    Args:
        candidates: align, for every row, only this many networks of `b` to it: the nearest once everything is aligned
            to the one reference. The other entries are then upper bounds, too. All when None.
    """
    distances, (a, b) = _common_distances(_learned(a, structure), _learned(b, structure), structure)
    if not structure.groups:
        return distances
    columns = distances.topk(min(candidates or len(b), len(b)), dim=1, largest=False).indices
    rows = torch.arange(len(a), device=a.device)[:, None].expand_as(columns)
    matched = _pair_distances(a, b, rows.flatten(), columns.flatten(), structure)
    return distances.scatter_reduce(1, columns, matched.view(columns.shape), "amin")


def mutual_distance(networks: Float[Tensor, "n D"], structure: Structure) -> Float[Tensor, " pairs"]:
    """`permutation_distance` of every two of the networks."""
    learned = _learned(networks, structure)
    distances, (aligned, _) = _common_distances(learned, learned, structure)
    rows, columns = torch.triu_indices(len(networks), len(networks), offset=1, device=networks.device)
    if not structure.groups:
        return distances[rows, columns]
    return distances[rows, columns].minimum(_pair_distances(aligned, aligned, rows, columns, structure))


def _learned(weights: Float[Tensor, "R D"], structure: Structure) -> Float[Tensor, "R D"]:
    """The weights with zeros in place of running statistics; those very weights where there are none."""
    if structure.statistics:
        weights = weights.clone()
        for t in structure.statistics:
            weights[:, t.slice] = 0
    return weights


def _common_distances(
    a: Float[Tensor, "n D"], b: Float[Tensor, "m D"], structure: Structure
) -> tuple[Float[Tensor, "n m"], tuple[Float[Tensor, "n D"], Float[Tensor, "m D"]]]:
    """Distances in one common order of the units, or of the networks as they are where that is nearer; and all
    networks in that order."""
    distances = _distances(a, b)
    if not structure.groups:
        return distances, (a, b)
    aligned = _canonical(a, b[0], structure), _canonical(b, b[0], structure)
    return distances.minimum(_distances(*aligned)), aligned


def _distances(a: Float[Tensor, "n D"], b: Float[Tensor, "m D"]) -> Float[Tensor, "n m"]:
    # The matrix-product form of cdist cancels badly for near-copies, which are what novelty measures look for.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").nan_to_num(torch.inf, posinf=torch.inf)


def _pair_distances(
    a: Float[Tensor, "n D"],
    b: Float[Tensor, "m D"],
    rows: Int[Tensor, " pairs"],
    partners: Int[Tensor, " pairs"],
    structure: Structure,
) -> Float[Tensor, " pairs"]:
    """Distance of rows of `a` to partners in `b`, which are matched to them whatever order they have."""
    several = PAIR_ELEMENTS // structure.size
    size = networks_at_once(structure) if a.is_cuda or not several else several
    distances = []
    for row, partner in zip(rows.split(size), partners.split(size), strict=True):
        matching = _match(b[partner], a[row], structure)
        distances.append((structure.flatten(matching.current) - a[row]).norm(dim=1))
    return torch.cat(distances).nan_to_num(torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class _Matching:
    """Networks on their way to their references: their tensors as permuted so far, and by which permutations."""

    structure: Structure
    reference: Tensors
    current: Tensors
    permutations: Permutations

    @classmethod
    def identity(cls, weights: Float[Tensor, "R D"], reference: Float[Tensor, "*one_or_R D"], structure: Structure):
        order = {g: torch.arange(n, device=weights.device).repeat(len(weights), 1) for g, n in structure.groups.items()}
        return cls(structure, structure.unflatten(reference.expand_as(weights)), structure.unflatten(weights), order)

    def touched(self, group: str) -> list[TensorSpec]:
        return [t for t in self.structure.tensors if group in t.groups]

    def neighbours(self, group: str) -> set[str]:
        """Groups whose best assignment depends on the order of this one: itself too, where a tensor has it twice."""
        beside = {g for t in self.touched(group) for g in t.groups if g is not None and g != group}
        return beside | {group for t in self.touched(group) if t.groups.count(group) > 1}

    def similarity(self, tensors: Collection[TensorSpec]) -> Float[Tensor, " R"]:
        """Inner product with the reference over some of the tensors."""
        products = [(self.reference[t.name] * self.current[t.name]).flatten(1).sum(1) for t in tensors]
        return torch.stack(products).sum(0)

    def best_assignment(
        self, group: str, tensors: Collection[TensorSpec], rows: Bool[Tensor, " R"] | None = None
    ) -> Int[Tensor, "R n"]:
        """For every unit of the reference, the current unit most similar to it by these tensors, one to one.

        Args:
            rows: networks to do this for, all by default; the units of any other stay where they are.
        """
        count, products = self.structure.groups[group], []
        for t in tensors:
            for axis in _axes(t, group):
                left, right = (_units(side[t.name], axis, count) for side in (self.reference, self.current))
                products.append(left @ right.mT)
        matrices = torch.stack(products).sum(0).nan_to_num()
        best = matrices.argmax(dim=2)
        # Where no two units have the same favourite, nothing is better; snapshots of one training are like that.
        order = torch.arange(count, device=best.device)
        rivals = (best.sort(dim=1).values != order).any(dim=1)
        if rows is not None:
            best, rivals = torch.where(rows[:, None], best, order), rivals & rows
        best[rivals] = _assigned(matrices[rivals])
        return best

    def permuted(self, group: str, assignment: Int[Tensor, "R n"]) -> "_Matching":
        """Put current unit `assignment[r, i]` in place i of network r."""
        moved = {}
        for t in self.touched(group):
            value = self.current[t.name]
            for axis in _axes(t, group):
                value = _take_units(value, axis, assignment)
            moved[t.name] = value
        order = self.permutations[group].gather(1, assignment)
        return replace(self, current=self.current | moved, permutations=self.permutations | {group: order})

    def where(self, chosen: Bool[Tensor, " R"], other: "_Matching") -> "_Matching":
        """The other matching for the chosen networks, this one for the rest."""

        def pick(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: value
                if value is theirs[name]
                else torch.where(chosen.view(-1, *[1] * (value.dim() - 1)), theirs[name], value)
                for name, value in mine.items()
            }

        return replace(
            self, current=pick(self.current, other.current), permutations=pick(self.permutations, other.permutations)
        )


def _canonical(
    weights: Float[Tensor, "R D"], reference: Float[Tensor, " D"], structure: Structure
) -> Float[Tensor, "R D"]:
    """Aligned to the reference in a way that does not depend on the order of the units: copies stay copies."""
    matchings = (_match(rows, reference, structure) for rows in _pieces(weights, structure))
    return torch.cat([structure.flatten(matching.current) for matching in matchings])


def _match(weights: Float[Tensor, "R D"], reference: Float[Tensor, "*one_or_R D"], structure: Structure) -> _Matching:
    """Match the groups one after the other by those tensors whose other axes are matched already, then improve.

    Which network comes out does not depend on the order of the units that went in.
    """
    matching = _Matching.identity(weights, reference, structure)
    matched: set[str | None] = {None}
    for group in structure.groups:
        usable = [t for t in structure.tensors if [g for g in t.groups if g not in matched] == [group]]
        if usable:
            matching = matching.permuted(group, matching.best_assignment(group, usable))
        matched.add(group)
    return matching if is_exact(structure) else _descend(matching)


def _descend(matching: _Matching) -> _Matching:
    """Coordinate descent over the groups; a step is taken for the networks that it brings nearer to their reference.

    A group is looked at again only for networks where another one, with which it shares a tensor, has moved since.
    """
    structure = matching.structure
    norms = [structure.flatten(side).norm(dim=1) for side in (matching.reference, matching.current)]
    tolerance = 1e-5 * norms[0] * norms[1]  # a smaller gain is a rounding error
    stale = {group: torch.ones_like(tolerance, dtype=torch.bool) for group in structure.groups}
    for _ in range(MAX_SWEEPS):
        for group in structure.groups:
            rows = stale[group]
            if not rows.any():
                continue
            touched = matching.touched(group)
            proposal = matching.permuted(group, matching.best_assignment(group, touched, rows))
            better = proposal.similarity(touched) > matching.similarity(touched) + tolerance
            matching = matching.where(better, proposal)
            stale[group] = torch.zeros_like(rows)
            for neighbour in matching.neighbours(group):
                stale[neighbour] = stale[neighbour] | better
        if not any(bool(rows.any()) for rows in stale.values()):
            break
    return matching


def _assigned(similarities: Float[Tensor, "R n n"]) -> Int[Tensor, "R n"]:
    """For every row of each matrix a column, one to one, such that the entries where they meet sum to the most."""
    matrices = similarities.cpu().numpy()
    assigned = np.empty(matrices.shape[:2], dtype=np.int64)

    def solve(network: int) -> None:
        assigned[network] = linear_sum_assignment(matrices[network], maximize=True)[1]

    count, units = len(matrices), matrices.shape[1]
    if count < 2 or units < THREADED_UNITS:
        for network in range(count):
            solve(network)
    else:
        with ThreadPoolExecutor(min(count, torch.get_num_threads())) as threads:  # SciPy leaves Python's lock
            list(threads.map(solve, range(count)))
    return torch.from_numpy(assigned).to(similarities.device)


def _axes(spec: TensorSpec, group: str) -> list[int]:
    return [axis for axis, name in enumerate(spec.groups) if name == group]


def _units(value: Float[Tensor, "R ..."], axis: int, count: int) -> Float[Tensor, "R n features"]:
    """One row per hidden unit: slices along an axis, a multiple axis cut into one contiguous block per unit."""
    return value.movedim(axis + 1, 1).reshape(len(value), count, -1)


def _take_units(value: Float[Tensor, "R ..."], axis: int, order: Int[Tensor, "R n"]) -> Float[Tensor, "R ..."]:
    rows = torch.arange(len(value), device=value.device)[:, None]
    moved = value.movedim(axis + 1, 1)
    return _units(value, axis, order.shape[1])[rows, order].reshape(moved.shape).movedim(1, axis + 1)
