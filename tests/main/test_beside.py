"""Several generators in one table: `beside` runs, or reads, the others first."""

import json
import shlex
from collections.abc import Callable

import pytest

import main
from Gpt.errors import ConfigError
from Gpt.report.figures import save_figures


@pytest.fixture
def run_twin(run, tiny) -> Callable:
    """`(name, settings)`: a configuration beside digits_loss with these settings, the smallest ones where left out."""

    def run_twin(name: str, settings: tuple[str, ...] = tiny):
        return run(f'beside=["digits_loss {shlex.join(settings)}"]', name=name)

    return run_twin


def test_generation_one_update_and_training_side_by_side_in_one_command(here, monkeypatch, times, run_twin):
    finished = times(here / "runs" / "digits_loss")
    monkeypatch.setattr(main, "save_figures", save_figures)
    results = run_twin("digits_rpg")
    assert times(here / "runs" / "digits_loss") == finished  # reused, and so is its zoo
    rows = {row.name: row for row in results.table}
    assert {"RPG, written from noise", "G.pt, one update (digits_loss)", "ordinary training (digits_loss)"} <= set(rows)
    (curve,) = results.training_curves
    assert len(curve.x) == 6 and curve.x[0] == 0
    folder = here / "runs" / "digits_rpg"
    assert (folder / "figures" / "side_by_side.png").is_file()
    assert "G.pt, one update (digits_loss)" in (folder / "report.html").read_text()
    collecting, reading = (
        json.loads((here / "runs" / name / "summary.json").read_text())["zoo_seconds"]
        for name in ("digits_loss", "digits_rpg")
    )
    assert reading == collecting > 0  # a zoo that another run collected has cost what it has cost


def test_what_stands_beside_is_run_first_on_the_same_zoo(tmp_path, monkeypatch, run_twin):
    order = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "train", lambda *_: order.append("trained") or pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception, match="enough"):
        run_twin("digits_rpg", settings=["run.name=first", "trainer.steps=9", "zoo.runs=640"])
    stored = json.loads((tmp_path / "runs" / "first" / "config.json").read_text())
    assert stored["zoo"]["runs"] == 96 and stored["trainer"]["steps"] == 9 and stored["condition"]["names"]
    assert order == ["trained"] and not (tmp_path / "runs" / "digits_rpg").exists()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("digits_los", ["no configuration 'digits_los'", "'digits_loss'"]),
        ("digits_loss trainer.stepz=1", ["trainer.stepz", "'steps'"]),
        ("digits_error", ["digits_error is about error, this run about loss"]),
        ("digits_loss zoo.runs=[", ["'zoo.runs=['", "key=value"]),
        ("digits_loss hydra.verbos=true", ["digits_loss hydra.verbos=true", "verbos"]),
        ("digits_loss 'seed=1", ["digits_loss 'seed=1", "No closing quotation"]),
        ("", ["beside: ''"]),
    ],
)
def test_what_cannot_stand_beside_is_named_before_anything_is_trained(tmp_path, monkeypatch, entry, words, run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(f'beside=["{entry}"]', name="digits_rpg")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "zoos").exists()


def test_networks_from_noise_for_a_wanted_loss(here, run_twin):
    results = run_twin("digits_loss_rpg")
    names = [row.name for row in results.table]
    assert names[0] == "RPG, written from noise" and "G.pt, one update (digits_loss)" in names
    assert not any("updates" in name for name in names if "digits_loss" not in name)  # nothing to update again
    assert {curve.name for curve in results.curves} >= {"held-out starts, attainable", "shuffled prompts", "retrieval"}
