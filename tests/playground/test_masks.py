"""Networks for class masks in bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_runs import EVEN, SHORT, TINY, experiment, masked_experiment, store_generator

from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.run.trained import TrainedRun, mask_role
from playground import PlaygroundConfig, play


def test_a_mask_is_written_for_and_measured_on_its_classes(masked, capsys):
    folder = play(masked_experiment(), PlaygroundConfig(**SHORT, mask=EVEN))
    facts, task = json.loads((folder / "networks.json").read_text()), masked_experiment().task
    assert facts["options"]["mask"] == EVEN
    mask = torch.arange(10) % 2 == 0
    for entry in facts["networks"]:
        network = task.constructor()
        network.load_state_dict(load_file(folder / entry["file"]), strict=True)
        for split in ("validation", "test"):
            with torch.no_grad():
                error, loss = task.task_test_fn(*task.data(split)[:2], mask, network)
            assert entry[f"{split}_loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert entry[f"{split}_error"] == pytest.approx(error.item(), abs=1e-3)
    assert "zero, two, four, six, eight (mask 1010101010, " in capsys.readouterr().out
    assert (folder / "walk.gif").is_file()
    other = play(masked_experiment(), PlaygroundConfig(**SHORT, mask="0101010101", out="other"))
    name = "network-000.safetensors"
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_the_role_of_a_mask():
    family = masked_experiment().task.family
    roles = {mask_role(family, mask) for mask in family.test_masks}
    assert roles == {"held out for testing"}
    assert mask_role(family, family.validation_masks[0]) == "held out for validation"
    assert mask_role(family, family.train_masks[0]) == "seen in training"
    assert mask_role(family, ~family.test_masks[0]) == "not seen in training"


def test_starts_of_a_family_are_measured_on_the_mask(masked):
    settings = ("generator=gpt", "condition=class_mask_and_metric", "run.name=updating")
    described = {"class_mask": torch.ones(8, 10), "target_metric": torch.rand(8, 2)}
    trained = experiment(*TINY[:4], *settings, name="digits_mask_rpg")
    trained.generator.fit(Batch(torch.randn(8, trained.task.structure.size), prompt=described))
    store_generator(trained)
    folder = play(trained, PlaygroundConfig(count=3, keyframes=0, mask=EVEN, wanted=5.0))
    task, mask = trained.task, torch.arange(10) % 2 == 0
    for i, entry in enumerate(json.loads((folder / "networks.json").read_text())["networks"]):
        start = TrainedRun(trained).fresh_starts(3, 0, mask).weights[i]
        network = task.constructor()
        network.load_state_dict(task.structure.state_dict(start))
        with torch.no_grad():
            error, _ = task.task_test_fn(*task.data("validation")[:2], mask, network)
        assert entry["start_validation_error"] == pytest.approx(error.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["prompt=", "mask="]),
        ({"mask": EVEN, "prompt": "all even digits"}, ["by prompt=", "or by mask="]),
        ({"mask": "101"}, ["mask=101", "10 bits", "1010101010"]),
        ({"mask": "1010101012"}, ["mask=1010101012", "10 bits"]),
        ({"mask": "1111111111"}, ["all classes"]),
        ({"mask": EVEN, "wanted": 3.0}, ["wanted=3", "not prompted with a metric"]),
        ({"prompts": "file.txt"}, ["prompts", "prompt=…"]),
    ],
)
def test_wishes_that_make_no_task_are_refused(masked, options, words):
    with pytest.raises(ConfigError) as caught:
        play(masked_experiment(), PlaygroundConfig(**options))
    assert all(word in str(caught.value) for word in words), str(caught.value)
