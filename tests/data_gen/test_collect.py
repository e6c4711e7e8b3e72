import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from data_gen import collect as collecting
from data_gen.collect import claim, collect, snapshot_schedule, total_iterations, train_population
from Gpt.data import shards
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError, TaskError, ZooError
from Gpt.evaluation.population import test_population as measure
from Gpt.masks import MaskSplit
from Gpt.networks import MLP, CartPoleActor
from Gpt.recipes import PpoRecipe, SingleRecipe, SupervisedRecipe
from Gpt.scoring import classification_loss, mask_error
from Gpt.tasks import TASK_METADATA, Task


def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (48,), generator=generator)
    return torch.randn(48, 6, generator=generator) + labels[:, None], labels


def make_task(**fields):
    defaults = dict(
        name="toy",
        task_test_fn=classification_loss,
        constructor=lambda: MLP(6, 5, 3),
        data_fn=lambda: examples(1),
        validation_data_fn=lambda: examples(2),
        train_data_fn=lambda: examples(0),
        minimize=True,
        best_prompt=0.0,
        recursive_prompt=0.0,
        metric="loss",
        batched=True,
        recipe=SupervisedRecipe(epochs=2, batch_size=8),
    )
    return Task(**defaults | fields)


@pytest.fixture
def task():
    return make_task()


def gather(task, folder, runs=7, **options):
    collect(task, folder, **dict(runs=runs, snapshots=4, shard_runs=3, progress=False) | options)
    return Zoo.open(folder, task.structure)


@pytest.mark.parametrize(("iterations", "snapshots", "expected"), [(9, 3, [7, 8, 9]), (9, 1, [9]), (3, 3, [1, 2, 3])])
def test_a_tail_is_the_last_iterations_in_a_row(iterations, snapshots, expected):
    assert snapshot_schedule(iterations, snapshots, "tail") == expected


def test_a_tail_is_no_longer_than_the_run():
    with pytest.raises(ConfigError, match="a tail of 1 to 9"):
        snapshot_schedule(9, 10, "tail")


def test_a_zoo_of_single_runs_keeps_the_tail_after_the_epochs(tmp_path):
    recipe = SingleRecipe(epochs=2, batch_size=8, augmentation="none", tail_iterations=5)
    zoo = gather(make_task(recipe=recipe), tmp_path, runs=2, snapshots=4, spacing="tail")
    assert zoo.iterations == [14, 15, 16, 17]  # 48 examples: 6 iterations an epoch
    assert zoo.metrics.keys() == {"validation_loss", "validation_error", "test_loss", "test_error"}


@pytest.mark.parametrize("spacing", ["log", "uniform"])
@pytest.mark.parametrize(
    "iterations, snapshots", [(1, 2), (5, 6), (12, 12), (1360, 2), (1360, 3), (1360, 32), (11700, 200)]
)
def test_schedules_are_increasing_and_hold_both_ends(spacing, iterations, snapshots):
    schedule = snapshot_schedule(iterations, snapshots, spacing, 0)
    assert len(schedule) == snapshots
    assert schedule[0] == 0 and schedule[-1] == iterations
    assert all(a < b for a, b in zip(schedule, schedule[1:], strict=False))


def test_log_schedule_is_even_in_log_once_integers_are_dense_enough():
    schedule = torch.tensor(snapshot_schedule(100_000, 41)).double()
    ratios = (schedule[20:].log().diff()).exp()
    assert (ratios - 100_000 ** (1 / 39)).abs().max() < 0.02
    assert snapshot_schedule(1000, 5, "log") == [0, 1, 10, 100, 1000]


def test_uniform_schedule_depends_on_the_seed_alone():
    assert snapshot_schedule(1000, 20, "uniform", 3) == snapshot_schedule(1000, 20, "uniform", 3)
    assert snapshot_schedule(1000, 20, "uniform", 3) != snapshot_schedule(1000, 20, "uniform", 4)
    inner = torch.tensor([snapshot_schedule(1000, 11, "uniform", seed)[1:-1] for seed in range(500)]).float()
    assert abs(inner.mean() - 500) < 15 and abs(inner.std() - 289) < 10


@pytest.mark.parametrize("snapshots, spacing", [(1, "log"), (13, "log"), (4, "even")])
def test_impossible_schedules_are_named(snapshots, spacing):
    with pytest.raises(ConfigError, match="snapshots do not fit|'even' is not known"):
        snapshot_schedule(11, snapshots, spacing)


def test_a_collected_zoo_holds_the_population(task, tmp_path):
    zoo = gather(task, tmp_path)
    weights, metrics = train_population(task, list(range(7)), 0, zoo.iterations, "cpu")
    assert zoo.run_ids.tolist() == list(range(7))
    every = torch.cartesian_prod(torch.arange(7), torch.arange(4))
    torch.testing.assert_close(zoo.read(*every.T), weights.flatten(0, 1), atol=1e-5, rtol=1e-4)
    for name, values in metrics.items():
        torch.testing.assert_close(zoo.metrics[name], values, atol=1e-4, rtol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir() if "shard-00002" in file.name) == [
        "shard-00002.json",
        "shard-00002.metrics.safetensors",
        "shard-00002.safetensors",
    ]
    zoo.verify()


def test_smaller_populations_make_the_same_zoo(task, tmp_path):
    one, other = gather(task, tmp_path / "a"), gather(task, tmp_path / "b", population=2)
    torch.testing.assert_close(one.metrics["test_loss"], other.metrics["test_loss"], atol=1e-4, rtol=1e-4)


