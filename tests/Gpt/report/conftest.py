"""A synthetic evaluation: every number is drawn, none was measured."""

import json

import numpy as np
import pytest

from Gpt.evaluation.results import Costs, Interval, Novelty, PromptCurve, Results, Row, Trace
from Gpt.report.figures import save_figures

NETWORKS, PROMPTS = 24, 20


def interval(mean: float, half_width: float = 0.02, count: int = NETWORKS) -> Interval:
    return Interval(float(mean), float(mean - half_width), float(mean + half_width), count)


def prompt_curve(name: str, follows: float, noise: float, draws: np.random.Generator) -> PromptCurve:
    asked = np.tile(np.linspace(0.0, 2.1, PROMPTS), (NETWORKS, 1))
    reached = follows * np.maximum(asked, 0.2) + (1 - follows) * 0.9 + noise * draws.standard_normal(asked.shape)
    kind = "baseline" if name in ("retrieval", "shuffled prompts") else "generator"
    return PromptCurve(name, kind, asked.tolist(), reached.tolist(), interval(follows - noise))


def decaying_trace(name: str, kind: str, x: list[float], start: float, end: float, rate: float) -> Trace:
    mean = [end + (start - end) * float(np.exp(-rate * point)) for point in x]
    return Trace(name, kind, x, mean, [0.95 * value for value in mean], [1.05 * value for value in mean])


@pytest.fixture(scope="session")
def synthetic_results() -> Results:
    """A complete evaluation of an imaginary task in which the generator loses to retrieval and to training."""
    draws = np.random.default_rng(0)
    rows = [
        ("G.pt, one update", "generator", 0.348, 9.93, 1, "prompt 0.21, chosen on validation"),
        ("G.pt, 5 updates, best attainable", "generator", 0.331, 9.41, 5, ""),
        ("G.pt, 5 updates of starts scaled by 2", "generator", 0.9, 30.2, 5, ""),
        ("RPG, written from noise (other)", "generator", 0.29, 8.1, None, "of the run other"),
        ("retrieval", "baseline", 0.171, 4.72, None, "stored snapshot nearest the prompt"),
        ("noise 0.05", "baseline", 0.174, 4.81, None, ""),
        ("noise 0.2", "baseline", 0.23, 6.1, None, ""),
        ("soup", "baseline", 0.19, 5.2, None, ""),
        ("per-weight Gaussian", "baseline", 2.9, 71.3, None, ""),
        ("interpolation", "baseline", 0.24, 6.9, None, ""),
        ("SGD, 1 step", "optimiser", 2.01, 64.2, 1, "lr 0.3, tuned over 21"),
        ("Adam, equal wall-clock", "optimiser", 0.41, 11.8, 37, "lr 0.01, tuned over 21"),
        ("ordinary training", "reference", 0.142, 3.97, 1120, "final snapshots of the test runs"),
    ]
    table = [
        Row(
            name,
            kind,
            {"test_loss": interval(loss), "test_error": interval(error, 0.4)},
            updates,
            0.0123,
            3.4e9,
            note,
            run="other" if "(other)" in name else "",
        )
        for name, kind, loss, error, updates, note in rows
    ]
    steps = [0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]
    updates = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    sets = [
        ("G.pt", "generator", 0.348, 1.08, 0.41, 0.62),
        ("held-out training", "reference", 0.142, 1.0, 0.44, 0.98),
        ("retrieval", "baseline", 0.171, 0.0, 1.0, 0.0),
        ("noise 0.2", "baseline", 0.23, 0.12, 0.83, 0.0),
        ("soup", "baseline", 0.19, 0.71, 0.5, 0.0),
    ]
    return Results(
        task="synthetic_digits",
        metric="test_loss",
        minimize=True,
        table=table,
        curves=[
            prompt_curve("held-out starts", 0.9, 0.05, draws),
            prompt_curve("held-out starts, attainable", 0.95, 0.05, draws),
            prompt_curve("training starts, attainable", 0.92, 0.05, draws),
            prompt_curve("retrieval", 0.99, 0.01, draws),
            prompt_curve("shuffled prompts", 0.0, 0.6, draws),
        ],
        recursive=[
            decaying_trace("held-out starts", "generator", updates, 2.3, 0.33, 3.0),
            decaying_trace("training starts", "generator", updates, 2.3, 0.32, 3.0),
            decaying_trace("starts scaled by 2", "generator", updates, 4.1, 0.9, 1.0),
            decaying_trace("normal starts", "generator", updates, 2.6, 0.5, 1.5),
        ],
        optimisers=[
            decaying_trace("SGD with momentum", "optimiser", steps, 2.3, 0.2, 0.05),
            decaying_trace("Adam", "optimiser", steps, 2.3, 0.17, 0.08),
            decaying_trace("AdamW", "optimiser", steps, 2.3, 0.16, 0.07),
        ],
        training_curves=[decaying_trace("ordinary training", "reference", [0.0, 1.0, 10.0, 1120.0], 2.3, 0.142, 0.01)],
        novelty=[
            Novelty(
                name,
                kind,
                interval(metric),
                7.1 * ratio,
                ratio,
                overlap,
                -18.5 if ratio < 0.5 else 0.8,
                good,
                1.1 * ratio,
            )
            for name, kind, metric, ratio, overlap, good in sets
        ],
        costs=Costs(20.3, 200.0, 0.0123, 0.31, 8.1e13, 3.2e15, 3.4e9, 1.1e9, 739.8),
        notes=["All numbers of this page are synthetic."],
    )


@pytest.fixture(scope="session")
def saved_figures(synthetic_results, tmp_path_factory):
    """Every figure of the synthetic evaluation on disk, `{name: path}`."""
    folder = tmp_path_factory.mktemp("figures")
    lines = [{"step": s, "time": 0.0, "train/loss": 2.0 / (s + 1), "validation/alignment": 0.5} for s in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return save_figures(synthetic_results, folder / "metrics.jsonl", folder)
