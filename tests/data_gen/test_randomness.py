import pytest
import torch
from scipy import stats

from data_gen.randomness import below, hash32, permuted, random_words, run_keys


def whole_epoch(keys, epoch, length):
    return permuted(keys, epoch, torch.arange(length), length)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 16, 97, 897, 1000, 1097, 8191])
def test_every_run_and_epoch_is_a_permutation(length):
    keys = run_keys(0, "batches", list(range(20)))
    for epoch in (0, 1, 1000):
        order = whole_epoch(keys, epoch, length)
        assert torch.equal(order.sort(1).values, torch.arange(length).expand(20, -1))


def test_permutations_differ_between_runs_and_epochs():
    keys = run_keys(0, "batches", list(range(50)))
    orders = torch.cat([whole_epoch(keys, epoch, 97) for epoch in range(20)])
    assert len(torch.unique(orders, dim=0)) == len(orders)
    # Fixed points of independent uniform permutations: one each on average, whatever pair is compared.
    agreements = (orders[:, None] == orders[None]).sum(-1).fill_diagonal_(0).float()
    assert abs(agreements.sum() / (1000 * 999) - 1) < 0.01


@pytest.mark.parametrize("length", [24, 97, 100, 897])
def test_permutations_look_uniform(length):
    keys = run_keys(1, "batches", list(range(20000)))
    order = permuted(keys, 3, torch.tensor([0, 1, length // 2, length - 1]), length)
    for column in order.T:
        assert stats.chisquare(torch.bincount(column, minlength=length)).pvalue > 1e-3
    steps = (order[:, 1] - order[:, 0]) % length  # neighbours go to independent places: every difference but zero
    assert stats.chisquare(torch.bincount(steps, minlength=length)[1:]).pvalue > 1e-3


@pytest.mark.parametrize("length", [97, 1097])
def test_permutations_have_as_many_ascents_and_as_much_trend_as_random_ones(length):
    order = whole_epoch(run_keys(3, "batches", list(range(1000))), 2, length).double()
    ascents = (order.diff(dim=1) > 0).double().sum(1)
    # Eulerian distribution: mean (n - 1) / 2, variance (n + 1) / 12.
    assert abs(ascents.mean() - (length - 1) / 2) < 4 * ((length + 1) / 12 / 1000) ** 0.5
    assert abs(12 * ascents.var() / (length + 1) - 1) < 0.2
    place = torch.arange(length).double()
    trend = torch.stack([torch.corrcoef(torch.stack([row, place]))[0, 1] for row in order])
    assert stats.kstest(trend * (length - 1) ** 0.5, "norm").pvalue > 1e-3


def test_all_orders_of_four_are_equally_likely():
    order = whole_epoch(run_keys(2, "batches", list(range(24000))), 0, 4)
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_entries_do_not_depend_on_which_others_are_asked_for():
    keys = run_keys(0, "batches", [3, 1, 4])
    order = whole_epoch(keys, 7, 1097)
    positions = torch.tensor([5, 1096, 0])
    assert torch.equal(permuted(keys[1:2], torch.tensor(7), positions, 1097), order[1:2, positions])


def test_hash_is_injective_and_stays_in_32_bits():
    words = torch.cat([torch.arange(100_000), 2**32 - 1 - torch.arange(100_000)])
    hashed = hash32(words)
    assert len(torch.unique(hashed)) == len(words)
    assert hashed.min() >= 0 and hashed.max() < 2**32


def test_random_words_are_uniform_and_uncorrelated():
    words = random_words(run_keys(0, "augmentation", list(range(200))), 5, torch.arange(500))
    assert stats.kstest(words.flatten() / 2**32, "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(below(words, 162).flatten(), minlength=162)).pvalue > 1e-3
    correlation = torch.corrcoef(torch.stack([words[:, :-1].flatten().double(), words[:, 1:].flatten().double()]))[0, 1]
    assert abs(correlation) < 0.015
