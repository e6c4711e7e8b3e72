"""Checkpoints of a training run: safetensors and JSON, written atomically, never unpickled.

    checkpoints/
      latest.json        names the newest complete folder; replaced atomically, so a kill at any moment leaves a valid run
      step-00000400/     model, ema and optimizer .safetensors, state.json
      best/              the EMA weights with the best validation score, and what that score was
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from Gpt.errors import CheckpointError


@dataclass
class TrainingState:
    """What the loop needs besides tensors; JSON-serialisable. Random states are functions of `step`, so none are kept.

    Attributes:
        step: optimiser steps taken.
        seconds: wall-clock spent training, earlier sessions included.
        best_score, best_step: of the best validation score so far (lower is better).
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = float("inf")
    best_step: int = -1


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self.identity = identity

    def save(self, state: TrainingState, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a complete checkpoint, make it the latest, and only then remove the one before.

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
        _write_json(self.folder / "latest.json", {"folder": name})
        for old in self.folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)

    def save_best(self, ema: nn.Module, facts: dict[str, Any]) -> None:
        """Replace the best EMA weights."""
        self._write("best", {"ema": ema.state_dict()}, {"facts": facts, "identity": self.identity})

    def exists(self) -> bool:
        return (self.folder / "latest.json").is_file()

    def load(self, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Continue from the latest checkpoint, bit for bit.

        Raises:
            CheckpointError: a file is missing or damaged, or the checkpoint is of another task, architecture or generator.
        """
        name = _read_json(self.folder / "latest.json")["folder"]
        facts = self._facts(name)
        _load_module(model, self.folder / name / "model.safetensors")
        _load_module(ema, self.folder / name / "ema.safetensors")
        _unflatten_optimizer(optimizer, _load_tensors(self.folder / name / "optimizer.safetensors"), facts["optimizer"])
        return TrainingState(**facts["state"])

    def load_best(self, generator: nn.Module) -> dict[str, Any]:
        """Load the weights to use: the best ones, or the latest EMA where no best was kept. Returns what is known of them.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another task, architecture or generator.
        """
        if (self.folder / "best" / "facts.json").is_file():
            name = "best"
        elif self.exists():
            name = _read_json(self.folder / "latest.json")["folder"]
        else:
            raise CheckpointError(f"no checkpoint in {self.folder}; train first, or name a run with run.folder=PATH")
        facts = self._facts(name)
        _load_module(generator, self.folder / name / "ema.safetensors")
        return facts.get("facts", facts.get("state", {}))

    def _facts(self, name: str) -> dict[str, Any]:
        facts = _read_json(self.folder / name / "facts.json")
        for key, value in self.identity.items():
            if facts["identity"].get(key) != value:
                raise CheckpointError(
                    f"the checkpoint in {self.folder} has {key} {facts['identity'].get(key)!r}, this run has {value!r}; "
                    "choose another run.name, or the configuration it was trained with"
                )
        return facts

    def _write(self, name: str, files: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
        """Write a folder next to its place, then swap it in."""
        temporary = self.folder / f"{name}.tmp-{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            for file, tensors in files.items():
                save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / f"{file}.safetensors")
            _write_json(temporary / "facts.json", facts)
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
            temporary.rename(self.folder / name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"could not write the checkpoint {self.folder / name}: {error}. The previous one is intact; "
                "make room and start again with resume=auto"
            ) from error


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors `{"<parameter index>/<name>": …}` and the settings of each parameter group."""
    state = optimizer.state_dict()
    tensors = {f"{i}/{key}": torch.as_tensor(v) for i, entry in state["state"].items() for key, v in entry.items()}
    return tensors, state["param_groups"]


def _unflatten_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], settings: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    # JSON has no tuples; Adam's betas must be one.
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in settings]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_module(module: nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(_load_tensors(file))
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit this generator: {error}") from error


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; start over with resume=never") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); start over with resume=never") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; start over with resume=never") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged ({error}); start over with resume=never") from error


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, file)
