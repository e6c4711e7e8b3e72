"""Where a run writes what it measures: always JSON lines in its folder, and wandb beside it.

Nothing else in the project knows wandb. A run never depends on it: whatever fails there is said once and left at that.
"""

import contextlib
import functools
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from Gpt.errors import ConfigError
from Gpt.evaluation.results import PromptCurve, Results, Row, Trace
from Gpt.report.text import comparison_rows

WANDB_MODES = ("offline", "online", "disabled")
Metrics = Mapping[str, float | int]


@dataclass(frozen=True)
class LoggerConfig:
    """Where a run reports besides its own folder.

    Attributes:
        wandb: "offline" records in the run folder (`wandb sync` uploads it), "online" uploads, "disabled" does neither.
        project, entity, name: under which the run appears; entity and name default to wandb's and to the folder's name.
    """

    wandb: str = "offline"
    project: str = "gpt-weights"
    entity: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ConfigError(f"logger.wandb is {self.wandb!r}; choose one of {', '.join(WANDB_MODES)}")


@runtime_checkable
class RunLogger(Protocol):
    """What the training loop and the evaluation report to."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Scalars measured after `step` optimiser steps, named `<split>/<metric>`, e.g. `validation/loss`."""

    def figure(self, name: str, path: Path) -> None:
        """An image that has been written to `path`."""

    def results(self, results: Results) -> None:
        """What an evaluation found."""

    def finish(self) -> None:
        """Nothing follows; may be called twice."""


def open_loggers(config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int = -1) -> "Loggers":
    """The loggers of one run.

    Args:
        settings: the run's resolved configuration, nested dicts.
        resume_step: step of the checkpoint the run goes on from; -1 starts afresh.
    """
    loggers: list[RunLogger] = [JsonlLogger(folder, resume_step)]
    if config.wandb != "disabled":
        loggers.append(WandbLogger(config, folder, settings))
    return Loggers(loggers)


class Loggers:
    """Hands everything to each of several loggers."""

    def __init__(self, loggers: Sequence[RunLogger]) -> None:
        self.loggers = tuple(loggers)

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def figure(self, name: str, path: Path) -> None:
        for logger in self.loggers:
            logger.figure(name, path)

    def results(self, results: Results) -> None:
        for logger in self.loggers:
            logger.results(results)

    def finish(self) -> None:
        for logger in self.loggers:
            logger.finish()


