"""Files that are replaced whole: who reads one finds its old content or its new, after a kill or a power failure too.

A file is written under a temporary name beside its place, flushed to the disk and renamed; then its folder is flushed,
which holds the name. A full disk is an error that names the file, and leaves the old content.
"""

import errno
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)  # folders of some network file systems


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields the name to write to; at the end what is there takes the file's place.

    Raises:
        OSError: it cannot be written; names the file, which is as it was.
    """
    temporary = temporary_name(file)
    with naming(file):
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, file)
            flush(file.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(file: Path) -> Path:
    """A hidden one of the same kind that no other worker uses, be it a thread, a process or one on another host."""
    return file.with_name(f".{file.stem}.{uuid.uuid4().hex}{file.suffix}")


def flush(path: Path) -> None:
    """Wait until the disk has the content of a file or, of a folder, the names in it."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in NOT_FLUSHED):
            raise


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of the system inside name the file; those of writing to an open one name none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error


def write_text(file: Path, text: str) -> None:
    """Replace a text file.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file.

    Raises:
        OSError: see `replacing`.
    """
    write_text(file, json.dumps(content, indent=1))


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file; that library has an error of its own for a full disk, which does not name the file.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(file) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
