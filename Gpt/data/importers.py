"""Zoos made elsewhere: G.pt's LMDB data sets, and folders of checkpoints."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from Gpt.data import shards
from Gpt.data.shards import Manifest
from Gpt.errors import DataError, StructureError, ZooError
from Gpt.evaluation.population import test_population as score_population
from Gpt.structure import Structure
from Gpt.tasks import Task

# G.pt's names of metrics, and ours.
LMDB_COLUMNS = {
    "avg_train_loss": "train_loss",
    "avg_train_err": "train_error",
    "avg_test_loss": "test_loss",
    "avg_test_err": "test_error",
    "train_ret": "train_return",
}
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class ForeignRun:
    """One run of a zoo made elsewhere: how to read its `[snapshots, D]` weights, and the columns it brings."""

    name: str
    snapshots: int
    read: Callable[[], Float[Tensor, "snapshots D"]]
    columns: dict[str, list[float]] = field(default_factory=dict)


def import_zoo(folder: str | Path, path_out: str | Path, task: Task, **options: Any) -> None:
    """Convert a zoo made elsewhere, of either kind that `foreign_runs` knows, to `path_out`.

    Args:
        options: `dtype`, `shard_runs`, `max_weight`, `device`, `progress`, as for collecting a zoo.

    Raises:
        ZooError, StructureError: as `foreign_runs` and what it returns.
    """
    _store(Path(folder), Path(path_out), task, foreign_runs(folder, task.structure), **options)


def foreign_runs(folder: str | Path, structure: Structure) -> list[ForeignRun]:
    """The runs in a folder, not read yet: those of G.pt's LMDB environments where there is a runs.json, otherwise those
    of checkpoints."""
    kind = lmdb_runs if any(Path(folder).glob("*/runs.json")) else checkpoint_runs
    return kind(Path(folder), structure)


def lmdb_runs(folder: Path, structure: Structure) -> list[ForeignRun]:
    """A zoo in the format of G.pt (Peebles et al. 2022): LMDB environments with a runs.json each.

    Both layouts are read: one folder per run, and folders that hold several runs. Runs are numbered from the last name
    to the first, because G.pt's test split is at the end and ours at the start. Each run was saved at iterations of its
    own, so snapshots are numbered 0, 1, 2 … instead. Runs with another number of snapshots than most are dropped.

    Raises:
        ZooError: the package lmdb is missing, the folder holds no such zoo, or a run is damaged; names the folder.
        StructureError: the networks are of another architecture than the task's.
    """
    _lmdb()
    found = (run for file in _run_indices(folder) for run in _lmdb_runs(file, structure))
    runs = sorted(found, key=attrgetter("name"))
    if not runs:
        raise ZooError(f"{folder} holds no zoo of G.pt: no sub-folder has both a runs.json and a data.mdb")
    return runs[::-1]


def checkpoint_runs(folder: Path, structure: Structure) -> list[ForeignRun]:
    """A folder of state_dicts (.pt, .pth, .bin, .safetensors), in any order of keys.

    Each sub-folder is a run and its files are the snapshots, in the order of their names with numbers taken as numbers.
    Where the folder holds the files itself, every file is a run of one snapshot.

    Raises:
        ZooError: there are no checkpoints, or a file cannot be read; names it.
        StructureError: a file's tensors are not those of the task's architecture, or hold other integers than the
            constructor's network, of which there is one for all; names file and tensor.
    """
    flat = _checkpoints(folder)
    nested = [sub for sub in sorted(folder.glob("*/"), key=_natural) if _checkpoints(sub)]
    if bool(flat) == bool(nested):
        raise ZooError(
            f"{folder} holds {'checkpoints as well as folders of checkpoints' if flat else 'no checkpoints'} "
            f"({', '.join(SUFFIXES)}); put each run's files into a sub-folder, or one file per run into this folder"
        )
    groups = [(file.name, [file]) for file in flat] or [(sub.name, _checkpoints(sub)) for sub in nested]
    return [ForeignRun(name, len(files), partial(_read_checkpoints, files, structure)) for name, files in groups]


def _store(
    folder: Path,
    path_out: Path,
    task: Task,
    runs: list[ForeignRun],
    *,
    dtype: str = "float32",
    shard_runs: int = 256,
    max_weight: float = 10.0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> None:
    """Write runs as a zoo, numbered in their order; finished shards are kept."""
    snapshots = Counter(run.snapshots for run in runs).most_common(1)[0][0]
    notes = ["Imported: snapshots are numbered in the order they were saved, their training iterations are not known."]
    if _copies_validation(task):
        notes.append("There are no validation data: the validation columns are copies of the test columns.")
    manifest = Manifest.of(
        task.zoo_name,
        task.structure,
        {"type": "import", "source": folder.resolve().name},
        seed=0,
        iterations=list(range(snapshots)),
        dtype=dtype,
        shard_runs=shard_runs,
        max_weight=max_weight,
        notes=notes,
    )
    shards.create_manifest(path_out, manifest)
    for first in tqdm(range(0, len(runs), shard_runs), unit=" shards", disable=not progress):
        members = runs[first : first + shard_runs]
        if shards.covers(path_out, first // shard_runs, first + len(members) - 1):
            continue
        dropped = {
            first + i: f"{run.name} has {run.snapshots} snapshots, most runs have {snapshots}"
            for i, run in enumerate(members)
            if run.snapshots != snapshots
        }
        kept = {first + i: run for i, run in enumerate(members) if first + i not in dropped}
        weights, columns = torch.empty(0, snapshots, manifest.size), {}
        if kept:
            weights = torch.stack([run.read() for run in kept.values()])
            columns = _complete(task, weights, list(kept.values()), device)
        shards.write_shard(path_out, manifest, first // shard_runs, list(kept), weights, columns, dropped)


def _complete(
    task: Task, weights: Float[Tensor, "runs snapshots D"], runs: list[ForeignRun], device: torch.device | str
) -> dict[str, Float[Tensor, "runs snapshots"]]:
    """The columns that every run brings; those of the validation and test split that none brings are measured."""
    names = set.intersection(*(set(run.columns) for run in runs))
    columns = {name: torch.tensor([run.columns[name] for run in runs]).float() for name in sorted(names)}
    for split in ("test", "validation"):
        if f"{split}_{task.metric}" in columns:
            continue
        if split == "validation" and _copies_validation(task):
            tested = [name for name in columns if name.startswith("test_")]
            columns |= {name.replace("test_", "validation_"): columns[name] for name in tested}
            continue
        measured = score_population(task, weights.flatten(0, 1).to(device), split, device=device)
        columns |= {name: values.view(weights.shape[:2]) for name, values in measured.items()}
    return columns


def _copies_validation(task: Task) -> bool:
    if task.validation_data_fn is None:
        return True
    try:
        task.data("validation")
    except DataError:
        return True
    return False


# --- G.pt's LMDB ------------------------------------------------------------------------------------------------------


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ZooError("reading a zoo of G.pt needs the package lmdb: pip install 'gpt-weights[lmdb]'") from error
    return lmdb


def _run_indices(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("*/runs.json") if (file.parent / "data.mdb").is_file())


def _lmdb_runs(index: Path, structure: Structure) -> Iterator[ForeignRun]:
    """The runs of one environment; fused environments have one more level in their index, the run's name."""
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        described = {index.parent.name: fields} if "checkpoints" in fields else fields
        for name, run in described.items():
            keys = sorted(run["checkpoints"])  # chronological, for numbers are zero-padded
            columns = {
                ours: [float(run["checkpoints"][key][theirs]) for key in keys]
                for theirs, ours in LMDB_COLUMNS.items()
                if keys and all(theirs in run["checkpoints"][key] for key in keys)
            }
            yield ForeignRun(name, len(keys), partial(_read_lmdb, index.parent, keys, structure), columns)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{index} is not an index of G.pt runs ({error!r}); remove or refetch that folder") from error


