"""The dry run: everything that a run needs is looked at or tried once, in small; nothing is kept.

    python main.py --config-name lora_tiny dry_run=true

Where the zoo is still to be collected, two runs of its recipe are trained for two iterations instead. What is missing
is downloaded and stays (data sets); compilation and the runs of `beside` are left out.
"""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from data_gen.collect import snapshot_schedule, total_iterations, train_population
from data_gen.memory import Trained
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.importer import gauge_warning, read_library
from Gpt.adapters.measure import library_columns
from Gpt.data import shards
from Gpt.data.importers import foreign_runs
from Gpt.data.shards import DTYPES
from Gpt.data.views import align_runs
from Gpt.data.zoo import Zoo
from Gpt.distributed import primary, world
from Gpt.errors import ConfigError, UserError, ZooError
from Gpt.evaluation.population import test_population as score_population
from Gpt.generator import Batch
from Gpt.population.functional import stack_initial
from Gpt.report.trackers import check_installed
from Gpt.run.experiment import Experiment
from Gpt.run.folder import choose_folder, open_folder
from Gpt.seeds import derive_seed, rng
from Gpt.text import SentenceEncoder

RUNS, SNAPSHOTS, ITERATIONS, NETWORKS, SAMPLING_STEPS = 2, 2, 2, 2, 2  # what is tried in place of the real thing
EXAMPLES = 16  # of a batch, on a CPU; on a GPU all that are differentiated at a time, for which memory might not do
CHECKPOINT_COPIES = 10  # of the parameters: weights, averages, two moments, and the best averages; old and new at once

