"""One self-contained page per run: no script, no network, every figure inside the file."""

import base64
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch

from Gpt.evaluation.results import Costs, Interval, Results, Row
from Gpt.files import write_text
from Gpt.report.logger import read_metrics
from Gpt.report.text import (
    column_label,
    format_flops,
    format_interval,
    format_number,
    format_seconds,
    metric_columns,
    metric_label,
    summarise,
)

MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}

CAPTIONS = {
    "table": (
        "Every way to obtain a network, best first, with the 95 % bootstrap interval of its mean. The bars to beat "
        "are retrieval (returning a stored network) and ordinary training."
    ),
    "side_by_side": (
        "One-step optimisation, generation and ordinary training on one axis: how many updates stand behind one "
        "network (none for what is written from noise or taken from the zoo) and what it reaches, with 95 % intervals. "
        "The line is ordinary training from its initialisation on, the mean over held-out runs with its band."
    ),
    "prompt_alignment": (
        "Asked against achieved: one thin line per starting network, the bold line their mean, the dashed diagonal "
        "what was asked. A generator that ignores its prompt draws a flat line. R² is one minus the squared miss over "
        "the spread of the prompts."
    ),
    "optimisers": (
        "One update of the generator (horizontal lines with their 95 % intervals) beside step after step of ordinary "
        "optimisers, from the same starting networks. Each curve has the learning rate that is best for its whole "
        "length; for fewer steps a higher one is better, and the table has such rows: they say what an update is worth."
    ),
    "recursive": (
        "What further updates add: each written network is the start of the next update. Bands are 95 % intervals. "
        "Starts from other distributions than the zoo's show how far the generator can be trusted away from its "
        "training data."
    ),
    "novelty": (
        "How new the networks are. At a distance ratio of 1 they are as far from the nearest training network as "
        "training networks are from each other; at 0 they are copies. New and good means right of the dashed line, at "
        "the good end of the metric."
    ),
    "gap_closed": (
        "The share of the way from the base model (0 %) to adapters trained for each task (100 %), with 95 % intervals "
        "over tasks: s2 are unseen pairs of a rule and a format that were both seen, s1 the training tasks with new "
        "inputs and wordings, s3 unseen rules."
    ),
    "confusions": (
        "Rows are what the prompts asked for, columns what the written adapters carry out when they decode freely: the "
        "rule and the format that more than half of an adapter's replies follow, counted in tasks. The diagonal, "
        "outlined, is right; unseen rules have no right column a generator could have learnt."
    ),
    "wrong_predictions": (
        "How alike networks err, against how far apart their weights are; one point per set of networks. Noise of "
        "growing scale draws the line. What lies below it errs otherwise than its distance would explain; copies lie "
        "at the upper left, those to the bit at the left edge, as a logarithmic axis has no place for no distance."
    ),
    "training": "The generator's training. Pale lines are single values, bold lines their running average.",
}


def write_report(
    run_dir: Path,
    results: Results,
    config: Mapping[str, Any],
    metrics_path: Path,
    figures: Mapping[str, Path],
) -> Path:
    """Write `report.html` into the run folder.

    Args:
        config: the run's resolved configuration, nested.
        metrics_path: the run's metrics.jsonl; its last values are listed.
        figures: `{name: path of a PNG or SVG}`, in reading order; a PNG with an SVG of the same name beside it is shown
            as the SVG, which stays sharp at any size.
    Returns:
        the path of the page.
    """
    columns = metric_columns(results)
    page = _template().render(
        results=results,
        label=metric_label(results.metric),
        summary=summarise(results),
        columns=[column_label(name, results) for name in columns],
        rows=[_table_row(row, columns) for row in results.table],
        novelty=[_novelty_row(results, i) for i in range(len(results.novelty))],
        costs=_costs(results.costs) if results.costs else [],
        break_even=_break_even(results.costs) if results.costs else "",
        figures=[(name, _data_uri(path), CAPTIONS.get(name, name)) for name, path in figures.items()],
        training=_last_values(metrics_path),
        config=flatten_config(config),
        environment=environment(),
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def environment() -> dict[str, str]:
    """Versions and hardware that the numbers were measured with."""
    cores = f"{os.cpu_count()} logical cores, {torch.get_num_threads()} used by torch"
    facts = {"processor": f"{platform.machine()}, {cores}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["accelerators"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
        facts["CUDA"] = str(torch.version.cuda)
    facts["system"] = platform.platform()
    facts["Python"] = platform.python_version()
    for package in ("torch", "torchvision", "numpy", "scipy", "wandb"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested configuration as dotted keys and printed values: `{"zoo": {"runs": 8}}` -> `[("zoo.runs", "8")]`."""
    flat = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat += flatten_config(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", str(value)))
    return flat


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("Gpt.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")


def _data_uri(path: Path) -> str:
    """The image as text inside the page. An SVG in an img element can neither run scripts nor load anything."""
    vector = path.with_suffix(".svg")
    shown = vector if vector.is_file() else path
    content = base64.b64encode(shown.read_bytes()).decode("ascii")
    return f"data:{MEDIA_TYPES[shown.suffix]};base64,{content}"


def _table_row(row: Row, columns: list[str]) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "metrics": [_cell(row.metrics.get(name)) for name in columns],
        "updates": "" if row.updates is None else f"{row.updates:,}",
        "seconds": format_seconds(row.seconds),
        "flops": format_flops(row.flops),
        "note": row.note,
    }


def _cell(interval: Interval | None) -> tuple[str, str]:
    return ("", "") if interval is None else format_interval(interval)


def _novelty_row(results: Results, index: int) -> dict[str, Any]:
    row = results.novelty[index]
    return {
        "name": row.name,
        "metric": format_interval(row.metric),
        "numbers": [
            format_number(row.distance),
            format_number(row.distance_ratio, 3),
            "" if row.error_overlap is None else format_number(row.error_overlap, 3),
            format_number(row.copying_z, 3),
            f"{row.novel_and_good:.0%}",
            "" if row.diversity is None else format_number(row.diversity, 3),
        ],
    }


def _costs(costs: Costs) -> list[tuple[str, str, str]]:
    return [
        ("the zoo", format_seconds(costs.zoo_seconds or None), format_flops(costs.zoo_flops or None)),
        (
            "the generator's training",
            format_seconds(costs.generator_seconds or None),
            format_flops(costs.generator_flops or None),
        ),
        ("one generated network", format_seconds(costs.sample_seconds), format_flops(costs.sample_flops)),
        ("one trained network", format_seconds(costs.train_seconds or None), format_flops(costs.train_flops or None)),
    ]


def _break_even(costs: Costs) -> str:
    if not costs.train_seconds:
        return "What training a network takes is not known here, so there is no break-even to give."
    if not costs.generator_seconds:
        return "What training the generator took is not known here, so there is no break-even to give."
    if costs.break_even is None:
        return "Zoo, generator and sampling never become cheaper than training each network: there is no break-even."
    return (
        f"Zoo, generator and sampling are cheaper in wall-clock than training each network from "
        f"{math.ceil(costs.break_even):,} networks on."
    )


def _last_values(metrics_path: Path) -> list[tuple[str, int, str]]:
    """Name, step and value of the last entry of every logged metric."""
    last: dict[str, tuple[int, float]] = {}
    for line in read_metrics(metrics_path):
        last |= {name: (int(line["step"]), value) for name, value in line.items() if name not in ("step", "time")}
    return [(name, step, format_number(value)) for name, (step, value) in sorted(last.items())]
