"""Collect the zoo if it is missing, train a generator on it, evaluate it, write the report.

    python main.py                                   the embedded default, configs/digits_loss.yaml
    python main.py --config-name mnist_loss          another configuration; --help lists them
    python main.py test_only=true                    evaluate again from the trained generator
    torchrun --nproc-per-node 2 main.py …            the same, spread over two processes
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from data_gen.collect import collect
from Gpt.checkpoint import CheckpointFolder, write_json
from Gpt.conditions import Conditions, prompt_features
from Gpt.config import RunConfig, checked, nearest
from Gpt.data import sources
from Gpt.data.batches import BatchSampler
from Gpt.data.importers import import_checkpoints, import_lmdb
from Gpt.data.zoo import Zoo, scales
from Gpt.diffusion.objectives import DDPM, FlowMatching, Objective
from Gpt.errors import CheckpointError, ConfigError, UserError
from Gpt.evaluation.evaluate import evaluate, validation_score
from Gpt.evaluation.family import evaluate_family, family_score
from Gpt.evaluation.results import Results
from Gpt.generator import Generator
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.models.paper_generator import PaperConfig, PaperGpt
from Gpt.models.upstream import resolve_checkpoint
from Gpt.report.figures import save_figures
from Gpt.report.html import write_report
from Gpt.report.logger import Loggers, open_loggers
from Gpt.report.text import print_table
from Gpt.seeds import derive_seed, rng
from Gpt.tasks import Task, get_task, load_task_modules
from Gpt.training import train
from rpg.generator import Rpg, RpgConfig
from rpg.paper import RpgPaper, RpgPaperConfig

CONFIGS = Path(__file__).parent / "configs"
FIT_EXAMPLES = 8192  # examples that normalisation scales are read off

GENERATORS: dict[str, tuple[type, Callable[..., Generator]]] = {
    "gpt": (GptConfig, Gpt),
    "gpt_paper": (PaperConfig, PaperGpt),
    "rpg": (RpgConfig, Rpg),
    "rpg_paper": (RpgPaperConfig, RpgPaper),
}


@dataclass
class Experiment:
    """The parts of one run, each built when it is first needed."""

    config: RunConfig
    name: str

    @cached_property
    def device(self) -> torch.device:
        wanted = self.config.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device={wanted}, but torch finds no CUDA device; use device=cpu or device=auto")
        if wanted == "cuda" and dist.is_initialized():
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if self.config.trainer.precision == "tf32":
            torch.set_float32_matmul_precision("high")  # torch keeps one setting for the whole process
        return torch.device(wanted)

    @cached_property
    def folder(self) -> Path:
        published = f"-{Path(self.config.resume_path).stem}" if self.config.resume_path else ""
        return Path(self.config.run.root) / (self.config.run.name or self.name + published)

    @cached_property
    def task(self) -> Task:
        sources.configure(self.config.data.root, self.config.data.download)
        load_task_modules(self.config.task_modules)
        task = get_task(self.config.task)
        if task.family and "class_mask" not in self.config.condition.names:
            raise ConfigError(
                f"task {task.name!r} is one task for each class mask, so its generator has to be told the mask; add "
                "condition=class_mask"
            )
        if self.config.zoo.recipe:
            known = [f.name for f in dataclasses.fields(task.recipe)] if task.recipe else []
            for key in self.config.zoo.recipe:
                if key not in known:
                    raise ConfigError(f"zoo.recipe: task {task.name!r} has no setting {key!r}; {nearest(key, known)}")
            task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, **self.config.zoo.recipe))
        return task

    @property
    def zoo_folder(self) -> Path:
        return Path(self.config.zoo.path or Path("zoos") / self.task.zoo_name)

    @cached_property
    def zoo(self) -> Zoo:
        """The zoo, collected or imported first where that is still to do."""
        settings, task = self.config.zoo, self.task
        if task.checkpoints:
            on_first_process(self._import_zoo)
        elif task.recipe or not self.zoo_folder.exists():
            collect(
                task,
                self.zoo_folder,
                runs=settings.runs,
                snapshots=settings.snapshots,
                spacing=settings.spacing,
                seed=settings.seed,
                dtype=settings.dtype,
                shard_runs=settings.shard_runs,
                device=self.device,
                population=settings.population,
                max_weight=settings.max_weight,
            )
        return Zoo.open(
            self.zoo_folder,
            task.structure,
            storage=settings.storage,
            device=self.device,
            test_runs=task.family.test_runs if task.family else settings.test_runs,
            validation_runs=task.family.validation_runs if task.family else settings.validation_runs,
        )

    def _import_zoo(self) -> None:
        """Convert the task's checkpoints; what was converted before is kept, and needs its source no longer."""
        source, settings = Path(self.task.checkpoints or ""), self.config.zoo
        if self.zoo_folder.exists() and not source.exists():
            return
        convert = import_lmdb if any(source.glob("*/runs.json")) else import_checkpoints
        convert(
            source,
            self.zoo_folder,
            self.task,
            dtype=settings.dtype,
            shard_runs=settings.shard_runs,
            max_weight=settings.max_weight,
            device=self.device,
        )

    @cached_property
    def generator(self) -> Generator:
        """The untrained generator; its parameters are a function of the seed."""
        settings = dict(self.config.generator)
        name = settings.pop("name", None)
        if name not in GENERATORS:
            raise ConfigError(f"generator.name={name} is unknown; {nearest(str(name), list(GENERATORS))}")
        config_class, build = GENERATORS[name]
        config = checked(config_class, settings, "generator.")
        width = getattr(config, "width", 1)
        features = prompt_features(self.config.condition.names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "generator"))
            conditions = Conditions(features, width, self.config.condition.dropout)
            return build(self.task.structure, conditions, self._objective(), config).to(self.device)

    @cached_property
    def checkpoints(self) -> CheckpointFolder:
        identity = {
            "task": self.task.name,
            "architecture": self.task.structure.fingerprint,
            "generator": self.config.generator,
            "conditions": list(self.config.condition.names),
        }
        return CheckpointFolder(self.folder / "checkpoints", json.loads(json.dumps(identity)))

    def sampler(self, split: str) -> BatchSampler:
        """Draws batches from one split of the zoo."""
        return BatchSampler(
            self.zoo,
            self.task,
            split,
            self.config.condition.names,
            self.config.batches,
            with_start=self.generator.needs_start,
            permute=self.generator.augment and split == "train",
        )

    def trained(self) -> Generator:
        """The generator with its best weights, or with the published ones of `resume_path`."""
        path = self.config.resume_path
        if path is None:
            self.checkpoints.load_best(self.generator)
        elif isinstance(self.generator, PaperGpt):
            self.generator.load_published(resolve_checkpoint(path))
        else:
            raise ConfigError(f"resume_path={path}: published weights need one of the *_paper configurations")
        return self.generator.eval()

    def _objective(self) -> Objective:
        settings = self.config.objective
        if settings.name == "flow":
            return FlowMatching(settings.prediction, settings.loss_space, settings.times)
        if settings.name == "ddpm":
            return DDPM(settings.prediction)
        raise ConfigError(f"objective.name={settings.name} is unknown; {nearest(settings.name, ['flow', 'ddpm'])}")