BLOCKED = "not possible, see above"


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        what: was looked at.
        size: how large it is or, where it is not ok, what is wrong with it.
    """

    what: str
    size: str
    ok: bool


def dry_run(experiment: Experiment) -> list[Check]:
    """Make all checks and print them as a table.

    Raises:
        ConfigError: one of them failed.
    """
    checks = run_checks(Rehearsal(experiment.config, experiment.name))
    failed = [check.what for check in checks if not check.ok and check.size != BLOCKED]
    if primary():
        print(f"dry run of {experiment.name}; nothing is trained or kept\n\n{table(checks)}\n")
    if failed:
        raise ConfigError(f"the run would fail; mend what the dry run says about: {', '.join(failed)}")
    return checks


def table(checks: list[Check]) -> str:
    """The checks as plain text, a line each."""
    width = max(len(check.what) for check in checks)
    return "\n".join(f"  {check.what:{width}s}  {'ok' if check.ok else 'NO':2s}  {check.size}" for check in checks)


def run_checks(rehearsal: "Rehearsal") -> list[Check]:
    """Every check, in the order in which a run would meet its trouble; what failed once is told once."""
    found: list[Check] = []
    told: set[str] = set()
    for what, job in CHECKS.items():
        try:
            found.append(Check(what, job(rehearsal), True))
        except UserError as error:
            found.append(Check(what, BLOCKED if str(error) in told else str(error), False))
            told.add(str(error))
    return found


class Rehearsal(Experiment):
    """The parts of a run, with a zoo that is there at once: the stored one, where it is complete, or a tiny one."""

    @cached_property
    def iterations(self) -> list[int]:
        """Training iterations of the snapshots that the zoo will have; none where the zoo is imported."""
        settings = self.config.zoo
        if self.task.checkpoints or self.task.recipe is None:
            return []
        return snapshot_schedule(total_iterations(self.task), settings.snapshots, settings.spacing, settings.seed)

    @cached_property
    def stored_runs(self) -> int:
        """How many runs the zoo's folder holds, from the first on without a gap."""
        if not (self.config.zoo.store and (self.zoo_folder / shards.MANIFEST).is_file()):
            return 0
        finished = shards.finished_shards(self.zoo_folder)
        leading = [index for place, index in enumerate(finished) if place == index]
        return shards.read_shard(self.zoo_folder, leading[-1]).runs[1] if leading else 0

    @property
    def is_complete(self) -> bool:
        """Whether the zoo is there as it is, so that a run would train or import nothing."""
        return self.stored_runs > 0 and (not self.iterations or self.stored_runs >= self.config.zoo.runs)

    @property
    def planned(self) -> dict[str, int]:
        """Networks of each split that the zoo will have; those of an imported one are not known before."""
        settings, (test, validation) = self.config.zoo, self.held_out
        total = settings.runs * (len(self.iterations) if settings.split == "snapshot" else 1)
        return {"train": total - test - validation, "validation": validation, "test": test}

    def runs_bytes(self, runs: int) -> int:
        """Stored bytes of that many runs; 0 where they are imported."""
        dtype = self.config.zoo.dtype
        if dtype not in DTYPES:
            raise ConfigError(f"zoo.dtype={dtype} is not known, expected one of {', '.join(DTYPES)}")
        return runs * len(self.iterations) * self.task.structure.size * DTYPES[dtype].itemsize

    @cached_property
    def zoo(self) -> Zoo:
        test, validation = self.held_out
        if self.is_complete and self.iterations:
            return self.opened(self.config.zoo.runs).zoo
        if self.is_complete:
            return Zoo.open(
                self.zoo_folder, self.task.structure, storage="disk", device=self.device, test_runs=test,
                validation_runs=validation,
            )  # fmt: skip
        copies = max(RUNS, self.config.generator.get("identities", 0))  # every identity is one training run's
        rows = torch.arange(copies) % len(self._tiny[0])
        weights, metrics = self._tiny
        zoo = Zoo.from_tensors(
            weights[rows],
            {name: values[rows] for name, values in metrics.items()},
            test + validation + torch.arange(copies),
            list(range(weights.shape[1])),
            self.task.structure,
            test_runs=test,
            validation_runs=validation,
        )
        return align_runs(zoo, test, validation) if self.config.zoo.align else zoo

    def opened(self, runs: int, **changes: str | bool) -> Experiment:
        """This experiment on the first runs of the stored zoo, which stays on disk."""
        zoo = dataclasses.replace(self.config.zoo, runs=runs, storage="disk", **changes)  # type: ignore[arg-type]
        return Experiment(dataclasses.replace(self.config, zoo=zoo), self.name)

    @property
    def _library(self) -> str | None:
        """The folder of adapters that are imported, if the task is about such."""
        return self.task.checkpoints if isinstance(self.task.family, AdapterFamily) else None

    @cached_property
    def _tiny(self) -> Trained:
        """A few snapshots of the first training runs, of fresh networks where the task cannot be trained; the first
        adapters of a library."""
        snapshots, settings, first = min(SNAPSHOTS, self.config.zoo.snapshots), self.config.zoo, sum(self.held_out)
        if self._library:
            _, members, weights = read_library(self._library, self.task)
            rows = first + torch.arange(RUNS) % (len(weights) - first)
            columns = library_columns(self.task, weights[rows], members[rows], self.device)
            return weights[rows, None].to(self.device), {name: values[:, None] for name, values in columns.items()}
        if not self.iterations:
            seeds = [derive_seed(settings.seed, "dry run", i) for i in range(RUNS * snapshots)]
            weights = stack_initial(self.task.constructor, self.task.structure, seeds).to(self.device)
            metrics = score_population(self.task, weights, "validation")
            return weights.unflatten(0, (RUNS, -1)), {name: v.unflatten(0, (RUNS, -1)) for name, v in metrics.items()}
        schedule = snapshot_schedule(min(ITERATIONS, self.iterations[-1]), snapshots, settings.spacing)
        return train_population(self.task, list(range(first, first + RUNS)), settings.seed, schedule, self.device)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """The run's, without a file for what it embeds."""
        return SentenceEncoder(self.config.condition.encoder, device=self.device)

    @cached_property
    def batch(self) -> Batch:
        """Of what one process differentiates at a time: all on a GPU, a part on a CPU."""
        config = self.config.trainer
        config.check_shared(world())
        count = config.batch_size // config.slices
        tried = count if self.device.type == "cuda" else min(count, EXAMPLES)
        return self.sampler("train")(tried, rng(self.device, self.config.seed, "dry run"))


# --- the checks: each says what it found, or raises a UserError -------------------------------------------------------


def _device(run: Rehearsal) -> str:
    if run.device.type != "cuda":
        threads = torch.get_num_threads()
        return f"{run.device}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{torch.cuda.get_device_name(run.device)}, {_size(torch.cuda.mem_get_info(run.device)[0])} free"


def _tracker(run: Rehearsal) -> str:
    check_installed(run.config.logger)
    backend, mode = run.config.logger.backend, run.config.logger.mode
    return f"{backend}, {mode}" if backend in ("wandb", "swanlab") else backend


