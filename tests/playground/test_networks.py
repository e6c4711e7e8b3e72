"""The networks that playground.py writes for a metric or for nothing, and what it says of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import EVEN, MASKED, SHORT, TINY, experiment, store_generator, store_rpg

from Gpt.errors import CheckpointError, ConfigError
from Gpt.evaluation.prompting import Starts
from Gpt.generator import Batch
from Gpt.run.folder import create_folder
from Gpt.run.trained import TrainedRun, Wish
from playground import PlaygroundConfig, play


def test_networks_are_complete_and_measure_what_is_written_beside_them(here, capsys):
    folder = play(experiment(*TINY), PlaygroundConfig(**SHORT, wanted=0.2))
    assert folder == Path("runs/tiny/playground")
    assert {f.name for f in folder.iterdir()} == {
        *(f"network-00{i}.safetensors" for i in range(3)),
        "networks.json",
        "walk.gif",
    }
    facts, task = json.loads((folder / "networks.json").read_text()), experiment(*TINY).task
    assert (facts["task"], facts["options"]["wanted"], facts["options"]["seed"]) == ("digits_loss", 0.2, 0)
    for entry in facts["networks"]:
        network = task.constructor()
        network.load_state_dict(load_file(folder / entry["file"]), strict=True)
        for split in ("validation", "test"):
            with torch.no_grad():
                loss, error = task.task_test_fn(*task.data(split), network)
            assert entry[f"{split}_loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert entry[f"{split}_error"] == pytest.approx(error.item(), abs=1e-3)
        assert 2 < entry["start_validation_loss"] < 3
    output = capsys.readouterr().out
    assert "asked for validation loss 0.2" in output
    assert f"{facts['networks'][2]['test_loss']:.4g}" in output
    assert str(folder) in output


def test_the_same_options_write_the_same_bytes_and_another_seed_others(here):
    def written(out: str, **options) -> dict[str, bytes]:
        folder = play(experiment(*TINY), PlaygroundConfig(**SHORT, out=out, **options))
        return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix != ".json"}

    first = written("first")
    assert written("second") == first
    assert all(content != first[name] for name, content in written("third", seed=1).items())
    assert written("fourth", wanted=0.0) == first  # the task's best prompt
    assert written("fifth", wanted=1.0) != first


@pytest.mark.parametrize("needs_start", [True, False])
def test_what_networks_are_asked_for(needs_start):
    starts = Starts("fresh", torch.randn(3, 1), torch.arange(3.0)) if needs_start else None
    wish = Wish(0.7, told={"class_mask": torch.ones(10)})
    request = wish.request(5, starts, torch.device("cpu"))
    assert request.count == 5 and torch.equal(request.prompt["class_mask"], torch.ones(5, 10))
    before, wanted = request.prompt["target_metric"].unbind(1)
    assert torch.equal(wanted, torch.full((5,), 0.7))
    if starts:
        assert torch.equal(before, torch.tensor([0.0, 1, 2, 0, 1]))
        assert torch.equal(request.start, starts.weights[[0, 1, 2, 0, 1]])
    else:
        assert request.start is None
        assert before.isnan().all()  # as in training: there is no start whose metric could be known


def test_a_generator_without_prompt_is_asked_for_nothing():
    assert Wish().request(2, None, torch.device("cpu")).prompt == {}
    unprompted = experiment("condition=none")
    assert TrainedRun(unprompted).wish() == Wish()
    with pytest.raises(ConfigError, match=r"wanted=0\.2.*not prompted"):
        TrainedRun(unprompted).wish(wanted=0.2)


def test_a_few_networks_are_the_first_of_many(here):
    """What a network looks like does not depend on how many are written, or written at once."""
    exact = (*TINY, "trainer.precision=float32")  # bfloat16 products round by the size of their batch
    many = play(experiment(*exact), PlaygroundConfig(count=3, keyframes=0, out="many"))
    few = play(experiment(*exact, "evaluation.max_batch=1"), PlaygroundConfig(count=2, keyframes=0, out="few"))
    for name in ("network-000.safetensors", "network-001.safetensors"):
        for tensor, expected in zip(load_file(few / name).values(), load_file(many / name).values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_networks_of_a_larger_count_before_are_removed_and_nothing_else(here):
    folder = play(experiment(*TINY), PlaygroundConfig(count=3, keyframes=0))
    for name in ("network-009.safetensors", "mine.safetensors"):
        (folder / name).touch()
    play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0))
    left = {"network-000.safetensors", "network-009.safetensors", "mine.safetensors", "networks.json"}
    assert {file.name for file in folder.iterdir()} == left
    for unknown in ("[]", "{"):
        (folder / "networks.json").write_text(unknown)
        play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0))


def test_a_broken_network_is_recorded_as_valid_json(here, monkeypatch):
    columns = {"validation_loss": torch.tensor([float("inf"), float("nan"), 0.5])}
    monkeypatch.setattr("Gpt.run.trained.test_population", lambda task, weights, split: columns)
    folder = play(experiment(*TINY), PlaygroundConfig(count=3, keyframes=0))
    networks = json.loads((folder / "networks.json").read_text(), parse_constant=pytest.fail)["networks"]
    assert [network["validation_loss"] for network in networks] == [None, None, 0.5]


def test_published_weights_are_played_with(here):
    arguments = (
        "generator=gpt_paper_mnist", "generator.width=16", "generator.layers=1", "generator.heads=2",
        "generator.steps=3", "objective=ddpm", "condition.dropout=0", "distillation.weight=0", "device=cpu",
    )  # fmt: skip
    Path("checkpoint_models").mkdir()
    torch.save({"G_ema": experiment(*arguments).generator.network.state_dict()}, "checkpoint_models/mnist_loss.pt")
    folder = play(experiment(*arguments, "resume_path=mnist_loss.pt"), PlaygroundConfig(**SHORT))
    assert folder == Path("runs/digits_loss-mnist_loss/playground")
    # The decoders of a new model are zero: what it writes is what it was given.
    for network in json.loads((folder / "networks.json").read_text())["networks"]:
        assert network["validation_loss"] == pytest.approx(network["start_validation_loss"], rel=1e-4)
    with pytest.raises(CheckpointError, match="download http.*cartpole.pt"):
        play(experiment(*arguments, "resume_path=cartpole.pt"), PlaygroundConfig())
    with pytest.raises(ConfigError, match=r"resume_path=mnist_loss\.pt.*_paper"):
        play(experiment(*TINY, "resume_path=mnist_loss.pt"), PlaygroundConfig())


def test_a_run_without_a_generator_is_told_how_to_train_one(here):
    command = r"python main\.py --config-name digits_loss run\.name=other"
    with pytest.raises(CheckpointError, match=rf"no trained generator in runs/other; .*{command}"):
        play(experiment(*TINY, "run.name=other"), PlaygroundConfig())
    elsewhere = command.replace("run", r"run\.root=there run")
    with pytest.raises(CheckpointError, match=rf"no trained generator in there/other; .*{elsewhere}"):
        play(experiment(*TINY, "run.name=other", "run.root=there"), PlaygroundConfig())
    assert not Path("runs/other").exists()
    begun = experiment(*TINY, "run.name=begun")
    create_folder(begun.config, begun.folder)
    with pytest.raises(CheckpointError, match="runs/begun has no checkpoint yet; the command that began it"):
        play(begun, PlaygroundConfig())


def test_a_generator_from_noise_that_is_told_a_metric_starts_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompted = experiment(*MASKED, name="digits_loss_rpg")
    store_rpg(prompted, {"target_metric": torch.stack([torch.full((8,), torch.nan), torch.linspace(0.1, 2, 8)], 1)})
    low = play(prompted, PlaygroundConfig(**SHORT, wanted=0.2, out="low"))
    high = play(prompted, PlaygroundConfig(**SHORT, wanted=1.5, out="high"))
    assert "start_validation_loss" not in json.loads((low / "networks.json").read_text())["networks"][0]
    name = "network-000.safetensors"
    assert (low / name).read_bytes() != (high / name).read_bytes()
    with pytest.raises(ConfigError, match="updates=2.*from noise alone"):
        play(prompted, PlaygroundConfig(**SHORT, wanted=0.2, updates=2, out="twice"))


def test_a_single_task_takes_no_mask(here):
    with pytest.raises(ConfigError, match="'digits_loss' is a single task.*digits_mask_rpg"):
        play(experiment(*TINY), PlaygroundConfig(mask=EVEN))


NORMALISED = """
import torch
from torch import nn

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
TASK_METADATA = {
    "normalised": {
        "task_test_fn": lambda x, y, net: torch.nn.functional.cross_entropy(net(x), y),
        "constructor": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)),
        "data_fn": lambda: (X, (X[:, 0] > 0).long()),
        "train_data_fn": lambda: (X, (X[:, 0] > 0).long()),
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "metric": "loss",
    }
}
"""


def test_statistics_are_re_estimated_where_that_is_asked_for_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(NORMALISED, encoding="utf-8")
    settings = ("task_modules=[my_tasks.py]", "task=normalised", "generator=rpg", "generator.policy=within_layer")
    trained = experiment(*MASKED, *settings, "condition=none", name="base")
    task = trained.task
    trained.generator.fit(Batch(torch.rand(8, task.structure.size) + 0.5))
    store_generator(trained)
    plain = play(trained, PlaygroundConfig(**SHORT, out="plain"))
    assert "re-estimated" not in capsys.readouterr().out
    fresh = play(trained, PlaygroundConfig(**SHORT, out="fresh", recalibrate=True))
    assert "batch-norm statistics re-estimated on 60 training images" in capsys.readouterr().out
    before, after = (json.loads((folder / "networks.json").read_text()) for folder in (plain, fresh))
    assert (before["options"]["recalibrate"], after["options"]["recalibrate"]) == (False, True)
    assert before["walk"]["validation_loss"] != after["walk"]["validation_loss"]
    inputs, _ = task.data("train")
    for entry in after["networks"]:
        old, new = (load_file(folder / entry["file"]) for folder in (plain, fresh))
        changed = {name for name in new if not torch.equal(new[name], old[name])}
        assert changed == {"1.running_mean", "1.running_var"}
        hidden = inputs @ new["0.weight"].T + new["0.bias"]
        torch.testing.assert_close(new["1.running_mean"], hidden.mean(0), atol=1e-4, rtol=1e-4)
        network = task.constructor().eval()
        network.load_state_dict(new)
        assert entry["test_loss"] == pytest.approx(task.score(network, "test").item(), rel=1e-4)


def test_statistics_that_are_not_there_are_not_re_estimated(here):
    with pytest.raises(ConfigError, match="no batch-norm statistics"):
        play(experiment(*TINY), PlaygroundConfig(**SHORT, recalibrate=True))
    assert not Path("runs/tiny/playground").exists()
