"""One product for all networks: the same numbers as a product for each, with shared inputs and with their own."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from Gpt.networks import MLP, ConvNet
from Gpt.population.functional import Population
from Gpt.population.shared_inputs import with_shared_inputs
from Gpt.structure import Structure

TEMPLATES = {
    "mlp": (lambda: MLP(12, 5, 3), (12,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)), (12,)),
    "convnet": (ConvNet, (3, 8, 8)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (7, 4)),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_outputs_are_those_of_the_networks_one_by_one(name, shared):
    build, shape = TEMPLATES[name]
    template = build().double()
    structure = Structure.of(template)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, structure.size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(*(() if shared else (4,)), 9, *shape, generator=generator, dtype=torch.float64)
    net = with_shared_inputs(template)

    def one(row, x):
        return functional_call(net, structure.unflatten(row), (x,))

    found = vmap(one, in_dims=(0, None if shared else 0))(weights, inputs)
    for i in range(4):
        own = inputs if shared else inputs[i]
        torch.testing.assert_close(found[i], functional_call(template, structure.unflatten(weights[i]), (own,)))


def test_gradients_outside_vmap_are_those_of_the_networks_one_by_one():
    template = MLP(12, 5, 3).double()
    structure, generator = Structure.of(template), torch.Generator().manual_seed(0)
    weights = torch.randn(4, structure.size, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(9, 12, generator=generator, dtype=torch.float64)

    def one(row, net):
        return functional_call(net, structure.unflatten(row), (inputs,))

    together = vmap(partial(one, net=with_shared_inputs(template)))(weights)
    alone = torch.stack([one(row, template) for row in weights])
    found, expected = [torch.autograd.grad(outputs.sin().sum(), weights)[0] for outputs in (together, alone)]
    torch.testing.assert_close(found, expected)


def batched_products(template):
    population = Population(template, Structure.of(template), torch.randn(4, 83))
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        population(torch.randn(9, 12))
    return {event.key: event.count for event in profile.key_averages()}["aten::bmm"]


def test_only_layers_with_inputs_of_their_own_take_a_product_for_each_network():
    assert batched_products(MLP(12, 5, 3)) == 2
    assert batched_products(with_shared_inputs(MLP(12, 5, 3))) == 1


def test_the_template_is_left_alone():
    template = MLP(12, 5, 3)
    with_shared_inputs(template)
    assert type(template.fc1) is nn.Linear
