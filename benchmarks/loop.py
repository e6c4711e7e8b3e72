"""The training loop timed from inside: `Gpt.training.train` itself runs, and its calls for a batch mark the steps."""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Clock, Timing, reset_peak, summarize
from Gpt.checkpoint import CheckpointFolder, Stateful, TrainingState
from Gpt.generator import Batch, Generator
from Gpt.report.logger import Loggers
from Gpt.tasks import TASK_METADATA, Task, check_entry
from Gpt.training import TrainerConfig, train


@functools.cache
def dataless_task(name: str) -> Task:
    """A built-in task whose data are not looked at until they are used: speed depends on shapes alone."""
    return check_entry(name, TASK_METADATA[name])


class NoCheckpoints(CheckpointFolder):
    """Writes nothing: a benchmark measures steps, not disks."""

    def __init__(self) -> None:
        super().__init__(Path("unwritten"), {})

    def save(self, state: TrainingState, model: Stateful, ema: Stateful, optimizer: Stateful) -> None:
        """Nothing."""

    def save_best(self, state: TrainingState, ema: Stateful, facts: dict[str, Any]) -> None:
        """Nothing."""

    def load_best(self, generator: Stateful) -> dict[str, Any]:
        """Nothing: the generator keeps the weights of the last step."""
        return {}


def time_training(
    generator: Generator,
    draw: Callable[[int, torch.Generator], Batch],
    config: TrainerConfig,
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    seed: int = 0,
) -> Timing:
    """Seconds per step of the complete loop: batch, loss, gradient, clipping, optimiser, averaged weights.

    Args:
        config: its `steps` are overruled by warmup + repeats; `slices` must be 1.
    """
    clock, calls = Clock(device), 0

    def marked(count: int, rng: torch.Generator) -> Batch:
        nonlocal calls
        calls += 1
        if calls == warmup + 1:
            reset_peak(device)
        if calls > warmup:
            clock.mark()
        return draw(count, rng)

    # The learning rate would fall to zero over so few steps; that changes no duration.
    steps = warmup + repeats + 1  # the last interval ends where the next batch is asked for
    settings = vars(config) | {"steps": steps, "validate_every": 0, "checkpoint_every": 0, "validation_batches": 1}
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        train(
            generator,
            marked,
            draw,
            lambda generator: {"score": 0.0},
            TrainerConfig(**settings),
            NoCheckpoints(),
            Loggers([]),
            device,
            seed,
        )
    return summarize(clock.intervals(), device)
