"""Updates of many networks at once are torch.optim's, one network after the other."""

from functools import partial

import pytest
import torch
from torch import nn

from Gpt.population import updates
from Gpt.seeds import rng
from Gpt.structure import Structure

RULES = {
    "sgd": (partial(updates.sgd, momentum=0.0), torch.optim.SGD),
    "momentum": (
        partial(updates.sgd, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        partial(updates.sgd, momentum=0.8, nesterov=True),
        partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    ),
    "adam": (partial(updates.adam, weight_decay=0.1), partial(torch.optim.Adam, weight_decay=0.1)),
    "adamw": (
        partial(updates.adam, decoupled=True, weight_decay=0.1),
        partial(torch.optim.AdamW, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize(("rule", "optimiser"), RULES.values(), ids=RULES)
def test_every_network_moves_as_by_torch_optim_at_its_own_rate(rule, optimiser):
    draw = rng("cpu", 0)
    start, gradients = torch.randn(3, 5, generator=draw), torch.randn(6, 3, 5, generator=draw)
    rates = torch.tensor([[0.3], [0.01], [0.1]])
    state = updates.initial_state(start.clone(), square=True)
    update = rule(torch.ones(5))
    for gradient in gradients:
        update(state, gradient, rates)
        state["iteration"] += 1
    for p in range(3):
        row = start[p].clone().requires_grad_()
        reference = optimiser([row], lr=float(rates[p]))
        for gradient in gradients:
            row.grad = gradient[p].clone()
            reference.step()
        torch.testing.assert_close(state["weights"][p], row.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rule", "_"), RULES.values(), ids=RULES)
def test_frozen_parameters_and_running_statistics_stay(rule, _):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net[0].bias.requires_grad_(False)
    structure = Structure.of(net)
    mask = updates.trainable(net, structure)
    moved = {t.name: mask[t.slice].unique().tolist() for t in structure.tensors}
    assert moved == {
        "0.weight": [1.0],
        "0.bias": [0.0],
        "1.weight": [1.0],
        "1.bias": [1.0],
        "1.running_mean": [0.0],
        "1.running_var": [0.0],
    }
    start = torch.randn(2, structure.size, generator=rng("cpu", 0))
    state = updates.initial_state(start.clone(), square=True)
    rule(mask)(state, torch.ones_like(start), 0.1)
    assert torch.equal(state["weights"][:, mask == 0], start[:, mask == 0])
    assert (state["weights"][:, mask == 1] != start[:, mask == 1]).all()
