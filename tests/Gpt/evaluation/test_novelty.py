from copy import copy
from dataclasses import replace

import pytest
import torch

from Gpt.evaluation import baselines
from Gpt.evaluation.novelty import Bank, Measured, former_runs_note, novelty
from Gpt.evaluation.population import test_population as measure
from Gpt.population.functional import stack_initial


def bank_of(zoo, task, max_runs=1000, max_behaviours=1000, **settings) -> Bank:
    return Bank.of(zoo, task, "cpu", max_runs=max_runs, max_behaviours=max_behaviours, candidates=6, **settings)


@pytest.fixture(scope="module")
def bank(task, zoo):
    return bank_of(zoo, task)


@pytest.fixture(scope="module")
def held_out(task, zoo):
    return baselines.final_stored(zoo, task, "test").read(zoo, "cpu")


def rows(task, bank, **sets):
    measured = {}
    for name, weights in sets.items():
        metric, (distance, _) = measure(task, weights, "test")["test_loss"], bank.nearest(weights)
        measured[name] = Measured(f"kind of {name}", metric, distance, bank.overlap(weights), bank.spread(weights))
    unit = bank.nearest(bank.weights[:20], bank.runs[:20])[0].mean()
    found, bar = novelty(measured, measured["held_out"], float(unit), task.minimize, seed=0)
    assert {row.name: row.kind for row in found} == {name: f"kind of {name}" for name in sets}
    return {row.name: row for row in found}, bar


def test_permuted_copies_are_found_out(task, zoo, bank, held_out):
    stored = baselines.best_stored(zoo, task, 20).read(zoo, "cpu")
    permutations = task.structure.random_permutations(20, torch.Generator().manual_seed(0))
    copies = stored.gather(1, task.structure.permutation_index(permutations))
    found, _ = rows(task, bank, copies=copies, held_out=held_out)
    assert found["copies"].distance < 1e-5 and found["copies"].distance_ratio < 1e-5
    assert found["copies"].copying_z < -5
    assert found["copies"].error_overlap > 0.98  # permuting units rounds logits differently
    assert found["copies"].novel_and_good == 0


def test_held_out_training_is_as_far_as_training_networks_are_from_each_other(task, bank, held_out):
    found, bar = rows(task, bank, held_out=held_out)
    row = found["held_out"]
    assert 0.8 < row.distance_ratio < 1.25
    assert row.copying_z == 0
    assert 0.2 < row.novel_and_good < 0.9
    assert row.error_overlap < 1
    assert bar > row.metric.mean


def test_copies_of_runs_that_gave_way_to_others_are_found_out(task, zoo, bank, held_out):
    former = held_out + 3
    changed = copy(zoo)
    changed.former = former.half()
    known, _ = rows(task, bank_of(changed, task), copies=former, held_out=held_out)
    unknown, _ = rows(task, bank, copies=former, held_out=held_out)
    assert known["copies"].distance < 0.1 < 3 < unknown["copies"].distance
    assert known["held_out"].distance_ratio == pytest.approx(unknown["held_out"].distance_ratio)
    assert f"{len(former)} runs" in former_runs_note(changed)[0] and not former_runs_note(zoo)


def test_a_run_that_gave_way_is_nobodys_own(task, zoo):
    changed, finals = copy(zoo), torch.arange(zoo.runs)
    changed.former = zoo.read(finals, torch.full_like(finals, -1)) + 1e-3
    bank = bank_of(changed, task)
    distance, _ = bank.nearest(bank.weights[:5], bank.runs[:5])
    torch.testing.assert_close(distance, torch.full((5,), 1e-3 * task.structure.size**0.5), rtol=1e-2, atol=0)


def test_copies_of_training_networks_that_are_copies_of_each_other_end_in_no_error(task, held_out):
    nothing = torch.zeros(len(held_out))
    sets = {"copies": Measured("generator", nothing, nothing), "others": Measured("baseline", nothing, nothing + 1)}
    (copies, others), _ = novelty(sets, sets["others"], unit=0.0, minimize=True, seed=0)
    assert copies.distance_ratio != copies.distance_ratio and others.distance_ratio == float("inf")


def test_diversity_is_that_of_trained_networks_and_none_of_one_network_under_many_names(task, bank, held_out):
    permutations = task.structure.random_permutations(20, torch.Generator().manual_seed(0))
    one = held_out[:1].expand(20, -1).gather(1, task.structure.permutation_index(permutations))
    half = held_out.mean(0) + (held_out - held_out.mean(0)) / 2
    found, _ = rows(task, bank, one=one, half=half, single=held_out[:1], held_out=held_out)
    assert found["held_out"].diversity == pytest.approx(1.0)
    assert found["one"].diversity < 1e-5
    assert found["single"].diversity is None
    assert 0 < found["half"].diversity < 0.75


def test_far_away_networks_are_novel_but_not_good(task, bank, held_out):
    random = 3 * stack_initial(task.constructor, task.structure, list(range(900, 920)))
    found, _ = rows(task, bank, random=random, held_out=held_out)
    assert found["random"].distance_ratio > 1 and found["random"].copying_z > 3
    assert found["random"].novel_and_good == 0


def test_a_little_noise_gives_the_distance_of_the_noise(task, zoo, bank, held_out):
    stored = baselines.best_stored(zoo, task, 20).read(zoo, "cpu")
    noise = 0.01 * torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
    found, _ = rows(task, bank, noise=stored + noise, held_out=held_out)
    assert found["noise"].distance == pytest.approx(noise.norm(dim=1).mean().item(), rel=1e-3)


def test_broken_networks_and_tasks_without_correctness(task, zoo, bank, held_out):
    without = replace(task, correct_fn=None)
    bank = bank_of(zoo, without)
    broken = torch.full_like(held_out, torch.nan)
    found, _ = rows(without, bank, broken=broken, held_out=held_out)
    assert found["broken"].error_overlap is None and found["broken"].novel_and_good == 0


def test_the_bank_holds_final_and_best_snapshots_of_the_best_training_runs(task, zoo):
    bank = bank_of(zoo, task, 10, 8)
    assert bank.weights.shape == (20, task.structure.size) and bank.wrong.shape == (8, 200)
    assert (bank.runs >= 40).all()
    first = bank.runs[:1]
    assert torch.equal(bank.weights[:1], zoo.read(first, torch.tensor([5])))
    alone = bank_of(zoo, task, 10, 8, with_best=False)
    assert torch.equal(alone.weights, bank.weights[:10]) and torch.equal(alone.runs, bank.runs[:10])
    assert alone.wrong.shape == (8, 200) and torch.equal(alone.wrong_runs, alone.runs[:8])


def test_a_training_network_is_compared_with_other_runs(bank):
    """Both snapshots of its own run are left out, of distances and of shared mistakes."""
    weights, runs = bank.weights[:5], bank.runs[:5]
    distance, nearest = bank.nearest(weights, runs)
    assert (distance > 0.1).all() and (bank.runs[nearest] != runs).all()
    assert bank.nearest(weights)[0].max() < 1e-5 and torch.equal(bank.nearest(weights)[1], torch.arange(5))
    assert (bank.overlap(weights) == 1).all() and (bank.overlap(weights, runs) < 1).any()
