"""From the command line to a checked configuration: what hydra composes, and what it would answer unhelpfully.

This module alone knows hydra.
"""

import dataclasses
import errno
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from Gpt.config import RunConfig, checked
from Gpt.distributed import primary, world
from Gpt.errors import ConfigError, UserError, nearest
from Gpt.interruption import Interrupted, handled
from rpg.registry import GENERATORS

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT = "digits_loss"
OPTIONS = (  # hydra's
    "--config-name", "-cn", "--config-dir", "-cd", "--config-path", "-cp", "--run", "-r", "--cfg", "-c", "--info",
    "-i", "--resolve", "--package", "-p", "--hydra-help", "--version", "--shell-completion", "-sc",
    "--experimental-rerun",
)  # fmt: skip
CONTINUES = "continues from what is stored: the finished shards of the zoo, the last checkpoint"
UNWRITABLE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
)  # fmt: skip


def after_interruption(config: RunConfig) -> str:
    """What the same command does after Ctrl-C or SIGTERM."""
    if config.dry_run:
        return "starts over"
    if config.resume == "never" and not (config.test_only or config.collect_only):
        zoo = "keeps the finished shards of the zoo" if config.zoo.store else "trains the zoo again"
        return (
            f"{zoo} and begins another run beside this one; to continue this one, set run.name to the name of its "
            "folder and leave out resume=never"
        )
    if config.zoo.store:
        return CONTINUES
    if config.collect_only or config.test_only:
        return "starts over, as the zoo is not stored"
    return "trains the zoo again, which is not stored, and continues from the last checkpoint"


def launch(
    job: Callable[[RunConfig, str], Any],
    arguments: list[str],
    interrupted: Callable[[RunConfig], str] = after_interruption,
) -> None:
    """Compose the configuration that the arguments ask for and hand it, with its name, to `job`.

    What a user can mend ends the process with a message and status 2; Ctrl-C and SIGTERM with what the same command
    does next, and status 130 or 143.
    """
    sys.argv[1:] = guard(lambda: check_arguments(arguments))

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=DEFAULT)
    def composed_job(composed: Mapping) -> None:
        config = guard(lambda: typed_config(composed))
        guard(lambda: job(config, str(HydraConfig.get().job.config_name)), interrupted(config))

    composed_job()


def guard(job: Callable[[], Any], interrupted: str = CONTINUES) -> Any:
    """Errors a user can mend end with their message; Ctrl-C and SIGTERM say what the same command does next."""
    with handled(shared=world() > 1):
        try:
            return job()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(
                f"error: {where}{error.strerror}; mend that and start again, or set another run.root or zoo.path, "
                "or out in the playground",
                file=sys.stderr,
            )
            sys.exit(2)
        except KeyboardInterrupt as error:
            if primary():  # signals are sent to all processes, which end together
                where = f" {error}" if str(error) else ""
                print(f"\nInterrupted{where}. The same command {interrupted}.", file=sys.stderr)
            sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))


def compose(name: str, settings: Sequence[str]) -> RunConfig:
    """A configuration by name, as the command line composes it; in a running hydra, from the same places.

    Raises:
        ConfigError: there is no such configuration, or a setting is wrong.
    """
    overrides = check_arguments(list(settings))
    try:
        if GlobalHydra.instance().is_initialized():
            return typed_config(hydra.compose(name, overrides))
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return typed_config(hydra.compose(name, overrides))
    except MissingConfigException as error:
        known = [file.stem for file in CONFIGS.glob("*.yaml")]
        raise ConfigError(f"there is no configuration {name!r}; {nearest(name, known)}") from error
    except HydraException as error:
        raise ConfigError(_first_line(error)) from error


def compose_beside(entry: str) -> tuple[RunConfig, str]:
    """A configuration of `beside` and its name, from name and settings in one string.

    Raises:
        ConfigError: see `compose`; or a quote is not closed.
    """
    try:
        name, *settings = shlex.split(entry)
        return compose(name, settings), name
    except ConfigError as error:
        raise ConfigError(f"beside: {entry!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"beside: {entry!r} is not a configuration's name and its settings ({error})") from error


def typed_config(composed: Mapping) -> RunConfig:
    """The composed configuration as checked dataclasses.

    Raises:
        ConfigError: a key is misspelt or a value is of the wrong type; names the key and the nearest right one.
    """
    try:
        values: Any = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"configuration: {error.full_key}: {_first_line(error)}; mend the reference ${{…}}, or write \\${{ for "
            "the characters themselves"
        ) from error
    return checked(RunConfig, values)


def overlaid(stored: RunConfig, given: RunConfig, settings: Sequence[str]) -> RunConfig:
    """The settings of a run with others on top.

    Args:
        given: what the settings on top compose to; their values are taken from it.
    """
    values, new = dataclasses.asdict(stored), dataclasses.asdict(given)
    for setting in settings:
        override = OverridesParser.create().parse_override(setting)
        for path in _leaves(override.key_or_group.split("."), override.value()):
            if path[0] != "hydra":
                _put(path, values, new)
    return checked(RunConfig, values)


