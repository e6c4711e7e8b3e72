"""Conditions: what is asked for reaches the embedding, what is not asked for is the null value."""

import math

import pytest
import torch
from torch import nn

from Gpt.conditions import Conditions, MetricScale, TargetMetric, fourier_features, prompt_features
from Gpt.errors import ConfigError
from Gpt.seeds import rng

METRICS = {
    "losses": torch.rand(500, generator=rng("cpu", 0)) ** 3 * 2.3,
    "returns with many ties": (torch.rand(500, generator=rng("cpu", 1)) * 900).clamp_max(500),
    "all equal": torch.full((500,), 0.5),
    "nearly equal and large": 500 + 1e-4 * torch.rand(500, generator=rng("cpu", 2)),
    "tiny": 1e-6 * torch.rand(500, generator=rng("cpu", 3)),
    "negative": -torch.rand(500, generator=rng("cpu", 4)) * 100,
}


@pytest.mark.parametrize("name", METRICS)
def test_the_scale_rises_with_the_metric_inside_and_far_outside_the_zoo(name):
    values = METRICS[name]
    scale = MetricScale()
    scale.fit(values)
    margin = max(1.0, float(values.abs().max()))
    probes = torch.linspace(float(values.min()) - margin, float(values.max()) + margin, 2001)
    probes = torch.cat([probes, values, scale.knots]).sort().values
    quantile, score = scale(probes)
    assert quantile.isfinite().all()
    assert score.isfinite().all()
    assert (quantile.diff() >= 0).all()
    assert (score.diff() >= 0).all()
    assert quantile[-1] > 1  # unreachable wishes keep their order
    assert quantile[0] < 0


def test_the_scale_is_the_quantile_and_the_standard_score():
    values = METRICS["losses"]
    scale = MetricScale()
    scale.fit(torch.cat([values, torch.tensor([math.nan, math.inf])]))
    quantile, score = scale(values)
    expected = values.argsort().argsort() / (len(values) - 1)
    error = (quantile - expected).abs()
    assert error.max() < 0.06
    assert error[expected > 0.15].max() < 0.01  # below, the zoo's metrics are closer than the scale resolves
    torch.testing.assert_close(score, (values - values.mean()) / values.std(), rtol=1e-4, atol=1e-4)


def test_runs_that_went_astray_leave_the_scale_of_the_others():
    """A hundred losses of up to 10,000 among eight thousand from 0.1 to 0.3: below these, quantiles stay quantiles."""
    values, astray = torch.linspace(0.1, 0.3, 8000), torch.linspace(100, 10_000, 100)
    plain, scale = MetricScale(), MetricScale()
    plain.fit(values)
    scale.fit(torch.cat([values, astray]))
    probes = torch.linspace(0.1, 0.29, 20)
    torch.testing.assert_close(scale(probes)[0], plain(probes)[0] * 8000 / 8100, rtol=0, atol=0.02)
    assert (scale(astray)[0].diff() > 0).all()


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3] * 300 + [1e4] * 40, [-500.0] * 500 + [-1.0] * 500])
def test_equal_metrics_far_from_the_others_have_a_finite_scale(values):
    """Float32 tells neighbours of 10,000 apart from a thousandth on."""
    scale = MetricScale()
    scale.fit(torch.tensor(values))
    assert (scale.knots.diff() > 0).all()
    assert all(part.isfinite().all() for part in scale(torch.tensor(values)))


def test_fourier_features_in_closed_form():
    features = fourier_features(torch.tensor([0.0, 0.25]), octaves=2)
    root = math.sqrt(0.5)
    at_quarter = [0.25, math.sin(math.pi / 8), root, math.cos(math.pi / 8), root]
    torch.testing.assert_close(features, torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0], at_quarter]))


def conditions(**options) -> Conditions:
    """Two conditions whose null values and bias are not zero."""
    module = Conditions({"target_metric": 2, "class_mask": 10}, 8, **options)
    for i, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=rng("cpu", 0, i))
    return module


