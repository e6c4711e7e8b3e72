"""Collect the zoo if it is missing, train a generator on it, evaluate it, write the report.

    python main.py                                   the embedded default, configs/digits_loss.yaml
    python main.py --config-name mnist_loss          another configuration; --help lists them
    python main.py dry_run=true                      check everything, train nothing
    python main.py test_only=true                    evaluate again from the trained generator
    torchrun --nproc-per-node 2 main.py …            the same, spread over two processes
"""

import dataclasses
import errno
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dry_run import dry_run
from experiment import Experiment, create_folder, occupy, open_folder
from Gpt.checkpoint import write_json
from Gpt.config import RunConfig, checked
from Gpt.data.zoo import Zoo, scales
from Gpt.distributed import on_first_process, primary, processes, world
from Gpt.errors import ConfigError, UserError, nearest
from Gpt.evaluation.beside import Others, read_runs, side_by_side, training_curves
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.results import Results
from Gpt.models.upstream import resolve_checkpoint
from Gpt.report.figures import save_figures
from Gpt.report.html import write_report
from Gpt.report.logger import Loggers, open_loggers
from Gpt.report.text import print_table
from Gpt.seeds import rng
from Gpt.training import train
from rpg.registry import GENERATORS

CONFIGS = Path(__file__).parent / "configs"
FIT_EXAMPLES = 8192  # examples that normalisation scales are read off, fewer where networks are large
FIT_WEIGHTS = 2**28
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def run(experiment: Experiment) -> Results | None:
    """The main job. Returns what the evaluation found, or None where there was nothing left to do."""
    config = experiment.config
    if config.dry_run:
        dry_run(experiment)
        return None
    if config.collect_only:
        zoo = experiment.zoo
        on_first_process(lambda: print(describe(zoo)))
        return None
    if config.resume_path:
        if not config.test_only:
            raise ConfigError("resume_path: published weights are evaluated, not trained; add test_only=true")
        resolve_checkpoint(config.resume_path)
    experiment.folder, summary = on_first_process(lambda: open_folder(experiment))
    if summary.get("finished") and not config.test_only:
        if primary():
            print(f"This run is finished: {experiment.folder / 'report.html'}")
            print("Evaluate it again with test_only=true, or train another with run.name=NAME or resume=never.")
        return None
    experiment.check_trainable()  # before the zoo is collected, which can take hours
    others = run_beside(experiment)
    if not summary:
        summary = {"zoo_seconds": experiment.zoo.seconds}
        on_first_process(lambda: create_folder(experiment, summary))
    lock = FileLock(experiment.folder / ".lock", timeout=0)
    on_first_process(lambda: occupy(lock))
    try:
        return train_and_judge(experiment, summary, others)
    finally:
        lock.release()


