"""The folder of a run: the settings it was begun with, whether a run may go on in it, and one process at a time."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from Gpt.checkpoint import read_json
from Gpt.config import ConditionConfig, RunConfig, checked
from Gpt.distributed import on_first_process
from Gpt.errors import CheckpointError, ConfigError
from Gpt.files import write_json, write_text


def choose_folder(config: RunConfig, folder: Path) -> Path:
    """Where the run goes: into its folder, or with `resume=never` into a new one beside it.

    Raises:
        ConfigError: `resume` is neither auto nor never.
    """
    if config.resume not in ("auto", "never"):
        raise ConfigError(f"resume={config.resume} is unknown; choose auto or never")
    if config.resume == "never" and folder.exists() and not config.test_only:
        number = next(i for i in range(2, 10_000) if not folder.with_name(f"{folder.name}-{i}").exists())
        return folder.with_name(f"{folder.name}-{number}")
    return folder


def open_folder(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What earlier sessions left in the summary.json of a run: nothing where there is no checkpoint to go on from.

    Raises:
        ConfigError: the folder holds a trained generator of other settings; names them.
        CheckpointError: `test_only` without a trained generator.
    """
    trained = (folder / "checkpoints" / "latest.json").is_file()
    if config.test_only and not config.resume_path and not trained:
        raise CheckpointError(f"test_only: there is no trained run in {folder}; train it first, or set run.name")
    if not trained or not (folder / "config.json").is_file():
        return {}
    different = list(_differences(_begun_with(folder), _settings(config)))
    if different:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(different[:5])}). "
            "Choose another run.name, or resume=never for a new folder beside it"
        )
    summary = folder / "summary.json"
    return read_json(summary) if summary.is_file() else {}


def create_folder(config: RunConfig, folder: Path) -> None:
    """The run folder with the configuration in it, and nothing else to be gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    write_json(folder / "summary.json", {})
    write_json(folder / "config.json", _settings(config))


def stored_config(folder: Path) -> RunConfig | None:
    """The configuration that a run was begun with; None where there is no run.

    Raises:
        ConfigError: it is of a version with other keys.
        CheckpointError: it is damaged.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is damaged ({reason}); start over with resume=never") from error
    if not (isinstance(values, dict) and set(values) >= {"task", "generator"}):
        raise CheckpointError(f"{file} is damaged (it is cut short); start over with resume=never")
    return checked(RunConfig, values)


def check_unchanged(stored: RunConfig, config: RunConfig, folder: Path) -> None:
    """Raises:
    ConfigError: a setting that the weights depend on is another than the stored one; names it. Files of tasks may lie
        elsewhere by now.
    """
    stored = dataclasses.replace(stored, task_modules=config.task_modules)
    if different := list(_differences(_settings(stored), _settings(config))):
        raise ConfigError(
            f"the run in {folder} was trained with other settings ({'; '.join(different[:5])}). Leave them out, or "
            "name another run: run.name=NAME"
        )


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder; they are let in when this one ends, however it does.

    Raises:
        ConfigError: one is at work there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    on_first_process(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{folder}: another process is at work in this run; wait for it, or set run.name") from error


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that trained weights depend on, as JSON gives them back."""
    return json.loads(json.dumps(config.training_settings()))


def _begun_with(folder: Path) -> dict[str, Any]:
    """The `_settings` of the run in a folder; one from before encoders could be chosen was told by the default one."""
    settings = read_json(folder / "config.json")
    condition = settings.get("condition", {})
    if "text" in condition.get("names", ()):
        condition.setdefault("encoder", ConditionConfig().encoder)
    return settings


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old}, now {new}"
