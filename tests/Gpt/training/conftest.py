"""Unbroken trainings to compare others with; the toy that is trained is a module beside this file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import run, subprocess_of  # noqa: E402


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


@pytest.fixture(scope="session")
def two_processes(outputs_of):
    """`(folder, *mode) -> what both print`; they end by themselves and well."""

    def run_both(folder: Path, *mode: object) -> list[str]:
        children = [subprocess_of(folder, *mode, rank, 2) for rank in range(2)]
        outputs = outputs_of(children, 120)
        assert [child.returncode for child in children] == [0, 0], outputs
        return outputs

    return run_both


@pytest.fixture(scope="session")
def unbroken_pair(tmp_path_factory, two_processes) -> Path:
    folder = tmp_path_factory.mktemp("unbroken-pair")
    two_processes(folder, "process")
    return folder
