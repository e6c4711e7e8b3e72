import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from data_gen import collect as collecting
from data_gen.collect import claim, collect, snapshot_schedule, total_iterations, train_population
from Gpt import files
from Gpt.data import shards
from Gpt.data.views import split_by_snapshot
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError, TaskError, ZooError
from Gpt.evaluation.population import test_population as measure
from Gpt.masks import MaskSplit
from Gpt.networks import MLP, CartPoleActor
from Gpt.recipes import PpoRecipe, SingleRecipe, SupervisedRecipe
from Gpt.scoring import mask_error
from Gpt.tasks import TASK_METADATA, Task


def mlp():
    return MLP(6, 5, 3)


@pytest.fixture
def make_task(noise_task):
    recipe = SupervisedRecipe(epochs=2, batch_size=8)
    return partial(noise_task, train=48, validation=48, test=48, recipe=recipe)


@pytest.fixture
def task(make_task):
    return make_task(mlp)


def gather(task, folder, runs=7, **options):
    collect(task, folder, **dict(runs=runs, snapshots=4, shard_runs=3, progress=False) | options)
    return Zoo.open(folder, task.structure)


def hooked(call):
    """`train_population`, after a call with the run ids."""

    def train(task, run_ids, *args, **options):
        call(run_ids)
        return train_population(task, run_ids, *args, **options)

    return train


@pytest.mark.parametrize(("iterations", "snapshots", "expected"), [(9, 3, [7, 8, 9]), (9, 1, [9]), (3, 3, [1, 2, 3])])
def test_a_tail_is_the_last_iterations_in_a_row(iterations, snapshots, expected):
    assert snapshot_schedule(iterations, snapshots, "tail") == expected


def test_a_tail_is_no_longer_than_the_run():
    with pytest.raises(ConfigError, match="a tail of 1 to 9"):
        snapshot_schedule(9, 10, "tail")


def test_a_zoo_of_single_runs_keeps_the_tail_after_the_epochs(make_task, tmp_path):
    recipe = SingleRecipe(epochs=2, batch_size=8, augmentation="none", tail_iterations=5)
    zoo = gather(make_task(mlp, recipe=recipe), tmp_path, runs=2, snapshots=4, spacing="tail")
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
    monkeypatch.setattr(collecting, "train_population", hooked(trained.extend))
    assert gather(task, tmp_path, runs=4).runs == 4
    assert trained == []
    assert gather(task, tmp_path, runs=8).runs == 8
    assert trained == [3, 4, 5, 6, 7]  # the second shard had held run 3 alone
    assert gather(task, tmp_path, runs=2).runs == 8


@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_a_zoo_is_its_first_runs_whatever_else_is_stored(task, tmp_path, storage):
    whole = gather(task, tmp_path, runs=8)
    part = Zoo.open(tmp_path, task.structure, storage=storage, runs=5, test_runs=2)
    assert part.run_ids.tolist() == list(range(5)) and part.split("train").tolist() == [2, 3, 4]
    every = torch.cartesian_prod(torch.arange(5), torch.arange(4)).T
    assert torch.equal(part.read(*every), whole.read(*every))
    assert all(torch.equal(part.metrics[name], values[:5]) for name, values in whole.metrics.items())
    assert 0 < part.seconds < whole.seconds
    with pytest.raises(IndexError):
        part.read(torch.tensor([5]), torch.tensor([0]))


def test_an_interrupted_collection_keeps_what_is_being_written_and_continues(task, tmp_path, monkeypatch):
    interrupted, original = threading.Event(), shards.write_shard

    def slow_disk(*args, **options):
        assert interrupted.wait(30)
        return original(*args, **options)

    def interrupt(run_ids):
        if run_ids[0] == 3:
            (tmp_path / ".shard-00001.safetensors.123").write_bytes(b"half a file")
            assert shards.finished_shards(tmp_path) == []
            interrupted.set()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_shard", slow_disk)
        patch.setattr(collecting, "train_population", hooked(interrupt))
        gather(task, tmp_path)
    assert shards.finished_shards(tmp_path) == [0]
    assert not list(tmp_path.glob("*.lock"))
    assert gather(task, tmp_path).runs == 7
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.lock"))


def test_shards_are_trained_while_others_are_written_and_claimed_until_they_are(task, tmp_path, monkeypatch):
    reached, original = threading.Event(), shards.write_shard

    def slow_disk(folder, manifest, index, *args, **options):
        if index == 0:
            assert reached.wait(30)  # the third shard's training
            with claim(tmp_path, 0) as claimed:
                assert not claimed
        return original(folder, manifest, index, *args, **options)

    monkeypatch.setattr(shards, "write_shard", slow_disk)
    monkeypatch.setattr(collecting, "train_population", hooked(lambda ids: reached.set() if ids[0] == 6 else None))
    zoo = gather(task, tmp_path)
    assert zoo.run_ids.tolist() == list(range(7))
    zoo.verify()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_leave_the_gpu_whole_though_it_goes_on_at_once(task, tmp_path, monkeypatch):
    def value(runs):
        return torch.tensor(runs)[:, None, None] / 10 + torch.arange(4)[:, None] / 100

    def train(task, run_ids, seed, iterations, device, progress):
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(50):  # the caller is far ahead of the GPU
            busy = busy @ busy / 50
        weights = value(run_ids).to(device) + 0 * busy[0, 0].nan_to_num() + torch.zeros(task.structure.size).to(device)
        return weights, {"validation_loss": weights[..., 0].clone()}

    monkeypatch.setattr(collecting, "train_population", train)
    monkeypatch.setattr(collecting, "PINNED_BYTES", 2**11)  # three runs in two pieces
    zoo = gather(task, tmp_path, runs=60, shard_runs=6, population=3, device="cuda")
    every = torch.cartesian_prod(torch.arange(60), torch.arange(4)).T
    expected = value(range(60)).expand(-1, -1, task.structure.size)
    torch.testing.assert_close(zoo.read(*every), expected.flatten(0, 1))
    torch.testing.assert_close(zoo.metrics["validation_loss"], expected[..., 0])
    zoo.verify()