def prompt(count: int) -> dict[str, torch.Tensor]:
    draw = rng("cpu", 1)
    return {
        "target_metric": torch.rand(count, 2, generator=draw),
        "class_mask": (torch.rand(count, 10, generator=draw) < 0.5).float(),
    }


def test_embeddings_add_and_what_is_left_out_is_null():
    module, asked = conditions(), prompt(4)
    metric = module.encoders["target_metric"](asked["target_metric"])
    mask = module.encoders["class_mask"](asked["class_mask"])
    both = module(asked, 4)
    torch.testing.assert_close(both, module.bias + metric + mask)
    alone = module({"class_mask": asked["class_mask"]}, 4)
    torch.testing.assert_close(alone, module.bias + module.null["target_metric"] + mask)
    torch.testing.assert_close(module({}, 4), (module.bias + sum(module.null.values())).expand(4, -1))


def test_a_dropped_condition_is_one_that_was_not_given():
    module, asked = conditions(), prompt(4)
    keep = torch.tensor([[True, False, True, False], [True, True, False, False]])
    found = module(asked, 4, keep)
    for i in range(4):
        given = {name: value[i : i + 1] for (name, value), kept in zip(asked.items(), keep[:, i], strict=True) if kept}
        torch.testing.assert_close(found[i : i + 1], module(given, 1))


def test_all_conditions_are_dropped_at_once_and_each_of_several_on_its_own():
    keep = conditions(dropout=0.3).keep(20_000, rng("cpu", 0))
    assert keep.shape == (2, 20_000)
    assert keep.float().mean(1).tolist() == pytest.approx([0.49, 0.49], abs=0.02)
    assert (keep[0] & keep[1]).float().mean().item() == pytest.approx(0.7**3, abs=0.02)
    assert (~keep).all(0).float().mean().item() == pytest.approx(0.3 + 0.7 * 0.3**2, abs=0.02)
    alone = Conditions({"class_mask": 10}, 8, 0.3).keep(20_000, rng("cpu", 0))
    assert alone.shape == (1, 20_000) and alone.float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert conditions(dropout=0.0).keep(100, rng("cpu", 0)).all()


def test_an_unknown_start_is_not_a_start_with_some_metric():
    module = TargetMetric(8)
    module.scale.fit(METRICS["losses"])
    values = torch.tensor([[math.nan, 0.3], [0.3, 0.3], [float(module.scale.center), 0.3], [math.nan, 0.1]])
    embedding = module(values)
    assert embedding.isfinite().all()
    assert len({tuple(row.tolist()) for row in embedding}) == 4
    module.mlp = nn.Identity()
    start, wanted, change = module(values[:2]).unflatten(1, (3, -1)).unbind(1)
    assert not start[0].any() and not change[0].any() and start[1].any()  # change[1] is none, which has a cosine
    assert torch.equal(wanted[0], wanted[1]) and change[1].any()


def test_gradients_are_finite_for_unknown_and_unreachable_values():
    module = conditions()
    module.fit({"target_metric": METRICS["losses"].view(-1, 2)})
    asked = prompt(4) | {"target_metric": torch.tensor([[math.nan, 0.0], [2.0, -50.0], [0.1, 1e4], [0.5, 0.5]])}
    module(asked, 4, module.keep(4, rng("cpu", 0))).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_an_unconditional_generator_has_an_embedding_too():
    module = Conditions({}, 8)
    assert module({}, 3).shape == (3, 8)
    assert module.keep(3, rng("cpu", 0)).shape == (0, 3)


def test_wrong_prompts_are_refused_by_name():
    module = conditions()
    with pytest.raises(ConfigError, match=r"knows the conditions \['class_mask', 'target_metric'\], not \['text'\]"):
        module({"text": torch.zeros(1, 384)}, 1)
    with pytest.raises(ConfigError, match=r"'target_metric' takes \[4, 2\], got \[4, 3\]"):
        module({"target_metric": torch.zeros(4, 3)}, 4)
    with pytest.raises(ConfigError, match=r"no condition 'class_masks'; did you mean 'class_mask'\?"):
        prompt_features(("class_masks",))
    with pytest.raises(ConfigError, match=r"no condition 'xyz'; known: class_mask"):
        prompt_features(("xyz",))
