"""Many networks at once are the networks one by one."""

import pytest
import torch
from torch import nn

from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.population import Population, stack_initial
from Gpt.seeds import rng
from Gpt.structure import Structure


class Tied(nn.Module):
    """A tied auto-encoder with batch norm and dropout: nothing that a careless vmap would get right."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.drop(self.norm(self.encode(x)).relu()))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: MLP(6, 5, 3), (7, 6)), (ConvNet, (2, 3, 8, 8)), (CartPoleActor, (5, 4)), (Tied, (5, 4))],
)
def test_a_population_is_its_networks_one_by_one(make, shape):
    net = make()
    structure = Structure.of(net)
    weights = stack_initial(make, structure, [1, 2, 3])
    for t in structure.tensors:
        if t.kind == "running_var":
            weights[:, t.slice] = torch.rand(t.numel, generator=rng("cpu", 0)) + 0.5
    population = Population(net, structure, weights)
    shared = torch.randn(shape, generator=rng("cpu", 1))
    own = torch.randn(3, *shape, generator=rng("cpu", 2))
    together, each = population(shared), population.each(own)
    assert len(population) == 3
    for p, row in enumerate(weights):
        single = make().eval()
        single.load_state_dict(structure.state_dict(row))
        torch.testing.assert_close(together[p], single(shared), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each[p], single(own[p]), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_network_and_the_template_is_left_alone():
    net = MLP(6, 5, 3).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    structure = Structure.of(net)
    weights = stack_initial(lambda: MLP(6, 5, 3), structure, [1, 2]).requires_grad_()
    Population(net, structure, weights)(torch.ones(3, 6))[1].sum().backward()
    assert (weights.grad[0] == 0).all()
    assert weights.grad[1].abs().sum() > 0
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_initial_networks_are_functions_of_their_seeds():
    structure = Structure.of(MLP(6, 5, 3))
    before = torch.get_rng_state()
    rows = stack_initial(lambda: MLP(6, 5, 3), structure, [5, 6, 5])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(stack_initial(lambda: MLP(6, 5, 3), structure, [6])[0], rows[1])
