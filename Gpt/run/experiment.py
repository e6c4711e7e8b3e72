"""One run and its parts: zoo, generator, samplers, judge, run folder, each built from the configuration when needed."""

import copy
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data_gen.collect import collect, train_population
from data_gen.memory import Stream, Trained, collect_in_memory
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.importer import import_adapters
from Gpt.checkpoint import CheckpointFolder
from Gpt.conditions import PROMPT_FEATURES
from Gpt.config import RunConfig, checked
from Gpt.data import sources
from Gpt.data.adapter_batches import AdapterBatchSampler
from Gpt.data.batches import BatchSampler, check_conditions
from Gpt.data.importers import import_zoo
from Gpt.data.views import align_runs, split_by_snapshot
from Gpt.data.zoo import Zoo, scales
from Gpt.descriptions import Descriptions
from Gpt.distillation import distillation
from Gpt.distributed import on_first_process, primary, together, world
from Gpt.errors import ConfigError
from Gpt.evaluation.judge import Judge
from Gpt.evaluation.judges import judge_of
from Gpt.generator import Generator
from Gpt.masks import MaskSplit
from Gpt.models.paper_generator import PaperGpt
from Gpt.models.upstream import resolve_checkpoint
from Gpt.recipes import Recipe
from Gpt.report.trackers import check_installed
from Gpt.seeds import rng
from Gpt.tasks import Task, get_task, load_task_modules
from Gpt.text import DEFAULT_MODEL, SentenceEncoder, find_model
from Gpt.training import Sampler, mixed_precision
from rpg.registry import build_generator

FIT_EXAMPLES = 8192  # examples that normalisation scales are read off, fewer where networks are large
FIT_WEIGHTS = 2**29


