"""Views lose nothing: every network once under its own metric, and aligned runs compute the same functions."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from Gpt.data.views import align_runs, split_by_snapshot
from Gpt.data.zoo import Zoo
from Gpt.errors import ZooError
from Gpt.networks import MLP
from Gpt.seeds import rng
from Gpt.structure import Structure

RUNS, SNAPSHOTS = 2, 25


@pytest.fixture
def zoo() -> Zoo:
    """Every weight of snapshot s of run r, and its error, is 25 r + s."""
    structure = Structure.of(nn.Linear(3, 2))
    numbers = torch.arange(float(RUNS * SNAPSHOTS)).view(RUNS, SNAPSHOTS)
    weights = numbers[..., None].expand(-1, -1, structure.size).contiguous()
    metrics = {"validation_error": numbers, "test_error": numbers}
    return Zoo.from_tensors(weights, metrics, [4, 7], list(range(100, 125)), structure)


@pytest.mark.parametrize(("test", "validation"), [(5, 5), (3, 7), (1, 1), (4, 0), (7, 3)])
def test_every_network_is_in_one_split_with_its_own_metric(zoo, test, validation):
    split = split_by_snapshot(zoo, test, validation)
    assert (split.runs, split.snapshots, split.iterations) == (50, 1, [124])
    sizes = {"test": test, "validation": validation, "train": 50 - test - validation}
    seen = []
    for name, size in sizes.items():
        if size:
            rows = split.split(name)
            networks = split.read(rows, torch.zeros_like(rows))
            assert len(rows) == size and (networks == networks[:, :1]).all()
            torch.testing.assert_close(split.metrics["validation_error"][rows, 0], networks[:, 0])
            seen += networks[:, 0].tolist()
    assert sorted(seen) == list(range(50))


def test_held_out_networks_lie_among_training_networks_at_even_distances(zoo):
    split = split_by_snapshot(zoo, 5, 5)
    held_out = torch.cat([split.split("test"), split.split("validation")]).sort().values
    assert (held_out.diff() == 5).all()
    assert (split.split("test").diff() == 10).all() and (split.split("validation").diff() == 10).all()
    assert held_out[0] > 0 and held_out[-1] < 49


def test_a_negative_snapshot_index_reads_the_same_network(zoo):
    split = split_by_snapshot(zoo, 5, 5)
    rows = split.split("train")
    torch.testing.assert_close(split.read(rows, torch.full_like(rows, -1)), split.read(rows, torch.zeros_like(rows)))


def test_too_many_held_out_networks_are_refused(zoo):
    with pytest.raises(ZooError, match="zoo.test_runs"):
        split_by_snapshot(zoo, 25, 25)


def shuffled_zoo():
    """Nine runs, which begin as unrelated networks; each ends as one network, nearly, with its hidden units in an order
    of its own."""
    structure = Structure.of(MLP(4, 6, 3), MLP.symmetry)
    draws = rng("cpu", 0)
    base = torch.randn(structure.size, generator=draws)
    weights = base + 0.01 * torch.randn(9, 2, structure.size, generator=draws)
    weights[:, 0] = torch.randn(9, structure.size, generator=draws)
    index = structure.permutation_index(structure.random_permutations(9, draws))
    shuffled = weights.gather(2, index[:, None].expand_as(weights))
    metrics = {"validation_loss": torch.zeros(9, 2)}
    return Zoo.from_tensors(shuffled, metrics, list(range(9)), [0, 1], structure, test_runs=2, validation_runs=1)


def test_aligned_runs_differ_by_their_noise_alone_and_keep_their_functions():
    zoo = shuffled_zoo()
    aligned = align_runs(zoo, 2, 1)
    rows = torch.arange(9)
    for snapshot in range(2):
        places = torch.full_like(rows, snapshot)
        before, after = zoo.read(rows, places), aligned.read(rows, places)
        assert (before - before.mean(0)).norm(dim=1).min() > 1
        if snapshot == 1:
            assert (after - after.mean(0)).norm(dim=1).max() < 0.2
        x = torch.randn(5, 4, generator=rng("cpu", 1))
        for a, b in zip(before, after, strict=True):
            outputs = [functional_call(MLP(4, 6, 3), zoo.structure.unflatten(flat), (x,)) for flat in (a, b)]
            torch.testing.assert_close(*outputs)
    for split in ("test", "validation", "train"):
        assert torch.equal(aligned.split(split), zoo.split(split))
    reference = aligned.split("train")[:1]
    assert torch.equal(aligned.read(reference, torch.tensor([-1])), zoo.read(reference, torch.tensor([-1])))


def test_an_architecture_without_hidden_units_cannot_be_aligned(zoo):
    with pytest.raises(ZooError, match="key 'symmetry'"):
        align_runs(zoo, 1, 0)
