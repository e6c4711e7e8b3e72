"""A zoo of trained networks: `[runs, snapshots, D]` weights and their metrics, on a device, in RAM or on disk."""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from safetensors.torch import load_file
from torch import Tensor

from Gpt.data import shards
from Gpt.data.shards import Manifest
from Gpt.errors import ZooError
from Gpt.seeds import rng
from Gpt.structure import Structure

SPLITS = ("train", "validation", "test")
UPSTREAM_STD = 0.538  # G.pt scales all weights to this standard deviation (that of ImageNet pixels in [-1, 1])


class Zoo:
    """Trained networks by (row, snapshot). All tensors it hands out are on `device`.

    Attributes:
        structure: the architecture.
        runs, snapshots: how many of each.
        run_ids: `[runs]` id of every row; ids of dropped runs are missing.
        iterations: training iteration of every snapshot, increasing; the first is the initialisation.
        metrics: `{column: [runs, snapshots]}` float32, e.g. "validation_loss".
        manifest: how the networks were made; None for a zoo that was never stored.
        dropped: `{run id: why it was left out}`.
        snapshots_of_training: how many of its networks are of one training: `snapshots`, unless these were made runs
            of their own (`Gpt.data.views.split_by_snapshot`).
        seconds: wall-clock that training the runs took, the workers' added up; 0 where it is not known (imported ones).
        former: `[n, D]` final networks of training runs that gave way to others (`replace`), in main memory; none
            unless whoever replaced them says which.
    """

    def __init__(
        self,
        weights: "_Weights",
        structure: Structure,
        run_ids: Int[Tensor, " runs"],
        iterations: list[int],
        metrics: Mapping[str, Float[Tensor, "runs snapshots"]],
        device: torch.device | str,
        test_runs: int,
        validation_runs: int,
        manifest: Manifest | None = None,
        dropped: Mapping[int, str] | None = None,
        folder: Path | None = None,
        seconds: float = 0.0,
        snapshots_of_training: int | None = None,
    ):
        self._weights = weights
        self.structure = structure
        self.device = torch.device(device)
        self.run_ids = run_ids.to(self.device)
        self.iterations = list(iterations)
        self.metrics = {name: values.float().to(self.device) for name, values in metrics.items()}
        self.manifest = manifest
        self.dropped = dict(dropped or {})
        self.folder = folder
        self.seconds = seconds
        self.snapshots_of_training = snapshots_of_training or len(self.iterations)
        self.former: Tensor = torch.empty(0, structure.size)
        self._bounds = (test_runs, test_runs + validation_runs)

    @classmethod
    def open(
        cls,
        path: str | Path,
        structure: Structure,
        *,
        storage: str = "auto",
        device: torch.device | str = "cpu",
        test_runs: int = 0,
        validation_runs: int = 0,
        runs: int | None = None,
    ) -> "Zoo":
        """Open a stored zoo; sizes and headers of its shards are checked, and every byte of what is kept in memory.

        Args:
            runs: only the runs with ids below this, as if no others were stored; all when None.
            storage: "gpu" keeps the weights on `device`, "ram" in memory, "disk" reads each network when it is asked
                for; "auto" takes the first of them that needs at most half of what is free.
            test_runs: runs with ids below this are the test split.
            validation_runs: the runs after those are the validation split; all later ones the training split.

        Raises:
            ZooError: there is no zoo, it belongs to another architecture, or a file is missing, truncated or altered.
        """
        folder, device = Path(path), torch.device(device)
        manifest = shards.read_manifest(folder)
        _check_structure(folder, manifest, structure)
        opened = _open_shards(folder, manifest, runs)
        run_ids = torch.tensor([run for shard in opened for run in shard.run_ids], dtype=torch.long)
        where = _choose_storage(storage, len(run_ids) * manifest.run_bytes, device)
        if where == "disk":
            weights: _Weights = _Disk(folder, manifest, opened)
        else:
            weights = _load(folder, manifest, opened, device if where == "gpu" else torch.device("cpu"))
        columns = [(shards.read_metrics(folder, shard.index), len(shard.run_ids)) for shard in opened if shard.run_ids]
        metrics = {name: torch.cat([c[name][:n] for c, n in columns]) for name in (columns[0][0] if columns else ())}
        dropped = {run: reason for shard in opened for run, reason in shard.dropped.items()}
        zoo = cls(
            weights, structure, run_ids, manifest.iterations, metrics, device, test_runs, validation_runs, manifest,
            dropped, folder, sum(shard.seconds for shard in opened),
        )  # fmt: skip
        if where != "disk":
            zoo.verify()
        return zoo

    @classmethod
    def from_tensors(
        cls,
        weights: Float[Tensor, "runs snapshots D"],
        metrics: Mapping[str, Float[Tensor, "runs snapshots"]],
        run_ids: Int[Tensor, " runs"] | list[int],
        iterations: list[int],
        structure: Structure,
        *,
        device: torch.device | str | None = None,
        test_runs: int = 0,
        validation_runs: int = 0,
        dropped: Mapping[int, str] | None = None,
        seconds: float = 0.0,
    ) -> "Zoo":
        """A zoo that was never stored; weights stay in their dtype and place, `device` is theirs by default."""
        if weights.shape[-1] != structure.size:
            raise ZooError(f"weights have {weights.shape[-1]} entries a network, the architecture has {structure.size}")
        ids = torch.as_tensor(run_ids, dtype=torch.long)
        where = weights.device if device is None else device
        return cls(
            _Memory(weights), structure, ids, iterations, metrics, where, test_runs, validation_runs, dropped=dropped,
            seconds=seconds,
        )  # fmt: skip

    @property
    def runs(self) -> int:
        return len(self.run_ids)

    @property
    def snapshots(self) -> int:
        return len(self.iterations)

    def read(self, runs: Int[Tensor, " B"], snapshots: Int[Tensor, " B"]) -> Float32[Tensor, "B D"]:
        """Networks by row (not run id) and snapshot index, as float32 on `device`."""
        return self._weights.read(runs, snapshots).to(self.device).float()

    def replace(
        self,
        rows: Int[Tensor, " n"],
        run_ids: Int[Tensor, " n"],
        weights: Float[Tensor, "n snapshots D"],
        metrics: Mapping[str, Float[Tensor, "n snapshots"]],
    ) -> None:
        """Put other runs into these rows; whoever holds `metrics` or `run_ids` sees them change.

        Raises:
            ZooError: the weights are on disk, where a zoo does not change.
        """
        if not isinstance(self._weights, _Memory):
            raise ZooError("runs can be replaced in memory only; open the zoo with storage=ram or gpu")
        self._weights.replace(rows, weights)
        self.run_ids[rows] = run_ids.to(self.device)
        for name, values in metrics.items():
            self.metrics[name][rows] = values.to(self.metrics[name])

    def column(self, name: str) -> Float[Tensor, "runs snapshots"]:
        """One of `metrics`.

        Raises:
            ZooError: the zoo does not have it.
        """
        if name not in self.metrics:
            raise ZooError(
                f"the zoo in {self.folder or 'memory'} has no column {name!r}, only {', '.join(sorted(self.metrics))}; "
                "choose a task that it was collected for, or another zoo.path"
            )
        return self.metrics[name]

    def split(self, name: str) -> Int[Tensor, " n"]:
        """Rows of the "train", "validation" or "test" split.

        Raises:
            ZooError: no run is left for the split.
        """
        if name not in SPLITS:
            raise ZooError(f"there is no split {name!r}, expected one of {', '.join(SPLITS)}")
        test, validation = self._bounds
        low, high = {"test": (0, test), "validation": (test, validation), "train": (validation, None)}[name]
        inside = self.run_ids >= low
        if high is not None:
            inside &= self.run_ids < high
        rows = inside.nonzero().squeeze(1)
        if len(rows) == 0:
            raise ZooError(
                f"the zoo has {self.runs} runs{self._dropped_words()}, but none for the {name} split: the "
                f"first {test} run ids are test, the next {validation - test} validation, all later ones train; "
                "collect more runs, or set smaller test and validation splits"
            )
        return rows

    def _dropped_words(self) -> str:
        if not self.dropped:
            return ""
        (reason, _), *_ = Counter(self.dropped.values()).most_common(1)
        return f" and dropped {len(self.dropped)} (such as: {reason})"

    def verify(self) -> None:
        """Read every byte of a stored zoo and compare checksums.

        Raises:
            ZooError: a file is missing, truncated or altered; names it.
        """
        if self.folder is None:
            return
        folder, manifest = self.folder, shards.read_manifest(self.folder)

        def check(index: int) -> None:
            shards.check_shard(folder, manifest, index, shards.read_shard(folder, index), checksums=True)

        with ThreadPoolExecutor() as pool:  # hashing lets other threads work
            list(pool.map(check, shards.finished_shards(folder)))