def test_a_disk_that_is_full_ends_the_training_of_the_next_shard(task, tmp_path, monkeypatch):
    full, trained = threading.Event(), []

    def no_space(path):
        if "shard-" in path.name:
            full.set()
            raise OSError(28, "No space left on device")

    def wait_for_the_disk(run_ids):
        trained.append(run_ids[0])
        assert run_ids[0] == 0 or full.wait(30)

    monkeypatch.setattr(files, "flush", no_space)
    monkeypatch.setattr(collecting, "train_population", hooked(wait_for_the_disk))
    with pytest.raises(ZooError, match="no space left for .*shard-00000.safetensors"):
        gather(task, tmp_path, runs=30)
    assert len(trained) <= 3  # of ten shards
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_the_seconds_of_a_zoo_add_up_over_sessions(task, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "train_population", hooked(lambda run_ids: time.sleep(0.05)))
    first = gather(task, tmp_path, runs=6).seconds
    assert first >= 0.1
    assert gather(task, tmp_path, runs=6).seconds == first  # nothing was left to do
    grown = gather(task, tmp_path, runs=12)
    assert grown.seconds >= first + 0.1
    assert split_by_snapshot(grown, 2, 2).seconds == grown.seconds
    index = shards.shard_files(tmp_path, 3)["index"]  # as written before seconds were
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "seconds"}))
    assert first < Zoo.open(tmp_path, task.structure).seconds < grown.seconds


def test_a_zoo_that_is_complete_is_not_written_to(task, tmp_path):
    """It may lie where nothing can be."""

    def written() -> dict[str, int]:
        return {str(place): place.stat().st_mtime_ns for place in (tmp_path, *tmp_path.iterdir())}

    gather(task, tmp_path)
    before = written()
    gather(task, tmp_path)
    assert written() == before


def test_other_settings_are_refused(task, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="file is a file, where a zoo's folder is expected; mend zoo.path"):
        gather(task, tmp_path / "file")
    (tmp_path / "file").unlink()
    gather(task, tmp_path)
    with pytest.raises(ZooError, match="seed 0, this run asks for 1"):
        gather(task, tmp_path, seed=1)


def test_exploding_runs_are_dropped(make_task, tmp_path):
    task = make_task(mlp, recipe=SupervisedRecipe(epochs=2, batch_size=8, learning_rate=1e6))
    with pytest.raises(ZooError, match="none for the train split"):
        gather(task, tmp_path).split("train")


def test_two_workers_share_the_work(task, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "WAIT_SECONDS", 0.01)
    trained, barrier = [], threading.Barrier(2)

    def note(run_ids):
        trained.append(run_ids[0])
        if run_ids[0] in (0, 3):
            barrier.wait(30)  # both workers are at work at the same time

    one_at_a_time = threading.Lock()

    def training(*args, **options):
        note(args[1])
        with one_at_a_time:  # workers are processes; two threads of one must not differentiate at once
            return train_population(*args, **options)

    monkeypatch.setattr(collecting, "train_population", training)
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
    recipe = PpoRecipe(iterations=2, environments=4, horizon=4)
    task = Task(name="cartpole", **TASK_METADATA["cartpole"] | {"recipe": recipe})
    assert total_iterations(task) == 2
    zoo = gather(task, tmp_path, runs=3, snapshots=3)
    assert set(zoo.metrics) == {"validation_return", "test_return"}
    assert zoo.structure.size == sum(p.numel() for p in CartPoleActor().parameters())


@pytest.mark.parametrize("setting", ["runs", "shard_runs", "population"])
def test_impossible_sizes_are_named(task, tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{setting} is -1"):
        gather(task, tmp_path, **{setting: -1})


def test_a_task_without_recipe_is_named(make_task, tmp_path):
    with pytest.raises(TaskError, match="'toy' has no recipe"):
        gather(make_task(mlp, recipe=None), tmp_path)


def test_a_recipe_for_policies_trains_no_other_network(make_task, tmp_path):
    with pytest.raises(TaskError, match="task 'toy': key 'recipe' is a PpoRecipe, which trains .*CartPoleActor"):
        gather(make_task(mlp, recipe=PpoRecipe()), tmp_path)


def test_a_family_is_collected_on_its_masks_and_keeps_apart_from_other_splits(make_task, tmp_path):
    family = MaskSplit(held_out=2, validation=1)
    task = make_task(lambda: nn.Linear(6, 2), task_test_fn=mask_error, metric="error", family=family)
    zoo = gather(task, tmp_path)
    masks = family.mask_of_runs(torch.arange(7))
    final = zoo.read(torch.arange(7), torch.full((7,), 3))
    expected = measure(task, final, "validation", masks)["validation_error"]
    torch.testing.assert_close(zoo.metrics["validation_error"][:, -1], expected, atol=1e-3, rtol=1e-4)
    assert zoo.manifest.recipe["family"] == dataclasses.asdict(family)
    with pytest.raises(ZooError):
        gather(dataclasses.replace(task, family=MaskSplit(held_out=2, validation=1, seed=1)), tmp_path)
