"""What adapters score on language tasks, task by task, and how that becomes a line of the report.

    exact         greedy decoding writes exactly the answer (%)
    lead          the generator's exact match minus this row's, task by task (points)
    gap_closed    (exact - the base model's) / (the trained adapters' - the base model's), means over tasks (%)
    format        the reply is in the wanted format (%)     content    it says the right thing, in any known format (%)
    loss          mean negative log-likelihood of an answer's tokens (nats)

Exact match needs no decoding: it holds if every token is the most likely one after the right ones. Format and content
are judged on those same predictions, each made after the right tokens, so that where a reply goes wrong they are not
quite those of free decoding.

Several processes share the passes through the language model, and the judgement of what comes out of each.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt import seeds
from Gpt.adapters.answers import Answers, answer_scores, passes
from Gpt.adapters.answers import Scores as AnswerScores
from Gpt.adapters.base import BaseModel
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import EASY, Member, Suite
from Gpt.distributed import Rows, in_chunks
from Gpt.evaluation.results import Interval, Row
from Gpt.evaluation.statistics import bootstrap_interval

Name = TypeVar("Name", bound=Hashable)

MEASURES = ("exact", "lead", "gap_closed", "format", "content", "loss")

Scores = dict[str, Float[Tensor, " tasks"]]
"""{measure: one number a task}, on the CPU."""


@dataclass(frozen=True)
class Line:
    """A way to obtain adapters: what they score on each split, and the adapters themselves."""

    name: str
    kind: str
    scores: dict[str, Scores]
    adapters: Mapping[str, Float[Tensor, "tasks D"]] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)

    def row(self, generator: "Line", base: "Line", trained: "Line", seed: int) -> Row:
        """Means over tasks with their intervals, beside the generator and between the base model and training."""
        metrics: dict[str, Interval] = {}
        for measure in MEASURES:
            for split, scores in self.scores.items():
                exact, low = scores["exact"], base.scores[split]["exact"]
                if measure == "gap_closed":
                    gap = trained.scores[split]["exact"] - low
                    if bootstrap_interval(gap, seed).low > 0:  # otherwise training does not tell tasks apart either
                        metrics[f"{split}_{measure}"] = ratio_interval(100 * (exact - low), gap, seed)
                elif measure != "lead":
                    metrics[f"{split}_{measure}"] = bootstrap_interval(scores[measure], seed)
                elif self is not generator:
                    lead = generator.scores[split]["exact"] - exact
                    metrics[f"{split}_{measure}"] = bootstrap_interval(lead, seed)
        return Row(self.name, self.kind, metrics, **self.details)


def exact_by_rule(line: Line, members: Mapping[str, Sequence[Member]]) -> str:
    """Mean exact match of every rule's tasks in all splits, the best first; before that, of all easy and other rules.

    Args:
        members: `{split: tasks}`, in the order of the line's scores.
    """
    found: dict[str, list[float]] = {}
    for split, tasks in members.items():
        for member, exact in zip(tasks, line.scores[split]["exact"].tolist(), strict=True):
            kind = "easy" if member.rule in EASY else "others"
            for name in (kind, member.rule):
                found.setdefault(name, []).append(exact)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    order = sorted(means, key=lambda name: (name not in ("easy", "others"), -means[name]))
    return ", ".join(f"{name} {means[name]:.1f}" for name in order)


def score_tasks(
    base: BaseModel,
    spec: AdapterSpec,
    suite: Suite,
    members: Mapping[str, Sequence[Member]],
    weights: Mapping[str, Float[Tensor, "tasks D"]],
    answers: Mapping[str, Answers],
) -> dict[str, Scores]:
    """Measure adapter i of every split on the examples `answers[split][i]` of task `members[split][i]`."""

    def judged(split: str, tasks: list[int], found: AnswerScores) -> Scores:
        exact, examples = found.exact.cpu(), answers[split][tasks]
        wrong = ~exact
        said, wanted = (_texts(base, tokens, examples.valid, wrong) for tokens in (found.predicted, examples.targets))
        owners = [members[split][tasks[i]] for i in wrong.nonzero()[:, 0].tolist()]
        replies = [suite.judge(*reply) for reply in zip(owners, said, wanted, strict=True)]
        form, content = exact.double(), exact.double()
        form[wrong] = torch.tensor([reply.format_valid for reply in replies], dtype=torch.float64)
        content[wrong] = torch.tensor([reply.content_correct for reply in replies], dtype=torch.float64)
        plain = exact_and_loss(split, tasks, found)
        return plain | {"format": 100 * form.mean(1), "content": 100 * content.mean(1)}

    return score_adapters(base, spec, weights, answers, judged)


def exact_and_loss(name: Hashable, tasks: list[int], found: AnswerScores) -> Scores:
    """The measures that need no judgement of replies."""
    return {"exact": 100 * found.exact.double().mean(1).cpu(), "loss": found.loss.double().mean(1).cpu()}


def score_adapters(
    base: BaseModel,
    spec: AdapterSpec,
    weights: Mapping[Name, Float[Tensor, "tasks D"]],
    answers: Mapping[Name, Answers],
    read: Callable[[Name, list[int], AnswerScores], Scores] = exact_and_loss,
) -> dict[Name, Scores]:
    """Measure adapter i of every set on the examples `answers[name][i]`, each pass in one of the processes.

    The passes of all sets are shared out together, so that sets of few tasks leave no process without work.

    Args:
        read: `(name, tasks, answered) -> scores` of those tasks of a set that were answered in one pass.
    """
    vocabulary = base.model.config.vocab_size
    parts = [(name, tasks) for name in weights for tasks in passes(answers[name], vocabulary)]

    def work(chunk: slice) -> Rows:
        name, tasks = parts[chunk.start]
        return read(name, tasks, answer_scores(base, spec, weights[name][tasks], answers[name][tasks]))

    rows = in_chunks(work, len(parts), 1)
    scores: dict[Name, Scores] = {}
    first = 0
    for name in weights:
        order = torch.tensor([task for of, tasks in parts if of == name for task in tasks]).argsort()
        scores[name] = {measure: values[first + order] for measure, values in rows.items()}
        first += len(order)
    return scores


def _texts(
    base: BaseModel, tokens: Int[Tensor, "P N K"], valid: Bool[Tensor, "P N K"], chosen: Bool[Tensor, "P N"]
) -> list[str]:
    """The chosen replies without their padding."""
    rows, lengths = tokens.cpu()[chosen].tolist(), valid.sum(-1).cpu()[chosen].tolist()
    return base.tokenizer.decode([row[:length] for row, length in zip(rows, lengths, strict=True)])


def ratio_interval(
    part: Float[Tensor, " n"], whole: Float[Tensor, " n"], seed: int = 0, resamples: int = 2000
) -> Interval:
    """mean(part) / mean(whole) with its 95 % percentile-bootstrap interval over tasks, drawn with both their values.

    For wholes whose mean is certainly positive.
    """
    part, whole = part.double().cpu(), whole.double().cpu()
    draws = torch.randint(len(part), (resamples, len(part)), generator=seeds.rng("cpu", seed, "bootstrap"))
    ratios = part[draws].mean(1) / whole[draws].mean(1).clamp_min(1e-9)
    low, high = np.quantile(ratios.numpy(), [0.025, 0.975], method="nearest")
    return Interval(float(part.mean() / whole.mean()), float(low), float(high), len(part))
