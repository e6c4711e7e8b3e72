"""The walk through a generator's latent space."""

import json

import pytest
import torch
from PIL import Image
from small_runs import MASKED, SHORT, TINY, experiment, store_rpg

import playground
from Gpt.report.walk import slerp_loop
from Gpt.run.trained import TrainedRun
from Gpt.seeds import rng
from playground import PlaygroundConfig, play


def test_the_walk_is_a_loop_from_one_start(here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        playground, "walk_gif", lambda filters, metric, path, name: seen.append((filters, metric, name))
    )
    config = PlaygroundConfig(count=2, keyframes=3, frames=4)
    folder = play(experiment(*TINY), config)
    filters, metric, name = seen[0]
    assert filters.shape == (12, 10, 8, 8)
    assert name == "validation loss"
    assert json.loads((folder / "networks.json").read_text())["walk"]["validation_loss"] == pytest.approx(metric)
    # The same networks, from the generator itself.
    trained = experiment(*TINY)
    generator, task = trained.trained(), trained.task
    start = TrainedRun(trained).fresh_starts(2, 0, None)
    keyframes = torch.randn(3, task.structure.size, generator=rng("cpu", 0, "playground", "walk"))
    prompt = {"target_metric": torch.tensor([[start.metric[0], task.best_prompt]]).expand(12, 2)}
    networks = generator.sample(prompt, start.weights[:1].expand(12, -1), noise=slerp_loop(keyframes, 4))
    torch.testing.assert_close(torch.tensor(filters).flatten(1), networks[:, :640])


def test_the_animation_has_every_frame(here):
    folder = play(experiment(*TINY), PlaygroundConfig(**SHORT))
    with Image.open(folder / "walk.gif") as image:
        assert image.n_frames == 4
    assert not (play(experiment(*TINY), PlaygroundConfig(count=1, keyframes=0, out="still")) / "walk.gif").exists()


def test_whole_networks_are_written_without_any_prompt_and_one_run_is_walked_through(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = experiment(*MASKED, "generator.identities=3", name="digits_rpg")
    store_rpg(whole, {"identity": torch.zeros(8, dtype=torch.long)})
    asked_for = []
    sample = type(whole.generator).sample

    def recorded(self, prompt, *arguments, **options):
        asked_for.append(prompt)
        return sample(self, prompt, *arguments, **options)

    monkeypatch.setattr(type(whole.generator), "sample", recorded)
    folder = play(whole, PlaygroundConfig(**SHORT))
    assert "unprompted" in capsys.readouterr().out
    networks = json.loads((folder / "networks.json").read_text())["networks"]
    assert set(networks[0]) == {"file", "validation_loss", "validation_error", "test_loss", "test_error"}
    written, *walked = asked_for
    assert written.keys() == {"identity"}  # each network draws one
    assert all(torch.equal(prompt["identity"], torch.zeros(2, dtype=torch.long)) for prompt in walked)
