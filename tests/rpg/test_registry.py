"""A configuration becomes the generator that it names, the same one every time."""

from dataclasses import replace

import pytest
import torch

from Gpt.config import ConditionConfig, ObjectiveConfig, RunConfig
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.diffusion.regression import Regression
from Gpt.errors import ConfigError
from Gpt.networks import MLP
from Gpt.structure import Structure
from rpg.registry import GENERATORS, build_generator, build_objective

SMALL = {"name": "gpt", "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def structure():
    return Structure.of(MLP(4, 3, 2), MLP.symmetry)


def test_weights_are_a_function_of_the_seed_alone(structure):
    config = RunConfig(generator=SMALL)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_generator(config, structure)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (build_generator(replace(config, seed=seed), structure) for seed in (0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert any((value != other.state_dict()[name]).any() for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "kind", "prediction"),
    [
        (ObjectiveConfig(), FlowMatching, "x0"),
        (ObjectiveConfig(prediction="velocity"), FlowMatching, "velocity"),
        (ObjectiveConfig(name="ddpm", prediction="eps"), DDPM, "eps"),
        (ObjectiveConfig(name="regression"), Regression, "x0"),
    ],
)
def test_objectives_are_those_that_are_named(settings, kind, prediction):
    objective = build_objective(settings)
    assert type(objective) is kind
    assert objective.prediction == prediction


def test_conditions_are_those_that_are_named(structure):
    config = RunConfig(generator=SMALL, condition=ConditionConfig(("class_mask", "text"), dropout=0.25))
    conditions = build_generator(config, structure).conditions
    assert list(conditions.encoders) == ["class_mask", "text"]
    assert conditions.dropout == 0.25
    assert [encoder.features for encoder in conditions.encoders.values()] == [10, 384]
    longer = build_generator(config, structure, text=768).conditions
    assert [encoder.features for encoder in longer.encoders.values()] == [10, 768]


def test_unknown_names_are_told_with_the_nearest(structure):
    with pytest.raises(ConfigError, match="generator.name=gpd is unknown; did you mean 'gpt'"):
        build_generator(RunConfig(generator=SMALL | {"name": "gpd"}), structure)
    with pytest.raises(ConfigError, match="generator.widht.*did you mean 'width'"):
        build_generator(RunConfig(generator=SMALL | {"widht": 3}), structure)
    with pytest.raises(ConfigError, match="generator.size is a setting of rpg_paper.*, not of gpt.*'~generator.size'"):
        build_generator(RunConfig(generator=SMALL | {"size": "tiny"}), structure)
    with pytest.raises(ConfigError, match="objective.name=flwo is unknown; did you mean 'flow'"):
        build_objective(ObjectiveConfig(name="flwo"))
    assert {"gpt", "gpt_paper", "rpg", "rpg_paper", "pdiff", "hyperconv", "query"} == set(GENERATORS)
