"""Rows of other runs: what earlier evaluations found about their generators, to stand in the same table."""

import json
import math
from pathlib import Path
from typing import Any

from Gpt.errors import ConfigError
from Gpt.evaluation.results import Interval, Row


def generator_rows(folder: str | Path, metric: str) -> list[Row]:
    """The rows of a finished run's generator, which say in their notes whose they are.

    Args:
        folder: of the run.
        metric: the column that both evaluations are about, such as "test_error".

    Raises:
        ConfigError: the run is not finished, or its evaluation is about another metric.
    """
    file = Path(folder) / "results.json"
    if not file.is_file():
        raise ConfigError(f"evaluation.beside: {file} does not exist; finish that run first, or leave it out")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["metric"] != metric:
        raise ConfigError(f"evaluation.beside: {folder} is about {content['metric']}, this run about {metric}")
    note = f"of the run {Path(folder).name}, task {content['task']}"
    return [_row(stored, note) for stored in content["table"] if stored["kind"] == "generator"]


def _row(stored: dict[str, Any], note: str) -> Row:
    """A row as JSON gives it back; what is not finite was stored as null."""
    metrics = {}
    for name, interval in stored["metrics"].items():
        mean, low, high = (math.nan if interval[key] is None else interval[key] for key in ("mean", "low", "high"))
        metrics[name] = Interval(mean, low, high, interval["count"])
    note = f"{note}; {stored['note']}" if stored["note"] else note
    return Row(**(stored | {"metrics": metrics, "note": note}))