def run(experiment: Experiment) -> Results | None:
    """The main job. Returns what the evaluation found, or None where there was nothing left to do."""
    config = experiment.config
    if config.collect_only:
        print(describe(experiment.zoo))
        return None
    if config.resume_path:  # before the zoo is collected, which can take hours
        if not config.test_only:
            raise ConfigError("resume_path: published weights are evaluated, not trained; add test_only=true")
        resolve_checkpoint(config.resume_path)
    experiment.folder, summary = on_first_process(lambda: open_folder(experiment))
    if summary.get("finished") and not config.test_only:
        print(f"This run is finished: {experiment.folder / 'report.html'}")
        print("Evaluate it again with test_only=true, or train another with run.name=NAME or resume=never.")
        return None
    begun = time.perf_counter()
    zoo = experiment.zoo
    if not summary:
        summary = {"zoo_seconds": time.perf_counter() - begun}
        on_first_process(lambda: create_folder(experiment, summary))

    folder, primary = experiment.folder, not dist.is_initialized() or dist.get_rank() == 0
    resumed = experiment.checkpoints.latest_step()
    logger = open_loggers(config.logger, folder, dataclasses.asdict(config), resumed) if primary else Loggers([])
    try:
        if not config.test_only:
            examples = experiment.sampler("train")(FIT_EXAMPLES, rng(experiment.device, config.seed, "fit"))
            experiment.generator.fit(examples)
            state = train(
                experiment.generator,
                experiment.sampler("train"),
                experiment.sampler("validation"),
                lambda generator: score(generator, experiment),
                config.trainer,
                experiment.checkpoints,
                logger,
                experiment.device,
                config.seed,
            )
            summary |= {"training_seconds": state.seconds, "step": state.step}
        if not primary:
            return None
        write_json(folder / "summary.json", summary)
        judge = evaluate_family if experiment.task.family else evaluate
        results = judge(
            experiment.trained(),
            experiment.task,
            zoo,
            config.evaluation,
            experiment.device,
            training_seconds=summary.get("training_seconds", 0.0),
            zoo_seconds=summary.get("zoo_seconds", 0.0),
            training_examples=summary.get("step", 0) * config.trainer.batch_size,
            progress=lambda phrase: print(f"evaluating: {phrase} …", flush=True),
        )
        report(experiment, results, logger)
        write_json(folder / "summary.json", summary | {"finished": True})
        return results
    finally:
        logger.finish()


