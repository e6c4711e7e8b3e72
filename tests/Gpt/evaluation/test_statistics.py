import math

import pytest
import torch
from scipy.stats import mannwhitneyu

from Gpt.evaluation.statistics import bootstrap_interval, data_copying_z, overlap, prompt_alignment, trace


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_bootstrap_interval_matches_the_normal_approximation():
    values = 3 + 2 * normal(400)
    interval = bootstrap_interval(values, seed=1)
    error = float(values.std()) / 20
    assert interval.mean == pytest.approx(float(values.double().mean()))
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.15 * error)
    assert interval.count == 400


def test_bootstrap_interval_covers_the_true_mean_about_95_times_in_100():
    intervals = [bootstrap_interval(normal(50, seed=i), seed=i, resamples=500) for i in range(200)]
    covered = sum(i.low <= 0 <= i.high for i in intervals)
    assert 178 <= covered <= 198


def test_bootstrap_interval_is_a_function_of_its_seed_and_leaves_global_randomness_alone():
    state = torch.get_rng_state()
    assert bootstrap_interval(normal(30), seed=4) == bootstrap_interval(normal(30), seed=4)
    assert bootstrap_interval(normal(30), seed=4) != bootstrap_interval(normal(30), seed=5)
    assert torch.equal(state, torch.get_rng_state())


def test_bootstrap_interval_of_one_value_and_of_infinite_ones():
    single = bootstrap_interval(torch.tensor([2.5]))
    assert (single.mean, single.low, single.high) == (2.5, 2.5, 2.5)
    broken = bootstrap_interval(torch.tensor([1.0, 2.0, 3.0, torch.inf]))
    assert broken.mean == math.inf and broken.high == math.inf and not math.isnan(broken.low)


def test_prompt_alignment_in_closed_form():
    prompted = torch.tensor([[1.0, 2.0, 3.0]]).repeat(4, 1)
    achieved = torch.stack([prompted[0], torch.full((3,), 2.0), prompted[0].flip(0), prompted[0] + 1])
    expected = torch.tensor([1.0, 0.0, -3.0, 1 - 3 / 2], dtype=torch.float64)
    torch.testing.assert_close(prompt_alignment(prompted, achieved), expected, rtol=0, atol=1e-7)


def test_prompt_alignment_of_a_broken_network_is_minus_infinity():
    assert prompt_alignment(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, torch.inf]])).item() == -math.inf


def test_data_copying_z_agrees_with_scipy_and_has_the_right_sign():
    a, b = normal(40).abs(), normal(60, seed=1).abs() + 0.2
    u = mannwhitneyu(a, b).statistic
    expected = (u - 40 * 60 / 2) / math.sqrt(40 * 60 * 101 / 12)
    assert data_copying_z(a, b) == pytest.approx(expected)
    assert data_copying_z(torch.zeros(40), b) < -8 < 8 < data_copying_z(b + 10, b)
    assert data_copying_z(b, b) == 0


def test_overlap_by_hand():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(overlap(a, b), torch.tensor([[1, 1 / 3, 0], [0, 0, 1]]))


def test_trace_bounds_its_mean():
    found = trace("t", "optimiser", [0, 5], [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])])
    assert (found.x, found.mean) == ([0.0, 5.0], [2.0, 2.0])
    assert found.low[0] < 2 < found.high[0] and found.low[1] == found.high[1] == 2
