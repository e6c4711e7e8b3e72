"""A disk that remembers what was flushed to it."""

import os
from pathlib import Path

import pytest


class Disk:
    """What happened on it, in order: ("flushed", path) of files and folders, and ("named", path) of renamed ones.

    What was flushed under another name goes by its last one.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Path]] = []

    def renamed(self, old: Path, new: Path) -> None:
        moved = [(kind, new / p.relative_to(old) if p.is_relative_to(old) else p) for kind, p in self.events]
        self.events[:] = [*moved, ("named", new)]

    def held(self, path: Path, when: int) -> bool:
        """Whether a power failure at that moment leaves a file or folder, with its content, under its name."""
        past = self.events[:when]
        flushed = ("flushed", path) in past
        named = ("named", path) in past and ("flushed", path.parent) in past[past.index(("named", path)) :]
        return flushed and named


@pytest.fixture
def disk(monkeypatch) -> Disk:
    found, open_file, fsync, rename, replace = Disk(), os.open, os.fsync, os.rename, os.replace
    opened: dict[int, Path] = {}

    def opening(path, *arguments, **options):
        descriptor = open_file(path, *arguments, **options)
        opened[descriptor] = Path(path)
        return descriptor

    def flushing(descriptor):
        fsync(descriptor)
        found.events.append(("flushed", opened[descriptor]))

    def renaming(old, new):
        rename(old, new)
        found.renamed(Path(old), Path(new))

    def replacing(old, new):
        replace(old, new)
        found.renamed(Path(old), Path(new))

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)
    return found