def train_and_judge(experiment: Experiment, summary: dict[str, Any], others: Others) -> Results:
    """The generator trained, judged and reported on, in the run's folder."""
    config, zoo = experiment.config, experiment.zoo
    folder = experiment.folder
    resumed = experiment.checkpoints.latest_step()
    logger = open_loggers(config.logger, folder, dataclasses.asdict(config), resumed) if primary() else Loggers([])
    try:
        if not config.test_only:
            count = min(FIT_EXAMPLES, max(64, FIT_WEIGHTS // experiment.task.structure.size))
            examples = experiment.sampler("train")(count, rng(experiment.device, config.seed, "fit"))
            experiment.generator.fit(examples)
            state = train(
                experiment.generator,
                experiment.sampler("train"),
                experiment.sampler("validation"),
                experiment.score,
                config.trainer,
                experiment.checkpoints,
                logger,
                experiment.device,
                config.seed,
                experiment.stream or (lambda step: None),
            )
            summary |= {"training_seconds": world() * state.seconds, "step": state.step}
        on_first_process(lambda: write_json(folder / "summary.json", summary))
        if experiment.stream:
            experiment.stream.finish(summary["step"])
        results = experiment.judge(
            experiment.trained(),
            experiment.task,
            zoo,
            config.evaluation,
            experiment.device,
            Spent(
                zoo_seconds=summary.get("zoo_seconds", 0.0),
                training_seconds=summary.get("training_seconds", 0.0),
                training_examples=summary.get("step", 0) * config.trainer.batch_size,
            ),
            progress=lambda phrase: print(f"evaluating: {phrase} …", flush=True) if primary() else None,
        )
        curves = training_curves(zoo, experiment.task, config.evaluation.networks, config.evaluation.seed)
        results = side_by_side(results, others, curves)
        on_first_process(lambda: report(experiment, results, logger))
        on_first_process(lambda: write_json(folder / "summary.json", summary | {"finished": True}))
        return results
    finally:
        logger.finish()


def report(experiment: Experiment, results: Results, logger: Any) -> None:
    """What a run leaves behind: results.json, figures, report.html, the logged charts, the table on the terminal."""
    folder = experiment.folder
    figures = save_figures(results, folder / "metrics.jsonl", folder / "figures")
    page = write_report(folder, results, dataclasses.asdict(experiment.config), folder / "metrics.jsonl", figures)
    for name, path in figures.items():
        logger.figure(name, path)
    logger.results(results)
    print(f"\n{print_table(results)}\n\nreport: {page}")


def run_beside(experiment: Experiment) -> Others:
    """What the runs of `beside`, which are finished first where they are not, and of `evaluation.beside` found."""
    found = [beside(experiment, entry) for entry in experiment.config.beside]
    for other in found:
        if primary():
            print(f"\nbeside {experiment.name}: {other.name}", flush=True)
        run(other)
    folders = [*experiment.config.evaluation.beside, *(other.folder for other in found)]
    return on_first_process(lambda: read_runs(folders, experiment.reported))


def beside(experiment: Experiment, entry: str) -> Experiment:
    """Another configuration with this one's data, device, logger and folder of runs; a shared zoo is collected alike.

    Args:
        entry: its name and settings, as on the command line.

    Raises:
        ConfigError: there is no such configuration, a setting is wrong, or its metric is not this one's.
    """
    try:
        name, *settings = shlex.split(entry)
    except ValueError as error:
        raise ConfigError(f"beside: {entry!r} is not a configuration's name and its settings ({error})") from error
    config, other = experiment.config, composed(name, settings)
    other = dataclasses.replace(
        other,
        data=config.data,
        device=config.device,
        logger=config.logger,
        run=dataclasses.replace(other.run, root=config.run.root),
        beside=(),
    )
    if Experiment(other, name).zoo_folder == experiment.zoo_folder:
        zoo = dataclasses.replace(config.zoo, align=other.zoo.align, split=other.zoo.split)
        other = dataclasses.replace(other, zoo=zoo)
    found = Experiment(other, name)
    if found.task.metric != experiment.task.metric:
        raise ConfigError(f"beside: {name} is about {found.task.metric}, this run about {experiment.task.metric}")
    return found


def composed(name: str, settings: list[str]) -> RunConfig:
    """A configuration by name, as the command line composes it; in a running hydra, from the same places.

    Raises:
        ConfigError: there is no such configuration, or a setting is wrong.
    """
    overrides = check_arguments(settings)
    try:
        if GlobalHydra.instance().is_initialized():
            return typed_config(hydra.compose(name, overrides))
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return typed_config(hydra.compose(name, overrides))
    except MissingConfigException as error:
        known = [file.stem for file in CONFIGS.glob("*.yaml")]
        raise ConfigError(f"beside: there is no configuration {name!r}; {nearest(name, known)}") from error
    except HydraException as error:
        raise ConfigError(f"beside: {' '.join([name, *settings])!r}: {_first_line(error)}") from error


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


def typed_config(composed: DictConfig) -> RunConfig:
    """The composed configuration as checked dataclasses.

    Raises:
        ConfigError: a key is misspelt or a value is of the wrong type; names the key and the nearest right one.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"configuration: {error.full_key}: {_first_line(error)}; mend the reference ${{…}}, or write \\${{ for "
            "the characters themselves"
        ) from error
    return checked(RunConfig, values)


def check_arguments(arguments: list[str]) -> list[str]:
    """Catch what hydra would answer unhelpfully: a misspelt key, group or configuration name, or what is no setting.

    Returns:
        the arguments, options first, with `++` before plain keys: a key of the schema can be set whether or not a file
        mentions it.

    Raises:
        ConfigError: names the key and the nearest right one.
    """
    name = _option(arguments, "--config-name", "-cn")
    if name is not None:
        folders = [CONFIGS, Path(_option(arguments, "--config-dir", "-cd") or CONFIGS)]
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        if name.removesuffix(".yaml") not in known:
            raise ConfigError(f"there is no configuration {name!r}; {nearest(name, known)}")
    several = {"--multirun", "-m"} & set(arguments)
    options, settings = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before.startswith("-") and "=" not in argument):
            options.append(argument)
        else:
            settings.append(_checked_override(argument, bool(several)))
    return options + settings  # hydra takes no setting in front of an option


def _option(arguments: list[str], *names: str) -> str | None:
    """Value of a command-line option, written `--option=value` or `--option value`; None where it is not given."""
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in names:
            return value or next(iter(arguments[i + 1 :]), "")
    return None


def _checked_override(argument: str, several: bool) -> str:
    """One setting; `several` values of it, separated by commas, are wanted by --multirun alone."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ConfigError(
            f"{argument!r} is no setting ({_first_line(error)}); write key=value, and in quotes for the shell where "
            "the value is a list or a dict: 'key=[1, 2]', 'key={a: 1}'"
        ) from error
    if override.is_sweep_override() and not several:
        raise ConfigError(f"{argument}: one value is expected; a list is written 'key=[1, 2]'")
    group = CONFIGS / override.key_or_group
    if override.key_or_group and group.is_dir() and not (isinstance(override.value(), dict) or override.is_delete()):
        known = [p.stem for p in group.glob("*.yaml")]
        for option in override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]:
            if option not in known:
                raise ConfigError(f"{argument}: no such option; {nearest(str(option), known)}")
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
    return argument if override.is_delete() else f"++{argument.lstrip('+')}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _possible(schema: Any) -> list[type]:
    """Dataclasses whose keys may stand at one place of the configuration: any generator's under `generator`."""
    return [schema] if dataclasses.is_dataclass(schema) else [config for config, _ in GENERATORS.values()]


def help_text() -> str:
    """Every configuration and every group option with the first comment line of its file."""

    def line(file: Path) -> str:
        return f"  {file.stem:24s} {file.read_text().splitlines()[0].lstrip('# ')}"

    parts = [(__doc__ or "").strip(), "", "Configurations (--config-name NAME):"]
    parts += [line(file) for file in sorted(CONFIGS.glob("*.yaml"))]
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
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "writing"
        print(f"error: {where}: {error.strerror}; mend that, or set another run.root or zoo.path", file=sys.stderr)
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
    with processes():
        _compose_and_run()


if __name__ == "__main__":
    main()
