"""A folder of PEFT adapters as a zoo."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.adapters.measure import adapter_parts, library_columns
from Gpt.adapters.peft_io import adapter_folders, gauge_report, load_adapter, read_adapter
from Gpt.adapters.suite import Member
from Gpt.data import shards
from Gpt.data.shards import Manifest
from Gpt.errors import DataError
from Gpt.tasks import Task


def import_adapters(
    folder: str | Path,
    path_out: str | Path,
    task: Task,
    *,
    dtype: str = "float32",
    shard_runs: int = 256,
    max_weight: float = 10.0,
    device: torch.device | str = "cpu",
) -> str | None:
    """Store adapters as the runs of a task's family, one snapshot each, in place of those of an earlier import.

    Args:
        folder: see `read_library`.

    Returns:
        what `gauge_report` warns of; it is among the zoo's notes too.

    Raises:
        DataError, StructureError: see `read_library`.
    """
    chosen, members, weights = read_library(folder, task)
    warning = gauge_warning(chosen)
    notes = ["Imported adapters, one snapshot each; their training iterations are not known."]
    manifest = Manifest.of(
        task.zoo_name,
        task.structure,
        {"type": "import", "source": Path(folder).resolve().name},
        seed=0,
        iterations=[0],
        dtype=dtype,
        shard_runs=shard_runs,
        max_weight=max_weight,
        notes=[*notes, warning] if warning else notes,
    )
    shards.create_manifest(Path(path_out), manifest)
    columns = library_columns(task, weights, members, device)
    pieces = torch.arange(len(weights)).split(shard_runs)
    for index, ids in enumerate(pieces):
        parts = {name: values[ids, None] for name, values in columns.items()}
        shards.write_shard(Path(path_out), manifest, index, ids.tolist(), weights[ids, None], parts)
    shards.remove_shards(Path(path_out), len(pieces))
    return warning


def read_library(folder: str | Path, task: Task) -> tuple[list[Path], Int[Tensor, " runs"], Float[Tensor, "runs D"]]:
    """Which adapter each run of a task's family is, the run's member, and the adapter's weights.

    `folder` has a sub-folder "rule/format" for every member, with one or several adapter folders below it; for a user's
    prompts, it may be called as their task. Held-out and validation members take `runs_per_member` of theirs, the
    training members all; where a member has fewer adapters than others, its own come again.

    Raises:
        DataError: a member has no adapter, or one is damaged.
        StructureError: an adapter does not have the form that the task's recipe says.
    """
    family, recipe = adapter_parts(task)
    found = [_folders_of(Path(folder), member, family.members) for member in family.members]
    held_out, train = family.test_runs + family.validation_runs, family.splits["train"]
    runs = held_out + len(train) * max(len(found[i]) for i in train)
    members = family.member_of_runs(torch.arange(runs))
    turns = [cycle(folders) for folders in found]
    chosen = [next(turns[member]) for member in members.tolist()]
    return chosen, members, torch.stack([load_adapter(adapter, recipe.spec, recipe.base) for adapter in chosen])


def gauge_warning(adapters: Sequence[Path]) -> str | None:
    """What `gauge_report` warns of in these folders, each of which counts once."""
    different = list(dict.fromkeys(adapters))
    return gauge_report([read_adapter(adapter)[0] for adapter in different]).warning if different[1:] else None


def _folders_of(folder: Path, member: Member, members: Sequence[Member]) -> list[Path]:
    alone = sum(other.rule == member.rule for other in members) == 1
    for name in (member.name, member.rule) if alone else (member.name,):
        if (folder / name).is_dir():
            return adapter_folders(folder / name)
    raise DataError(f"{folder} has no sub-folder {name!r} with adapters for that task")
