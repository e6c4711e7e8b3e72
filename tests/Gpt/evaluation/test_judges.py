"""Every generator has one judge, which reads exactly the settings that it says it reads."""

from dataclasses import fields, replace

import pytest
from torch import nn

from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import TASKS
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import ConfigError
from Gpt.evaluation.adapter_distances import AdapterDistanceJudge
from Gpt.evaluation.adapters import AdapterJudge
from Gpt.evaluation.family import MaskJudge
from Gpt.evaluation.judge import EVERY_JUDGE, EvaluationConfig
from Gpt.evaluation.judges import JUDGES
from Gpt.evaluation.prompted import PromptJudge
from Gpt.evaluation.whole import WholeJudge
from Gpt.generator import Generator
from Gpt.masks import MaskSplit


@pytest.mark.parametrize(
    ("family", "needs_start", "conditions", "judge"),
    [
        (None, True, ("target_metric",), PromptJudge),
        (None, True, (), PromptJudge),
        (None, False, ("target_metric",), PromptJudge),
        (None, False, (), WholeJudge),
        (MaskSplit(held_out=2, validation=2), False, ("class_mask",), MaskJudge),
        (MaskSplit(held_out=2, validation=2), True, ("class_mask", "target_metric"), MaskJudge),
        (TASKS["lora_tiny"]["family"], False, ("text",), AdapterJudge),
        ("prompts without answers", False, ("text",), AdapterDistanceJudge),
    ],
)
def test_one_judge_fits(task, family, needs_start, conditions, judge, tmp_path):
    if family == "prompts without answers":
        sets = [PromptSet(name, (f"{name}?",)) for name in ("a", "b")]
        write_prompts(tmp_path, {"train": sets, "test": sets})
        family = AdapterFamily(str(tmp_path), unseen_rules=0, unseen_combinations=0, validation=1)
    generator, task = Generator(task.structure, FlowMatching(), "euler", 1), replace(task, family=family)
    generator.needs_start = needs_start
    assert [found for found in JUDGES if found.fits(task, generator, conditions)] == [judge]


def test_every_setting_is_read_by_a_judge():
    known = {field.name for field in fields(EvaluationConfig)}
    assert EVERY_JUDGE.union(*(judge.settings for judge in JUDGES)) == known
    assert not any(EVERY_JUDGE & judge.settings for judge in JUDGES)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_setting_that_does_nothing_is_refused(judge, task):
    normalised = replace(task, constructor=lambda: nn.BatchNorm1d(3), symmetry=None)
    others = {"optimiser_steps": 9, "samples_per_prompt": 3, "soup": 7, "recalibrate": True, "prompts": 3}
    config = EvaluationConfig(label="other", max_batch=7, guidance=2.0, seed=3, beside=("runs/a",))
    judge.check(config, task, ("target_metric",))
    for name, value in others.items():
        config = EvaluationConfig(**{name: value})
        if name in judge.settings | judge.ignored:
            judge.check(config, normalised, ("target_metric",))
        else:
            with pytest.raises(ConfigError, match=f"evaluation.{name}={value} does nothing .*{judge.name}.*label"):
                judge.check(config, normalised, ("target_metric",))


@pytest.mark.parametrize("conditions", [(), ("text",)])
def test_a_generator_that_is_not_told_the_metric_is_not_judged_by_it(conditions, task):
    PromptJudge.check(EvaluationConfig(), task, ("target_metric", *conditions))
    with pytest.raises(ConfigError, match="judged by the loss that it is asked for.*add condition=target_metric"):
        PromptJudge.check(EvaluationConfig(), task, conditions)


def test_there_must_be_something_to_recalibrate_before_anything_is_trained(task):
    config, normalised = (
        EvaluationConfig(recalibrate=True),
        replace(task, constructor=lambda: nn.BatchNorm1d(3), symmetry=None),
    )
    WholeJudge.check(config, normalised, ())
    with pytest.raises(ConfigError, match="no batch-norm statistics"):
        WholeJudge.check(config, task, ())
    with pytest.raises(ConfigError, match="no training data"):
        WholeJudge.check(config, replace(normalised, train_data_fn=None), ())