def _task(run: Rehearsal) -> str:
    structure = run.task.structure
    facts = [f"{structure.size:,} weights in {len(structure.tensors)} tensors"]
    if structure.groups:
        count, groups = sum(structure.groups.values()), len(structure.groups)
        facts.append(f"{count:,} hidden units in {groups} group{'s' * (groups > 1)}")
    elif not isinstance(run.task.family, AdapterFamily):
        facts.append("no hidden units known")
    facts.append(f"prompted with {', '.join(run.config.condition.names) or 'nothing'}")
    return f"{run.task.name}: {', '.join(facts)}"


def _data(run: Rehearsal) -> str:
    if run.unanswered:
        return "prompts without answers: adapters are judged by their weights"
    splits = ["validation", "test"] if run.task.train_data_fn is None else ["train", "validation", "test"]
    return ", ".join(f"{split} {_shapes(run.task.data(split))}" for split in splits)


def _shapes(items: tuple) -> str:
    shapes = ["x".join(map(str, i.shape)) for i in items if isinstance(i, torch.Tensor) and i.dim()]
    return " and ".join(dict.fromkeys(shapes)) or f"{len(items)} items"


def _folder(run: Rehearsal) -> str:
    folder = choose_folder(run.config, run.folder)
    summary = open_folder(run.config, folder)
    run.check_published()
    where = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise ConfigError(f"{where} cannot be written ({error.strerror}); choose another run.root") from error
    state = "finished, nothing to train" if summary.get("finished") else "begun before" if summary else "new"
    return f"{folder}, {state}"


def _zoo(run: Rehearsal) -> str:
    settings, split = run.config.zoo, run.planned
    run.check_refresh()
    if not run.iterations:
        return _imported(run)
    if min(split["train"], split["validation"]) < 1:
        raise ZooError(
            f"zoo.runs={settings.runs}: {split['test']} networks for testing and {split['validation']} for validation "
            f"leave {split['train']} to train on; each of train and validation needs one"
        )
    identities = run.config.generator.get("identities", 0)
    if identities not in (0, split["train"]):
        raise ConfigError(f"generator.identities={identities} does not fit {split['train']} training runs")
    if run.stored_runs:  # opened as it is, without its views, for which there may be too few runs
        run.opened(min(run.stored_runs, settings.runs), align=False, split="run").zoo  # noqa: B018 - raises
    return f"{settings.runs:,} runs x {len(run.iterations)} snapshots, {_size(run.runs_bytes(settings.runs))}; " + (
        f"{run.stored_runs:,} runs are in {run.zoo_folder}" if settings.store else "kept in memory"
    )


def _imported(run: Rehearsal) -> str:
    source = run.task.checkpoints
    found = source is not None and Path(source).exists()
    again = found and isinstance(run.task.family, AdapterFamily)  # a library is read anew for every run
    if run.stored_runs and not again:
        return f"{run.zoo.runs:,} runs x {run.zoo.snapshots} snapshots in {run.zoo_folder}"
    if source is None or not found:
        raise ZooError(
            f"task {run.task.name!r} has no zoo at {run.zoo_folder} and no checkpoints at {source}; mend its key "
            "'checkpoints', or set zoo.path"
        )
    if again:
        adapters, *_ = read_library(source, run.task)
        warning = gauge_warning(adapters)
        counts = f"{len(adapters):,} runs of {len(set(adapters)):,} adapters to be imported from {source}"
        return f"{counts}; but {warning}" if warning else counts
    runs = foreign_runs(source, run.task.structure)
    count = sum(foreign.snapshots for foreign in runs) if run.config.zoo.split == "snapshot" else len(runs)
    test, validation = run.held_out
    if count <= test + validation:
        raise ZooError(
            f"{source} holds {count} networks to share out, {test} for testing and {validation} for validation, which "
            "leaves none to train on; set fewer zoo.test_runs and zoo.validation_runs"
        )
    runs[0].read()
    return (
        f"{len(runs):,} runs to be imported from {source}; {runs[0].name}, of {runs[0].snapshots} snapshots, was read"
    )


