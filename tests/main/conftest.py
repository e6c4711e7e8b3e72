"""A finished run of the default configuration at its smallest, to be looked at, gone on with and broken."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import main
from Gpt.evaluation.results import Results
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment

TINY = (
    "zoo.runs=96", "zoo.test_runs=16", "zoo.validation_runs=16", "zoo.shard_runs=48", "zoo.snapshots=6",
    "zoo.recipe={epochs: 2}", "generator.width=32", "generator.depth=1", "generator.heads=2",
    "trainer.steps=6", "trainer.batch_size=32", "trainer.warmup=2", "trainer.validate_every=3",
    "trainer.checkpoint_every=2", "trainer.log_every=2", "evaluation.networks=6", "evaluation.novelty_networks=6",
    "evaluation.quick_networks=4", "evaluation.max_batch=7", "logger=disabled", "device=cpu",
)  # fmt: skip
PROMPTED = (
    "evaluation.prompts=4", "evaluation.recursive_steps=2", "evaluation.optimiser_steps=4",
    "evaluation.learning_rates=3", "evaluation.tuning_networks=2",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Settings of the smallest run of a generator that is prompted with a metric."""
    return TINY + PROMPTED


@pytest.fixture(scope="session")
def run() -> Callable[..., Results | None]:
    """`(*settings, name="digits_loss")`: main's job in this process, at its smallest, as on the command line."""

    def run(*settings: str, name: str = "digits_loss") -> Results | None:
        judged = () if name == "digits_rpg" else PROMPTED
        return main.run(Experiment(compose(name, [*TINY, *judged, *settings]), name))

    return run


@pytest.fixture(scope="session")
def times() -> Callable[[Path], dict[str, int]]:
    """Every file of a folder with the time it was last written."""
    return lambda folder: {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, run) -> Path:
    """A folder with one finished run of the default configuration, and its zoo."""
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
    monkeypatch.setattr(main, "judge", lambda *_: "results")
    monkeypatch.setattr(main, "side_by_side", lambda results, *_: results)
    monkeypatch.setattr(main, "report", lambda *_: None)