def _leaves(path: list[str], value: Any) -> Iterator[list[str]]:
    """The keys that a setting sets: those of a dict leave its others as they are."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves([*path, str(key)], inner)
    else:
        yield path


def _put(path: list[str], values: dict[str, Any], new: dict[str, Any]) -> None:
    """Take one value over; one that is not there is removed."""
    key, *rest = path
    if rest:
        _put(rest, values.setdefault(key, {}), new.get(key, {}))
    elif key in new:
        values[key] = new[key]
    else:
        values.pop(key, None)


def check_arguments(arguments: list[str]) -> list[str]:
    """Catch what hydra would answer unhelpfully: a misspelt option, key, group or configuration, or what is no setting.

    Returns:
        the arguments, options first, with `++` before plain keys: a key of the schema can be set whether or not a file
        mentions it.

    Raises:
        ConfigError: names the key and the nearest right one.
    """
    _check_name(arguments)
    if {"--multirun", "-m"} & set(arguments):
        raise ConfigError(
            "--multirun: one command trains one run; for several, write a loop in the shell that names each: "
            "for s in 0 1 2; do python main.py seed=$s run.name=seed-$s; done"
        )
    options, settings = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-"):
            if argument.partition("=")[0] not in OPTIONS:
                raise ConfigError(
                    f"there is no option {argument}; write settings as key=value, and choose a configuration with "
                    "--config-name NAME"
                )
            options.append(argument)
        elif before.startswith("-") and "=" not in argument:
            options.append(argument)
        else:
            settings.append(_checked_setting(argument))
    return options + settings  # hydra takes no setting in front of an option


def help_text(about: str) -> str:
    """Every configuration and every group option with the first comment line of its file."""

    def line(file: Path) -> str:
        return f"  {file.stem:24s} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"

    parts = [about.strip(), "", "Configurations (--config-name NAME):"]
    parts += [line(file) for file in sorted(CONFIGS.glob("*.yaml"))]
    for group in sorted(p for p in CONFIGS.iterdir() if p.is_dir() and p.name != "__pycache__"):
        parts += ["", f"{group.name}=OPTION:", *(line(file) for file in sorted(group.glob("*.yaml")))]
    parts += ["", "Any key can be set on the command line, e.g. trainer.steps=200 zoo.runs=512;"]
    parts += ["Gpt/config.py documents each."]
    return "\n".join(parts)


def _check_name(arguments: list[str]) -> None:
    name = _option(arguments, "--config-name", "-cn")
    if name is None:
        return
    folders = [CONFIGS, Path(_option(arguments, "--config-dir", "-cd") or CONFIGS)]
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    if name.removesuffix(".yaml") not in known:
        raise ConfigError(f"there is no configuration {name!r}; {nearest(name, known)}")


def _option(arguments: list[str], *names: str) -> str | None:
    """Value of a command-line option, written `--option=value` or `--option value`; None where it is not given."""
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in names:
            return value or next(iter(arguments[i + 1 :]), "")
    return None


def _checked_setting(argument: str) -> str:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if (CONFIGS / f"{argument}.yaml").is_file():
            raise ConfigError(f"{argument!r} is a configuration; choose it with --config-name {argument}") from error
        raise ConfigError(
            f"{argument!r} is no setting ({_first_line(error)}); write key=value, and in quotes for the shell where "
            "the value is a list or a dict: 'key=[1, 2]', 'key={a: 1}'"
        ) from error
    if override.is_sweep_override():
        raise ConfigError(f"{argument}: one value is expected; a list is written 'key=[1, 2]'")
    key, removes = override.key_or_group, override.is_delete()
    if key and (CONFIGS / key).is_dir() and not (isinstance(override.value(), dict) or removes):
        _check_option(argument, key, override.value())
        return argument
    if key.split(".")[0] == "hydra":
        return argument
    _check_key(key)
    return argument if removes else f"++{argument.lstrip('+')}"


def _check_option(argument: str, group: str, option: Any) -> None:
    known = [file.stem for file in (CONFIGS / group).glob("*.yaml")]
    if option not in known:
        raise ConfigError(f"{argument}: no such option; {nearest(str(option), known)}")


def _check_key(key: str) -> None:
    """Follow a key through the schema, as far as that goes: `generator` holds any generator's settings."""
    schemas: list[type] = [RunConfig]
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        known: dict[str, Any] = {f.name: f.type for schema in schemas for f in dataclasses.fields(schema)}
        if depth == 2 and parts[0] == "generator":
            known["name"] = str
        if part not in known:
            raise ConfigError(
                f"configuration: there is no key {'.'.join(parts[:depth])!r}; {nearest(part, list(known))}"
            )
        if parts[:depth] == ["generator"]:
            schemas = [config for config, _ in GENERATORS.values()]
        elif dataclasses.is_dataclass(known[part]):
            schemas = [known[part]]
        else:
            break


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
