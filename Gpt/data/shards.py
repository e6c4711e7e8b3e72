"""The zoo on disk: one folder, a manifest, and per shard of runs three files that one worker writes and nobody changes.

    manifest.json                    what was trained and how; written once
    shard-00000.safetensors          "weights" [runs, snapshots, D], contiguous: a network is one read at an offset
    shard-00000.metrics.safetensors  one [runs, snapshots] float32 tensor per column
    shard-00000.json                 run ids, dropped runs, sizes and SHA-256 of the two; written last, it makes the
                                     shard exist

Every file is written as `Gpt.files` does it, so a reader sees a whole file or none.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.errors import ZooError
from Gpt.files import flush, naming, replacing, temporary_name
from Gpt.recipes import Recipe
from Gpt.structure import Structure

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What all shards of a zoo have in common.

    Attributes:
        zoo: name of the zoo (tasks that share networks share a zoo).
        fingerprint, tensors: the architecture, see `Gpt.structure`; `tensors` is `[[name, shape], …]`.
        recipe: type and fields of the recipe, or where imported networks came from.
        iterations: training iteration of every snapshot, increasing.
        shard_runs: shard i holds the runs `[i * shard_runs, (i + 1) * shard_runs)`, less those dropped.
        max_weight: runs with a larger absolute weight in any snapshot are dropped.
        notes: what a reader of results has to know, in sentences.
    """

    zoo: str
    fingerprint: str
    tensors: list[list]
    recipe: dict[str, Any]
    seed: int
    iterations: list[int]
    dtype: str = "float32"
    shard_runs: int = 256
    max_weight: float = 10.0
    notes: list[str] = dataclasses.field(default_factory=list)
    format: int = FORMAT

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ZooError(f"zoo dtype {self.dtype!r} is not known, expected one of {', '.join(DTYPES)}")

    @classmethod
    def of(cls, zoo: str, structure: Structure, recipe: Recipe | dict, **fields: Any) -> "Manifest":
        """The manifest of a zoo of one architecture, in the types that JSON gives back."""
        if not isinstance(recipe, dict):
            recipe = {"type": type(recipe).__name__, **dataclasses.asdict(recipe)}
        tensors = [[t.name, list(t.shape)] for t in structure.tensors]
        return cls(zoo, structure.fingerprint, tensors, recipe, **fields)

    @property
    def size(self) -> int:
        """D, the length of one network's flat vector."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors)

    @property
    def run_bytes(self) -> int:
        """Stored bytes of one run."""
        return len(self.iterations) * self.size * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_manifest(folder: Path) -> Manifest:
    """Raises:
    ZooError: there is no zoo in the folder, or its manifest is damaged or of another format version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ZooError(f"there is no zoo at {folder}: {MANIFEST} is missing; collect it first, or mend the path")
    fields = _read_json(file)
    if fields.get("format") != FORMAT:
        raise ZooError(f"{file} has format {fields.get('format')!r}, this version reads {FORMAT}; collect it again")
    try:
        return Manifest(**fields)
    except TypeError as error:
        raise ZooError(f"{file} is not a zoo's manifest ({error}); collect into another folder") from error


def create_manifest(folder: Path, manifest: Manifest) -> None:
    """Begin a zoo, or join one that has the same manifest; of several workers that begin at once, one writes it.

    Raises:
        ZooError: the folder holds a zoo with another manifest, names the first key that differs; or it is a file.
        OSError: it cannot be written; a zoo that is there need not be.
    """
    if folder.exists() and not folder.is_dir():
        raise ZooError(f"{folder} is a file, where a zoo's folder is expected; mend zoo.path")
    file = folder / MANIFEST
    if not file.is_file() and _begin(file, manifest):
        return
    check_same(folder, read_manifest(folder), manifest)


