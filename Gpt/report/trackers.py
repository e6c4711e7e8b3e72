"""Experiment trackers: wandb, SwanLab and TensorBoard. Each is one class with the four methods of `RunLogger`.

Whatever fails in a tracker is said once and left at that; the run's own files are written by `Gpt.report.logger`.
"""

import functools
import importlib.util
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Gpt.errors import ConfigError
from Gpt.evaluation.results import PromptCurve, Results, Row, Trace
from Gpt.files import write_text
from Gpt.report.text import comparison_rows, print_table, side_by_side_rows

MODES = {
    "wandb": ("offline", "online"),
    "swanlab": ("offline", "online", "local"),
    "tensorboard": ("offline",),
    "none": ("offline",),
}
OPTIONAL = ("swanlab", "tensorboard")  # packages, and the extras of this project that install them
Metrics = Mapping[str, float | int]


@dataclass(frozen=True)
class LoggerConfig:
    """Where a run reports besides the files in its folder.

    Attributes:
        backend: "wandb", "swanlab", "tensorboard" or "none".
        mode: "offline" records in the run folder (`wandb sync` or `swanlab sync` uploads it), "online" uploads, "local"
            records for SwanLab's own dashboard (`swanlab watch`).
        project, entity, name: under which the run appears in wandb and SwanLab; entity (SwanLab's workspace) and name
            default to the account's and to the folder's name.
    """

    backend: str = "wandb"
    mode: str = "offline"
    project: str = "gpt-weights"
    entity: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in MODES:
            raise ConfigError(f"logger.backend is {self.backend!r}; choose one of {', '.join(MODES)}")
        if self.mode not in MODES[self.backend]:
            modes = ", ".join(MODES[self.backend])
            raise ConfigError(f"logger.mode is {self.mode!r}; choose one of {modes} (logger.backend={self.backend})")


def check_installed(config: LoggerConfig) -> None:
    """Look for the backend's package without importing it.

    Raises:
        ConfigError: it is missing; names what installs it.
    """
    if config.backend in OPTIONAL and importlib.util.find_spec(config.backend) is None:
        raise ConfigError(
            f"logger={config.backend} needs the package {config.backend}: pip install 'gpt-weights[{config.backend}]'"
        )
    if config.mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise ConfigError("logger.mode=local needs SwanLab's dashboard: pip install 'swanlab[dashboard]'")


