"""What docs/architecture.md says of imports is so."""

import ast
from pathlib import Path

import pytest

import main

ROOT = Path(main.__file__).parent
FORBIDDEN = {"Gpt": {"rpg", "data_gen", "main", "playground"}, "rpg": {"data_gen", "main"}, "data_gen": {"rpg", "main"}}


def imported(file: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    files = [file for file in (ROOT / package).rglob("*.py") if ROOT / "Gpt" / "run" not in file.parents]
    wrong = {str(file.relative_to(ROOT)): both for file in files if (both := imported(file) & FORBIDDEN[package])}
    assert len(files) > 10 and wrong == {}


def test_one_module_knows_hydra():
    files = [*ROOT.glob("*.py"), *(file for package in FORBIDDEN for file in (ROOT / package).rglob("*.py"))]
    assert [file.name for file in files if "hydra" in imported(file)] == ["command_line.py"]
