"""The judges of generators, and which one is asked."""

from collections.abc import Sequence

from Gpt.evaluation.adapter_distances import AdapterDistanceJudge
from Gpt.evaluation.adapters import AdapterJudge
from Gpt.evaluation.family import MaskJudge
from Gpt.evaluation.judge import Judge
from Gpt.evaluation.prompted import PromptJudge
from Gpt.evaluation.whole import WholeJudge
from Gpt.generator import Generator
from Gpt.tasks import Task

JUDGES: tuple[type[Judge], ...] = (PromptJudge, MaskJudge, WholeJudge, AdapterJudge, AdapterDistanceJudge)


def judge_of(task: Task, generator: Generator, conditions: Sequence[str]) -> type[Judge]:
    """The judge that fits the task, and what the generator starts from and is prompted with."""
    return next(judge for judge in JUDGES if judge.fits(task, generator, conditions))