def score(generator: Generator, experiment: Experiment) -> dict[str, float]:
    """Validation metrics for the loop; "score" is the one-update metric, signed so that lower is better."""
    measure = family_score if experiment.task.family else validation_score
    measured = measure(generator, experiment.task, experiment.zoo, experiment.config.evaluation, experiment.device)
    metric = measured[f"validation_{experiment.task.metric}"]
    return {name.removeprefix("validation_"): value for name, value in measured.items()} | {
        "score": metric if experiment.task.minimize else -metric
    }


def report(experiment: Experiment, results: Results, logger: Any) -> None:
    """What a run leaves behind: results.json, figures, report.html, the logged charts, the table on the terminal."""
    folder = experiment.folder
    figures = save_figures(results, folder / "metrics.jsonl", folder / "figures")
    page = write_report(folder, results, dataclasses.asdict(experiment.config), folder / "metrics.jsonl", figures)
    for name, path in figures.items():
        logger.figure(name, path)
    logger.results(results)
    print(f"\n{print_table(results)}\n\nreport: {page}")


def describe(zoo: Zoo) -> str:
    """What a zoo holds, what was dropped, and the scales that normalisation uses."""
    found = scales(zoo)
    tensors = zip(zoo.structure.tensors, found.mean, found.std, strict=True)
    lines = [
        f"{zoo.runs} runs x {zoo.snapshots} snapshots x {zoo.structure.size} weights in {zoo.folder}",
        f"dropped runs: {len(zoo.dropped)}" + "".join(f"\n  {run}: {why}" for run, why in zoo.dropped.items()),
        f"one coefficient for all weights (G.pt: 0.538 / std): {found.coefficient:.4f}",
        *(f"  {t.name}: mean {m:+.4f}, std {s:.4f}" for t, m, s in tensors),
        *(f"final {name}: {values[:, -1].mean():.4f}" for name, values in zoo.metrics.items()),
    ]
    return "\n".join(lines)


def open_folder(experiment: Experiment) -> tuple[Path, dict[str, Any]]:
    """Where the run goes, and what earlier sessions left in its summary.json: nothing where the run is new.

    Raises:
        ConfigError: the folder holds a trained generator of other settings; names them.
        CheckpointError: `test_only` without a trained generator.
    """
    config, folder = experiment.config, experiment.folder
    if config.resume not in ("auto", "never"):
        raise ConfigError(f"resume={config.resume} is unknown; choose auto or never")
    if config.resume == "never" and folder.exists() and not config.test_only:
        number = next(i for i in range(2, 10_000) if not folder.with_name(f"{folder.name}-{i}").exists())
        folder = folder.with_name(f"{folder.name}-{number}")
    trained = (folder / "checkpoints" / "latest.json").is_file()
    if config.test_only and not config.resume_path and not trained:
        raise CheckpointError(f"test_only: there is no trained run in {folder}; train it first, or set run.name")
    if not (folder / "config.json").is_file():
        return folder, {}
    different = list(_differences(json.loads((folder / "config.json").read_text()), _settings(config)))
    if different and trained:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(different[:5])}). "
            "Choose another run.name, or resume=never for a new folder beside it"
        )
    summary = folder / "summary.json"
    return folder, json.loads(summary.read_text()) if summary.is_file() and not different else {}


def create_folder(experiment: Experiment, summary: dict[str, Any]) -> None:
    """The run folder with the configuration in it."""
    folder, config = experiment.folder, experiment.config
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), folder / "config.yaml")
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", _settings(config))


