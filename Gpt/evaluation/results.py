"""What an evaluation found: plain numbers, ready for JSON, figures and the report; no tensors, no networks."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over `count` networks, tasks or seeds."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a way to obtain a network, and what the network scores.

    Attributes:
        kind: "generator", "optimiser", "baseline", "reference" (ordinary training to the end) or "control" (the
            generator told something else, or nothing).
        metrics: e.g. {"test_loss": Interval, "test_error": Interval}.
        updates: network updates (gradient steps, or generator calls) behind one network; None where it means nothing.
        seconds, flops: cost of one network on this machine, the zoo and the generator's training not included.
        note: one phrase on how it was selected, e.g. "lr 0.3, tuned over 21".
        run: folder of the other run that found it; empty for this one.
    """

    name: str
    kind: str
    metrics: dict[str, Interval]
    updates: int | None = None
    seconds: float | None = None
    flops: float | None = None
    note: str = ""
    run: str = ""


@dataclass(frozen=True)
class PromptCurve:
    """Asked against achieved, one line per starting network.

    Attributes:
        name: e.g. "held-out starts".
        kind: whose networks these are, see `Row`; controls are baselines.
        prompted: [networks][prompts] wanted metric.
        achieved: [networks][prompts] measured metric (mean over samples when there are several per prompt).
        alignment: R² per network, averaged, with its interval over networks.
    """

    name: str
    kind: str
    prompted: list[list[float]]
    achieved: list[list[float]]
    alignment: Interval


@dataclass(frozen=True)
class Trace:
    """A metric along an axis: recursive updates, optimiser steps, ordinary training. `low` and `high` bound the mean;
    for `kind` see `Row`."""

    name: str
    kind: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Novelty:
    """How far a set of networks is from the training networks.

    Attributes:
        kind: see `Row`; networks trained apart from the training runs are references.
        distance: mean L2 distance to the nearest training network, minimum over permutations.
        distance_ratio: the same over the distance between training networks.
        error_overlap: mean over networks of the largest IoU of wrongly classified examples with a training network.
        copying_z: data-copying score Z_U (Meehan et al. 2020); far below zero means copies.
        novel_and_good: share of networks that are novel (distance ratio at least 1) and above the metric bar.
        diversity: mean distance between two of them over that between two trained networks that the generator has not
            seen; 0 if all are one network. None where that is not measured.
    """

    name: str
    kind: str
    metric: Interval
    distance: float
    distance_ratio: float
    error_overlap: float | None
    copying_z: float
    novel_and_good: float
    diversity: float | None = None


@dataclass(frozen=True)
class Costs:
    """Wall-clock (s) and FLOPs of everything behind one generated network, and when it pays off.

    Attributes:
        zoo_seconds, train_seconds: 0 where that is not known, for networks that were imported.
        generator_seconds, generator_flops: 0 where that is not known, for published weights.
        break_even: number of networks from which zoo + generator + sampling is cheaper in wall-clock than training each
            network; None when it never is, or when it is not known what the generator took.
    """

    zoo_seconds: float
    generator_seconds: float
    sample_seconds: float
    train_seconds: float
    zoo_flops: float
    generator_flops: float
    sample_flops: float
    train_flops: float
    break_even: float | None


@dataclass(frozen=True)
class Confusion:
    """What networks do, when they should do which: `counts[wanted][found]`, numbers of networks.

    Attributes:
        name: of which networks, and what, e.g. "s2: rule".
        wanted, found: names of the rows and of the columns.
    """

    name: str
    wanted: list[str]
    found: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class Results:
    """Everything one evaluation found. `metric` is the column it is about, such as "test_loss".

    `training_curves` are what ordinary training reached after every stored iteration.
    """

    task: str
    metric: str
    minimize: bool
    table: list[Row]
    curves: list[PromptCurve] = field(default_factory=list)
    recursive: list[Trace] = field(default_factory=list)
    optimisers: list[Trace] = field(default_factory=list)
    training_curves: list[Trace] = field(default_factory=list)
    novelty: list[Novelty] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)
    costs: Costs | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Nested dicts and lists of numbers and strings."""
        return asdict(self)
