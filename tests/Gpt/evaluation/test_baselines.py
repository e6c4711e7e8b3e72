from dataclasses import replace

import pytest
import torch
from torch import nn

from Gpt.data.alignment import align
from Gpt.evaluation import baselines
from Gpt.evaluation.population import test_population as measure
from Gpt.structure import Structure


def test_retrieval_is_the_brute_force_nearest_training_snapshot(task, zoo):
    metric = zoo.metrics["validation_loss"][40:]
    wanted = torch.linspace(-1, metric.max().item() + 1, 57)
    stored = baselines.retrieve(zoo, task, wanted)
    assert (stored.runs >= 40).all()
    found = zoo.metrics["validation_loss"][stored.runs, stored.snapshots]
    best = (metric.flatten()[None] - wanted[:, None]).abs().min(1).values
    torch.testing.assert_close((found - wanted).abs(), best)


def test_best_stored_are_the_best_snapshots_of_different_training_runs(task, zoo):
    metric = zoo.metrics["validation_loss"]
    stored = baselines.best_stored(zoo, task, 10)
    assert len(stored.runs.unique()) == 10 and (stored.runs >= 40).all()
    values = metric[stored.runs, stored.snapshots]
    torch.testing.assert_close(values, metric[40:].min(1).values.sort().values[:10])
    worst = baselines.best_stored(zoo, replace(task, minimize=False), 1)
    assert metric[worst.runs, worst.snapshots] == metric[40:].max()


def test_final_stored_ranks_training_runs_and_keeps_the_order_of_others(task, zoo):
    metric = zoo.metrics["validation_loss"]
    ranked = baselines.final_stored(zoo, task, "train")
    assert (metric[ranked.runs, -1].diff() >= 0).all() and (ranked.snapshots == 5).all()
    assert torch.equal(baselines.final_stored(zoo, task, "test", 4).runs, torch.arange(4))
    highest = baselines.final_stored(zoo, replace(task, minimize=False), "train")
    assert (metric[highest.runs, -1].diff() <= 0).all() and highest.runs.sort().values.equal(torch.arange(40, 120))


def test_noise_is_relative_to_each_tensor_and_grows_with_its_scale(task, zoo):
    weights = baselines.final_stored(zoo, task, "train").read(zoo, "cpu")
    noisy = baselines.noisy(weights, task.structure, 0.2, seed=0)
    for spec in task.structure.tensors:
        spread = weights[:, spec.slice].std(1, correction=0, keepdim=True)
        relative = (noisy - weights)[:, spec.slice] / spread
        assert relative.std() == pytest.approx(0.2, rel=0.15)
    losses = [
        measure(task, baselines.noisy(weights, task.structure, scale, seed=0), "test")["test_loss"].mean()
        for scale in (0.0, 0.2, 1.0)
    ]
    assert losses[0] == measure(task, weights, "test")["test_loss"].mean()
    assert losses[0] < losses[1] < losses[2]


def test_noise_leaves_running_statistics_alone():
    structure = Structure.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    weights = torch.rand(5, structure.size)
    for jittered in (
        baselines.noisy(weights, structure, 1.0, seed=0),
        baselines.per_weight_gaussian(weights, structure, 5, seed=0) - weights.mean(0) + weights,
    ):
        moved = (jittered - weights).abs() > 1e-6
        changed = {t.name: bool(moved[:, t.slice].any()) for t in structure.tensors}
        assert not changed["1.running_var"] and not changed["1.running_mean"] and changed["0.weight"]


def test_soups_average_consecutive_networks_in_order_of_merit():
    weights = torch.arange(14.0).view(7, 2)
    torch.testing.assert_close(baselines.soups(weights, 3), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))
    torch.testing.assert_close(baselines.soups(weights, 50), weights.mean(0, keepdim=True))


def test_soup_of_permuted_copies_is_the_network_itself(task, zoo):
    network = baselines.best_stored(zoo, task, 1).read(zoo, "cpu")
    permutations = task.structure.random_permutations(16, torch.Generator().manual_seed(0))
    copies = network.expand(16, -1).gather(1, task.structure.permutation_index(permutations))
    aligned, _ = align(copies, copies[0], task.structure)
    torch.testing.assert_close(baselines.soups(aligned, 16), copies[:1])
    assert not torch.allclose(baselines.soups(copies, 16), copies[:1], atol=0.05)
    torch.testing.assert_close(baselines.midpoints(copies, task.structure), copies[::2])


def test_gaussian_has_the_mean_and_spread_of_every_weight(task, zoo):
    pool = baselines.final_stored(zoo, task, "train").read(zoo, "cpu")
    drawn = baselines.per_weight_gaussian(pool, task.structure, 4000, seed=0)
    torch.testing.assert_close(drawn.mean(0), pool.mean(0), atol=0.1, rtol=0.05)
    torch.testing.assert_close(drawn.std(0), pool.std(0), atol=0.02, rtol=0.06)
    correlation = torch.corrcoef(drawn[:, :5].T) - torch.eye(5)
    assert correlation.abs().max() < 0.08
