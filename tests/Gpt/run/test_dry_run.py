"""The dry run: it says yes where a run would succeed, names everything that is wrong at once, and leaves nothing."""

import dataclasses
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import main
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.importer import import_adapters
from Gpt.adapters.peft_io import save_adapter
from Gpt.adapters.spec import AdapterModule, AdapterSpec, adapter_structure
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import adapter_entry
from Gpt.errors import ConfigError, TaskError, ZooError
from Gpt.recipes import AdapterRecipe
from Gpt.run import dry_run
from Gpt.run.command_line import compose
from Gpt.run.dry_run import BLOCKED, CHECKS, Rehearsal, run_checks
from Gpt.run.experiment import Experiment
from Gpt.tasks import check_entry, get_task

SMALL = [
    "zoo.runs=48", "zoo.test_runs=8", "zoo.validation_runs=8", "zoo.shard_runs=16", "zoo.snapshots=4",
    "zoo.recipe={epochs: 1}", "generator.width=32", "generator.depth=1", "generator.heads=2", "logger=disabled",
    "device=cpu",
]  # fmt: skip


def experiment(*arguments: str, name: str = "digits_loss") -> Experiment:
    return Experiment(compose(name, list(arguments)), name)


def found(*arguments: str, name: str = "digits_loss", **parts) -> dict[str, dry_run.Check]:
    """The checks by name; `parts` stand in the place of the rehearsal's own."""
    rehearsal = Rehearsal(experiment(*arguments, name=name).config, name)
    rehearsal.__dict__ |= parts
    return {check.what: check for check in run_checks(rehearsal)}


def troubles(checks: dict[str, dry_run.Check]) -> dict[str, str]:
    return {what: check.size for what, check in checks.items() if not check.ok and check.size != BLOCKED}


def everything(folder: Path) -> dict[str, int]:
    """Every file and folder with the time it was last written."""
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns if f.is_file() else 0 for f in folder.rglob("*")}


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """A folder with the whole zoo of the small configuration."""
    folder = tmp_path_factory.mktemp("collected")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert experiment(*SMALL).zoo.runs == 48
    return folder


@pytest.fixture
def stored(collected, empty) -> Path:
    shutil.copytree(collected, empty, dirs_exist_ok=True)
    return empty


@pytest.fixture
def untrained(monkeypatch):
    """Whatever wants to train a zoo fails the test."""

    def refuse(*_, **__):
        pytest.fail("trained, although a dry run of a stored zoo trains nothing")

    for where in ("Gpt.run.dry_run", "data_gen.collect", "Gpt.run.experiment"):
        monkeypatch.setattr(f"{where}.train_population", refuse)


def test_the_embedded_default_passes_and_leaves_nothing_behind(empty, capsys):
    assert main.run(experiment("dry_run=true", "device=cpu")) is None
    lines = capsys.readouterr().out.splitlines()
    rows = {what: next(line for line in lines if line.startswith(f"  {what}  ".ljust(18))) for what in CHECKS}
    assert all(f"{what:14s}  ok" in row for what, row in rows.items())
    assert "1,280 runs x 32 snapshots, 118.8 MiB" in rows["zoo"]  # 1,280 x 32 x 760 weights x 4 bytes
    assert "760 weights in 4 tensors, 10 hidden units in 1 group, prompted" in rows["task"]
    assert "train 1097x1x8x8" in rows["data"]
    assert not everything(empty)


def test_the_device_is_described_be_it_a_processor_or_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 4 * 2**30))
    described = []
    for name in ("cpu", "cuda:1"):
        rehearsal = Rehearsal(compose("digits_loss", []), "digits_loss")
        rehearsal.device = torch.device(name)
        described.append(dry_run._device(rehearsal))
    assert described == ["cpu, 1 thread", "card cuda:1, 3.0 GiB free"]


def test_language_models_and_adapters_pass_too(empty):
    checks = found("device=cpu", "logger=disabled", name="lora_tiny")
    assert not troubles(checks)
    assert "text 12x32" in checks["batch"].size
    assert not everything(empty)


