"""Zoos in memory: the same networks as stored ones, and the right ones at every step of a stream."""

from dataclasses import replace

import pytest
import torch

from data_gen.collect import collect, train_population
from data_gen.memory import Stream, collect_in_memory
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError, TaskError, ZooError
from Gpt.tasks import TASK_METADATA, check_entry

SETTINGS = {"runs": 7, "snapshots": 3, "seed": 1, "population": 3}


@pytest.fixture(scope="module")
def task():
    task = check_entry("digits_loss", TASK_METADATA["digits_loss"])
    return replace(task, recipe=replace(task.recipe, epochs=1))


@pytest.fixture(scope="module")
def fresh(task):
    return collect_in_memory(task, **SETTINGS, test_runs=1, validation_runs=2, progress=False)


@pytest.fixture
def stream_of(task, tmp_path):
    """A stream of two runs every ten steps, and the run ids that it trains."""

    def make(zoo, every=10, population=2):
        trained = []

        def train(ids):
            trained.append(ids)
            return train_population(task, ids, 1, zoo.iterations, "cpu")

        return Stream(zoo, train, every, population, tmp_path / "former"), trained

    return make


def everything(zoo: Zoo) -> torch.Tensor:
    rows = torch.arange(zoo.runs).repeat_interleave(zoo.snapshots)
    return zoo.read(rows, torch.arange(zoo.snapshots).repeat(zoo.runs)).view(zoo.runs, zoo.snapshots, -1)


def test_a_zoo_in_memory_is_the_stored_one(task, fresh, tmp_path):
    collect(task, tmp_path / "zoo", **SETTINGS, shard_runs=3, progress=False)
    stored = Zoo.open(tmp_path / "zoo", task.structure, test_runs=1, validation_runs=2)
    assert torch.equal(everything(fresh), everything(stored))
    assert fresh.run_ids.tolist() == stored.run_ids.tolist() and fresh.iterations == stored.iterations
    assert fresh.metrics.keys() == stored.metrics.keys()
    assert all(torch.equal(fresh.metrics[name], stored.metrics[name]) for name in stored.metrics)
    assert fresh.split("test").tolist() == [0] and fresh.split("train").tolist() == [3, 4, 5, 6]


def test_exploded_runs_are_dropped_and_counted(task, fresh):
    largest = everything(fresh).abs().flatten(1).amax(1)
    bound = largest.sort().values[-3:-1].mean().item()
    zoo = collect_in_memory(task, **SETTINGS, max_weight=bound, progress=False)
    kept = (largest <= bound).nonzero().squeeze(1)
    assert 0 < len(zoo.dropped) == 7 - len(kept)
    assert torch.equal(everything(zoo), everything(fresh)[kept])
    assert zoo.run_ids.tolist() == kept.tolist()


def test_a_stream_replaces_the_oldest_training_runs_and_nothing_else(task, stream_of):
    zoo = collect_in_memory(task, **SETTINGS, test_runs=1, validation_runs=2, progress=False)
    before, (stream, _) = everything(zoo), stream_of(zoo)
    expected, metrics = train_population(task, list(range(7, 13)), 1, zoo.iterations, "cpu")
    stream(9)
    assert torch.equal(everything(zoo), before)
    stream(10)
    assert zoo.run_ids.tolist() == [0, 1, 2, 7, 8, 5, 6]
    stream(29)
    assert zoo.run_ids.tolist() == [0, 1, 2, 7, 8, 9, 10]
    stream(30)
    assert zoo.run_ids.tolist() == [0, 1, 2, 11, 12, 9, 10]
    now = everything(zoo)
    assert torch.equal(now[:3], before[:3])
    torch.testing.assert_close(now[3:], expected[[4, 5, 2, 3]])
    torch.testing.assert_close(zoo.metrics["validation_loss"][3:], metrics["validation_loss"][[4, 5, 2, 3]])
    assert zoo.split("train").tolist() == [3, 4, 5, 6]


def test_a_resumed_stream_trains_what_the_zoo_held_and_no_more(task, stream_of):
    whole, late = (collect_in_memory(task, **SETTINGS, validation_runs=3, progress=False) for _ in range(2))
    stream, _ = stream_of(whole)
    for step in range(0, 75, 5):
        stream(step)
    resumed, trained = stream_of(late)
    resumed(70)
    assert torch.equal(everything(late), everything(whole))
    assert trained == [[17, 18], [19, 20]]


def test_every_run_that_gave_way_is_known_in_the_end_whatever_happened_in_between(task, stream_of, tmp_path):
    zoos = [collect_in_memory(task, **SETTINGS, validation_runs=3, progress=False) for _ in range(3)]
    drawn = train_population(task, list(range(3, 15)), 1, zoos[0].iterations, "cpu")[0][:, -1]
    stream, _ = stream_of(zoos[0])
    stream.finish(10)  # the first replacement belongs to step 10, the eleventh
    assert zoos[0].former.shape == (0, task.structure.size)
    stream.finish(11)
    assert torch.equal(zoos[0].former, drawn[:2])
    stream.finish(45)
    assert zoos[0].run_ids.tolist() == [0, 1, 2, 11, 12, 13, 14]
    torch.testing.assert_close(zoos[0].former, drawn[:8], atol=1e-5, rtol=1e-4)
    resumed, trained = stream_of(zoos[1])
    resumed.finish(45)
    assert torch.equal(zoos[1].former, zoos[0].former) and len(trained) == 2
    (tmp_path / "former" / "000001.safetensors").unlink()
    forgetful, trained = stream_of(zoos[2])
    forgetful.finish(45)
    assert torch.equal(zoos[2].former, zoos[0].former) and trained[-1] == [7, 8]
    assert not list((tmp_path / "former").glob("*.part"))


def test_a_dropped_run_of_a_stream_is_replaced_by_a_sound_one(task, tmp_path):
    zoo = collect_in_memory(task, **SETTINGS, validation_runs=3, progress=False)

    def exploding(run_ids):
        weights, metrics = train_population(task, run_ids, 1, zoo.iterations, "cpu")
        weights[0] = torch.inf
        return weights, metrics

    Stream(zoo, exploding, 10, 2, tmp_path)(10)
    assert everything(zoo).isfinite().all()
    assert zoo.run_ids.tolist() == [0, 1, 2, 8, 8, 5, 6]


def test_what_does_not_fit_is_named(task, fresh, stream_of, tmp_path):
    with pytest.raises(ConfigError, match="4 runs, fewer than zoo.population=5"):
        stream_of(fresh, population=5)
    with pytest.raises(ConfigError, match="population is 0"):
        collect_in_memory(task, runs=2, snapshots=2, population=0)
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        collect_in_memory(task, runs=2, snapshots=2, dtype="int8")
    without = replace(task, recipe=None)
    with pytest.raises(TaskError, match="no recipe"):
        collect_in_memory(without, runs=2, snapshots=2)
    collect(task, tmp_path / "zoo", runs=2, snapshots=2, progress=False)
    stored = Zoo.open(tmp_path / "zoo", task.structure, storage="disk")
    with pytest.raises(ZooError, match="in memory only"):
        stored.replace(torch.tensor([0]), torch.tensor([9]), torch.zeros(1, 2, task.structure.size), {})
