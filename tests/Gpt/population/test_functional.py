"""Many networks at once are the networks one by one."""

import pytest
import torch
from torch import nn

from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.population.functional import Population, activations, piece, population_gradient, stack_initial
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


@pytest.mark.parametrize("numbers", [1, 20_000, 2**22])
@pytest.mark.parametrize("make", [ConvNet, lambda: nn.Sequential(ConvNet(), nn.BatchNorm1d(10))])
def test_networks_and_examples_come_in_pieces_without_a_trace(make, numbers, monkeypatch):
    template = make()
    structure = Structure.of(template)
    weights = stack_initial(make, structure, [1, 2, 3, 4, 5])
    shared = torch.randn(7, 3, 8, 8, generator=rng("cpu", 1))
    own = torch.randn(5, 7, 3, 8, 8, generator=rng("cpu", 2))
    labels = torch.randint(10, (5, 7), generator=rng("cpu", 3))
    found = []
    for limit in (2**30, numbers):
        monkeypatch.setattr("Gpt.population.functional.CPU_NUMBERS", limit)
        population, trained = Population(template, structure, weights), weights.clone()
        gradient = population_gradient(template, structure, shared[:1])(trained, own, labels)
        found.append([population(shared), population.each(own), gradient, trained])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-4)


def test_a_pass_holds_as_much_as_it_may_and_one_network_at_least(monkeypatch):
    monkeypatch.setattr("Gpt.population.functional.cuda_numbers", lambda device: 2**30)
    numbers = activations(ConvNet(), torch.zeros(1, 3, 32, 32))
    assert numbers == 2 * (16 * 16 * 16 + 32 * 16 * 16 + 10)
    for examples in (1, 40, 10_000):
        networks, at_once = piece(numbers, examples, torch.device("cpu"))
        assert numbers * networks * at_once <= 2**22 and at_once <= examples
    assert piece(2**40, 10, torch.device("cpu")) == (1, 1)
    assert piece(20, 10_000, torch.device("cuda"))[0] > piece(20, 10_000, torch.device("cpu"))[0]
    networks, at_once = piece(40, 10_000, torch.device("cuda"), 2048)
    assert at_once == 10_000 and 2048 <= networks <= 2**30 // (40 * at_once)
    assert piece(numbers, 10_000, torch.device("cuda"), 2048)[1] == 1024


def test_gradients_are_those_of_each_network_alone_and_dropout_is_left_out():
    template = Tied().train()
    structure = Structure.of(template)
    weights = stack_initial(Tied, structure, [1, 2])
    inputs, labels = torch.randn(2, 6, 4, generator=rng("cpu", 0)), torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)
    trained = weights.clone()
    gradient = population_gradient(template, structure, inputs[0, :1])(trained, inputs, labels)
    for p, row in enumerate(weights):
        net = Tied().train()
        net.load_state_dict(structure.state_dict(row))
        net.drop.p = 0.0
        nn.functional.cross_entropy(net(inputs[p]), labels[p]).backward()
        expected = {name: value.grad for name, value in net.named_parameters()}
        buffers = {name: torch.zeros_like(value) for name, value in net.named_buffers() if value.is_floating_point()}
        torch.testing.assert_close(gradient[p], structure.flatten(expected | buffers), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained[p], structure.flatten(net.state_dict()).detach())


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
