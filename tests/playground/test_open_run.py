"""Runs opened from Python: the networks are those of playground.py, from starts of one's own too."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import EVEN, TINY, experiment, masked_experiment, store_generator

from Gpt.errors import CheckpointError, ConfigError, StructureError
from Gpt.networks import MLP
from Gpt.run.folder import create_folder
from Gpt.run.trained import open_run
from Gpt.seeds import derive_seed
from playground import PlaygroundConfig, play


@pytest.fixture
def stored(here):
    """The folder of a run with its settings beside its generator, moved since."""
    trained = experiment(*TINY, "trainer.precision=float32")  # bfloat16 products round by the size of their batch
    create_folder(trained.config, trained.folder)
    return shutil.move(trained.folder, here / "elsewhere")


def test_networks_are_those_of_the_playground(here, stored):
    run = open_run(stored, device="cpu")
    weights = run.write(3, wanted=0.2, seed=5)
    shutil.copytree(stored, here / "runs" / "tiny")
    config = PlaygroundConfig(count=3, keyframes=0, wanted=0.2, seed=5)
    folder = play(experiment(*TINY, "trainer.precision=float32"), config)
    for i, row in enumerate(weights):
        for name, value in load_file(folder / f"network-00{i}.safetensors").items():
            assert torch.equal(run.task.structure.state_dict(row)[name], value)
    torch.testing.assert_close(run.write(2, wanted=0.2, seed=5), weights[:2])
    assert not torch.equal(run.write(3, wanted=0.1, seed=5), weights)
    assert run.write().shape == (8, run.task.structure.size)


def test_a_network_of_ones_own_is_updated(stored):
    run = open_run(str(stored), device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "own"))
        net = run.task.constructor()
    row = run.task.structure.flatten(net.state_dict()).detach()
    written = run.write(start=net, wanted=0.2)
    assert written.shape == (1, run.task.structure.size)
    for same in (net.state_dict(), row, row[None]):
        assert torch.equal(run.write(start=same, wanted=0.2), written)
    assert not torch.equal(run.write(1, wanted=0.2), written)  # which starts from another
    starts = run.measured_starts(row[None], None)
    assert torch.equal(starts.metric, run.measure(row[None], "validation")["validation_loss"])
    assert torch.equal(run.grant(run.wish(wanted=0.2), 1, starts), written)  # it is told what the start measures
    four = run.write(4, start=torch.stack([row, row]), wanted=0.2)
    assert len(four) == 4
    torch.testing.assert_close(four[:1], written)


def test_several_updates_start_from_what_was_written_and_are_told_what_it_measures(stored, monkeypatch):
    run = open_run(stored, device="cpu")
    told, sample = [], run.generator.sample

    def listening(prompt, start=None, **settings):
        told.append((prompt["target_metric"].clone(), start.clone(), sample(prompt, start, **settings)))
        return told[-1][-1]

    monkeypatch.setattr(run.generator, "sample", listening)
    written = run.write(2, wanted=0.2, updates=3)
    assert len(told) == 3 and torch.equal(written, told[-1][-1])
    for (_, _, before), (prompt, start, _) in zip(told, told[1:], strict=False):
        assert torch.equal(start, before)
        assert torch.equal(prompt[:, 0], run.measure(before, "validation")["validation_loss"])
        assert (prompt[:, 1] == 0.2).all()
    assert torch.equal(run.write(2, wanted=0.2), told[0][-1])
    broken = run.measured_starts(torch.full_like(written, torch.nan), None, instead=torch.tensor([2.0]))
    assert torch.equal(broken.metric, torch.full_like(broken.metric, 2.0))
    with pytest.raises(ConfigError, match="updates=0: one at least"):
        run.write(2, updates=0)


def test_what_is_written_is_measured_and_becomes_a_module(stored):
    run = open_run(stored, device="cpu")
    weights = run.write(2, wanted=0.2)
    found = run.measure(weights)
    inputs, labels = run.task.data("test")
    for i, row in enumerate(weights):
        with torch.no_grad():
            logits = run.network(row)(inputs)
        error = 100 * (logits.argmax(1) != labels).float().mean().item()
        assert found["test_error"][i].item() == pytest.approx(error, abs=1e-3)


def test_networks_for_classes(masked):
    trained = masked_experiment()
    create_folder(trained.config, trained.folder)
    run = open_run(trained.folder, device="cpu")
    weights = run.write(2, mask=EVEN)
    assert torch.equal(run.write(2, mask=torch.arange(10) % 2 == 0), weights)
    by_bits, by_tensor = (run.measure(weights, mask=mask) for mask in (EVEN, run.wish(mask=EVEN).mask))
    assert torch.equal(by_bits["test_error"], by_tensor["test_error"])
    with pytest.raises(ConfigError, match="one task for each class mask; say which by mask="):
        run.measure(weights)
    with pytest.raises(ConfigError, match="say which classes"):
        run.write(2)
    with pytest.raises(ConfigError, match="writes from noise alone"):
        run.write(2, mask=EVEN, start=weights)


def test_what_is_no_trained_run_is_refused(here, tmp_path):
    with pytest.raises(CheckpointError, match=r"no run in nowhere: no config\.yaml"):
        open_run("nowhere")
    begun = experiment(*TINY, "run.name=begun")
    create_folder(begun.config, begun.folder)
    with pytest.raises(CheckpointError, match="runs/begun has no checkpoint yet"):
        open_run(begun.folder)
    settings = (begun.folder / "config.yaml").read_text()
    for damaged in ("", settings[:30], "task: [", "\x00", "- task"):
        (begun.folder / "config.yaml").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"begun/config\.yaml is damaged .*resume=never"):
            open_run(begun.folder)
    (begun.folder / "config.yaml").write_text(settings)
    store_generator(begun)
    run = open_run(begun.folder, device="cpu")
    with pytest.raises(ConfigError, match="count=0"):
        run.write(0)
    with pytest.raises(StructureError, match="another architecture"):
        run.write(start=MLP(4, 3, 2).state_dict() | {"more": torch.ones(1)})
    with pytest.raises(StructureError, match="flat weights have 3 entries"):
        run.write(start=torch.ones(3))


def test_adapters_are_not_written_this_way(adapters):
    run = open_run("runs/lora_tiny", device="cpu")
    for ask in (
        lambda: run.write(prompt="the last word"),
        lambda: run.measure(torch.zeros(1, run.task.structure.size)),
    ):
        with pytest.raises(ConfigError, match=r"adapters of a language model; write them by rpg\.write_adapter"):
            ask()