@dataclass(frozen=True)
class Scales:
    """Mean and standard deviation of every tensor, and G.pt's single factor 0.538 / std(all weights)."""

    mean: Float[Tensor, " tensors"]
    std: Float[Tensor, " tensors"]
    coefficient: float


def scales(zoo: Zoo, split: str = "train", max_networks: int = 4096, seed: int = 0) -> Scales:
    """Scales of the weights, from networks drawn uniformly over the runs and snapshots of one split."""
    generator = rng("cpu", seed, "scales")
    rows = zoo.split(split).cpu()
    runs = rows[torch.randint(len(rows), (max_networks,), generator=generator)]
    weights = zoo.read(runs, torch.randint(zoo.snapshots, (max_networks,), generator=generator))
    mean = torch.stack([weights[:, t.slice].mean() for t in zoo.structure.tensors])
    std = torch.stack([weights[:, t.slice].std() for t in zoo.structure.tensors])
    return Scales(mean, std, UPSTREAM_STD / weights.std().item())


# --- storage ----------------------------------------------------------------------------------------------------------


class _Weights(Protocol):
    def read(self, runs: Tensor, snapshots: Tensor) -> Tensor: ...


class _Memory:
    """All weights in one tensor, on whatever device."""

    def __init__(self, weights: Float[Tensor, "runs snapshots D"]):
        self._weights = weights

    def read(self, runs: Int[Tensor, " B"], snapshots: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        device = self._weights.device
        return self._weights[runs.to(device), snapshots.to(device)]

    def replace(self, runs: Int[Tensor, " n"], weights: Float[Tensor, "n snapshots D"]) -> None:
        self._weights[runs.to(self._weights.device)] = weights.to(self._weights)


class _Disk:
    """One positioned read per network: no page of a neighbour is fetched, no file is opened twice."""

    def __init__(self, folder: Path, manifest: Manifest, opened: list["_OpenedShard"]):
        self._manifest = manifest
        self._files = [shards.shard_files(folder, shard.index)["weights"].open("rb", buffering=0) for shard in opened]
        self._starts = [shard.data_start for shard in opened]
        self._first_rows = np.cumsum([0, *(len(shard.run_ids) for shard in opened)])

    def read(self, runs: Int[Tensor, " B"], snapshots: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        dtype, size = self._manifest.torch_dtype, self._manifest.size
        rows = _from_start(runs, int(self._first_rows[-1]), "run")
        columns = _from_start(snapshots, len(self._manifest.iterations), "snapshot")
        holders = np.searchsorted(self._first_rows, rows, side="right") - 1
        places = (rows - self._first_rows[holders]) * len(self._manifest.iterations) + columns
        networks = torch.empty(len(rows), size, dtype=dtype)
        for buffer, holder, place in zip(
            networks.view(torch.uint8).numpy(), holders.tolist(), places.tolist(), strict=True
        ):
            offset = self._starts[holder] + place * buffer.nbytes
            if os.preadv(self._files[holder].fileno(), [buffer], offset) != buffer.nbytes:
                raise ZooError(f"{self._files[holder].name} was truncated while in use; collect that shard again")
        return networks


def _from_start(index: Int[Tensor, " B"], length: int, what: str) -> np.ndarray:
    """Indices as tensors take them (negative ones count from the end), checked."""
    values = index.cpu().numpy()
    if len(values) and not (-length <= values.min() and values.max() < length):
        raise IndexError(f"{what} {values[(values < -length) | (values >= length)][0]} is outside a zoo of {length}")
    return values % length


def _load(folder: Path, manifest: Manifest, opened: list["_OpenedShard"], device: torch.device) -> _Memory:
    """All shards in one tensor; memory peaks at the zoo and one shard."""
    runs = sum(len(shard.run_ids) for shard in opened)
    weights = torch.empty(runs, len(manifest.iterations), manifest.size, dtype=manifest.torch_dtype, device=device)
    first = 0
    for shard in opened:
        rows = load_file(shards.shard_files(folder, shard.index)["weights"])["weights"]
        weights[first : first + len(shard.run_ids)] = rows[: len(shard.run_ids)]
        first += len(shard.run_ids)
    return _Memory(weights)


def _choose_storage(wanted: str, size: int, device: torch.device) -> str:
    if wanted not in ("auto", "gpu", "ram", "disk"):
        raise ZooError(f"zoo storage {wanted!r} is not known, expected auto, gpu, ram or disk")
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 2:
        return "gpu"
    return "ram" if size <= _free_memory() / 2 else "disk"


def _free_memory() -> int:
    """Bytes of main memory that can be taken, page cache included where the system says so (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


# --- opening ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OpenedShard:
    """A checked shard: its number, its runs that are looked at (the first ones), what they took, and where its data
    begin in the weights file (bytes)."""

    index: int
    run_ids: list[int]
    dropped: dict[int, str]
    seconds: float
    data_start: int


def _open_shards(folder: Path, manifest: Manifest, runs: int | None) -> list[_OpenedShard]:
    finished = shards.finished_shards(folder)
    if not finished:
        raise ZooError(f"the zoo at {folder} has no finished shard yet; collect it first")
    if finished != list(range(len(finished))):
        gap = next(i for i, index in enumerate(finished) if i != index)
        raise ZooError(
            f"{shards.shard_files(folder, gap)['index']} is missing although later shards exist; collect again to "
            "make it (finished shards are kept), or wait for the worker that is at it"
        )
    opened = []
    for index in finished:
        shard = shards.read_shard(folder, index)
        first, end = shard.runs
        limit = end if runs is None else min(runs, end)
        if first >= limit:
            break
        opened.append(
            _OpenedShard(
                index,
                [run for run in shard.run_ids if run < limit],
                {run: reason for run, reason in shard.dropped.items() if run < limit},
                shard.seconds * (limit - first) / (end - first),
                shards.check_shard(folder, manifest, index, shard),
            )
        )
    return opened


def _check_structure(folder: Path, manifest: Manifest, structure: Structure) -> None:
    if manifest.fingerprint == structure.fingerprint:
        return
    stored = [(name, tuple(shape)) for name, shape in manifest.tensors]
    wanted = [(t.name, t.shape) for t in structure.tensors]
    pairs = zip_longest(stored, wanted, fillvalue=("no tensor", ()))
    (old, old_shape), (new, new_shape) = next((p for p in pairs if p[0] != p[1]), (stored[0], wanted[0]))
    raise ZooError(
        f"the zoo at {folder} holds networks of another architecture: {old} {old_shape} where the task has {new} "
        f"{new_shape}; choose the task it was collected for, or collect a zoo for this one in another folder"
    )
