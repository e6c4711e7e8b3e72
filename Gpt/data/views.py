"""The same zoo seen otherwise: snapshots as runs, and runs with their hidden units in one order. Nothing is copied."""

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from Gpt.data.alignment import align, networks_at_once
from Gpt.data.zoo import Zoo
from Gpt.errors import ZooError


def split_by_snapshot(zoo: Zoo, test: int, validation: int) -> Zoo:
    """Every snapshot as a run of its own with one snapshot; rows follow training, run after run.

    The held-out snapshots lie at even distances among the others, test and validation in turn, so that they are as hard
    to tell from the training networks as these are from each other. They are neighbours of training networks
    nevertheless: a split like this shows copying, not generalisation to other trainings.

    Args:
        test, validation: how many networks to hold out. The new run ids begin with those, as `Zoo.split` wants it.

    Raises:
        ZooError: no network is left to train on.
    """
    total, held_out = zoo.runs * zoo.snapshots, test + validation
    if held_out >= total:
        raise ZooError(
            f"the zoo has {total} networks, of which {test} for testing and {validation} for validation leave none to "
            "train on; keep more snapshots, or set smaller zoo.test_runs and zoo.validation_runs"
            + "".join(f"; run {run} was dropped: {why}" for run, why in zoo.dropped.items())
        )
    places = [(2 * i + 1) * total // (2 * held_out) for i in range(held_out)]
    in_turn = sorted(range(held_out), key=lambda i: _turn(i, test, held_out))
    order = [places[i] for i in in_turn]
    chosen = set(order)
    order += [place for place in range(total) if place not in chosen]
    run_ids = torch.empty(total, dtype=torch.long)
    run_ids[torch.tensor(order)] = torch.arange(total)
    metrics = {name: values.reshape(-1, 1) for name, values in zoo.metrics.items()}
    return Zoo(
        _Snapshots(zoo), zoo.structure, run_ids, zoo.iterations[-1:], metrics, zoo.device, test, validation,
        zoo.manifest, zoo.dropped, zoo.folder, zoo.seconds, zoo.snapshots_of_training,
    )  # fmt: skip


def align_runs(zoo: Zoo, test: int, validation: int) -> Zoo:
    """Every run with its hidden units renamed, once for all its snapshots, such that its final network comes nearest to
    that of the first training run.

    What RPG has identities for, training runs in different basins (Wang et al. 2025, arXiv 2501.11587, "permutation
    state"), weight matching answers without telling the generator anything: see `Gpt.data.alignment`.

    Args:
        test, validation: the runs of these splits, as in `Zoo.open`.

    Raises:
        ZooError: no hidden units of the architecture are known.
    """
    if not zoo.structure.groups:
        raise ZooError(
            "zoo.align: no hidden units of this network are known; name them in the task's key 'symmetry', or drop it"
        )
    last = zoo.snapshots - 1
    first = zoo.split("train")[:1]
    reference = zoo.read(first, torch.full_like(first, last))[0]
    parts = []
    for rows in torch.arange(zoo.runs, device=zoo.device).split(networks_at_once(zoo.structure)):
        parts.append(align(zoo.read(rows, torch.full_like(rows, last)), reference, zoo.structure)[1])
    permutations = {group: torch.cat([part[group] for part in parts]) for group in zoo.structure.groups}
    return Zoo(
        _Renamed(zoo, permutations), zoo.structure, zoo.run_ids, zoo.iterations, zoo.metrics, zoo.device, test,
        validation, zoo.manifest, zoo.dropped, zoo.folder, zoo.seconds, zoo.snapshots_of_training,
    )  # fmt: skip


def _turn(i: int, test: int, held_out: int) -> tuple[bool, int]:
    """Whether held-out network i is for validation (the test ones are spread evenly among all), and its place."""
    return (i + 1) * test // held_out == i * test // held_out, i


class _Snapshots:
    """Reads row r as snapshot r % S of run r // S of another zoo."""

    def __init__(self, zoo: Zoo):
        self._zoo = zoo

    def read(self, runs: Int[Tensor, " B"], snapshots: Int[Tensor, " B"]) -> Float32[Tensor, "B D"]:
        return self._zoo.read(runs // self._zoo.snapshots, runs % self._zoo.snapshots)


class _Renamed:
    """Reads networks of another zoo with the hidden units of run r in the order `permutations[group][r]`."""

    def __init__(self, zoo: Zoo, permutations: dict[str, Int[Tensor, "runs n"]]):
        self._zoo, self._permutations = zoo, permutations

    def read(self, runs: Int[Tensor, " B"], snapshots: Int[Tensor, " B"]) -> Float32[Tensor, "B D"]:
        rows = runs.to(self._zoo.device)
        order = {group: permutation[rows] for group, permutation in self._permutations.items()}
        return self._zoo.read(runs, snapshots).gather(1, self._zoo.structure.permutation_index(order))
