"""Current folders with a run to play with; what a run is made of is in a module beside this file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import LORA, TINY, experiment, masked_experiment, store_generator, store_rpg  # noqa: E402

from Gpt.run.folder import create_folder  # noqa: E402


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run of the smallest generator."""
    monkeypatch.chdir(tmp_path)
    store_generator(experiment(*TINY))
    return tmp_path


@pytest.fixture
def masked(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run of the smallest generator of networks for class masks."""
    monkeypatch.chdir(tmp_path)
    store_rpg(masked_experiment(), {})
    return tmp_path


@pytest.fixture
def adapters(tmp_path, monkeypatch) -> Path:
    """The current folder, with a run whose generator writes adapters."""
    monkeypatch.chdir(tmp_path)
    trained = experiment(*LORA, name="lora_tiny")
    store_generator(trained)
    create_folder(trained.config, trained.folder)
    return tmp_path