class JsonlLogger:
    """`metrics.jsonl`, one JSON object a line, and `results.json`, in the run folder.

    Every line holds "step", "time" (Unix, seconds) and the metrics; values that are not finite are null. A resumed run
    drops the lines after its checkpoint (and a last line cut short), so that no step appears twice.
    """

    def __init__(self, folder: Path, resume_step: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "metrics.jsonl"
        kept = [line for line in _valid_lines(path) if line["step"] <= resume_step]
        rewritten = path.with_suffix(".jsonl.tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(rewritten, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        line = {"step": step, "time": round(time.time(), 3), **{name: float(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(_finite_or_null(line), allow_nan=False) + "\n")
        self._file.flush()

    def figure(self, name: str, path: Path) -> None:
        """Figures already lie in the run folder."""

    def results(self, results: Results) -> None:
        content = json.dumps(_finite_or_null(results.to_json()), allow_nan=False, indent=1)
        (self.folder / "results.json").write_text(content, encoding="utf-8")

    def finish(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """The lines of a metrics.jsonl, null as nan; empty when there is no such file."""
    return [{name: math.nan if v is None else v for name, v in line.items()} for line in _valid_lines(path)]


def _valid_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; writing may have been cut off in the middle of the last one."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _never_fatal(method: Callable[..., None]) -> Callable[..., None]:
    """Turn any failure of wandb into one warning, after which the logger stays silent."""

    @functools.wraps(method)
    def guarded(self: "WandbLogger", *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - network, account, disk, or wandb itself
            self._failed = True
            logging.getLogger(__name__).warning("wandb failed and is left out; the run goes on. It said: %s", error)

    return guarded


class WandbLogger:
    """The run's scalars, charts, figures and table in wandb, recorded under `<folder>/wandb`."""

    def __init__(self, config: LoggerConfig, folder: Path, settings: dict[str, Any]) -> None:
        self._failed = False
        self._run: Any = None
        self._start(config, folder, settings)

    @_never_fatal
    def _start(self, config: LoggerConfig, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=config.wandb,  # type: ignore[arg-type]
            project=config.project,
            entity=config.entity,
            name=config.name or folder.name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(console="off", silent=config.wandb == "offline"),  # online prints the run's address
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @_never_fatal
    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log({**metrics, "step": step})

    @_never_fatal
    def figure(self, name: str, path: Path) -> None:
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(str(path))})

    @_never_fatal
    def results(self, results: Results) -> None:
        import wandb

        for curve in results.curves:
            self._run.summary[f"prompt_alignment/{curve.name}"] = curve.alignment.mean
        for row in results.table:
            for name, interval in row.metrics.items():
                self._run.summary[f"{name}/{row.name}"] = interval.mean
        columns, rows = _table(results)
        charts = {name: wandb.plot.line_series(**chart) for name, chart in line_charts(results).items()}
        self._run.log({"results": wandb.Table(columns=columns, data=rows), **charts})

    @_never_fatal
    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _run_id(folder: Path) -> str:
    """The run's wandb id, kept in its folder, so that a resumed run goes on in the same wandb run."""
    path = folder / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def line_charts(results: Results) -> dict[str, dict[str, Any]]:
    """`{name: arguments of wandb.plot.line_series}`: prompt curves, one update against optimisers, recursion."""
    charts = {f"prompt_curve/{curve.name}": _prompt_chart(curve, results.metric) for curve in results.curves}
    levels = comparison_rows(results)
    if results.optimisers:
        title = f"{results.metric}: one update against optimisers"
        charts["optimisers"] = _trace_chart(results.optimisers, levels, results.metric, "optimiser steps", title)
    if results.recursive:
        references = [row for row in levels if row.kind == "reference"]
        title = f"{results.metric}: recursive updates"
        charts["recursive"] = _trace_chart(results.recursive, references, results.metric, "updates", title)
    return charts


def _prompt_chart(curve: PromptCurve, metric: str) -> dict[str, Any]:
    """Achieved against asked: their mean, the identity, and one line per network."""
    networks = len(curve.prompted)
    asked = [sum(values) / networks for values in zip(*curve.prompted, strict=True)]
    mean = [sum(values) / networks for values in zip(*curve.achieved, strict=True)]
    return {
        "xs": [asked, asked, *curve.prompted],
        "ys": [mean, asked, *curve.achieved],
        "keys": ["mean", "asked", *(f"network {i}" for i in range(networks))],
        "title": f"{curve.name}: achieved against asked {metric}",
        "xname": f"asked {metric}",
    }


def _trace_chart(
    traces: Sequence[Trace], levels: Sequence[Row], metric: str, xname: str, title: str
) -> dict[str, Any]:
    """The traces, and each row of the table that has no steps as a horizontal line across them."""
    ends = [min(t.x[0] for t in traces), max(t.x[-1] for t in traces)]
    return {
        "xs": [*(t.x for t in traces), *(ends for _ in levels)],
        "ys": [*(t.mean for t in traces), *([row.metrics[metric].mean] * 2 for row in levels)],
        "keys": [*(t.name for t in traces), *(row.name for row in levels)],
        "title": title,
        "xname": xname,
    }


def _table(results: Results) -> tuple[list[str | int], list[list[Any]]]:
    """Columns and rows of the table, every metric with the two ends of its interval."""
    names = list(dict.fromkeys(name for row in results.table for name in row.metrics))
    columns: list[str | int] = ["name", "kind", *(f"{n}{end}" for n in names for end in ("", " low", " high"))]
    rows = []
    for row in results.table:
        found = [row.metrics.get(name) for name in names]
        scores = [value for i in found for value in ((i.mean, i.low, i.high) if i else (None, None, None))]
        rows.append([row.name, row.kind, *scores, row.updates, row.seconds, row.flops, row.note])
    return [*columns, "updates", "seconds", "flops", "note"], rows