@dataclass
class Experiment:
    """The parts of one run, each built when it is first needed."""

    config: RunConfig
    name: str

    @cached_property
    def device(self) -> torch.device:
        """Raises:
        ConfigError: there is no such device, or none that a run can use.
        """
        wanted = self.config.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch("cpu|cuda(:(0|[1-9][0-9]*))?", wanted):
            raise ConfigError(f"device={wanted} is none; use auto, cpu, cuda or cuda:N")
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device={wanted}, but torch finds no CUDA device; use device=cpu or device=auto")
        if wanted == "cuda" and world() > 1:
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        _, _, index = wanted.partition(":")
        if index and int(index) >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"device={wanted}, but torch finds {count} CUDA devices, counted from cuda:0; use a lower N"
            )
        return torch.device(wanted)

    @cached_property
    def folder(self) -> Path:
        published = f"-{Path(self.config.resume_path).stem}" if self.config.resume_path else ""
        return Path(self.config.run.root) / (self.config.run.name or self.name + published)

    @cached_property
    def task(self) -> Task:
        data = self.config.data
        sources.configure(data.root, data.download, data.examples)
        load_task_modules(self.config.task_modules)
        task = get_task(self.config.task, self.device)
        check_conditions(task, self.config.condition.names)
        encoder = self.config.condition.encoder
        if encoder != DEFAULT_MODEL and not isinstance(task.family, MaskSplit):
            own = "its prompts are read by the encoder of its family" if task.family else "it is told no sentences"
            raise ConfigError(f"condition.encoder={encoder}: task {task.name!r}: {own}; leave it out")
        if task.family:
            masks, names = isinstance(task.family, MaskSplit), self.config.condition.names
            members, told = ("class mask", "class_mask") if masks else ("sentence", "text")
            if told not in names and "text" not in names:
                raise ConfigError(
                    f"task {task.name!r} is one task for each {members}, so its generator has to be told which; add "
                    f"condition.names=[{told}]"
                )
            hashed = isinstance(task.family, AdapterFamily) and task.family.encoder == "hash"
            # Before anything is collected; a run that is told masks in bits may be asked in words later.
            told_in_words, asked_in_words = "text" in names and not hashed, encoder != DEFAULT_MODEL
            if told_in_words or (asked_in_words and not self.config.test_only):
                find_model(encoder)
        changes = self.config.zoo.recipe
        return task.with_recipe(changed_recipe(task, changes)) if changes else task

    @property
    def zoo_folder(self) -> Path:
        examples = self.config.data.examples
        name = self.task.zoo_name if examples is None else f"{self.task.zoo_name}-{examples}"
        return Path(self.config.zoo.path or Path("zoos") / name)

    @cached_property
    def zoo(self) -> Zoo:
        """The zoo as it is to be seen: aligned, or split by snapshot, where the settings say so."""
        plain = self._plain_zoo
        zoo = together(lambda: align_runs(plain, *self.held_out)) if self.config.zoo.align else plain
        return split_by_snapshot(zoo, *self.held_out) if self.config.zoo.split == "snapshot" else zoo

    @cached_property
    def _plain_zoo(self) -> Zoo:
        """The zoo, collected or imported first where that is still to do."""
        settings, task = self.config.zoo, self.task
        self.check_refresh()
        if not settings.store:
            return collect_in_memory(
                task,
                population=settings.population or settings.shard_runs,
                test_runs=self.held_out[0],
                validation_runs=self.held_out[1],
                progress=primary(),
                **self._population,
            )
        if task.checkpoints:
            on_first_process(self._import_zoo)
        elif task.recipe or not self.zoo_folder.exists():
            together(self._collect_zoo)
        return together(self._open_zoo)

    @property
    def unanswered(self) -> bool:
        """Whether the task is about adapters that nothing but other adapters can judge."""
        return isinstance(self.task.family, AdapterFamily) and not self.task.family.answered

    def check_refresh(self) -> None:
        """Raises:
        ConfigError: the zoo is to change as training goes on, and cannot; or it is to be trained in memory, and can
            only be imported.
        """
        settings = self.config.zoo
        if not settings.store and self.unanswered:
            raise ConfigError(
                f"zoo.store=false: the prompts of task {self.task.name!r} have no answers, so that its adapters are "
                "imported, not trained; leave it out"
            )
        if settings.refresh_every and settings.store:
            raise ConfigError("zoo.refresh_every changes the zoo as training goes on; set zoo.store=false with it")
        if settings.refresh_every and (self.task.family or self.config.generator.get("identities")):
            raise ConfigError("zoo.refresh_every=0 is needed: prompts do not follow masks and identities of new runs")
        if settings.refresh_every and (settings.align or settings.split != "run"):
            raise ConfigError("zoo.refresh_every=0 is needed: runs that are aligned or split by snapshot do not change")

    @property
    def held_out(self) -> tuple[int, int]:
        """Number of test and of validation runs."""
        split: Any = self.task.family or self.config.zoo
        return split.test_runs, split.validation_runs

    @cached_property
    def stream(self) -> Stream | None:
        """What keeps the zoo fresh; None for a zoo that does not change, or where published weights drew from none."""
        settings = self.config.zoo
        if not settings.refresh_every or self.config.resume_path:
            return None

        def fresh(run_ids: list[int]) -> Trained:
            return train_population(self.task, run_ids, settings.seed, self.zoo.iterations, self.device)

        population = settings.population or settings.shard_runs
        folder = self.folder / "former"
        return Stream(self.zoo, fresh, settings.refresh_every, population, folder, settings.max_weight)

    def _collect_zoo(self) -> None:
        """Train the shards that are missing; of several processes, each claims one after the other."""
        settings = self.config.zoo
        stored = self._population | {"shard_runs": settings.shard_runs, "population": settings.population}
        collect(self.task, self.zoo_folder, **stored, progress=primary())

    @property
    def _population(self) -> dict[str, Any]:
        """What a zoo holds, on disk or in memory: arguments of `collect` and `collect_in_memory`."""
        names = ("runs", "snapshots", "spacing", "seed", "dtype", "max_weight")
        return {name: getattr(self.config.zoo, name) for name in names} | {"device": self.device}

    def _open_zoo(self) -> Zoo:
        settings, task = self.config.zoo, self.task
        return Zoo.open(
            self.zoo_folder,
            task.structure,
            storage=settings.storage,
            device=self.device,
            test_runs=self.held_out[0],
            validation_runs=self.held_out[1],
            runs=settings.runs if task.recipe and not task.checkpoints else None,
        )

    def _import_zoo(self) -> None:
        """Convert the task's checkpoints; what was converted before is kept, and needs its source no longer."""
        source, settings = Path(self.task.checkpoints or ""), self.config.zoo
        if self.zoo_folder.exists() and not source.exists():
            return
        convert = import_adapters if isinstance(self.task.family, AdapterFamily) else import_zoo
        warning = convert(
            source,
            self.zoo_folder,
            self.task,
            dtype=settings.dtype,
            shard_runs=settings.shard_runs,
            max_weight=settings.max_weight,
            device=self.device,
        )
        if warning:
            warnings.warn(warning, stacklevel=2)

    @cached_property
    def generator(self) -> Generator:
        """The untrained generator; its parameters are a function of the seed."""
        another = self.is_told_in_words and self.config.condition.encoder != DEFAULT_MODEL
        features = self.encoder.features if another else PROMPT_FEATURES["text"]
        generator = build_generator(self.config, self.task.structure, features).to(self.device)
        generator.mixed_precision = mixed_precision(self.config.trainer.precision, self.device)
        self._check_answers(generator)
        if self.config.distillation.weight:
            if not generator.distils:
                name = self.config.generator["name"]
                raise ConfigError(f"generator.name={name} learns from weights alone; set distillation.weight=0")
            generator.distillation = distillation(self.task, self.config.distillation)
            generator.distils_after = self.config.distillation.after
        return generator

    def _check_answers(self, generator: Generator) -> None:
        """Raises:
        ConfigError: its loss needs answers, and the prompts of the task have none.
        """
        if self.unanswered and generator.needs_answers:
            raise ConfigError(
                f"generator.loss.sft={self.config.generator['loss']['sft']}: a loss through the language model needs "
                f"answers, and the prompts of task {self.task.name!r} have none; learn from the weights alone, by "
                "generator.loss.sft=0 generator.loss.mse=1 generator.loss.regression_until=1, or prepare the prompts "
                "with answers"
            )

    @cached_property
    def checkpoints(self) -> CheckpointFolder:
        identity = {
            "task": self.task.name,
            "architecture": self.task.structure.fingerprint,
            "generator": self.config.generator,
            "conditions": list(self.config.condition.names),
        }
        former = {}
        if self.is_told_in_words:
            key, label = "condition.encoder", self.encoder.label
            identity[key] = label
            # Earlier versions knew one encoder, and not its digest.
            former[key] = label if Path(self.config.condition.encoder).name == DEFAULT_MODEL else DEFAULT_MODEL
        return CheckpointFolder(self.folder / "checkpoints", json.loads(json.dumps(identity)), former)

    def sampler(self, split: str) -> Sampler:
        """Draws batches from one split of the zoo."""
        if isinstance(self.task.family, AdapterFamily):
            pooled = not self.generator.reads_prompt_sets
            return AdapterBatchSampler(self.zoo, self.task, split, self.config.batches, pooled=pooled)
        return BatchSampler(
            self.zoo,
            self.task,
            split,
            self.config.condition.names,
            self.config.batches,
            with_start=self.generator.needs_start,
            permute=self.generator.augment and split == "train",
            identities=self.config.generator.get("identities", 0),
            descriptions=self.descriptions,
        )

    @property
    def is_told_in_words(self) -> bool:
        """Whether the generator is prompted with sentences about class masks."""
        return "text" in self.config.condition.names and isinstance(self.task.family, MaskSplit)

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """What embeds sentences about class masks. Embeddings are kept in the run folder, each encoder's in a folder of
        their own: a run that is told masks in bits may be asked in words by any of them."""
        encoder = SentenceEncoder(self.config.condition.encoder, device=self.device)
        encoder.keep(self.folder / "text" / encoder.label / "embeddings.safetensors")
        return encoder

    @cached_property
    def descriptions(self) -> Descriptions | None:
        """Sentences for the class masks of a family, for a generator that is prompted with text."""
        if not self.is_told_in_words:
            return None
        if self.task.vocabulary is None:
            raise ConfigError(f"condition text: task {self.task.name!r} has no vocabulary; add its key 'vocabulary'")
        return Descriptions(self.task.vocabulary, self.encoder)

    def trained(self) -> Generator:
        """The generator with its best weights, or with the published ones of `resume_path`."""
        self._set_precision()
        path = self.config.resume_path
        if path is None:
            self.checkpoints.load_best(self.generator)
        elif isinstance(self.generator, PaperGpt):
            self.generator.load_published(resolve_checkpoint(path))
        else:
            raise ConfigError(f"resume_path={path}: published weights need one of the *_paper configurations")
        # A copy is not compiled: each batch size of the evaluation would be compiled anew.
        return copy.deepcopy(self.generator).eval()

    def check_trainable(self) -> None:
        """Check, or build, what does not need the zoo.

        Raises:
            ConfigError: the generator, its sampler, the objective, the conditions, the tracker, the shares of a batch,
                where the zoo comes from, the published weights or a setting of the evaluation are wrong.
        """
        self.check_published()
        check_installed(self.config.logger)
        self.check_refresh()
        if not self.config.test_only:
            self.config.trainer.check_shared(world())
        self.check_judging()  # builds the generator, which checks itself

    def check_judging(self) -> None:
        """Raises:
        ConfigError: the generator cannot be judged, or watched in training, with these settings.
        """
        judging, config, task = self.judging, self.config, self.task
        judging.check(config.evaluation, task, config.condition.names)
        read = judging.splits if config.test_only else judging.splits | {"validation"}
        for split, runs in zip(("test", "validation"), self.held_out, strict=True):
            if split in read and runs < 1:
                where = f"the family of task {task.name!r}" if task.family else f"zoo.{split}_runs={runs}"
                raise ConfigError(
                    f"{where} leaves nothing for the {split} split, which this run reads; hold out one at least"
                )

    def check_published(self) -> None:
        """Raises:
        ConfigError: published weights are to be trained.
        CheckpointError: they cannot be read.
        """
        if self.config.resume_path is None:
            return
        if not self.config.test_only:
            raise ConfigError("resume_path: published weights are evaluated, not trained; add test_only=true")
        resolve_checkpoint(self.config.resume_path)

    def fit(self) -> None:
        """Let the generator read its scales off training examples: different networks, as far as there are enough.

        Raises:
            ZooError: the zoo, another task's perhaps, lacks the metric that every judge selects by.
        """
        self._set_precision()
        self.zoo.column(f"validation_{self.task.metric}")
        sampler, draws = self.sampler("train"), rng(self.device, self.config.seed, "fit")
        count = min(FIT_EXAMPLES, max(8, FIT_WEIGHTS // self.task.structure.size))
        if isinstance(sampler, BatchSampler) and not sampler.with_start:
            self.generator.fit(sampler.distinct(count, draws))
        else:
            networks = self.zoo.runs * self.zoo.snapshots  # no more to tell, however often they are drawn
            self.generator.fit(sampler(min(count, 4 * networks), draws))

    def _set_precision(self) -> None:
        """Of float32 products from here on; torch keeps one setting for the whole process."""
        torch.set_float32_matmul_precision("high" if self.config.trainer.precision == "tf32" else "highest")

    def beside(self, config: RunConfig, name: str) -> "Experiment":
        """Another run with this one's data, device, logger and folder of runs; a shared zoo is collected alike.

        Raises:
            ConfigError: its metric is not this one's.
        """
        own, run = self.config, dataclasses.replace(config.run, root=self.config.run.root)
        config = dataclasses.replace(config, data=own.data, device=own.device, logger=own.logger, run=run, beside=())
        if Experiment(config, name).zoo_folder == self.zoo_folder:
            zoo = dataclasses.replace(own.zoo, align=config.zoo.align, split=config.zoo.split)
            config = dataclasses.replace(config, zoo=zoo)
        other = Experiment(config, name)
        if other.task.metric != self.task.metric:
            raise ConfigError(f"beside: {name} is about {other.task.metric}, this run about {self.task.metric}")
        return other

    @property
    def judging(self) -> type[Judge]:
        """The kind of judge that fits the task and the generator."""
        return judge_of(self.task, self.generator, self.config.condition.names)

    def judge(self, generator: Generator) -> Judge:
        """The judge of this generator, or of a copy with other weights."""
        told = self.config.condition.names, self.descriptions
        return self.judging(generator, self.task, self.zoo, self.config.evaluation, self.device, *told)

    def score(self, generator: Generator) -> dict[str, float]:
        """What the generator's networks reach on validation data, for the loop.

        Returns:
            `generated_<name>`; and "score", which picks the best weights, lower is better.
        """
        measured = self.judge(generator).score()
        metric = measured[f"validation_{self.task.metric}"]
        facts = {f"generated_{name.removeprefix('validation_')}": value for name, value in measured.items()}
        return facts | {"score": metric if self.task.minimize else -metric}


def changed_recipe(task: Task, changes: Mapping[str, Any]) -> Recipe:
    """A task's training recipe with some of its settings changed, nested ones too.

    Raises:
        ConfigError: it has no such setting, or one of another type; or the task has no recipe.
    """
    if task.recipe is None:
        raise ConfigError(f"zoo.recipe: task {task.name!r} has no recipe, as its networks are imported; leave it out")
    return checked(type(task.recipe), _merged(dataclasses.asdict(task.recipe), changes), "zoo.recipe.")


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def describe(zoo: Zoo) -> str:
    """What a zoo holds, what was dropped, and the scales that normalisation uses."""
    found = scales(zoo, max_networks=min(4096, max(16, FIT_WEIGHTS // zoo.structure.size)))
    tensors = zip(zoo.structure.tensors, found.mean, found.std, strict=True)
    lines = [
        f"{zoo.runs} runs x {zoo.snapshots} snapshots x {zoo.structure.size} weights in {zoo.folder or 'memory'}",
        f"trained in {zoo.seconds:,.1f} s, the workers' added up" if zoo.seconds else "trained elsewhere",
        f"dropped runs: {len(zoo.dropped)}" + "".join(f"\n  {run}: {why}" for run, why in zoo.dropped.items()),
        f"one coefficient for all weights (G.pt: 0.538 / std): {found.coefficient:.4f}",
        *(f"  {t.name}: mean {m:+.4f}, std {s:.4f}" for t, m, s in tensors),
        *(f"final {name}: {values[:, -1].mean():.4f}" for name, values in zoo.metrics.items()),
    ]
    return "\n".join(lines)
