"""What the benchmarks share: clocks, peak memory, records, one table.

Device work is asynchronous, so that CUDA is timed with events on its stream and the CPU with a wall clock. Every figure
is the median of repeats after a warm-up, between the fastest and the slowest of them.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of `repeats`; peak bytes on the device (None on a CPU)."""

    median: float
    fastest: float
    slowest: float
    repeats: int
    peak_bytes: int | None

    def facts(self, **rates: float) -> dict[str, Any]:
        """For a record; `rates` are amounts per call, such as samples=1024, and become amounts per second."""
        peak = None if self.peak_bytes is None else round(self.peak_bytes / GIB, 2)
        spread = {"fastest": self.fastest, "slowest": self.slowest, "repeats": self.repeats}
        per_second = {f"{name}_per_second": amount / self.median for name, amount in rates.items()}
        return {"seconds": self.median, **spread, "peak_gib": peak, **per_second}


class Clock:
    """Marks points in a stream of device work; `intervals` waits for them and gives the seconds in between."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this point of the work that has been issued so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def intervals(self) -> list[float]:
        """Seconds from each mark to the next."""
        synchronize(self.device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]


def summarize(seconds: Sequence[float], device: torch.device) -> Timing:
    """Median and range of some durations, with the peak memory since `reset_peak`."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), peak_bytes(device))


def measure(work: Callable[[], Any], device: torch.device, *, warmup: int = 2, repeats: int = 5) -> Timing:
    """Time `work` by itself, after `warmup` untimed calls (compilation, handles, caches)."""
    for _ in range(warmup):
        work()
    synchronize(device)
    reset_peak(device)
    clock = Clock(device)
    clock.mark()
    for _ in range(repeats):
        work()
        clock.mark()
    return summarize(clock.intervals(), device)


def synchronize(device: torch.device) -> None:
    """Wait for all work issued to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held on the device since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def machine(device: torch.device) -> dict[str, str]:
    """What a figure was measured on."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "card": card,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if device.type == "cuda" else "-",
        "python": platform.python_version(),
    }


class Bench:
    """Runs the cases of one script and keeps their records: one line of JSON each in `output`, one table at the end.

    Args:
        arguments: from `parser`.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.device = torch.device(arguments.device)
        self.small: bool = arguments.small
        self.seed: int = arguments.seed
        self.output: Path | None = arguments.output
        self._only: list[str] = arguments.only
        self.records: list[dict[str, Any]] = []

    def case(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run `work` if `--only` names it, and record the facts that it returns; a case too large is recorded as such.

        Memory of the case is given back before the next one: build everything inside `work`.
        """
        if self._only and not any(fnmatch(name, pattern) for pattern in self._only):
            return
        begun = perf_counter()
        try:
            facts = work()
        except torch.OutOfMemoryError:
            facts = {"failed": "out of memory"}
        self._release()
        self._record({"name": name, **facts, "wall_seconds": perf_counter() - begun})

    def _release(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(self, facts: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        command = f"python -m {_module_name()} {shlex.join(sys.argv[1:])}".strip()
        record = {**facts, **machine(self.device), "seed": self.seed, "date": now, "command": command}
        self.records.append(record)
        print(row(record), flush=True)
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def finish(self) -> list[dict[str, Any]]:
        """Print the table of this run and return its records."""
        print("\n" + table(self.records))
        return self.records


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=(description or "").strip().splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--small", action="store_true", help="tiny sizes: seconds on a CPU")
    options.add_argument("--output", type=Path, help="append one JSON line per case to this file")
    options.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cases to run, such as 'train/*'")
    options.add_argument("--seed", type=int, default=0)
    return options


HEADER = f"{'case':44s} {'median':>10s} {'fastest .. slowest':>23s} {'GiB':>6s}  rates"


def table(records: Sequence[dict[str, Any]]) -> str:
    """One row per record, for a terminal."""
    return "\n".join([HEADER, *(row(record) for record in records)])


def row(record: dict[str, Any]) -> str:
    """One record as a line: name, seconds with their range, peak memory, and everything per something."""
    if "failed" in record:
        return f"{record['name']:44s} {record['failed']}"
    if "seconds" not in record:
        shown = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("seed", "wall_seconds")}
        return f"{record['name']:44s} " + "  ".join(f"{k} {v:,.4g}" for k, v in shown.items())
    spread = f"{seconds(record['fastest'])} .. {seconds(record['slowest'])}"
    memory = "-" if record["peak_gib"] is None else f"{record['peak_gib']:.1f}"
    rates = [f"{value:,.4g} {name.replace('_', ' ')}" for name, value in record.items() if _is_shown(name)]
    return f"{record['name']:44s} {seconds(record['seconds']):>10s} {spread:>23s} {memory:>6s}  {', '.join(rates)}"


def _is_shown(name: str) -> bool:
    return "_per_" in name or name.startswith(("seconds_at", "final_test"))


def seconds(value: float) -> str:
    """A duration with its unit."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


def _module_name() -> str:
    main = sys.modules["__main__"]
    return main.__spec__.name if getattr(main, "__spec__", None) else Path(sys.argv[0]).stem