def _never_fatal(method: Callable[..., None]) -> Callable[..., None]:
    """Turn any failure of a tracker into one warning, after which it stays silent."""

    @functools.wraps(method)
    def guarded(self: "_Tracker", *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - network, account, disk, or the tracker itself
            self._failed = True
            message = "%s failed and is left out; the run goes on. It said: %s"
            logging.getLogger(__name__).warning(message, self.name, error)

    return guarded


class _Tracker:
    """What trackers share; arguments as of `Gpt.report.logger.open_loggers`."""

    name: str

    def __init__(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int = -1) -> None:
        self._failed = False
        self._run: Any = None
        self._step = max(resume_step, 0)  # the last one logged, at which figures and results are shown
        self._start(config, folder, settings, resume_step)

    def _start(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int) -> None:
        raise TypeError(f"{type(self).__name__} does not define _start")

    def _end(self) -> None:
        self._run.finish()

    def flush(self) -> None:
        """Trackers send in the background."""

    @_never_fatal
    def finish(self) -> None:
        if self._run is not None:
            self._end()
            self._run = None


class WandbLogger(_Tracker):
    """The run's scalars, charts, figures and table in wandb, recorded under `<folder>/wandb`."""

    name = "wandb"

    @_never_fatal
    def _start(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=config.mode,  # type: ignore[arg-type]
            project=config.project,
            entity=config.entity,
            name=config.name or folder.name,
            id=_run_id(folder / "wandb"),
            resume="allow",
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(console="off", silent=config.mode == "offline"),  # online prints the run's address
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

        for name, value in _summary(results).items():
            self._run.summary[name] = value
        columns, rows = _table(results)
        charts = {name: wandb.plot.line_series(**chart) for name, chart in line_charts(results).items()}
        self._run.log({"results": wandb.Table(columns=columns, data=rows), **charts})


class SwanLabLogger(_Tracker):
    """The run's scalars, figures and table in SwanLab, recorded under `<folder>/swanlab`."""

    name = "swanlab"

    @_never_fatal
    def _start(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int) -> None:
        import swanlab

        self._run = swanlab.init(
            mode=config.mode,
            project=config.project,
            workspace=config.entity,
            name=config.name or folder.name,
            id=_run_id(folder / "swanlab"),
            resume="allow",
            log_dir=str(folder / "swanlab"),
            config=settings,
            settings=swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")),
        )

    @_never_fatal
    def log(self, metrics: Metrics, step: int) -> None:
        self._step = step
        self._run.log(dict(metrics), step=step)

    @_never_fatal
    def figure(self, name: str, path: Path) -> None:
        import swanlab

        self._run.log({f"figures/{name}": swanlab.Image(str(path))}, step=self._step)

    @_never_fatal
    def results(self, results: Results) -> None:
        import swanlab

        self._run.log({**_summary(results), "results": swanlab.Text(print_table(results))}, step=self._step)


class TensorBoardLogger(_Tracker):
    """The run's scalars, figures and table as TensorBoard events, under `<folder>/tensorboard`.

    What a killed session logged after its checkpoint is not shown any more.
    """

    name = "tensorboard"

    @_never_fatal
    def _start(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    @_never_fatal
    def log(self, metrics: Metrics, step: int) -> None:
        self._step = step
        for name, value in metrics.items():
            self._run.add_scalar(name, value, step)

    @_never_fatal
    def figure(self, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._run.add_image(f"figures/{name}", imread(path), self._step, dataformats="HWC")

    @_never_fatal
    def results(self, results: Results) -> None:
        for name, value in _summary(results).items():
            self._run.add_scalar(name, value, self._step)
        lines = print_table(results).splitlines()
        self._run.add_text("results", "\n".join(f"    {line}" for line in lines), self._step)  # Markdown's verbatim

    def _end(self) -> None:
        self._run.close()


def _run_id(folder: Path) -> str:
    """The run's id in a tracker, kept in its folder, so that a resumed run goes on under the same one."""
    path = folder / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _summary(results: Results) -> dict[str, float]:
    """What an evaluation found, one number for each curve and for each metric of each row."""
    aligned = {f"prompt_alignment/{curve.name}": curve.alignment.mean for curve in results.curves}
    rows = {f"{name}/{row.name}": i.mean for row in results.table for name, i in row.metrics.items()}
    return aligned | rows


TRACKERS: dict[str, type[WandbLogger] | type[SwanLabLogger] | type[TensorBoardLogger]] = {
    "wandb": WandbLogger,
    "swanlab": SwanLabLogger,
    "tensorboard": TensorBoardLogger,
}


def line_charts(results: Results) -> dict[str, dict[str, Any]]:
    """`{name: arguments of wandb.plot.line_series}`: prompt curves, one update against optimisers, recursion, and
    generation beside ordinary training."""
    charts = {f"prompt_curve/{curve.name}": _prompt_chart(curve, results.metric) for curve in results.curves}
    levels = comparison_rows(results)
    if results.optimisers:
        title = f"{results.metric}: one update against optimisers"
        charts["optimisers"] = _trace_chart(results.optimisers, levels, results.metric, "optimiser steps", title)
    if results.recursive:
        references = [row for row in levels if row.kind == "reference"]
        title = f"{results.metric}: recursive updates"
        charts["recursive"] = _trace_chart(results.recursive, references, results.metric, "updates", title)
    if results.training_curves:
        title, rows = f"{results.metric}: side by side", side_by_side_rows(results)
        charts["side_by_side"] = _trace_chart(results.training_curves, rows, results.metric, "updates", title)
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


def _trace_chart(traces: Sequence[Trace], levels: Sequence[Row], metric: str, xname: str, title: str) -> dict[str, Any]:
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
