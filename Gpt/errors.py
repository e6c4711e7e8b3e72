"""Errors that a user can cause and can mend. `main.py` prints their message without a traceback."""


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
