"""main.py as its users meet it: what a run leaves behind, what is refused, and in which words."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir

import main
from experiment import Experiment
from Gpt.adapters.conditions import HashedWords
from Gpt.config import RunConfig, checked
from Gpt.errors import CheckpointError, ConfigError, TaskError, UserError
from Gpt.report.figures import save_figures
from Gpt.report.logger import read_metrics
from Gpt.tasks import TASK_METADATA, check_entry

ROOT = Path(main.__file__).parent
CONFIG_NAMES = sorted(file.stem for file in main.CONFIGS.glob("*.yaml") if file.stem != "base")
TINY = [
    "zoo.runs=96", "zoo.test_runs=16", "zoo.validation_runs=16", "zoo.shard_runs=48", "zoo.snapshots=6",
    "zoo.recipe={epochs: 2}", "generator.width=32", "generator.depth=1", "generator.heads=2",
    "trainer.steps=6", "trainer.batch_size=32", "trainer.warmup=2", "trainer.validate_every=3",
    "trainer.checkpoint_every=2", "trainer.log_every=2", "evaluation.networks=6", "evaluation.prompts=4",
    "evaluation.recursive_steps=2", "evaluation.optimiser_steps=4", "evaluation.learning_rates=3",
    "evaluation.novelty_networks=8", "evaluation.tuning_networks=2", "evaluation.quick_networks=4",
    "evaluation.max_batch=7", "logger=disabled", "device=cpu",
]  # fmt: skip


def config_of(*arguments: str, name: str = "digits_loss") -> RunConfig:
    """What the command line says, composed and checked as main does."""
    overrides = main.check_arguments(list(arguments))
    with initialize_config_dir(str(main.CONFIGS), version_base="1.3"):
        return main.typed_config(compose(name, overrides))


def run(*arguments: str):
    return main.run(Experiment(config_of(*TINY, *arguments), "digits_loss"))


def files(folder: Path) -> dict[str, int]:
    """Every file with the time it was last written."""
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with one finished run of the default configuration at its smallest, and its zoo."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run() is not None
    return folder


@pytest.fixture
def here(workplace, tmp_path, monkeypatch) -> Path:
    """A copy of the workplace, as the current folder; no more figures are drawn, which takes longest."""
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unmeasured(monkeypatch):
    """Evaluation, which takes longest, is left out."""
    monkeypatch.setattr("experiment.evaluate", lambda *_, **__: "results")
    monkeypatch.setattr(main, "side_by_side", lambda results, *_: results)
    monkeypatch.setattr(main, "report", lambda *_: None)


def test_a_run_leaves_everything_behind(workplace):
    folder = workplace / "runs" / "digits_loss"
    expected = {"config.json", "config.yaml", "metrics.jsonl", "results.json", "report.html", "summary.json"}
    assert expected | {"metrics.csv"} <= {f.name for f in folder.iterdir()}
    assert len(list((folder / "figures").iterdir())) > 3
    assert (folder / "checkpoints" / "latest.json").is_file()
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    validated = [line for line in lines if "validation/score" in line]
    assert [line["step"] for line in validated] == [3, 6]
    names = ("loss", "generated_loss", "generated_alignment")  # of training, and of the networks: a loss, too
    assert all(f"validation/{name}" in line for line in validated for name in names)
    assert all(line["validation/loss"] != line["validation/generated_loss"] for line in validated)
    results = json.loads((folder / "results.json").read_text())
    assert results["task"] == "digits_loss"
    kinds = {row["kind"] for row in results["table"]}
    assert kinds == {"generator", "baseline", "optimiser", "reference"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["step"] == 6
    assert summary["zoo_seconds"] > 0
    assert summary["training_seconds"] > 0
    assert checked(RunConfig, json.loads(json.dumps(config_of(*TINY).training_settings())))


def test_two_processes_are_not_let_into_one_run(here, unmeasured):
    """The second is told, and leaves everything as it is; when the first has ended, there is no trace of it."""
    folder = here / "runs" / "digits_loss"
    with FileLock(folder / ".lock"):
        before = files(folder)
        with pytest.raises(ConfigError, match=r"runs/digits_loss: another process is at work .* run.name"):
            run("test_only=true")
        assert files(folder) == before
    run("test_only=true")
    run("test_only=true")


def test_a_finished_run_is_left_alone_and_says_so(here, capsys):
    shutil.rmtree(here / "zoos")  # not even the zoo is needed
    before = files(here)
    assert run() is None
    output = capsys.readouterr().out
    assert "finished" in output
    assert "report.html" in output
    assert "test_only=true" in output
    assert files(here) == before


def test_test_only_measures_the_same_again(here):
    folder = here / "runs" / "digits_loss"
    stored, before = json.loads((folder / "results.json").read_text()), files(here)
    results = run("test_only=true")
    assert results is not None
    rows = {row["name"]: row["metrics"] for row in json.loads((folder / "results.json").read_text())["table"]}
    for row in stored["table"]:
        if row["kind"] != "optimiser":  # of which some get as much time as the generator takes
            assert rows[row["name"]] == row["metrics"]
    changed = {name for name, written in files(here).items() if before.get(name) != written}
    assert not [name for name in changed if "checkpoints" in name or name.startswith("zoos")]
    assert len(read_metrics(folder / "metrics.jsonl")) == 5


def test_test_only_can_measure_in_another_way(here):
    results = run("test_only=true", "evaluation.networks=4", "evaluation.label=mine")
    assert results is not None
    assert results.table[0].name.startswith("mine")


def test_test_only_without_a_trained_generator(here):
    before = files(here)
    with pytest.raises(CheckpointError, match=r"no trained run in runs/other; train it first, or set run\.name"):
        run("test_only=true", "run.name=other")
    assert files(here) == before
    assert not (here / "runs" / "other").exists()


@pytest.mark.parametrize("change", ["trainer.learning_rate=0.001", "zoo.seed=1", "generator.width=16"])
def test_other_settings_in_the_same_folder_are_refused_by_name(here, change):
    key, value = change.split("=")
    before = files(here)
    for arguments in ([change], [change, "test_only=true"]):
        with pytest.raises(ConfigError) as caught:
            run(*arguments)
        for part in (f"{key} was", f"now {value}", "runs/digits_loss", "run.name", "resume=never"):
            assert part in str(caught.value)
    assert files(here) == before


def test_settings_without_influence_on_the_weights_may_change(here):
    assert run("evaluation.networks=4", "data.root=elsewhere", "zoo.storage=disk") is None


class Killed(BaseException):
    pass


def test_a_killed_run_continues_with_the_same_command(here, unmeasured, monkeypatch):
    finished, folder = here / "runs" / "digits_loss", here / "runs" / "killed"
    log = main.Loggers.log

    def kill_at_four(self, metrics, step):
        log(self, metrics, step)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(main.Loggers, "log", kill_at_four)
        run("run.name=killed")
    assert "finished" not in json.loads((folder / "summary.json").read_text())
    assert run("run.name=killed") is not None
    assert json.loads((folder / "summary.json").read_text())["finished"]
    expected, found = (
        [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(f / "metrics.jsonl")]
        for f in (finished, folder)
    )
    assert found == expected
    for old, new in zip(sorted(finished.rglob("*.safetensors")), sorted(folder.rglob("*.safetensors")), strict=True):
        assert old.name == new.name
        assert old.read_bytes() == new.read_bytes()


def test_a_zoo_that_changed_is_judged_alike_in_every_session(here, monkeypatch):
    judged = []
    monkeypatch.setattr("experiment.evaluate", lambda _, __, zoo, *rest, **___: judged.append(zoo))
    monkeypatch.setattr(main, "side_by_side", lambda results, *_: results)
    monkeypatch.setattr(main, "report", lambda *_: None)
    fresh = ["zoo.store=false", "zoo.population=16", "zoo.refresh_every=1", "run.name=fresh"]
    run(*fresh)
    run(*fresh, "test_only=true")
    for zoo in judged:  # 64 training runs are four populations: at the sixth step the first has changed twice
        assert zoo.run_ids[32:].tolist() == [*range(160, 176), *range(112, 160)]
        assert len(zoo.former) == 64 + 16
    assert torch.equal(judged[0].former, judged[1].former)
    assert judged[0].metrics["validation_loss"].equal(judged[1].metrics["validation_loss"])


def test_an_untrained_folder_takes_corrected_settings(here, unmeasured):
    with pytest.raises(ConfigError, match=r"trainer\.slices=3 .*trainer\.batch_size=32"):
        run("run.name=wrong", "trainer.slices=3")
    assert run("run.name=wrong", "trainer.slices=2") is not None


def test_resume_never_makes_a_folder_beside_it(here, unmeasured):
    before = files(here / "runs" / "digits_loss")
    run("resume=never")
    assert (here / "runs" / "digits_loss-2" / "checkpoints" / "latest.json").is_file()
    assert files(here / "runs" / "digits_loss") == before
    with pytest.raises(ConfigError, match="resume=always is unknown; choose auto or never"):
        run("resume=always")


def test_collect_only_describes_the_zoo_and_trains_nothing(here, capsys):
    assert run("collect_only=true", "run.name=other") is None
    output = capsys.readouterr().out
    assert "96 runs x 6 snapshots x 760 weights" in output
    assert "fc1.weight" in output
    assert "final validation_loss" in output
    assert not (here / "runs" / "other").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.stepz=5", ["trainer.stepz", "'steps'"]),
        ("trianer.steps=5", ["trianer", "'trainer'"]),
        ("generator.widht=5", ["generator.widht", "'width'"]),
        ("trainer=gpus", ["trainer=gpus", "'gpu'"]),
        ("generator=unheard_of", ["generator=unheard_of", "known:", "gpt_large"]),
        ("--config-name=mnist_los", ["mnist_los", "'mnist_loss'"]),
        ("-cn=nonsense", ["nonsense", "known:", "digits_loss"]),
        ("+zoo.rums=3", ["zoo.rums", "'runs'"]),
        ("=3", ["no key ''"]),
        ("a=[", ["'a=['", "key=value", "quotes"]),
        ("zoo.recipe={epochs: 2", ["'zoo.recipe={epochs: 2'", "'key={a: 1}'"]),
        ("zoo.runs=${", ["'zoo.runs=${'", "key=value"]),
        ("digits_rpg", ["'digits_rpg'", "key=value"]),
        ("zoo.runs=1,2", ["zoo.runs=1,2", "one value", "'key=[1, 2]'"]),
        ("trainer=[gpu, small]", ["trainer=[gpu, small]", "known: gpu, small"]),
        ("trainer=", ["trainer=", "known: gpu, small"]),
    ],
)
def test_misspellings_are_answered_with_the_nearest_word(argument, words):
    with pytest.raises(ConfigError) as caught:
        main.check_arguments(["seed=1", argument])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("trainer.steps=many", ["trainer.steps", "many", "integer"]),
        ("trainer.steps=0", ["trainer.steps", "greater than 0"]),
        ("trainer.schedule=lineer", ["trainer.schedule", "'linear'", "'cosine'"]),
        ("trainer.precision=float16", ["trainer.precision", "'bfloat16'"]),
        ("logger.mode=sometimes", ["logger.mode", "offline"]),
        ("task_modules=my_tasks.py", ["task_modules", "my_tasks.py"]),
        ("zoo.runs=", ["zoo.runs", "integer"]),
        ("zoo.runs=${zoo.rums}", ["zoo.runs", "'zoo.rums' not found", "${"]),
        ("zoo.path=${oc.env:NO_SUCH_VARIABLE}", ["zoo.path", "NO_SUCH_VARIABLE", "${"]),
        ("task=${task}", ["task", "Recursive"]),
    ],
)
def test_wrong_values_are_named(argument, words):
    with pytest.raises(ConfigError) as caught:
        config_of(argument)
    assert all(word in str(caught.value) for word in words), str(caught.value)


FROM_NOISE = ("generator={name: rpg, width: 32, depth: 1, heads: 2, identities: 3, steps: 2}",)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["task=digits_los"], TaskError, ["digits_los", "'digits_loss'", "task_modules"]),
        (["task_modules=[mine.py]"], TaskError, ["mine.py", "no file"]),
        (["zoo.recipe={epoch: 2}"], ConfigError, ["zoo.recipe", "'epoch'", "'epochs'"]),
        (["generator.name=gtp"], ConfigError, ["generator.name=gtp", "'gpt'"]),
        (["objective.name=flows"], ConfigError, ["objective.name=flows", "'flow'"]),
        (["condition.names=[target_metrics]"], ConfigError, ["condition.names", "'target_metric'"]),
        (["generator.heads=3"], ConfigError, ["generator.heads=3", "generator.width=32"]),
        (["generator.sampler=ddpm"], ConfigError, ["sampler", "ddpm"]),
        (["zoo.snapshots=1"], ConfigError, ["snapshots"]),
        (["zoo.refresh_every=5"], ConfigError, ["zoo.refresh_every", "zoo.store=false"]),
        (["zoo.refresh_every=5", "zoo.store=false", *FROM_NOISE], ConfigError, ["refresh_every", "identities"]),
        (["zoo.refresh_every=5", "zoo.store=false", "zoo.align=true"], ConfigError, ["refresh_every", "aligned"]),
    ],
)
def test_wrong_parts_are_named_before_anything_is_trained(tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(config_of(*TINY, *arguments), "digits_loss")
    with pytest.raises(error) as caught:
        _ = experiment.task, experiment.generator, experiment.zoo
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("argument", ["generator.sampler=ddpm", "logger=swanlab"])
def test_no_zoo_is_collected_for_what_cannot_be_trained(tmp_path, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError):
        run(argument)
    assert not list(tmp_path.iterdir())


def test_options_may_follow_settings():
    assert main.check_arguments(["seed=1", "--config-name", "digits_rpg"]) == [
        "--config-name",
        "digits_rpg",
        "++seed=1",
    ]


def test_options_and_sweeps_are_left_to_hydra():
    options = ["--config-name", "digits_rpg", "--multirun", "trainer=gpu,small"]
    assert main.check_arguments([*options, "seed=1,2"]) == [*options, "++seed=1,2"]
    with pytest.raises(ConfigError, match="'gpu'"):
        main.check_arguments([*options, "trainer=gpus,small"])


@pytest.mark.parametrize(
    "argument", ["evaluation.guidance=2.0", "evaluation.soup=7", "logger.project=mine", "+zoo.runs=3"]
)
def test_keys_can_be_set_whether_or_not_a_file_mentions_them(argument):
    config = config_of(argument)
    section, key = argument.lstrip("+").split("=")[0].split(".")
    assert str(getattr(getattr(config, section), key)) == argument.split("=")[1]


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="device=gpu"):
        _ = Experiment(config_of("device=gpu"), "digits_loss").device


def test_a_missing_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="device=cuda:1, but torch finds no CUDA device; use device=cpu"):
        _ = Experiment(config_of("device=cuda:1"), "x").device


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_configuration_composes_and_builds_its_generator(name, monkeypatch):
    for initialise in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "trunc_normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, initialise, lambda tensor, *_, **__: tensor)  # memory not touched is free
    config = config_of(name=name)
    assert config.task in TASK_METADATA
    if getattr(TASK_METADATA[config.task].get("recipe"), "base", None) == "smollm2":
        pytest.importorskip("gguf")  # the language model is not installed
    for group in ("zoo", "trainer", "evaluation", "logger", "objective", "condition"):
        assert getattr(config, group) is not None
    task = check_entry(config.task, TASK_METADATA[config.task])
    experiment = Experiment(config, name)
    # Token indices have values, which the meta device has not; the paper's generators have none, and are far larger.
    device = torch.device("meta" if config.generator["name"] == "gpt_paper" else "cpu")
    experiment.__dict__ |= {"task": task, "device": device}
    with device:
        assert sum(p.numel() for p in experiment.generator.parameters()) > 1000


def test_help_names_every_configuration_and_option():
    text = main.help_text()
    for file in (f for f in main.CONFIGS.rglob("*.yaml") if f.stem != "base"):
        assert file.stem in text
        assert file.read_text().startswith("# "), f"{file} lacks the comment that --help shows"


def test_users_see_messages_and_programmers_tracebacks(capsys):
    def fails(error: BaseException):
        raise error

    with pytest.raises(SystemExit) as caught:
        main.guard(lambda: fails(UserError("the thing, the place, the remedy")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the thing, the place, the remedy\n"
    with pytest.raises(SystemExit) as caught:
        main.guard(lambda: fails(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert "same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main.guard(lambda: fails(OSError(errno.EROFS, "Read-only file system", "runs/mine")))
    assert caught.value.code == 2
    assert "error: runs/mine: Read-only file system; " in capsys.readouterr().err
    for bug in (OSError(errno.ENOENT, "No such file or directory", "runs/mine"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            main.guard(lambda bug=bug: fails(bug))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_the_command_itself(here):
    before = files(here)
    refused = command(here, *TINY, "trainer.steps=7")
    assert refused.returncode == 2
    expected = "error: runs/digits_loss holds a run with other settings (trainer.steps was 6, now 7)"
    assert refused.stderr.startswith(expected), refused.stderr
    assert "Traceback" not in refused.stderr
    assert files(here) == before


def less_the_clock(found: Any) -> Any:
    """Results without seconds, and of the optimisers only the longest run, whose steps do not follow from seconds."""
    if isinstance(found, dict):
        clocked = ("seconds" in key or key in ("break_even", "note", "optimisers") for key in found)
        return {k: less_the_clock(v) for (k, v), c in zip(found.items(), clocked, strict=True) if not c}
    if isinstance(found, list):
        rows = (r for r in found if not (isinstance(r, dict) and r.get("kind") == "optimiser" and r["updates"] < 4))
        return [less_the_clock(row) for row in rows]
    return found


def test_two_processes_find_what_one_finds(here):
    """All of the evaluation, one-update curves included: the same numbers, to the bit."""
    file = here / "runs" / "digits_loss" / "results.json"
    expected = less_the_clock(json.loads(file.read_text()))
    file.unlink()
    shutil.rmtree(here / "zoos")  # both processes collect it again
    (here / "without_figures.py").write_text("import main; main.save_figures = lambda *_: {}; main.main()")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [*launcher, "without_figures.py", *TINY, "test_only=true"]
    ended = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("evaluating: one update") == 1
    found = less_the_clock(json.loads(file.read_text()))
    assert found == expected
    assert expected["curves"] and sum(row["kind"] == "optimiser" for row in expected["table"]) == 3


def run_twin(name: str, *arguments: str, settings: list[str] = TINY):
    config = config_of(*TINY, *arguments, f'beside=["digits_loss {shlex.join(settings)}"]', name=name)
    return main.run(Experiment(config, name))


def test_generation_one_update_and_training_side_by_side_in_one_command(here, monkeypatch):
    finished = files(here / "runs" / "digits_loss")
    monkeypatch.setattr(main, "save_figures", save_figures)
    results = run_twin("digits_rpg")
    assert files(here / "runs" / "digits_loss") == finished  # reused, and so is its zoo
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


def test_what_stands_beside_is_run_first_on_the_same_zoo(tmp_path, monkeypatch):
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
def test_what_cannot_stand_beside_is_named_before_anything_is_trained(tmp_path, monkeypatch, entry, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        main.run(Experiment(config_of(*TINY, f'beside=["{entry}"]', name="digits_rpg"), "digits_rpg"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "zoos").exists()


def test_networks_from_noise_for_a_wanted_loss(here):
    results = run_twin("digits_loss_rpg")
    names = [row.name for row in results.table]
    assert names[0] == "RPG, written from noise" and "G.pt, one update (digits_loss)" in names
    assert not any("updates" in name for name in names if "digits_loss" not in name)  # nothing to update again
    assert {curve.name for curve in results.curves} >= {"held-out starts, attainable", "shuffled prompts", "retrieval"}


MASKED = [
    "zoo.runs=136", "zoo.shard_runs=136", "zoo.snapshots=2", "zoo.recipe={epochs: 2}", "generator.width=32",
    "generator.depth=1", "generator.heads=2", "trainer.steps=4", "trainer.batch_size=16", "trainer.warmup=2",
    "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=2", "evaluation.samples_per_prompt=2",
    "logger=disabled", "device=cpu",
]  # fmt: skip


def test_a_family_of_masks_from_the_zoo_to_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(config_of(*MASKED, name="digits_mask_rpg"), "digits_mask_rpg")
    results = main.run(experiment)
    assert results is not None
    family = experiment.task.family
    assert [len(experiment.zoo.split(name)) for name in ("test", "validation", "train")] == [64, 32, 40]
    assert results.table[0].name == "RPG, unseen masks"
    assert results.table[0].metrics["test_error"].count == family.held_out
    folder = tmp_path / "runs" / "digits_mask_rpg"
    assert "nearest seen mask" in (folder / "report.html").read_text()
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation/score" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["validation/generated_worst_mask"] >= line["validation/generated_error"] for line in lines)
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert "RPG, unseen masks" in capsys.readouterr().out
    again = Experiment(config_of(*MASKED, "test_only=true", name="digits_mask_rpg"), "digits_mask_rpg")
    repeated = main.run(again)
    assert repeated is not None
    assert [row.metrics for row in repeated.table] == [row.metrics for row in results.table]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("class_mask_and_metric", "asked for error"),
        ("class_mask_and_text", "RPG, unseen masks in words alone"),
        ("text", "RPG, unseen masks"),
    ],
)
def test_conditions_of_a_family_alone_and_together(tmp_path, monkeypatch, condition, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    monkeypatch.setattr("experiment.find_model", lambda: None)
    monkeypatch.setattr("experiment.SentenceEncoder", lambda **_: HashedWords())
    arguments = [*MASKED, "evaluation.samples_per_prompt=1", f"condition={condition}"]
    results = main.run(Experiment(config_of(*arguments, name="digits_mask_rpg"), "digits_mask_rpg"))
    assert any(words in f"{row.name}; {row.note}" for row in results.table)


def test_without_the_sentence_model_text_is_refused_before_anything_is_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Gpt.text.BUNDLED", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; .*gpt-weights\[text\]"):
        main.run(Experiment(config_of(*MASKED, name="digits_text_rpg"), "digits_text_rpg"))
    assert not list(tmp_path.iterdir())


def test_a_generator_that_is_not_told_the_mask_is_refused_for_a_family():
    config = config_of("condition=none", name="digits_mask_rpg")
    with pytest.raises(ConfigError, match="'digits_mask' is one task for each class mask.*names=\\[class_mask\\]"):
        _ = Experiment(config, "digits_mask_rpg").task


def test_published_rpg_can_be_had_by_its_group():
    arguments = ["generator=rpg_paper_tiny", "objective=ddpm_eps", "generator.condition=head", "distillation.weight=0"]
    experiment = Experiment(config_of(*arguments, "condition.dropout=0", "device=cpu", name="digits_mask_rpg"), "x")
    assert experiment.generator.default_steps == 1000
    with pytest.raises(ConfigError, match="predicts noise"):
        _ = Experiment(config_of(arguments[0], arguments[-1], "device=cpu", name="digits_mask_rpg"), "x").generator
