import builtins
import json
import pickle

import lmdb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from Gpt.data import shards
from Gpt.data.importers import import_zoo
from Gpt.data.zoo import Zoo
from Gpt.errors import DataError, StructureError, ZooError
from Gpt.networks import MLP
from Gpt.population.functional import Population, stack_initial
from Gpt.scoring import classification_loss
from Gpt.tasks import Task

SNAPSHOTS = ["ep000_it00000", "ep001_it00010", "ep001_it00200", "ep010_it00003"]


def examples(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 6, generator=generator), torch.randint(3, (30,), generator=generator)


def network():
    return MLP(6, 5, 3)


def make_task(**fields):
    defaults = dict(
        name="toy",
        task_test_fn=classification_loss,
        constructor=network,
        data_fn=lambda: examples(1),
        validation_data_fn=lambda: examples(2),
        minimize=True,
        best_prompt=0.0,
        recursive_prompt=0.0,
        metric="loss",
        batched=True,
    )
    return Task(**defaults | fields)


@pytest.fixture
def task():
    return make_task()


def networks(task, runs=5, snapshots=4):
    seeds = list(range(runs * snapshots))
    return stack_initial(task.constructor, task.structure, seeds).view(runs, snapshots, -1)


def metrics_of(run, snapshot):
    return {
        "avg_train_loss": 1.0,
        "avg_train_err": 2.0,
        "avg_test_loss": run + snapshot / 10,
        "avg_test_err": 50.0 - run,
    }


def write_lmdb(folder, task, weights, groups):
    """G.pt's layout: `groups` are the runs of each environment; one run has a plain index, several are fused."""
    for group in groups:
        names = [f"{run:06d}" for run in group]
        place = folder / "_".join(names)
        place.mkdir(parents=True)
        index = {}
        with lmdb.open(str(place), map_size=2**22) as environment, environment.begin(write=True) as view:
            for run, name in zip(group, names, strict=True):
                checkpoints = {}
                for s, row in enumerate(weights[run]):
                    key = f"{name}/{SNAPSHOTS[s]}.pt"
                    view.put(key.encode(), row.numpy().tobytes())
                    sizes = np.array([t.numel for t in task.structure.tensors], np.float32)
                    view.put(f"{key}_arch".encode(), sizes.tobytes())
                    checkpoints[key] = metrics_of(run, s)
                index[name] = {"checkpoints": checkpoints, "metadata": {"optimal_test_loss": 0.0}}
        (place / "runs.json").write_text(json.dumps(index if len(group) > 1 else index[names[0]], sort_keys=True))


def load(task, path, **options):
    return Zoo.open(path, task.structure, **options)


def every(zoo):
    return zoo.read(*torch.cartesian_prod(torch.arange(zoo.runs), torch.arange(zoo.snapshots)).T).view(
        zoo.runs, zoo.snapshots, -1
    )


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4]], [[0, 2], [1], [3, 4]]])
def test_lmdb_round_trip_plain_and_fused(task, tmp_path, groups):
    weights = networks(task)
    write_lmdb(tmp_path / "source", task, weights, groups)
    import_zoo(tmp_path / "source", tmp_path / "zoo", task, shard_runs=2, progress=False)
    zoo = load(task, tmp_path / "zoo")
    assert torch.equal(every(zoo), weights.flip(0))  # G.pt's last runs are its test split, our first ones are ours
    expected = torch.tensor([[metrics_of(run, s)["avg_test_loss"] for s in range(4)] for run in (4, 3, 2, 1, 0)])
    torch.testing.assert_close(zoo.metrics["test_loss"], expected)
    torch.testing.assert_close(zoo.metrics["test_error"][:, 0], torch.tensor([46.0, 47, 48, 49, 50]))
    assert zoo.iterations == [0, 1, 2, 3]
    population = Population(task.template, task.structure, weights[1])
    loss, error = classification_loss(*examples(2), population)
    torch.testing.assert_close(zoo.metrics["validation_loss"][3], loss)
    torch.testing.assert_close(zoo.metrics["validation_error"][3], error)
    zoo.verify()


def unavailable():
    raise DataError("no such files")