def on_first_process(job: Callable[[], Any]) -> Any:
    """What `job` returns or, if the user can mend it, raises in the first process; the others only get it told."""
    if not dist.is_initialized():
        return job()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [job()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that trained weights depend on, as JSON gives them back."""
    return json.loads(json.dumps(config.training_settings()))


def _differences(old: Any, new: Any, path: str = "") -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old}, now {new}"


def typed_config(composed: DictConfig) -> RunConfig:
    """The composed configuration as checked dataclasses.

    Raises:
        ConfigError: a key is misspelt or a value is of the wrong type; names the key and the nearest right one.
    """
    return checked(RunConfig, OmegaConf.to_container(composed, resolve=True))


def check_arguments(arguments: list[str]) -> list[str]:
    """Catch what hydra would answer unhelpfully: a misspelt key, group or configuration name.

    Returns:
        the arguments, with `++` before plain keys: a key of the schema can be set whether or not a file mentions it.

    Raises:
        ConfigError: names the key and the nearest right one.
    """
    name = _option(arguments, "--config-name", "-cn")
    if name is not None:
        folders = [CONFIGS, Path(_option(arguments, "--config-dir", "-cd") or CONFIGS)]
        known = [file.stem for folder in folders for file in folder.glob("*.yaml")]
        if name.removesuffix(".yaml") not in known:
            raise ConfigError(f"there is no configuration {name!r}; {nearest(name, known)}")
    return [_checked_override(a) if "=" in a and not a.startswith("-") else a for a in arguments]


def _option(arguments: list[str], *names: str) -> str | None:
    """Value of a command-line option, written `--option=value` or `--option value`; None where it is not given."""
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in names:
            return value or next(iter(arguments[i + 1 :]), "")
    return None


def _checked_override(argument: str) -> str:
    override = OverridesParser.create().parse_override(argument)
    group = CONFIGS / override.key_or_group
    if group.is_dir() and isinstance(override.value(), str):
        if not (group / f"{override.value()}.yaml").is_file():
            known = [p.stem for p in group.glob("*.yaml")]
            raise ConfigError(f"{argument}: no such option; {nearest(str(override.value()), known)}")
        return argument
    keys = override.key_or_group.split(".")
    if keys[0] == "hydra":
        return argument
    schema: Any = RunConfig
    for depth, key in enumerate(keys):
        if not (dataclasses.is_dataclass(schema) or keys[:depth] == ["generator"]):
            break
        known = {f.name: f.type for c in _possible(schema) for f in dataclasses.fields(c)} | (
            {"name": str} if keys[:depth] == ["generator"] else {}
        )
        if key not in known:
            raise ConfigError(
                f"configuration: there is no key {'.'.join(keys[: depth + 1])!r}; {nearest(key, list(known))}"
            )
        schema = known[key]
    return argument if argument[0] in "+~" else f"++{argument}"


def _possible(schema: Any) -> list[type]:
    """Dataclasses whose keys may stand at one place of the configuration: any generator's under `generator`."""
    return [schema] if dataclasses.is_dataclass(schema) else [config for config, _ in GENERATORS.values()]


def help_text() -> str:
    """Every configuration and every group option with the first comment line of its file."""

    def line(file: Path) -> str:
        return f"  {file.stem:24s} {file.read_text().splitlines()[0].lstrip('# ')}"

    parts = [(__doc__ or "").strip(), "", "Configurations (--config-name NAME):"]
    parts += [line(file) for file in sorted(CONFIGS.glob("*.yaml")) if file.stem != "base"]
    for group in sorted(p for p in CONFIGS.iterdir() if p.is_dir() and p.name != "__pycache__"):
        parts += ["", f"{group.name}=OPTION:", *(line(file) for file in sorted(group.glob("*.yaml")))]
    parts += ["", "Any key can be set on the command line, e.g. trainer.steps=200 zoo.runs=512;"]
    parts += ["Gpt/config.py documents each."]
    return "\n".join(parts)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="digits_loss")
def _compose_and_run(composed: DictConfig) -> None:
    guard(lambda: run(Experiment(typed_config(composed), HydraConfig.get().job.config_name)))


def guard(job: Callable[[], Any], interrupted: str = "continues from the last checkpoint (resume=auto)") -> Any:
    """Errors a user can mend end with their message; Ctrl-C says what the same command does next."""
    try:
        return job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command {interrupted}.", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Command-line entry."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text())
        return
    sys.argv[1:] = guard(lambda: check_arguments(sys.argv[1:]))
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        _compose_and_run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