def test_finished_shards_are_kept_and_a_zoo_can_grow(task, tmp_path, monkeypatch):
    gather(task, tmp_path, runs=4)
    trained = []
    original = collecting.train_population
    monkeypatch.setattr(
        collecting,
        "train_population",
        lambda task, run_ids, *args, **options: trained.extend(run_ids) or original(task, run_ids, *args, **options),
    )
    assert gather(task, tmp_path, runs=4).runs == 4
    assert trained == []
    assert gather(task, tmp_path, runs=8).runs == 8
    assert trained == [3, 4, 5, 6, 7]  # the second shard had held run 3 alone
    assert gather(task, tmp_path, runs=2).runs == 8


def test_an_interrupted_collection_continues(task, tmp_path, monkeypatch):
    original = shards.write_shard

    def interrupted(folder, manifest, index, *rest):
        if index == 1:
            (folder / ".shard-00001.safetensors.123").write_bytes(b"half a file")
            raise KeyboardInterrupt
        return original(folder, manifest, index, *rest)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gather(task, tmp_path)
    monkeypatch.setattr(shards, "write_shard", original)
    assert shards.finished_shards(tmp_path) == [0]
    assert gather(task, tmp_path).runs == 7
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.lock"))


def test_other_settings_are_refused(task, tmp_path):
    gather(task, tmp_path)
    with pytest.raises(ZooError, match="seed 0, this run asks for 1"):
        gather(task, tmp_path, seed=1)


def test_exploding_runs_are_dropped(tmp_path):
    task = make_task(recipe=SupervisedRecipe(epochs=2, batch_size=8, learning_rate=1e6))
    with pytest.raises(ZooError, match="none for the train split"):
        gather(task, tmp_path).split("train")


def test_two_workers_share_the_work(task, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "WAIT_SECONDS", 0.01)
    trained, barrier = [], threading.Barrier(2)
    original = collecting.train_population

    def train(task, run_ids, *args, **options):
        if len(trained) < 2:
            trained.append(run_ids[0])
            barrier.wait(30)  # both workers are at work at the same time
        else:
            trained.append(run_ids[0])
        return original(task, run_ids, *args, **options)

    monkeypatch.setattr(collecting, "train_population", train)
    task.structure, task.data("train"), task.data("validation"), task.data("test")
    workers = [threading.Thread(target=gather, args=(task, tmp_path, 12)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert sorted(trained) == [0, 3, 6, 9]
    assert Zoo.open(tmp_path, task.structure).runs == 12


def test_a_claim_is_exclusive_and_released(tmp_path):
    with claim(tmp_path, 0) as first:
        with claim(tmp_path, 0) as second, claim(tmp_path, 1) as other:
            assert (first, second, other) == (True, False, True)
    with claim(tmp_path, 0) as again:
        assert again
    assert not list(tmp_path.iterdir())


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("holder", ["ended process", "another process with the same number", "killed while writing"])
def test_a_stale_lock_is_taken_over(tmp_path, holder):
    lock = tmp_path / "shard-00000.lock"
    identity = collecting._identity(os.getpid()) | {"time": 0}
    if holder == "ended process":
        lock.write_text(json.dumps(identity | {"pid": ended_process()}))
    elif holder == "killed while writing":
        lock.write_text("")
        os.utime(lock, (0, 0))
    else:
        lock.write_text(json.dumps(identity | {"started": "1"}))
    with claim(tmp_path, 0) as claimed:
        assert claimed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"host": "elsewhere", "pid": 2**22 + 1}, {}])
def test_a_lock_that_may_be_held_is_respected(tmp_path, changes):
    lock = tmp_path / "shard-00000.lock"
    lock.write_text(json.dumps(collecting._identity(os.getpid()) | {"time": 0} | changes))
    with claim(tmp_path, 0) as claimed:
        assert not claimed
    assert lock.exists()


def test_reinforcement_learning_recipes_are_dispatched(tmp_path):
    recipe = PpoRecipe(iterations=2, environments=4, horizon=4, evaluation_episodes=2)
    task = Task(name="cartpole", **TASK_METADATA["cartpole"] | {"recipe": recipe})
    assert total_iterations(task) == 2
    zoo = gather(task, tmp_path, runs=3, snapshots=3)
    assert set(zoo.metrics) == {"validation_return", "test_return"}
    assert zoo.structure.size == sum(p.numel() for p in CartPoleActor().parameters())


@pytest.mark.parametrize("setting", ["runs", "shard_runs", "population"])
def test_impossible_sizes_are_named(task, tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{setting} is -1"):
        gather(task, tmp_path, **{setting: -1})


def test_a_task_without_recipe_is_named(tmp_path):
    with pytest.raises(TaskError, match="'toy' has no recipe"):
        gather(make_task(recipe=None), tmp_path)


def test_a_family_is_collected_on_its_masks_and_keeps_apart_from_other_splits(tmp_path):
    family = MaskSplit(held_out=2, validation=1)
    task = make_task(task_test_fn=mask_error, constructor=lambda: nn.Linear(6, 2), metric="error", family=family)
    zoo = gather(task, tmp_path)
    masks = family.mask_of_runs(torch.arange(7))
    final = zoo.read(torch.arange(7), torch.full((7,), 3))
    expected = measure(task, final, "validation", masks)["validation_error"]
    torch.testing.assert_close(zoo.metrics["validation_error"][:, -1], expected, atol=1e-3, rtol=1e-4)
    assert zoo.manifest.recipe["family"] == dataclasses.asdict(family)
    with pytest.raises(ZooError):
        gather(dataclasses.replace(task, family=MaskSplit(held_out=2, validation=1, seed=1)), tmp_path)
