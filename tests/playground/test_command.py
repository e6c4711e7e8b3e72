"""The command playground.py: its arguments, and the run that they mean."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, experiment

import playground
from Gpt.errors import ConfigError
from Gpt.run.folder import create_folder, stored_config
from playground import PlaygroundConfig, split_arguments

ROOT = Path(playground.__file__).parent


def test_arguments_are_told_apart():
    own = ["count=3", "wanted=1e-1", "guidance=2", "steps=null", "out=a b/c"]
    run = ["--config-name", "digits_error", "run.name=mine", "trainer=gpu", "+zoo.seed=1", "generator.steps=3"]
    config, others = split_arguments([run[0], run[1], *own, *run[2:]])
    assert others == run
    assert config == PlaygroundConfig(count=3, wanted=0.1, guidance=2.0, steps=None, out="a b/c")
    assert split_arguments([]) == (PlaygroundConfig(), [])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("conut=3", ["conut", "'count'"]),
        ("wnated=0.2", ["wnated", "'wanted'"]),
        ("trianer=gpu", ["trianer", "'trainer'"]),
        ("count=0", ["count=0", "greater than 0"]),
        ("count=few", ["count", "few", "integer"]),
        ("keyframes=-1", ["keyframes=-1"]),
        ("wanted=[1", ["'wanted=[1'", "key=value"]),
        ("count=${x", ["'count=${x'", "key=value"]),
        ("wanted=low", ["wanted", "low", "number"]),
        ("wanted=nan", ["wanted", "finite"]),
    ],
)
def test_wrong_options_are_named(argument, words):
    with pytest.raises(ConfigError) as caught:
        split_arguments([argument])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bits_and_sentences_are_taken_as_they_are():
    config, others = split_arguments(["mask=0101010101", "prompt=things that fly: yes, all = 1"])
    assert (config.mask, config.prompt, others) == ("0101010101", "things that fly: yes, all = 1", [])


def test_the_command_itself(here):
    create_folder(experiment(*TINY).config, Path("runs/tiny"))
    call = [sys.executable, str(ROOT / "playground.py"), "run.name=tiny", "count=2", "keyframes=0", "out=written"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert (here / "written" / "network-001.safetensors").is_file()


def test_a_run_is_played_with_the_settings_it_was_trained_with(here):
    create_folder(experiment(*TINY, "seed=7").config, Path("runs/tiny"))
    plain = experiment("run.name=tiny", "data.root=elsewhere")
    found = playground.run_of(plain.config, "digits_loss", ["run.name=tiny", "data.root=elsewhere"]).config
    assert (found.seed, found.generator["width"], found.data.root) == (7, 32, "elsewhere")
    assert playground.run_of(experiment().config, "digits_loss", []).config == experiment().config  # no such run
    other = experiment("run.name=tiny", name="cartpole_small").config
    with pytest.raises(ConfigError, match="cartpole_small is about task 'cartpole.*about 'digits_loss'; leave"):
        playground.run_of(other, "cartpole_small", ["run.name=tiny"])


TRAINED = ("seed=7", "data.root=there", "condition.encoder=there/encoder", "zoo.recipe={epochs: 2}", "logger=disabled")


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("evaluation.max_batch=3", "evaluation.max_batch", 3),
        ("condition.encoder=here/encoder", "condition.encoder", "here/encoder"),  # it is told no sentences
        ("zoo.path=${run.root}/zoo", "zoo.path", "runs/zoo"),
        ("zoo={path: zoo, storage: disk}", "zoo.storage", "disk"),
        ("logger=tensorboard", "logger.backend", "tensorboard"),
        ("task_modules=[moved.py]", "task_modules", ("moved.py",)),
        ("trainer.steps=4000", "trainer.steps", 4000),  # as it was
        ("~zoo.path", "zoo.path", None),
    ],
)
def test_settings_of_the_command_line_go_on_top_of_those(here, setting, key, value):
    create_folder(experiment(*TINY, *TRAINED, "trainer.steps=4000").config, Path("runs/tiny"))
    composed = experiment("run.name=tiny", *([] if setting[0] == "~" else [setting])).config
    chosen = playground.run_of(composed, "digits_loss", ["run.name=tiny", setting]).config
    found = dataclasses.asdict(chosen)
    for part in key.split("."):
        found = found[part]
    assert found == value
    stored = stored_config(Path("runs/tiny"))
    section = key.split(".")[0]
    assert dataclasses.replace(chosen, device="cpu", **{section: getattr(stored, section)}) == stored


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed=8", "seed was 7, now 8"),
        ("zoo.recipe={epochs: 5}", "zoo.recipe.epochs was 2, now 5"),
        ("generator.width=64", "generator.width was 32, now 64"),
        ("trainer=gpu", "trainer.batch_size was 256, now 2048"),
    ],
)
def test_a_setting_that_the_weights_were_not_trained_with_is_refused_by_name(here, setting, told):
    create_folder(experiment(*TINY, *TRAINED).config, Path("runs/tiny"))
    with pytest.raises(ConfigError, match=f"runs/tiny was trained with other settings .*{told}.*Leave them out"):
        playground.run_of(experiment("run.name=tiny", setting).config, "digits_loss", ["run.name=tiny", setting])


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["playground.py", "run.name=tiny", "cuont=2"])
    with pytest.raises(SystemExit, match="2"):
        playground.main()
    assert capsys.readouterr().err == "error: configuration: there is no key 'cuont'; did you mean 'count'?\n"
    monkeypatch.setattr(sys, "argv", ["playground.py", "--help"])
    playground.main()
    assert "wanted: metric to ask for" in capsys.readouterr().out
