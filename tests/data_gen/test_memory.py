"""Zoos in memory: the same networks as stored ones, and the right ones at every step of a stream."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_gen import memory
from data_gen.collect import collect, train_population
from data_gen.memory import Stream, collect_in_memory
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError, TaskError, ZooError
from Gpt.tasks import TASK_METADATA, Task, check_entry

SETTINGS = {"runs": 7, "snapshots": 3, "seed": 1, "population": 3}


def small_task() -> Task:
    task = check_entry("digits_loss", TASK_METADATA["digits_loss"])
    return replace(task, recipe=replace(task.recipe, epochs=1))


@pytest.fixture(scope="module")
def task():
    return small_task()


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_train_a_part_each_and_have_the_whole(task, fresh, tmp_path, outputs_of, dtype):
    """To the bit what one process makes, less the same exploded runs, and as it is kept fresh."""
    bound = everything(fresh).abs().flatten(1).amax(1).sort().values[-3:-1].mean().item()
    environment = os.environ | {"PYTHONPATH": str(Path(memory.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    calls = [[sys.executable, __file__, str(tmp_path), str(i), dtype, str(bound)] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [subprocess.Popen(call, env=environment, **pipes) for call in calls]
    outputs = outputs_of(children, 200)
    assert [c.returncode for c in children] == [0, 0], outputs
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    alone = collect_in_memory(task, **SETTINGS, dtype=dtype, max_weight=bound, progress=False)
    assert first.pop("trained") == [0, 1, 2, 6] and second.pop("trained") == [3, 4, 5]
    assert first["seconds"] == second["seconds"] > 0
    new = int(alone.run_ids.max()) + 1
    assert (first["streamed"], second["streamed"]) == ([new, new + 2, new + 4], [new + 1, new + 3, new + 5])
    keep_fresh(alone, tmp_path / "alone")
    files = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("alone", "former"))
    assert next(files) == next(files)
    for found in (first, second):
        assert torch.equal(found["weights"], everything(alone)) and found["run_ids"] == alone.run_ids.tolist()
        assert list(found["dropped"].items()) == list(alone.dropped.items()) and found["dropped"]
        assert found["metrics"].keys() == alone.metrics.keys()
        assert all(torch.equal(found["metrics"][name], values) for name, values in alone.metrics.items())


def keep_fresh(zoo: Zoo, folder: Path) -> None:
    """Five populations of one run each."""

    def train(run_ids: list[int]) -> memory.Trained:
        return memory.train_population(small_task(), run_ids, SETTINGS["seed"], zoo.iterations, "cpu")

    stream = Stream(zoo, train, 10, 1, folder)
    for step in (0, 10, 45, 50):
        stream(step)


def _collect_with_others(folder: Path, number: int, dtype: str, bound: float) -> None:
    """One of two processes: what it trained, and the zoo that it has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2)
    trained, train = [], memory.train_population

    def counting(task, run_ids, *args, **options):
        trained.extend(run_ids)
        return train(task, run_ids, *args, **options)

    memory.train_population = counting
    zoo = collect_in_memory(small_task(), **SETTINGS, dtype=dtype, max_weight=bound, progress=False)
    collected = len(trained)
    keep_fresh(zoo, folder / "former")
    found = {"weights": everything(zoo), "metrics": zoo.metrics, "run_ids": zoo.run_ids.tolist()}
    found |= {"dropped": zoo.dropped, "seconds": zoo.seconds}
    found |= {"trained": trained[:collected], "streamed": trained[collected:]}
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()


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


if __name__ == "__main__":
    folder, number, dtype, bound = sys.argv[1:]
    _collect_with_others(Path(folder), int(number), dtype, float(bound))
