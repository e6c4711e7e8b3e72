"""Where a run writes what it measures: always JSON lines and a CSV in its folder, and a tracker beside them.

The trackers are in `Gpt.report.trackers`; nothing else in the project knows them, and a run never depends on one.
"""

import contextlib
import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from Gpt.evaluation.results import Results
from Gpt.files import flush, naming, replacing, write_json, write_text
from Gpt.report.trackers import TRACKERS, LoggerConfig, Metrics, check_installed


@runtime_checkable
class RunLogger(Protocol):
    """What the training loop and the evaluation report to."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Scalars measured after `step` optimiser steps, named `<split>/<metric>`, e.g. `validation/loss`."""

    def flush(self) -> None:
        """A checkpoint follows: what was logged must not be lost after it."""

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

    Raises:
        ConfigError: the package of an optional backend is not installed.
    """
    check_installed(config)
    loggers: list[RunLogger] = [JsonlLogger(folder, resume_step)]
    if config.backend != "none":
        loggers.append(TRACKERS[config.backend](config, folder, settings, resume_step))
    return Loggers(loggers)


class Loggers:
    """Hands everything to each of several loggers."""

    def __init__(self, loggers: Sequence[RunLogger]) -> None:
        self.loggers = tuple(loggers)

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self.loggers:
            logger.log(metrics, step)

    def flush(self) -> None:
        for logger in self.loggers:
            logger.flush()

    def figure(self, name: str, path: Path) -> None:
        for logger in self.loggers:
            logger.figure(name, path)

    def results(self, results: Results) -> None:
        for logger in self.loggers:
            logger.results(results)

    def finish(self) -> None:
        with contextlib.ExitStack() as stack:  # one that cannot, on a full disk, does not keep the others from it
            for logger in reversed(self.loggers):
                stack.callback(logger.finish)


class JsonlLogger:
    """`metrics.jsonl`, one JSON object a line, `metrics.csv` and `results.json`, in the run folder.

    Every line holds "step", "time" (Unix, seconds) and the metrics; values that are not finite are null. A resumed run
    drops the lines after its checkpoint (and a last line cut short), so that no step appears twice. The CSV is made of
    these lines when a session ends; one that was killed leaves them, and the next one's CSV has them all.
    """

    def __init__(self, folder: Path, resume_step: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = path = folder / "metrics.jsonl"
        kept = [line for line in _valid_lines(path) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        line = {"step": step, "time": round(time.time(), 3), **{name: float(value) for name, value in metrics.items()}}
        with naming(self._path):
            self._file.write(json.dumps(_finite_or_null(line), allow_nan=False) + "\n")
            self._file.flush()

    def flush(self) -> None:
        with naming(self._path):
            flush(self._path)

    def figure(self, name: str, path: Path) -> None:
        """Figures already lie in the run folder."""

    def results(self, results: Results) -> None:
        write_json(self.folder / "results.json", _finite_or_null(results.to_json()))

    def finish(self) -> None:
        self._file.close()
        write_csv(self._path, self.folder / "metrics.csv")


def read_metrics(path: Path) -> list[dict[str, float | int]]:
    """The lines of a metrics.jsonl, null as nan; empty when there is no such file."""
    return [{name: math.nan if v is None else v for name, v in line.items()} for line in _valid_lines(path)]


def write_csv(metrics: Path, path: Path) -> None:
    """A metrics.jsonl as a table: a row for each line, a column for each metric; empty where it was not measured."""
    lines = read_metrics(metrics)
    columns = list(dict.fromkeys(["step", "time", *(name for line in lines for name in line)]))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(lines)


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
