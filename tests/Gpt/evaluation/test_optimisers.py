from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from Gpt.evaluation import optimisers
from Gpt.evaluation.optimisers import OPTIMISERS, checkpoint_steps, optimise, step_seconds, tune
from Gpt.evaluation.population import test_population as measure
from Gpt.evaluation.prompting import initial_networks
from Gpt.networks import MLP
from Gpt.seeds import rng

TORCH = {
    "SGD, momentum 0.9": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
def test_all_at_once_equals_torch_optim_on_each_network(task, zoo, optimiser):
    starts = initial_networks(zoo, task, "test", 3, "cpu").weights
    rates = [0.01, 0.1]
    trained = optimise(task, starts, optimiser, rates, [0, 2, 5], seed=7)
    assert torch.equal(trained[0], starts.expand(2, -1, -1))
    x, y = task.data("train")
    for i, rate in enumerate(rates):
        for j, start in enumerate(starts):
            net = MLP(6, 4, 3)
            net.load_state_dict(task.structure.state_dict(start))
            rule = TORCH[optimiser.name](net.parameters(), lr=rate)
            draw = rng("cpu", 7, "mini-batches")
            for step in range(5):
                batch = torch.randint(len(y), (3, 16), generator=draw)[j]
                rule.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                rule.step()
                if step == 1:
                    torch.testing.assert_close(trained[1, i, j], task.structure.flatten(net.state_dict()).detach())
            torch.testing.assert_close(trained[2, i, j], task.structure.flatten(net.state_dict()).detach())


def test_tuning_picks_the_grids_best_rate_on_validation_data_for_every_budget(task, zoo):
    tuning = initial_networks(zoo, task, "validation", 8, "cpu")
    starts = initial_networks(zoo, task, "test", 6, "cpu")
    tuned, trace = tune(task, OPTIMISERS[0], tuning, starts, budgets=[1, 40, 1], learning_rates=7, seed=0)
    assert [entry.steps for entry in tuned] == [1, 40]
    grid = OPTIMISERS[0].learning_rates(7)
    for entry in tuned:
        everything = optimise(task, tuning.weights, OPTIMISERS[0], grid, [entry.steps], 0)[0]
        losses = [measure(task, networks, "validation")["validation_loss"].mean() for networks in everything]
        assert entry.learning_rate == grid[int(torch.stack(losses).argmin())]
        assert entry.weights.shape == starts.weights.shape
    assert trace.x == [0, 1, 2, 5, 10, 20, 40]
    final = measure(task, tuned[1].weights, "test")["test_loss"].mean()
    assert trace.mean[-1] == pytest.approx(final.item(), rel=1e-5)
    assert trace.mean[-1] < 0.7 * trace.mean[0]


def test_test_data_have_no_say_in_the_learning_rate(task, zoo, misleading):
    tuning = initial_networks(zoo, task, "validation", 4, "cpu")
    rates = []
    for judged in (task, misleading):
        tuned, trace = tune(judged, OPTIMISERS[0], tuning, tuning, budgets=[5, 40], learning_rates=5, seed=0)
        rates.append([entry.learning_rate for entry in tuned])
    assert rates[0] == rates[1] and trace.mean[-1] > 1.5 * trace.mean[0]


def test_learning_rates_are_shared_out_in_chunks(task, zoo, monkeypatch):
    """What each process computes does not depend on how many there are: the same few rates at a time."""
    starts, chunks = initial_networks(zoo, task, "validation", 4, "cpu"), []

    def counted(task, weights, optimiser, rates, steps, seed):
        chunks.append((len(steps), list(rates)))
        return optimise(task, weights, optimiser, rates, steps, seed)

    monkeypatch.setattr(optimisers, "optimise", counted)
    tuned, _ = tune(task, OPTIMISERS[0], starts, starts, budgets=[1, 40], learning_rates=7, seed=0)
    grid = OPTIMISERS[0].learning_rates(7)
    assert chunks[:2] == [(2, grid[:4]), (2, grid[4:])]
    assert [rates for _, rates in chunks[2:]] == sorted([entry.learning_rate] for entry in tuned)


def test_a_rate_that_breaks_networks_is_not_chosen_and_an_edge_is_told(task, zoo):
    wild = replace(OPTIMISERS[0], low=-8.0, high=8.0)
    starts = initial_networks(zoo, task, "validation", 4, "cpu")
    tuned, _ = tune(task, wild, starts, starts, budgets=[20], learning_rates=17, seed=0)
    assert 1e-3 < tuned[0].learning_rate < 2 and not tuned[0].at_edge
    timid = replace(OPTIMISERS[0], low=-8.0, high=-6.0)
    assert tune(task, timid, starts, starts, budgets=[20], learning_rates=3, seed=0)[0][0].at_edge


def test_checkpoints_are_even_on_a_logarithmic_axis_and_hold_the_extra_ones():
    assert checkpoint_steps(30, [7, 99]) == [0, 1, 2, 5, 7, 10, 20, 30]
    assert checkpoint_steps(1) == [0, 1]


def test_works_where_gradients_are_switched_off_and_times_a_step(task, zoo):
    starts = initial_networks(zoo, task, "validation", 4, "cpu")
    with torch.no_grad():
        moved = optimise(task, starts.weights, OPTIMISERS[0], [0.1], [1], 0)[0, 0]
    assert not torch.equal(moved, starts.weights) and not moved.requires_grad
    assert 0 < step_seconds(task, starts, 0, steps=2) < 10
