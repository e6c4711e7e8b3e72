"""Checkpoints of a training run: safetensors and JSON, written whole or not at all, never unpickled.

checkpoints/
  latest.json        names the folders to use; replaced last, so a kill or a power failure leaves a valid run
  step-00000400/     model, ema and optimizer .safetensors, facts.json
  best-00000200/     the EMA weights with the best validation score until then, and what that score was
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from Gpt.errors import CheckpointError
from Gpt.files import flush, save_tensors, write_json


@runtime_checkable
class Stateful(Protocol):
    """A module, an optimiser, or what stands for one that is spread over processes, see `Gpt.sharding.Whole`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything to be saved."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take over what was saved."""
        ...


@dataclass
class TrainingState:
    """What the loop needs besides tensors; JSON-serialisable. Random states are functions of `step`, so none are kept.

    Attributes:
        step: optimiser steps taken.
        seconds: wall-clock spent training, earlier sessions included.
        best_score, best_step: of the best validation score so far (lower is better).
        unlogged_steps, unlogged_loss: how many steps there are since the loss was last logged, and the sum of theirs.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = float("inf")
    best_step: int = -1
    unlogged_steps: int = 0
    unlogged_loss: float = 0.0

    @property
    def best_folder(self) -> str | None:
        return f"best-{self.best_step:08d}" if self.best_step >= 0 else None


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        identity: what the run's generator is; checkpoints of another are refused.
        former: that part of an identity which checkpoints of earlier versions do not mention, and had.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], former: dict[str, Any] | None = None):
        self.folder = folder
        self.identity = identity
        self.former = former or {}

    def save(self, state: TrainingState, model: Stateful, ema: Stateful, optimizer: Stateful) -> None:
        """Write a complete checkpoint, make it and the best weights the ones to use, and only then remove older ones.

        Raises:
            CheckpointError: the disk is full; the previous checkpoint is intact.
        """
        name = f"step-{state.step:08d}"
        tensors, settings = _flatten_optimizer(optimizer)
        self._write(
            name,
            {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": tensors},
            {"state": vars(state), "optimizer": settings, "identity": self.identity},
        )
        with self._explained(name):
            write_json(self.folder / "latest.json", {"folder": name, "best": state.best_folder})
        for old in (*self.folder.glob("step-*"), *self.folder.glob("best-*")):
            if old.name not in (name, state.best_folder):
                shutil.rmtree(old, ignore_errors=True)

    def save_best(self, state: TrainingState, ema: Stateful, facts: dict[str, Any]) -> None:
        """Write the weights of `state.best_step`; the next `save` makes them the ones to use.

        Raises:
            CheckpointError: the disk is full; the previous checkpoint is intact.
        """
        assert state.best_folder is not None
        self._write(state.best_folder, {"ema": ema.state_dict()}, {"facts": facts, "identity": self.identity})

    def exists(self) -> bool:
        return (self.folder / "latest.json").is_file()

    def latest_state(self) -> TrainingState:
        """How far the latest checkpoint has come; of a training that has not begun where there is none."""
        return TrainingState(**self._facts(self._latest()["folder"])["state"]) if self.exists() else TrainingState()

    def latest_step(self) -> int:
        """Step of the latest checkpoint, -1 where there is none."""
        return self.latest_state().step if self.exists() else -1

    def load(self, model: Stateful, ema: Stateful, optimizer: Stateful) -> TrainingState:
        """Continue from the latest checkpoint, bit for bit.

        Raises:
            CheckpointError: a file is missing or damaged, or the checkpoint is of another task, architecture or
                generator.
        """
        name = self._latest()["folder"]
        facts = self._facts(name)
        _load_module(model, self.folder / name / "model.safetensors")
        _load_module(ema, self.folder / name / "ema.safetensors")
        _unflatten_optimizer(optimizer, _load_tensors(self.folder / name / "optimizer.safetensors"), facts["optimizer"])
        return TrainingState(**facts["state"])

    def load_best(self, generator: Stateful) -> dict[str, Any]:
        """Load the weights to use, the best ones or else the latest average, and return what is known of them.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another task, architecture or generator.
        """
        if not self.exists():
            raise CheckpointError(f"no checkpoint in {self.folder}; train first, or name a trained run: run.name=NAME")
        latest = self._latest()
        name = latest["best"] or latest["folder"]
        facts = self._facts(name)
        _load_module(generator, self.folder / name / "ema.safetensors")
        return facts.get("facts", facts.get("state", {}))

    def _latest(self) -> dict[str, Any]:
        return read_json(self.folder / "latest.json")

    def _facts(self, name: str) -> dict[str, Any]:
        facts = read_json(self.folder / name / "facts.json")
        stored = self.former | facts["identity"]
        for key, value in self.identity.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint in {self.folder} has {key} {stored.get(key)!r}, this run has "
                    f"{value!r}; choose another run.name, or the configuration it was trained with"
                )
        return facts

    def _write(self, name: str, files: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Write a folder next to its place, then rename it."""
        temporary = self.folder / f"{name}.tmp"
        with self._explained(name):
            try:
                for leftover in (temporary, self.folder / name):  # of a killed process; latest.json never named them
                    shutil.rmtree(leftover, ignore_errors=True)
                temporary.mkdir(parents=True)
                for file, tensors in files.items():
                    contiguous = {k: v.detach().contiguous() for k, v in tensors.items()}
                    save_tensors(contiguous, temporary / f"{file}.safetensors")
                write_json(temporary / "facts.json", facts)
                temporary.rename(self.folder / name)
                flush(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = "The previous one is intact" if self.exists() else "There is none before it"
            raise CheckpointError(
                f"could not write the checkpoint {self.folder / name}: {error}. {kept}; make room and start again with "
                "the same command"
            ) from error


def _flatten_optimizer(optimizer: Stateful) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors `{"<parameter index>/<name>": …}` and the settings of each parameter group."""
    state = optimizer.state_dict()
    tensors = {f"{i}/{key}": torch.as_tensor(v) for i, entry in state["state"].items() for key, v in entry.items()}
    return tensors, state["param_groups"]


def _unflatten_optimizer(optimizer: Stateful, tensors: dict[str, Tensor], settings: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    # JSON has no tuples; Adam's betas must be one.
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in settings]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_module(module: Stateful, file: Path) -> None:
    try:
        module.load_state_dict(_load_tensors(file))
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} does not fit this generator: other code or other settings wrote it. Go on with those, or train "
            f"again (another run.name, or resume=never). {error}"
        ) from error


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; start over with resume=never") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); start over with resume=never") from error


def read_json(file: Path) -> dict[str, Any]:
    """What `Gpt.files.write_json` wrote into a run's folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; start over with resume=never") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); start over with resume=never") from error