def _begin(file: Path, manifest: Manifest) -> bool:
    """Write a manifest; False where another worker was before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    with naming(file):
        try:
            _write(temporary, [json.dumps(dataclasses.asdict(manifest), indent=1).encode()])
            flush(temporary)
            first = _is_first(temporary, file)
            flush(file.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return first


def _is_first(temporary: Path, file: Path) -> bool:
    """Give a temporary file its name, unless another worker was before."""
    try:
        os.link(temporary, file)  # unlike rename, fails where the file already exists
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, on which two workers must not begin at once
        if file.exists():
            return False
        os.replace(temporary, file)
    return True


def check_same(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises:
    ZooError: two manifests differ in more than their notes and, where networks were imported, the size of shards.
    """
    free = ("notes", "shard_runs") if found.recipe.get("type") == "import" else ("notes",)
    for field in dataclasses.fields(Manifest):
        old, new = getattr(found, field.name), getattr(wanted, field.name)
        if old != new and field.name not in free:
            raise ZooError(
                f"the zoo at {folder} has {_difference(field.name, old, new)}; "
                "use another folder for the new zoo, or delete this one to collect it anew"
            )


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        return _difference(f"{name}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} {name}, this run asks for {len(new)}"
        i = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        return _difference(f"{name}[{i}]", old[i], new[i])
    return f"{name} {old!r}, this run asks for {new!r}"


@dataclass(frozen=True)
class Shard:
    """The index of one shard.

    Attributes:
        runs: the half-open range it covers; `run_ids` are those of it that are stored.
        seconds: wall-clock of the worker that trained it; 0 where that is not known, as of imported networks.
    """

    runs: tuple[int, int]
    run_ids: list[int]
    dropped: dict[int, str]
    files: dict[str, dict[str, Any]]
    seconds: float = 0.0


def shard_files(folder: Path, index: int) -> dict[str, Path]:
    """The three files of one shard, whether they exist or not: "index", "weights" and "metrics"."""
    stem = f"shard-{index:05d}"
    suffixes = {"index": ".json", "weights": ".safetensors", "metrics": ".metrics.safetensors"}
    return {kind: folder / f"{stem}{suffix}" for kind, suffix in suffixes.items()}


def write_shard(
    folder: Path,
    manifest: Manifest,
    index: int,
    run_ids: list[int],
    weights: Float[Tensor, "runs snapshots D"] | Sequence[Float[Tensor, "snapshots D"]],
    metrics: Mapping[str, Float[Tensor, "runs snapshots"]],
    missing: Mapping[int, str] | None = None,
    seconds: float = 0.0,
) -> Shard:
    """Write the runs of one shard, less those with non-finite or exploded weights; they are not copied.

    Args:
        missing: runs of this shard that could not be made, `{run id: why}`; they count as dropped.
        seconds: what making the runs took.

    Raises:
        ZooError: the disk is full; says how much room the shard needs.
    """
    dropped = dict(missing or {})
    for run, row in zip(run_ids, weights, strict=True):
        dropped |= bad_runs([run], row[None], manifest.max_weight)
    covered = sorted({*run_ids, *dropped})
    kept = [i for i, run in enumerate(run_ids) if run not in dropped]
    columns = {name: values.cpu()[kept].float().contiguous() for name, values in metrics.items()}
    files = shard_files(folder, index)
    try:
        files["index"].unlink(missing_ok=True)  # a shard that is written anew does not exist until it is whole
        sums = {
            "weights": _replace(files["weights"], _safetensors(manifest, [weights[i] for i in kept])),
            "metrics": _replace(files["metrics"], [safetensors.torch.save(columns)]),
        }
        shard = Shard((covered[0], covered[-1] + 1), [run_ids[i] for i in kept], dropped, sums, seconds)
        _replace(files["index"], [json.dumps(dataclasses.asdict(shard)).encode()])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = len(kept) * manifest.run_bytes
        raise ZooError(
            f"no space left for {files['weights']}: this shard needs {needed / 2**20:,.1f} MiB; finished shards are "
            "kept, make room and run again to continue (or use a smaller dtype, fewer snapshots or fewer runs)"
        ) from error
    return shard


def covers(folder: Path, index: int, run: int) -> bool:
    """Whether a shard is finished and goes up to a run; a zoo that grew has a last shard that does not."""
    return shard_files(folder, index)["index"].is_file() and read_shard(folder, index).runs[1] > run


def read_shard(folder: Path, index: int) -> Shard:
    """The index of one finished shard.

    Raises:
        ZooError: the file is damaged.
    """
    file = shard_files(folder, index)["index"]
    fields = _read_json(file)
    try:
        dropped = {int(run): reason for run, reason in fields["dropped"].items()}
        return Shard(tuple(fields["runs"]), fields["run_ids"], dropped, fields["files"], fields.get("seconds", 0.0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ZooError(f"{file} is damaged ({error!r}); {_remedy(folder, index)}") from error


def remove_shards(folder: Path, first: int) -> None:
    """Remove the finished shards from number `first` on, each of which stops existing before its numbers do."""
    for index in finished_shards(folder):
        if index >= first:
            for file in shard_files(folder, index).values():
                file.unlink(missing_ok=True)


def finished_shards(folder: Path) -> list[int]:
    """Indices of all finished shards, increasing."""
    return sorted(int(file.stem.removeprefix("shard-")) for file in folder.glob("shard-?????.json"))


def check_shard(folder: Path, manifest: Manifest, index: int, shard: Shard, checksums: bool = False) -> int:
    """Compare a shard's files with its index.

    Args:
        checksums: also read every byte and compare the SHA-256.

    Returns:
        Offset of the first weight in the weights file, in bytes.

    Raises:
        ZooError: a file is missing, truncated or altered; names it.
    """
    files = shard_files(folder, index)
    for kind, expected in shard.files.items():
        file = files[kind]
        if not file.is_file():
            raise ZooError(f"{file} is missing; {_remedy(folder, index)}")
        if file.stat().st_size != expected["bytes"]:
            raise ZooError(
                f"{file} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}; {_remedy(folder, index)}"
            )
        if checksums and _sha256(file) != expected["sha256"]:
            raise ZooError(f"{file} was altered: its SHA-256 differs; {_remedy(folder, index)}")
    header = _safetensors_header(manifest, len(shard.run_ids))
    with files["weights"].open("rb") as stream:
        if stream.read(len(header)) != header:
            raise ZooError(f"{files['weights']} has an altered header; {_remedy(folder, index)}")
    return len(header)


def read_metrics(folder: Path, index: int) -> dict[str, Tensor]:
    """The columns of one shard, `[runs, snapshots]` float32 each."""
    file = shard_files(folder, index)["metrics"]
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ZooError(f"{file} is damaged ({error}); {_remedy(folder, index)}") from error


def _remedy(folder: Path, index: int) -> str:
    return f"delete {shard_files(folder, index)['index']} and collect again to make this shard anew"


def bad_runs(run_ids: list[int], weights: Float[Tensor, "runs snapshots D"], max_weight: float) -> dict[int, str]:
    """Runs with non-finite or exploded weights in any snapshot, and why they have to go."""
    if not run_ids:
        return {}
    lowest, highest = torch.aminmax(weights.flatten(1), dim=1)  # NaN if any weight is NaN
    bad = {}
    for run, value in zip(run_ids, torch.maximum(-lowest, highest).tolist(), strict=True):
        if not value < float("inf"):
            bad[run] = "a weight is not finite"
        elif value > max_weight:
            bad[run] = f"a weight reaches {value:.3g}, above max_weight {max_weight:g}"
    return bad


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ZooError(f"{file} is not readable as JSON ({error}); {_how_to_mend(file)}") from error
    if not isinstance(fields, dict):
        raise ZooError(f"{file} holds a {type(fields).__name__} instead of an object; {_how_to_mend(file)}")
    return fields


def _how_to_mend(file: Path) -> str:
    """Shards without a manifest could be of any settings."""
    return f"delete {'the folder' if file.name == MANIFEST else 'it'} and collect again"


def _safetensors_header(manifest: Manifest, runs: int) -> bytes:
    """The start of a weights file: its one tensor's description, padded so that data begin at a multiple of 8."""
    codes = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    shape = [runs, len(manifest.iterations), manifest.size]
    tensor = {"dtype": codes[manifest.dtype], "shape": shape, "data_offsets": [0, runs * manifest.run_bytes]}
    entry = json.dumps({"weights": tensor}).encode()
    entry += b" " * (-len(entry) % 8)
    return len(entry).to_bytes(8, "little") + entry


def _safetensors(manifest: Manifest, runs: Sequence[Float[Tensor, "snapshots D"]]) -> Iterator[bytes | memoryview]:
    """A weights file, run after run, so that no second copy of a shard is in memory."""
    yield _safetensors_header(manifest, len(runs))
    for run in runs:
        yield run.to("cpu", manifest.torch_dtype).contiguous().flatten().view(torch.uint8).numpy().data


def _replace(file: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Replace a file. Returns size and SHA-256."""
    with replacing(file) as temporary:
        return _write(temporary, parts)


def _write(file: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
