"""Checkpoints: whole or not there, of this run or refused, and readable without running anything."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from Gpt import files
from Gpt.checkpoint import CheckpointFolder, TrainingState
from Gpt.errors import CheckpointError
from Gpt.seeds import rng

IDENTITY = {"task": "digits_loss", "architecture": "0123abcd", "generator": {"name": "gpt", "width": 8}}


def network(seed: int, width: int = 3) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))
    for i, parameter in enumerate(net.parameters()):
        nn.init.normal_(parameter, generator=rng("cpu", seed, i))
    return net


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimiser after three steps."""
    net = network(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.9, 0.95))
    for i in range(3):
        net(torch.randn(6, 4, generator=rng("cpu", seed, "x", i))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def save(folder: Path, step: int, seed: int, best: int = -1, identity=IDENTITY) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, identity)
    net, optimizer = trained(seed)
    state = TrainingState(step, 1.5, 0.25, best)
    if best == step:
        checkpoints.save_best(state, network(seed + 100), {"step": step, "score": 0.25})
    checkpoints.save(state, net, network(seed + 50), optimizer)
    return checkpoints


def test_everything_comes_back_to_the_bit(tmp_path):
    checkpoints = save(tmp_path, 400, seed=1)
    net, ema, (expected, expected_optimizer) = network(7), network(8), trained(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=9.0)
    state = checkpoints.load(net, ema, optimizer)
    assert state == TrainingState(400, 1.5, 0.25, -1)
    assert_equal(net, expected)
    assert_equal(ema, network(51))
    found, wanted = optimizer.state_dict(), expected_optimizer.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    for i, entry in wanted["state"].items():
        assert all(torch.equal(found["state"][i][key], value) for key, value in entry.items())


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "none", IDENTITY)
    assert not checkpoints.exists()
    assert checkpoints.latest_step() == -1
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*train first.*run\.name=NAME"):
        checkpoints.load_best(network(0))


def test_only_what_is_in_use_is_kept(tmp_path):
    save(tmp_path, 100, seed=1, best=100)
    save(tmp_path, 200, seed=2, best=100)
    assert {f.name for f in tmp_path.iterdir()} == {"latest.json", "step-00000200", "best-00000100"}
    checkpoints = save(tmp_path, 300, seed=3, best=300)
    assert {f.name for f in tmp_path.iterdir()} == {"latest.json", "step-00000300", "best-00000300"}
    assert checkpoints.latest_step() == 300


def test_best_weights_are_used_once_a_checkpoint_names_them(tmp_path):
    checkpoints = save(tmp_path, 100, seed=1, best=100)
    checkpoints.save_best(TrainingState(150, 0.0, 0.1, 150), network(9), {"step": 150, "score": 0.1})
    net = network(0)
    assert checkpoints.load_best(net) == {"step": 100, "score": 0.25}
    assert_equal(net, network(101))
    save(tmp_path, 200, seed=2, best=150)
    assert checkpoints.load_best(net) == {"step": 150, "score": 0.1}
    assert_equal(net, network(9))


def test_without_best_weights_the_latest_average_is_used(tmp_path):
    net = network(0)
    assert save(tmp_path, 100, seed=1).load_best(net)["step"] == 100
    assert_equal(net, network(51))


@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "facts", "latest"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("no space")])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, file, error):
    checkpoints = save(tmp_path, 100, seed=1, best=100)
    save_file, replace = files.save_file, os.replace

    def full_save(tensors, path, metadata):
        if path.name.startswith(f".{file}."):
            path.write_bytes(b"half a fi")
            raise error
        save_file(tensors, path, metadata)

    def full_replace(source, path):
        if path.stem == file:
            raise error
        replace(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_save)
        patch.setattr(os, "replace", full_replace)
        with pytest.raises(CheckpointError, match=r"step-00000200.*(No|no) space.*previous one is intact; make room"):
            save(tmp_path, 200, seed=2, best=100)
    net = network(0)
    assert checkpoints.load(net, network(0), torch.optim.AdamW(net.parameters())).step == 100
    assert_equal(net, trained(1)[0])
    assert not list(tmp_path.glob("step-*.tmp"))
    save(tmp_path, 200, seed=2, best=100)
    assert checkpoints.latest_step() == 200


def test_a_full_disk_before_the_first_checkpoint_is_not_told_of_another(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space.*There is none before it; make room"):
        save(tmp_path, 100, seed=1)


def test_a_checkpoint_is_on_the_disk_before_it_is_the_one_to_use(tmp_path, disk):
    """What a power failure leaves: everything below a name that was flushed, and names that were."""
    save(tmp_path, 100, seed=1, best=100)
    folder, latest = tmp_path / "step-00000100", tmp_path / "latest.json"
    used = disk.events.index(("named", latest))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "facts.json"):
        assert disk.held(folder / name, used), name
    assert all(disk.held(place, used) for place in (folder, tmp_path / "best-00000100"))
    assert disk.held(latest, len(disk.events))


@pytest.mark.parametrize(
    ("key", "value"),
    [("task", "mnist_loss"), ("architecture", "ffff0000"), ("generator", {"name": "gpt", "width": 16})],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path, key, value):
    save(tmp_path, 100, seed=1, best=100)
    other = CheckpointFolder(tmp_path, IDENTITY | {key: value})
    net = network(0)
    for load in (
        lambda: other.load(net, network(0), torch.optim.AdamW(net.parameters())),
        lambda: other.load_best(net),
        other.latest_step,
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        for part in (key, repr(IDENTITY[key]), repr(value), "run.name"):
            assert part in str(caught.value)


def test_what_earlier_checkpoints_do_not_mention_is_what_they_had(tmp_path):
    save(tmp_path, 100, seed=1)
    for encoder, former, opens in (("a", "a", True), ("b", "a", False), ("b", None, False)):
        asked = CheckpointFolder(tmp_path, IDENTITY | {"encoder": encoder}, {"encoder": former} if former else None)
        refused = pytest.raises(CheckpointError, match=f"has encoder {former!r}, .*'b'")
        with contextlib.nullcontext() if opens else refused:
            assert asked.latest_step() == 100
    save(tmp_path, 100, seed=1, identity=IDENTITY | {"encoder": "b"})
    with pytest.raises(CheckpointError, match="has encoder 'b', this run has 'a'"):
        CheckpointFolder(tmp_path, IDENTITY | {"encoder": "a"}, {"encoder": "a"}).latest_step()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    checkpoints = save(tmp_path, 100, seed=1)
    wide = network(0, width=5)
    with pytest.raises(CheckpointError, match=r"(?s)model\.safetensors does not fit.*resume=never.*0\.weight"):
        checkpoints.load(wide, network(0, width=5), torch.optim.AdamW(wide.parameters()))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "facts.json"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "missing"])
def test_damaged_files_are_named(tmp_path, name, damage):
    checkpoints = save(tmp_path, 100, seed=1)
    file = tmp_path / "step-00000100" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff\xfe" + content[2:])
    net = network(0)
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing).*resume=never"):
        checkpoints.load(net, network(0), torch.optim.AdamW(net.parameters()))
