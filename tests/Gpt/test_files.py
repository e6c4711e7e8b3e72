"""Files that are replaced whole: flushed before they are named, and after any error the old content."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import main
from Gpt import files
from Gpt.files import flush, replacing, save_tensors, write_json, write_text


@pytest.mark.parametrize("write", [write_text, lambda file, text: save_tensors({text: torch.ones(3)}, file)])
def test_content_and_name_are_on_the_disk_when_it_returns(tmp_path, disk, write):
    write(tmp_path / "a.txt", "new")
    assert [kind for kind, _ in disk.events] == ["flushed", "named", "flushed"]
    assert disk.held(tmp_path / "a.txt", len(disk.events))
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def small_files():
    """No file may be larger than a thousand bytes, which is how a disk with that much room answers."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, allowed[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_text(file, "x" * 4000),
        lambda file: write_json(file, {"x": "x" * 4000}),
        lambda file: save_tensors({"a": torch.zeros(1000)}, file),
    ],
)
def test_a_full_disk_is_told_with_the_file_which_stays_as_it_was(tmp_path, small_files, write):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(OSError) as caught:
        write(file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_json_is_replaced_whole(tmp_path, monkeypatch, place):
    write_json(tmp_path / "a.json", {"x": 1})

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, place, fail)
    with pytest.raises(OSError, match=r"(?i)input/output.*a\.json"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_cannot_be_written_is_told_with_the_file_and_not_with_its_temporary_name(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for place in ("write_text", "unlink"):
        monkeypatch.setattr(Path, place, refused)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a.txt", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(tmp_path / "a.txt"))


def test_an_error_of_who_writes_leaves_the_file_as_it_was(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_folders_that_cannot_be_flushed_are_left_to_the_system_and_files_are_not(tmp_path, monkeypatch):
    def refused(descriptor):
        raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    flush(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError):
        flush(tmp_path / "a")


def test_tensors_come_back_with_what_is_said_of_them(tmp_path):
    save_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors", {"of": "ones"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(3))


def test_files_are_written_in_one_place():
    """Nobody beside it writes a file whole, or renames one over another, but for what needs more than that."""
    root, writing = Path(main.__file__).parent, ("save_file(", ".write_text(", ".write_bytes(", "os.replace(")
    sources = [root / "playground.py", *(f for name in ("Gpt", "rpg", "data_gen") for f in (root / name).rglob("*.py"))]
    found = {f.name for f in sources if any(word in f.read_text(encoding="utf-8") for word in writing)}
    # On file systems without hard links a manifest is renamed.
    assert found == {Path(files.__file__).name, "shards.py"}