def test_everything_that_is_wrong_is_told_at_once_and_each_trouble_once(empty, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    (empty / "file").write_text("")
    wrong = [
        "zoo.runs=10", "zoo.dtype=float64", "generator.heads=3", "run.root=file/runs",
        "logger=tensorboard",
    ]  # fmt: skip
    expected = {
        "tracker": "gpt-weights[tensorboard]",
        "run folder": "run.root",
        "zoo": "-6 to train on",
        "generator": "generator.heads=3",
    }
    checks = found(*SMALL, *wrong)
    told = troubles(checks)
    assert told.keys() == expected.keys()
    assert all(words in told[what] for what, words in expected.items())
    assert checks["task"].ok and checks["data"].ok and not checks["networks"].ok
    with pytest.raises(ConfigError, match="the dry run says about: tracker, run folder, zoo, generator"):
        main.run(experiment(*SMALL, *wrong, "dry_run=true"))
    assert f"networks        NO  {BLOCKED}" in capsys.readouterr().out
    assert [*everything(empty)] == ["file"]


def test_a_task_that_does_not_exist_blocks_what_needs_it(empty):
    checks = found("task=digits_los", "device=cpu")
    assert [*troubles(checks)] == ["task"]
    assert checks["device"].ok and checks["generator"].size == BLOCKED


def test_a_stored_zoo_is_opened_instead(stored, untrained):
    before = everything(stored)
    checks = found(*SMALL)
    assert not troubles(checks)
    assert checks["zoo's networks"].size.startswith("48 stored runs")
    assert everything(stored) == before


@pytest.mark.parametrize("condition", ["target_metric", "none"])
def test_a_stored_zoo_without_the_tasks_metric_is_named(stored, condition):
    run = experiment(*SMALL, "generator=rpg", f"condition={condition}")
    run.task = dataclasses.replace(run.task, metric="return")
    told = troubles(found(*SMALL, task=run.task))["zoo's networks"]
    assert "zoos/digits has no column 'validation_return', only test_error, " in told
    with pytest.raises(ZooError, match="'validation_return'"):
        run.fit()


def test_what_a_zoo_lacks_is_counted_and_not_trained(stored):
    before = everything(stored)
    checks = found(*SMALL, "zoo.runs=64")
    assert not troubles(checks)
    assert "64 runs x 4 snapshots" in checks["zoo"].size and "48 runs are in zoos/digits" in checks["zoo"].size
    assert "2 runs x 2 snapshots trained" in checks["zoo's networks"].size
    assert everything(stored) == before
    rehearsal = Rehearsal(experiment(*SMALL, "zoo.runs=64").config, "x")
    assert rehearsal.runs_bytes(64 - rehearsal.stored_runs) == 16 * 4 * 760 * 4


def test_a_stored_zoo_of_other_settings_is_refused_before_anything_is_trained(stored):
    told = troubles(found(*SMALL, "zoo.seed=5"))
    assert "seed 0, this run asks for 5" in told["zoo"]


def test_a_disk_that_is_too_small_is_named(empty, monkeypatch):
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert [*troubles(found(*SMALL))] == ["space"]
    words = troubles(found(*SMALL))["space"]
    assert "runs/digits_loss and zoos/digits need" in words and "1.0 MiB are free" in words


def test_a_zoo_in_memory_must_fit_into_it(empty, monkeypatch):
    arguments = [*SMALL, "zoo.store=false", "zoo.refresh_every=5"]
    assert not troubles(found(*arguments))
    monkeypatch.setattr(dry_run, "_memory", lambda _: 2**16)
    assert "needs 570.0 KiB of memory" in troubles(found(*arguments))["space"]  # 48 x 4 x 760 x 4 bytes


def test_a_loss_that_is_not_finite_is_a_trouble(empty, monkeypatch):
    monkeypatch.setattr("Gpt.models.gpt.Gpt.loss", lambda self, *_: next(self.parameters()).sum() * torch.inf)
    assert [*troubles(found(*SMALL))] == ["gradient"]


def test_identities_must_be_those_of_the_zoo_to_come(empty):
    arguments = [*SMALL, "generator.name=rpg", "~generator.rounds", "condition=none"]
    fitting = found(*arguments, "generator.identities=32", name="digits_loss")
    assert not troubles(fitting)
    assert "identity 16" in fitting["batch"].size
    told = troubles(found(*arguments, "generator.identities=33", name="digits_loss"))
    assert "generator.identities=33 does not fit 32 training runs" in told["zoo"]


def test_tasks_that_import_their_zoo_need_its_source(empty):
    task = dataclasses.replace(get_task("digits_loss"), recipe=None, checkpoints="networks")
    arguments = [*(argument for argument in SMALL if "recipe" not in argument), "distillation.weight=0"]
    told = troubles(found(*arguments, task=task))
    assert [*told] == ["zoo"] and "no checkpoints at networks" in told["zoo"]
    (empty / "networks").mkdir()
    told = troubles(found(*arguments, task=task))
    assert [*told] == ["zoo"] and "networks holds no checkpoints" in told["zoo"]
    for run in range(17):
        torch.save(task.constructor().state_dict(), f"networks/{run}.pt")
    before = everything(empty)
    checks = found(*arguments, task=task)
    assert not troubles(checks)
    assert checks["zoo"].size == "17 runs to be imported from networks; 0.pt, of 1 snapshots, was read"
    assert "made afresh" in checks["zoo's networks"].size
    assert everything(empty) == before
    (empty / "networks" / "16.pt").unlink()
    told = troubles(found(*arguments, task=task))
    assert [*told] == ["zoo"] and "networks holds 16 networks" in told["zoo"]
    torch.save(nn.Linear(2, 2).state_dict(), "networks/0.pt")
    told = troubles(found(*arguments, "zoo.test_runs=2", task=task))
    assert [*told] == ["zoo"] and "networks/0.pt" in told["zoo"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft reads it of transformers
def test_adapters_to_be_imported_are_read(empty):
    pytest.importorskip("peft")
    sets = [PromptSet(name, (f"{name}?",), ("yes",)) for name in ("a", "b", "c")]
    write_prompts("prompts", {"train": sets, "test": sets})
    family = AdapterFamily(
        "prompts", unseen_rules=1, unseen_combinations=0, validation=1, train_examples=2, examples=2, prompts=1,
        encoder="hash",
    )  # fmt: skip
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    size = adapter_structure("tiny", spec).size
    for name in ("a", "b", "c"):
        save_adapter(f"adapters/{name}", torch.zeros(size), spec, "tiny")
    entry = adapter_entry(family, AdapterRecipe("tiny", spec)) | {"checkpoints": "adapters"}
    mine = {"name": "lora_tiny", "task": check_entry("mine", entry)}
    checks = found("logger=disabled", "trainer.batch_size=2", **mine)
    assert not troubles(checks) and checks["zoo"].size.startswith("4 runs of 3 adapters to be imported")
    assert "gauge" not in checks["zoo"].size
    import_adapters("adapters", "zoos/mine", mine["task"])  # which the run does again, in case they are others now
    (empty / "adapters" / "b").rename(empty / "away")
    told = troubles(found("logger=disabled", **mine))
    assert [*told] == ["zoo"] and "no sub-folder 'b'" in told["zoo"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_without_a_common_gauge_are_told_of(empty):
    pytest.importorskip("peft")
    sets = [PromptSet(name, (f"{name}?",)) for name in ("a", "b", "c")]
    write_prompts("prompts", {"train": sets, "test": sets})
    family = AdapterFamily(
        str(empty / "prompts"), unseen_rules=1, unseen_combinations=0, validation=1, prompts=1, encoder="hash"
    )
    for seed, name in enumerate("abc"):
        own = AdapterSpec(rank=2, targets=("q_proj",), train_a=True, a_seed=seed)
        fresh = adapter_structure("tiny", own).flatten(AdapterModule("tiny", own).state_dict())
        save_adapter(f"adapters/{name}", fresh, own, "tiny")
    entry = adapter_entry(family, AdapterRecipe("tiny", own)) | {"checkpoints": "adapters"}
    weights = ("generator.loss.sft=0", "generator.loss.mse=1", "generator.loss.regression_until=1")
    mine = {"name": "lora_tiny", "task": check_entry("mine", entry)}
    assert "do not share a gauge" in found("logger=disabled", "trainer.batch_size=2", *weights, **mine)["zoo"].size


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_prompts_without_answers_need_no_language_model_and_no_loss_through_it(empty, monkeypatch):
    pytest.importorskip("peft")
    sets = [PromptSet(name, (f"{name}?",)) for name in ("a", "b", "c")]
    write_prompts("prompts", {"train": sets, "test": sets})
    family = AdapterFamily(
        str(empty / "prompts"), unseen_rules=1, unseen_combinations=0, validation=1, prompts=1, encoder="hash"
    )
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    rows = torch.randn(3, adapter_structure("tiny", spec).size, generator=torch.Generator().manual_seed(0))
    for name, row in zip("abc", 0.1 * rows, strict=True):
        save_adapter(f"adapters/{name}", row, spec, "tiny")
    entry = adapter_entry(family, AdapterRecipe("tiny", spec))
    with pytest.raises(
        TaskError, match="prompts of .*prompts have no answers, so no adapter can be trained .*checkpoint"
    ):
        check_entry("mine", entry)
    mine = {"name": "lora_tiny", "task": check_entry("mine", entry | {"checkpoints": "adapters"})}

    def load(name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("Gpt.adapters.base._original", load)
    told = troubles(found("logger=disabled", "trainer.batch_size=2", **mine))
    assert [*told] == ["generator"]
    for words in ("generator.loss.sft=1.0", "answers", "'mine'", "generator.loss.sft=0 generator.loss.mse=1"):
        assert words in told["generator"]
    weights = ("generator.loss.sft=0", "generator.loss.mse=1", "generator.loss.regression_until=1")
    checks = found("logger=disabled", "trainer.batch_size=2", *weights, **mine)
    assert not troubles(checks)
    assert "of the library" in checks["zoo's networks"].size and "loss " in checks["gradient"].size
    told = troubles(found("logger=disabled", "zoo.store=false", *weights, **mine))
    assert [*told] == ["zoo"] and "zoo.store=false" in told["zoo"] and "are imported, not trained" in told["zoo"]


def test_a_run_of_other_settings_in_the_folder_is_refused(empty):
    folder = empty / "runs" / "digits_loss"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest.json").write_text("{}")
    (folder / "config.json").write_text('{"seed": 7}')
    assert "holds a run with other settings" in troubles(found(*SMALL))["run folder"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_sizes_are_told_in_units_that_suit_them(count, text):
    assert dry_run._size(count) == text