@pytest.mark.parametrize("validation_data_fn", [None, unavailable])
def test_without_validation_data_the_test_columns_are_copied_and_noted(tmp_path, validation_data_fn):
    task = make_task(validation_data_fn=validation_data_fn)
    write_lmdb(tmp_path / "source", task, networks(task), [[0], [1]])
    import_zoo(tmp_path / "source", tmp_path / "zoo", task, progress=False)
    zoo = load(task, tmp_path / "zoo")
    assert torch.equal(zoo.metrics["validation_error"], zoo.metrics["test_error"])
    assert any("copies of the test columns" in note for note in zoo.manifest.notes)


def test_runs_of_another_length_are_dropped(task, tmp_path):
    weights = list(networks(task))
    weights[1] = weights[1][:2]
    write_lmdb(tmp_path / "source", task, weights, [[0], [1], [2, 3], [4]])
    import_zoo(tmp_path / "source", tmp_path / "zoo", task, shard_runs=1, progress=False)
    zoo = load(task, tmp_path / "zoo")
    assert zoo.dropped == {3: "000001 has 2 snapshots, most runs have 4"}
    assert torch.equal(every(zoo), torch.stack([weights[run] for run in (4, 3, 2, 0)]))


def test_an_interrupted_import_continues(task, tmp_path):
    write_lmdb(tmp_path / "source", task, networks(task), [[0], [1], [2], [3], [4]])
    options = dict(shard_runs=2, progress=False)
    import_zoo(tmp_path / "source", tmp_path / "zoo", task, **options)
    kept, lost = (shards.shard_files(tmp_path / "zoo", i)["index"] for i in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    import_zoo(tmp_path / "source", tmp_path / "zoo", task, **options)
    assert kept.stat().st_mtime_ns == before
    assert load(task, tmp_path / "zoo").runs == 5


def test_faults_of_lmdb_zoos_are_named(task, tmp_path):
    (tmp_path / "torn" / "000000").mkdir(parents=True)
    (tmp_path / "torn" / "000000" / "runs.json").write_text("{}")
    with pytest.raises(ZooError, match="torn holds no zoo of G.pt"):
        import_zoo(tmp_path / "torn", tmp_path / "zoo", task, progress=False)
    source = tmp_path / "source"
    write_lmdb(source, task, networks(task), [[0], [1]])
    wider = make_task(constructor=lambda: MLP(6, 7, 3))
    with pytest.raises(StructureError, match=r"000001.*\[30, 5, 15, 3\] numbers, .* network has \[42, 7, 21, 3\]"):
        import_zoo(source, tmp_path / "a", wider, progress=False)
    index = source / "000000" / "runs.json"
    fields = json.loads(index.read_text())
    fields["checkpoints"]["000000/ep002_it00000.pt"] = metrics_of(0, 0)
    del fields["checkpoints"]["000000/ep001_it00010.pt"]
    index.write_text(json.dumps(fields))
    with pytest.raises(ZooError, match="no entry '000000/ep002_it00000.pt'"):
        import_zoo(source, tmp_path / "b", task, progress=False)
    (source / "000000" / "data.mdb").write_bytes(b"nothing" * 1000)
    with pytest.raises(ZooError, match="000000 is not a readable LMDB environment"):
        import_zoo(source, tmp_path / "c", task, progress=False)
    index.write_text('{"000000": {"checkpoints": [1, 2]}}')
    with pytest.raises(ZooError, match="000000/runs.json is not an index"):
        import_zoo(source, tmp_path / "d", task, progress=False)


def test_without_lmdb_the_extra_is_named(task, tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **options):
        if name == "lmdb":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "000000").mkdir()
    (tmp_path / "000000" / "runs.json").write_text("{}")
    with pytest.raises(ZooError, match=r"gpt-weights\[lmdb\]"):
        import_zoo(tmp_path, tmp_path / "zoo", task)


def save(file, state):
    file.parent.mkdir(parents=True, exist_ok=True)
    state = dict(reversed(state.items()))  # the order of keys must not matter
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_folders_of_checkpoints_are_runs_in_natural_order(task, tmp_path, suffix):
    weights = networks(task, runs=3, snapshots=3)
    for run, folder in enumerate(["run1", "run2", "run10"]):
        for s, epoch in enumerate([0, 9, 10]):
            save(tmp_path / "in" / folder / f"epoch_{epoch}{suffix}", task.structure.state_dict(weights[run, s]))
    import_zoo(tmp_path / "in", tmp_path / "zoo", task, shard_runs=2, progress=False)
    zoo = load(task, tmp_path / "zoo")
    assert torch.equal(every(zoo), weights)
    assert set(zoo.metrics) == {"test_loss", "test_error", "validation_loss", "validation_error"}
    loss, _ = classification_loss(*examples(1), Population(task.template, task.structure, weights[2]))
    torch.testing.assert_close(zoo.metrics["test_loss"][2], loss)