def _read_lmdb(folder: Path, keys: list[str], structure: Structure) -> Float[Tensor, "snapshots D"]:
    """Raw float32 vectors, after a check of the sizes of all tensors, which every key has beside it."""
    lmdb = _lmdb()
    sizes = np.array([t.numel for t in structure.tensors])
    rows = np.empty((len(keys), structure.size), np.float32)
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
        with environment, environment.begin() as view:
            for row, key in zip(rows, keys, strict=True):
                stored = [view.get(name.encode()) for name in (key, f"{key}_arch")]
                if stored[0] is None:
                    raise ZooError(f"{folder}: the database has no entry {key!r} of runs.json; fetch that run again")
                if stored[1] is not None and not np.array_equal(np.frombuffer(stored[1], np.float32), sizes):
                    found = np.frombuffer(stored[1], np.float32).astype(int).tolist()
                    raise StructureError(
                        f"{folder}: {key!r} has tensors of {found} numbers, the task's network has {sizes.tolist()}"
                    )
                if len(stored[0]) != row.nbytes:
                    raise StructureError(
                        f"{folder}: {key!r} has {len(stored[0])} bytes, the task's network {row.nbytes} in float32"
                    )
                row[:] = np.frombuffer(stored[0], np.float32)
    except lmdb.Error as error:
        raise ZooError(f"{folder} is not a readable LMDB environment ({error}); fetch that run again") from error
    return torch.from_numpy(rows)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which epoch_9 comes before epoch_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ZooError(f"there is no folder {folder} to import checkpoints from")
    return sorted((file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()), key=_natural)


def _read_checkpoints(files: list[Path], structure: Structure) -> Float[Tensor, "snapshots D"]:
    rows = []
    for file in files:
        state = _state_dict(file)
        try:
            rows.append(structure.flatten(state))
            structure.check_fixed(state)
        except StructureError as error:
            raise StructureError(f"{file}: {error}") from error
    return torch.stack(rows)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; code in pickles is never run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is no file of torch, or holds more than tensors, such as a whole module"
        raise ZooError(f"{file} cannot be read as a checkpoint ({reason}); save a state_dict to it again") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # with the optimiser's, epoch and so on
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ZooError(f"{file} holds no state_dict (a dict of tensors); save net.state_dict() to it")
    return state
