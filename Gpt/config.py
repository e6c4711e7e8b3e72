"""The typed configuration of a run: what hydra composes from `configs/` becomes one `RunConfig`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from Gpt.data.batches import BatchConfig, Share
from Gpt.distillation import DistillationConfig
from Gpt.errors import ConfigError, nearest
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.report.logger import LoggerConfig
from Gpt.text import DEFAULT_MODEL
from Gpt.training import TrainerConfig


@dataclass(frozen=True)
class DataConfig:
    """Where image data are.

    Attributes:
        root: folder to look in before `./data`.
        download: fetch with torchvision what is not found.
        examples: use only the first this many examples of each split, to try a configuration on a small machine.
    """

    root: str | None = None
    download: bool = True
    examples: PositiveInt | None = None


@dataclass(frozen=True)
class ZooConfig:
    """The population of trained networks.

    Attributes:
        path: its folder; `zoos/<the task's zoo name>` when None. Collected there if it is missing or incomplete.
        runs: training runs in all; the first `test_runs` are the test split, the next `validation_runs` the validation
            split.
        snapshots, spacing: stored per run, "log" or "uniform" in the training iteration, or its "tail".
        split: by "run" or, for one or few long trajectories, by "snapshot"; then `test_runs` and `validation_runs`
            count snapshots, see `Gpt.data.views`.
        align: rename the hidden units of every run to match the first training run's.
        dtype: float32, bfloat16 or float16 on disk and in memory.
        shard_runs, population: runs stored, and runs trained, at once (population: a shard's when None).
        storage: "gpu", "ram", "disk", or "auto".
        store: write the zoo to a folder. Otherwise it lives in memory, and every session trains it anew.
        refresh_every: training steps after which a population of the oldest training runs gives way to newly trained
            ones; 0 for a zoo that does not change. Needs `store=false`. The evaluation knows the runs that the zoo
            holds at the end; novelty is measured against the final networks of all runs that it ever held.
        max_weight: runs with a larger weight are dropped.
        recipe: changes to the task's training recipe, e.g. {epochs: 5}.
    """

    path: str | None = None
    runs: PositiveInt = 2304
    test_runs: NonNegativeInt = 128
    validation_runs: NonNegativeInt = 128
    snapshots: PositiveInt = 32
    spacing: str = "log"
    split: Literal["run", "snapshot"] = "run"
    align: bool = False
    seed: int = 0
    dtype: str = "float32"
    shard_runs: PositiveInt = 256
    population: PositiveInt | None = None
    storage: Literal["auto", "gpu", "ram", "disk"] = "auto"
    store: bool = True
    refresh_every: NonNegativeInt = 0
    max_weight: PositiveFloat = 10.0
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The diffusion objective, see `Gpt.diffusion.objectives`.

    Attributes:
        name: "flow", "ddpm" or "regression".
        loss_space, times, shift: of flow matching only.
    """

    name: str = "flow"
    prediction: str = "x0"
    loss_space: str = "x0"
    times: str = "logit_normal"
    shift: PositiveFloat = 1.0


@dataclass(frozen=True)
class ConditionConfig:
    """What the generator can be prompted with.

    Attributes:
        names: of `Gpt.conditions`; empty for an unconditional generator.
        dropout: share of training examples that leave all conditions out, for guidance, and, where there are several,
            each of them on its own.
        encoder: embeds sentences about class masks, in training and wherever a mask is said in words: the packaged
            all-MiniLM-L6-v2, the folder of another mean-pooled sentence-transformers model, or the name of one in the
            local Hugging Face cache. (What reads the prompts of adapters is a setting of their family.)
    """

    names: tuple[str, ...] = ("target_metric",)
    dropout: Share = 0.1
    encoder: str = DEFAULT_MODEL


@dataclass(frozen=True)
class RunFolderConfig:
    """Where the run lives: `<root>/<name>`; the name of the configuration when None."""

    root: str = "runs"
    name: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything about one run.

    Attributes:
        task: a key of TASK_METADATA.
        task_modules: files of the user's that add tasks.
        generator: {name: …, settings of that generator}.
        beside: other configurations, whose runs are finished first and whose generators stand in the same table and
            figure; each a name and, where wanted, settings, as on the command line: "digits_loss trainer.steps=200".
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume_path: published G.pt weights to evaluate with test_only=true, such as mnist_loss.pt.
        resume: "auto" continues or reuses what the run folder holds; "never" starts a new folder beside it.
        test_only: evaluate the trained generator again instead of training.
        collect_only: stop when the zoo is there, and print what it holds.
        dry_run: check everything that the run needs, in small, and leave nothing behind.
    """

    task: str = "digits_loss"
    task_modules: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    zoo: ZooConfig = field(default_factory=ZooConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    generator: dict[str, Any] = field(default_factory=lambda: {"name": "gpt"})
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    beside: tuple[str, ...] = ()
    device: str = "auto"
    seed: int = 0
    resume_path: str | None = None
    resume: str = "auto"
    test_only: bool = False
    collect_only: bool = False
    dry_run: bool = False

    def training_settings(self) -> dict[str, Any]:
        """The part of the configuration that trained weights depend on; a run is only resumed with the same."""
        settings = dataclasses.asdict(self) | {"data": {"examples": self.data.examples}}
        elsewhere = ("evaluation", "logger", "run", "beside", "device")
        for key in (*elsewhere, "resume_path", "resume", "test_only", "collect_only", "dry_run"):
            del settings[key]
        del settings["trainer"]["sharded"]  # where the weights are kept
        # How many runs are replaced at once decides what a changing zoo holds.
        where = ("path", "shard_runs", "storage", "store", *(() if self.zoo.refresh_every else ("population",)))
        for key in where:
            del settings["zoo"][key]
        if "text" in self.condition.names:  # the model that embeds the prompts, wherever it is stored
            settings["condition"]["encoder"] = Path(self.condition.encoder).name
        else:
            del settings["condition"]["encoder"]
        return settings


Schema = TypeVar("Schema")


def checked(schema: type[Schema], values: dict[str, Any], where: str = "") -> Schema:
    """Nested dicts as instances of a dataclass, with every key and type checked.

    Args:
        where: prefix of the keys in error messages, such as "generator.".

    Raises:
        ConfigError: a key is unknown (names the nearest right one) or a value is of the wrong type.
    """
    _check_keys(schema, values, where)
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = where + ".".join(str(part) for part in first["loc"])
        remedy = f"; write a list, [{first['input']}]" if first["type"] == "tuple_type" else ""
        raise ConfigError(f"configuration: {key}={first['input']!r}: {first['msg']}{remedy}") from error


def _check_keys(schema: type, values: dict[str, Any], where: str) -> None:
    known: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"configuration: there is no key {where + key!r}; {nearest(key, known)}")
        if dataclasses.is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(known[key], value, f"{where}{key}.")