def test_a_flat_folder_is_one_run_per_file(task, tmp_path):
    weights = networks(task, runs=3, snapshots=1)
    for run in range(3):
        save(tmp_path / "in" / f"net{run}.pt", task.structure.state_dict(weights[run, 0]))
    (tmp_path / "in" / "notes.txt").write_text("not a checkpoint")
    import_zoo(tmp_path / "in", tmp_path / "zoo", task, progress=False)
    zoo = load(task, tmp_path / "zoo")
    assert (zoo.runs, zoo.snapshots) == (3, 1)
    assert torch.equal(every(zoo), weights)


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("content", ["garbage", "empty", "module", "code", "list"])
def test_unreadable_checkpoints_are_named(task, tmp_path, content):
    file = tmp_path / "in" / "net0.pt"
    save(tmp_path / "in" / "net1.pt", network().state_dict())
    if content == "module":
        torch.save(nn.Linear(2, 2), file)
    elif content == "code":
        file.write_bytes(pickle.dumps(Payload(), protocol=2))
    elif content == "list":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_bytes(b"garbage" if content == "garbage" else b"")
    reason = "holds more than tensors" if content in ("module", "code") else ""
    with pytest.raises(ZooError, match=f"net0.pt.*{reason}"):
        import_zoo(tmp_path / "in", tmp_path / "zoo", task, progress=False)


def test_checkpoints_of_another_architecture_are_named(task, tmp_path):
    save(tmp_path / "in" / "a.safetensors", MLP(6, 4, 3).state_dict())
    with pytest.raises(StructureError, match=r"a.safetensors: 'fc1.weight' has shape \(4, 6\)"):
        import_zoo(tmp_path / "in", tmp_path / "zoo", task, progress=False)
    save(tmp_path / "in" / "b.safetensors", network().state_dict())
    (tmp_path / "in" / "a.safetensors").write_bytes(b"short")
    with pytest.raises(ZooError, match="a.safetensors cannot be read"):
        import_zoo(tmp_path / "in", tmp_path / "zoo", task, progress=False)


def test_integers_that_would_be_lost_are_refused_and_counters_are_not(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.register_buffer("pruned", torch.zeros(4, dtype=torch.bool))

        def forward(self, x):
            return self.fc(self.norm(x).masked_fill(self.pruned, 0))

    own, net = make_task(constructor=Masked), Masked()
    net.norm.num_batches_tracked += 5
    save(tmp_path / "in" / "a.pt", net.state_dict())
    own.structure.check_fixed(net.state_dict())
    net.pruned[1] = True
    save(tmp_path / "in" / "b.pt", net.state_dict())
    with pytest.raises(StructureError, match=r"b\.pt: 'pruned' .*differs from the constructor's"):
        import_zoo(tmp_path / "in", tmp_path / "zoo", own, progress=False)


def test_a_state_dict_among_other_things_is_taken(task, tmp_path):
    net = network()
    save(tmp_path / "in" / "a.pt", net.state_dict())
    torch.save({"epoch": 3, "state_dict": net.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "in" / "b.pt")
    import_zoo(tmp_path / "in", tmp_path / "zoo", task, progress=False)
    zoo = Zoo.open(tmp_path / "zoo", task.structure)
    first, second = zoo.read(torch.arange(2), torch.zeros(2, dtype=torch.long))
    assert zoo.runs == 2 and torch.equal(first, second)


def test_ambiguous_and_empty_folders_are_named(task, tmp_path):
    with pytest.raises(ZooError, match="no folder"):
        import_zoo(tmp_path / "nowhere", tmp_path / "zoo", task)
    with pytest.raises(ZooError, match="no checkpoints"):
        import_zoo(tmp_path, tmp_path / "zoo", task)
    save(tmp_path / "in" / "a.pt", network().state_dict())
    save(tmp_path / "in" / "run" / "a.pt", network().state_dict())
    with pytest.raises(ZooError, match="as well as folders"):
        import_zoo(tmp_path / "in", tmp_path / "zoo", task)
