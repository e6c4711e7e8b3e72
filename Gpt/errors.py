"""Errors that a user can cause and can mend. `main.py` prints their message without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of every error caused by input; the message names the thing, the place and the remedy."""


class TaskError(UserError):
    """An entry of TASK_METADATA is missing, incomplete or does not do what its key promises."""


class StructureError(UserError):
    """Weights and architecture do not belong together."""


class DataError(UserError):
    """A data set is not where it was looked for, or is not what it should be."""


class ZooError(UserError):
    """A zoo is missing, damaged, or of another architecture."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the most similar known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
