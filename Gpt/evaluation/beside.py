"""One-step optimisation, generation and ordinary training side by side: what earlier evaluations found about other
generators, and what ordinary training reached on its way, to stand with what this one found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from Gpt.checkpoint import read_json
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError, ZooError
from Gpt.evaluation.results import Interval, Results, Row, Trace
from Gpt.evaluation.statistics import trace
from Gpt.tasks import Task

KINDS = ("generator", "reference")


@dataclass(frozen=True)
class Others:
    """Rows and training curves of other runs; their names say whose they are."""

    rows: list[Row] = field(default_factory=list)
    training_curves: list[Trace] = field(default_factory=list)


def read_runs(folders: Sequence[str | Path], metric: str) -> Others:
    """What finished runs found about their generators, and about the ordinary training beside them.

    Args:
        folders: of the runs.
        metric: the column that all evaluations are about, such as "test_error".

    Raises:
        ConfigError: a run is not finished, or its evaluation is about another metric.
    """
    others = Others()
    for folder in map(Path, folders):
        content = _results(folder, metric)
        note = f"of the run {folder.name}, task {content['task']}"
        # What that run has from others again is theirs to tell.
        stored = [row for row in content["table"] if row["kind"] in KINDS and not row.get("run")]
        others.rows.extend(_row(row, note, folder.name) for row in stored)
        others.training_curves.extend(_trace(curve, folder.name) for curve in content.get("training_curves", []))
    return others


def side_by_side(results: Results, others: Others) -> Results:
    """The results with rows and training curves of other runs; none appears twice."""
    curves = results.training_curves
    seen = [(curve.x, curve.mean) for curve in curves]
    added = [curve for curve in others.training_curves if (curve.x, curve.mean) not in seen]
    return replace(results, table=[*results.table, *others.rows], training_curves=[*curves, *added])


def training_curves(zoo: Zoo, task: Task, count: int | None, seed: int = 0) -> list[Trace]:
    """The test metric of ordinary training after every stored iteration, mean over the first `count` test runs, or
    all of them.

    Nothing where no run is held out, where the zoo stores the end of training alone or did not measure the rest, or
    where networks were imported, for nobody knows after how many iterations.
    """
    column = f"test_{task.metric}"
    try:
        rows = zoo.split("test")[:count]
    except ZooError:
        return []
    if task.recipe is None or zoo.snapshots < 2 or column not in zoo.metrics or zoo.metrics[column][rows].isnan().any():
        return []
    return [trace("ordinary training", "reference", zoo.iterations, list(zoo.metrics[column][rows].T.cpu()), seed)]


def _results(folder: Path, metric: str) -> dict[str, Any]:
    file = folder / "results.json"
    if not file.is_file():
        raise ConfigError(f"beside: {file} does not exist; finish that run first, or leave it out")
    content = read_json(file)
    if content["metric"] != metric:
        raise ConfigError(f"beside: {folder} is about {content['metric']}, this run about {metric}")
    return content


def _row(stored: dict[str, Any], note: str, run: str) -> Row:
    metrics = {name: Interval(**_numbers(interval)) for name, interval in stored["metrics"].items()}
    note = f"{note}; {stored['note']}" if stored["note"] else note
    return Row(**(stored | {"name": f"{stored['name']} ({run})", "metrics": metrics, "note": note, "run": run}))


def _trace(stored: dict[str, Any], run: str) -> Trace:
    return Trace(**(_numbers(stored) | {"name": f"{stored['name']} ({run})"}))


def _numbers(stored: Any) -> Any:
    """What is not finite was stored as null."""
    if isinstance(stored, dict):
        return {key: _numbers(value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [_numbers(value) for value in stored]
    return math.nan if stored is None else stored
