import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from Gpt.data import shards
from Gpt.data import zoo as zoo_module
from Gpt.data.zoo import Zoo, scales
from Gpt.errors import ZooError
from Gpt.networks import MLP
from Gpt.recipes import SupervisedRecipe
from Gpt.structure import Structure

STRUCTURE = Structure.of(MLP(4, 3, 2))
ITERATIONS = [0, 5, 20]
SHARD_RUNS = 4
RUNS = 10


def manifest(**changes):
    fields = dict(seed=0, iterations=ITERATIONS, dtype="float32", shard_runs=SHARD_RUNS)
    return shards.Manifest.of("toy", STRUCTURE, SupervisedRecipe(), **fields | changes)


def networks(runs=RUNS):
    return torch.randn(runs, len(ITERATIONS), STRUCTURE.size, generator=torch.Generator().manual_seed(0))


def write(folder, weights=None, **changes):
    weights = networks() if weights is None else weights
    description = manifest(**changes)
    shards.create_manifest(folder, description)
    metrics = {"test_loss": torch.arange(len(weights) * 3.0).view(-1, 3)}
    for index in range(-(-len(weights) // SHARD_RUNS)):
        ids = list(range(len(weights)))[index * SHARD_RUNS : (index + 1) * SHARD_RUNS]
        part = {name: values[ids] for name, values in metrics.items()}
        shards.write_shard(folder, description, index, ids, weights[ids], part)
    return weights


def open_zoo(folder, **options):
    return Zoo.open(folder, STRUCTURE, **dict(test_runs=2, validation_runs=3) | options)


@pytest.mark.parametrize("storage", ["ram", "disk", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_networks_come_back(tmp_path, storage, dtype):
    weights = write(tmp_path, dtype=dtype).to(shards.DTYPES[dtype]).float()
    zoo = open_zoo(tmp_path, storage=storage)
    runs = torch.tensor([9, 0, 3, 4, 4, -1])
    snapshots = torch.tensor([2, 0, 1, 1, 0, -1])
    assert torch.equal(zoo.read(runs, snapshots), weights[runs, snapshots])
    assert zoo.read(runs[:0], snapshots[:0]).shape == (0, STRUCTURE.size)
    assert (zoo.runs, zoo.snapshots, zoo.iterations) == (RUNS, 3, ITERATIONS)
    assert torch.equal(zoo.metrics["test_loss"], torch.arange(RUNS * 3.0).view(-1, 3))
    assert zoo.manifest.recipe["type"] == "SupervisedRecipe"
    zoo.verify()


def test_the_weights_file_is_plain_safetensors(tmp_path):
    weights = write(tmp_path)
    stored = load_file(shards.shard_files(tmp_path, 1)["weights"])
    assert torch.equal(stored["weights"], weights[4:8])


@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_indices_outside_are_refused(tmp_path, storage):
    write(tmp_path)
    zoo = open_zoo(tmp_path, storage=storage)
    for run, snapshot in [(RUNS, 0), (-RUNS - 1, 0), (0, 3)]:
        with pytest.raises(IndexError):
            zoo.read(torch.tensor([run]), torch.tensor([snapshot]))


def test_splits_are_by_run_id_and_partition_the_zoo(tmp_path):
    weights = networks()
    weights[1, 2, 5] = torch.nan
    write(tmp_path, weights)
    zoo = open_zoo(tmp_path)
    ids = {name: zoo.run_ids[zoo.split(name)].tolist() for name in ("test", "validation", "train")}
    assert ids == {"test": [0], "validation": [2, 3, 4], "train": [5, 6, 7, 8, 9]}
    rows = torch.cat([zoo.split(name) for name in ("test", "validation", "train")])
    assert rows.tolist() == list(range(RUNS - 1))


@pytest.mark.parametrize("bounds, split", [((0, 2), "test"), ((2, 0), "validation"), ((5, 5), "train")])
def test_an_empty_split_is_an_error_that_counts(tmp_path, bounds, split):
    write(tmp_path)
    with pytest.raises(ZooError, match=f"10 runs, but none for the {split} split"):
        open_zoo(tmp_path, test_runs=bounds[0], validation_runs=bounds[1]).split(split)
    with pytest.raises(ZooError, match="no split 'dev'"):
        open_zoo(tmp_path).split("dev")


@pytest.mark.parametrize("bad, reason", [(torch.nan, "not finite"), (-torch.inf, "not finite"), (-11.0, "reaches 11")])
def test_bad_runs_are_dropped_with_a_reason(tmp_path, bad, reason):
    weights = networks()
    weights[6, 1, 0] = bad
    write(tmp_path, weights)
    for storage in ("ram", "disk"):
        zoo = open_zoo(tmp_path, storage=storage)
        assert reason in zoo.dropped[6]
        assert zoo.run_ids.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
        assert torch.equal(zoo.read(torch.tensor([6]), torch.tensor([1])), weights[7:8, 1])
        assert zoo.metrics["test_loss"][6, 0] == 21


def test_max_weight_is_a_setting_and_a_shard_may_lose_all_runs(tmp_path):
    weights = networks().clamp(-2, 2)
    weights[4:8] += 6
    write(tmp_path, weights, max_weight=3.0)
    zoo = open_zoo(tmp_path, storage="disk")
    assert zoo.run_ids.tolist() == [0, 1, 2, 3, 8, 9]
    assert torch.equal(zoo.read(torch.tensor([4]), torch.tensor([0])), weights[8:9, 0])
    with pytest.raises(ZooError, match=r"6 runs and dropped 4 \(such as: a weight reaches .*none for the validation"):
        open_zoo(tmp_path, test_runs=4, validation_runs=4).split("validation")


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(seed=1), "seed 0, this run asks for 1"),
        (dict(iterations=[0, 5]), "3 iterations, this run asks for 2"),
        (dict(iterations=[0, 6, 20]), r"iterations\[1\] 5, this run asks for 6"),
        (dict(dtype="float16"), "dtype 'float32', this run asks for 'float16'"),
        (dict(shard_runs=5), "shard_runs 4"),
    ],
)
def test_another_manifest_is_refused_by_the_name_of_the_key(tmp_path, changes, named):
    shards.create_manifest(tmp_path, manifest())
    shards.create_manifest(tmp_path, manifest(notes=["notes may differ"]))
    with pytest.raises(ZooError, match=named):
        shards.create_manifest(tmp_path, manifest(**changes))
    recipe = shards.Manifest.of(
        "toy", STRUCTURE, SupervisedRecipe(epochs=7), seed=0, iterations=ITERATIONS, shard_runs=SHARD_RUNS
    )
    with pytest.raises(ZooError, match="recipe.epochs 25, this run asks for 7"):
        shards.create_manifest(tmp_path, recipe)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_file_systems_without_hard_links_will_do(tmp_path, monkeypatch):
    def unsupported(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    write(tmp_path)
    assert open_zoo(tmp_path).runs == RUNS
    with pytest.raises(ZooError, match="seed 0, this run asks for 1"):
        shards.create_manifest(tmp_path, manifest(seed=1))
    assert not list(tmp_path.glob(".*"))


def test_another_architecture_is_refused_by_the_name_of_the_tensor(tmp_path):
    write(tmp_path)
    with pytest.raises(ZooError, match=r"fc1.weight \(3, 4\) where the task has fc1.weight \(5, 4\)"):
        Zoo.open(tmp_path, Structure.of(MLP(4, 5, 2)))
    with pytest.raises(ZooError, match="24 entries a network"):
        Zoo.from_tensors(torch.zeros(1, 1, 24), {}, [0], [0], STRUCTURE)


def damage(file, fault):
    if fault == "missing":
        file.unlink()
    elif fault == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    else:
        content = bytearray(file.read_bytes())
        content[20 if fault == "altered header" else -1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    "kind, fault",
    [
        *[("weights", fault) for fault in ("missing", "truncated", "altered header")],
        *[("metrics", fault) for fault in ("missing", "truncated", "altered header")],
        *[("index", fault) for fault in ("missing", "truncated", "altered data")],
    ],
)
def test_opening_finds_damage_and_names_the_file(tmp_path, kind, fault):
    write(tmp_path)
    file = shards.shard_files(tmp_path, 1)[kind]
    damage(file, fault)
    with pytest.raises(ZooError, match=file.name):
        open_zoo(tmp_path)


@pytest.mark.parametrize("kind", ["weights", "metrics"])
def test_verifying_finds_a_single_altered_bit_and_names_the_file(tmp_path, kind):
    write(tmp_path)
    file = shards.shard_files(tmp_path, 1)[kind]
    zoo = open_zoo(tmp_path, storage="disk")
    zoo.verify()
    damage(file, "altered data")
    with pytest.raises(ZooError, match=f"{file.name} was altered"):
        zoo.verify()
    with pytest.raises(ZooError, match=f"{file.name} was altered"):
        open_zoo(tmp_path, storage="ram")


def test_an_index_with_other_keys_is_named(tmp_path):
    write(tmp_path)
    file = shards.shard_files(tmp_path, 1)["index"]
    file.write_text(file.read_text().replace('"run_ids"', '"rum_ids"'))
    with pytest.raises(ZooError, match=file.name):
        open_zoo(tmp_path)


def test_a_missing_or_foreign_manifest_is_named(tmp_path):
    with pytest.raises(ZooError, match="no zoo at"):
        open_zoo(tmp_path)
    shards.create_manifest(tmp_path, manifest())
    with pytest.raises(ZooError, match="no finished shard"):
        open_zoo(tmp_path)
    file = tmp_path / "manifest.json"
    for content, named in [("{", "JSON"), ("[]", "list"), ('{"format": 9}', "format 9"), ('{"format": 1}', "missing")]:
        file.write_text(content)
        with pytest.raises(ZooError, match=named):
            open_zoo(tmp_path)
    with pytest.raises(ZooError, match="dtype 'int8'"):
        manifest(dtype="int8")
    write(tmp_path / "other")
    with pytest.raises(ZooError, match="storage 'tape'"):
        open_zoo(tmp_path / "other", storage="tape")


def test_a_file_cut_short_while_it_is_read_is_noticed(tmp_path):
    write(tmp_path)
    zoo = open_zoo(tmp_path, storage="disk")
    os.truncate(shards.shard_files(tmp_path, 2)["weights"], 100)
    with pytest.raises(ZooError, match="shard-00002.safetensors was truncated"):
        zoo.read(torch.tensor([9]), torch.tensor([2]))


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ZooError, match="no space left for .*shard-00003.safetensors.*needs .* MiB; finished shards are"
    ):
        shards.write_shard(tmp_path, manifest(), 3, [12], networks(1), {})
    with pytest.raises(OSError, match="No space left"):
        shards.create_manifest(tmp_path / "another", manifest())
    left = [*tmp_path.glob("another/*"), *tmp_path.glob("another/.*"), *tmp_path.glob("*shard-00003*")]
    assert not left and not list(tmp_path.glob(".*"))
    assert open_zoo(tmp_path).runs == RUNS


def test_auto_takes_the_fastest_place_that_has_room(tmp_path, monkeypatch):
    write(tmp_path)
    size = manifest().run_bytes * RUNS
    for free, expected in [(2 * size, zoo_module._Memory), (2 * size - 1, zoo_module._Disk)]:
        monkeypatch.setattr(zoo_module, "_free_memory", lambda free=free: free)
        assert isinstance(open_zoo(tmp_path)._weights, expected)


def test_free_memory_is_plausible():
    assert 2**20 < zoo_module._free_memory() < 2**50


def test_scales_are_the_statistics_of_each_tensor():
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.full((t.numel,), 1.0 + i) for i, t in enumerate(STRUCTURE.tensors)])
    weights = 0.5 + spread * torch.randn(60, 3, STRUCTURE.size, generator=generator)
    weights[:10] = 1e6  # the test split has no say
    zoo = Zoo.from_tensors(weights, {}, list(range(60)), ITERATIONS, STRUCTURE, test_runs=10)
    found = scales(zoo, max_networks=20_000)
    exact = weights[10:].double()
    for i, t in enumerate(STRUCTURE.tensors):
        np.testing.assert_allclose(found.mean[i], exact[..., t.slice].mean(), atol=0.03)
        np.testing.assert_allclose(found.std[i], exact[..., t.slice].std(), rtol=0.01)
    np.testing.assert_allclose(found.coefficient, 0.538 / exact.std(), rtol=0.01)


def test_from_tensors_keeps_dtype_and_reads_float32():
    weights = networks().bfloat16()
    zoo = Zoo.from_tensors(weights, {}, list(range(100, 110)), ITERATIONS, STRUCTURE)
    assert torch.equal(zoo.read(torch.tensor([3]), torch.tensor([2])), weights[3:4, 2].float())
    assert zoo.run_ids[zoo.split("train")].tolist() == list(range(100, 110))
    zoo.verify()


def test_indices_are_readable_by_people(tmp_path):
    write(tmp_path)
    fields = json.loads(shards.shard_files(tmp_path, 2)["index"].read_text())
    assert fields["run_ids"] == [8, 9] and fields["runs"] == [8, 10]
    assert json.loads((tmp_path / "manifest.json").read_text())["tensors"][0] == ["fc1.weight", [3, 4]]