def _networks_at_hand(run: Rehearsal) -> str:
    zoo, name = run.zoo, f"validation_{run.task.metric}"
    reached = f"{name} {zoo.column(name)[:, -1].mean():.4g}"
    if run.is_complete:
        return f"{zoo.runs:,} stored runs, {reached} at their end"
    verb = "trained for a moment" if run.iterations else "of the library" if run._library else "made afresh"
    return f"{RUNS} runs x {zoo.snapshots} snapshots {verb}, {reached}"


def _generator(run: Rehearsal) -> str:
    run.check_judging()
    count = sum(p.numel() for p in run.generator.parameters())
    return f"{run.config.generator['name']}: {count:,} parameters, {_size(4 * count)}"


def _space(run: Rehearsal) -> str:
    needed = {run.folder: CHECKPOINT_COPIES * 4 * sum(p.numel() for p in run.generator.parameters())}
    if run.config.zoo.store:
        needed[run.zoo_folder] = run.runs_bytes(max(0, run.config.zoo.runs - run.stored_runs))
    elif (zoo := run.runs_bytes(run.config.zoo.runs)) > (memory := _memory(run.device)):
        raise ZooError(
            f"the zoo needs {_size(zoo)} of memory, {run.device} has {_size(memory)}; set zoo.store=true, or fewer "
            "zoo.runs or zoo.snapshots"
        )
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    lines = []
    for folders in disks.values():
        wanted, free = sum(needed[f] for f in folders), shutil.disk_usage(_existing(folders[0])).free
        if wanted > free:
            raise ZooError(
                f"{' and '.join(map(str, folders))} need {_size(wanted)}, {_size(free)} are free; make room, or set "
                "zoo.path or run.root to another disk"
            )
        lines.append(f"{_size(wanted)} to be written, {_size(free)} free")
    return "; ".join(lines)


def _batch(run: Rehearsal) -> str:
    prompts = ", ".join(f"{name} {'x'.join(map(str, v.shape))}" for name, v in run.batch.prompt.items())
    tried, config = len(run.batch.target), run.config.trainer
    return f"{tried:,} of {config.batch_size // config.slices:,} examples, {prompts or 'without prompts'}"


def _gradient(run: Rehearsal) -> str:
    generator, device = run.generator, run.device
    generator.fit(run.batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=generator.mixed_precision):
            loss = generator.loss(run.batch, rng(device, run.config.seed, "dry run", "noise"))
        loss.backward()
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{device} has too little memory for this batch; raise trainer.slices") from error
    norm = float(torch.nn.utils.clip_grad_norm_(generator.parameters(), math.inf))
    generator.zero_grad(set_to_none=True)
    if not (math.isfinite(norm) and math.isfinite(loss.item())):
        raise ConfigError(f"the loss is {loss.item()}, its gradient's norm {norm}; try trainer.precision=float32")
    peak = f", at most {_size(torch.cuda.max_memory_allocated(device))} on {device}" if device.type == "cuda" else ""
    return f"loss {loss.item():.4g}, norm {norm:.4g}{peak}"


def _written(run: Rehearsal) -> str:
    generator, batch = run.generator.eval(), run.batch
    count, steps = min(NETWORKS, len(batch.target)), min(SAMPLING_STEPS, generator.default_steps)
    weights = generator.sample(
        {name: value[:count] for name, value in batch.prompt.items()},
        batch.start[:count] if generator.needs_start and batch.start is not None else None,
        count=count,
        steps=steps,
        seed=run.config.seed,
    )
    if run.unanswered:
        return f"{count} written in {steps} steps by the untrained generator"
    found = score_population(run.task, weights, "validation", device=run.device)
    measured = ", ".join(f"{name} {float(values.mean()):.4g}" for name, values in found.items())
    return f"{count} written in {steps} steps by the untrained generator, {measured}"


CHECKS: dict[str, Callable[[Rehearsal], str]] = {
    "device": _device,
    "tracker": _tracker,
    "task": _task,
    "data": _data,
    "run folder": _folder,
    "zoo": _zoo,
    "zoo's networks": _networks_at_hand,
    "generator": _generator,
    "space": _space,
    "batch": _batch,
    "gradient": _gradient,
    "networks": _written,
}


def _memory(device: torch.device) -> int:
    """Bytes: free ones of a GPU, all of the main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest one around it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _size(count: int | float) -> str:
    """Bytes in a unit that suits them: 3.6 MiB."""
    unit = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**unit:.{min(unit, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"
