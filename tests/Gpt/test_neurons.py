"""Neuron tokens: every weight is in one, units are interchangeable, and the transformer keeps them so."""

import pytest
import torch
from torch import nn

from Gpt.errors import StructureError
from Gpt.models.gpt import NeuronTransformer
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.neurons import NeuronTokens
from Gpt.seeds import rng
from Gpt.structure import Structure

STRUCTURES = {
    "mlp": Structure.of(MLP(6, 5, 3), MLP.symmetry),
    "convnet": Structure.of(ConvNet(), ConvNet.symmetry),
    "actor": Structure.of(CartPoleActor(), CartPoleActor.symmetry),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_tokens_hold_every_weight_and_give_it_back(name):
    structure = STRUCTURES[name]
    tokens = NeuronTokens(structure)
    flat = torch.randn(3, structure.size, generator=rng("cpu", 0))
    blocks = tokens.encode(flat)
    assert [tuple(block.shape[1:]) for block in blocks] == list(tokens.shapes)
    assert sum(units for units, _ in tokens.shapes) == tokens.count
    torch.testing.assert_close(tokens.decode(blocks), flat, rtol=0, atol=0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_gradient_of_decoding_is_that_of_indexing(name):
    tokens = NeuronTokens(STRUCTURES[name])
    draw = rng("cpu", 1)
    shapes = [(2, *shape) for shape in tokens.shapes]
    blocks = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, STRUCTURES[name].size, generator=draw, dtype=torch.float64)
    slots = torch.cat([block.flatten(1) for block in blocks], dim=1)
    expected = torch.autograd.grad((slots[:, tokens.first] + slots[:, tokens.last]) / 2, blocks, upstream)
    torch.testing.assert_close(torch.autograd.grad(tokens.decode(blocks), blocks, upstream), expected)


def test_the_mnist_mlp_is_eleven_tokens():
    tokens = NeuronTokens(Structure.of(MLP(), MLP.symmetry))
    assert tokens.shapes == ((10, 784 + 1 + 10), (1, 10))
    assert tokens.count == 11


def test_only_networks_with_joined_hidden_layers_are_entangled():
    assert [NeuronTokens(s).entangled for s in STRUCTURES.values()] == [False, True, True]


def test_a_weight_that_two_units_hold_becomes_their_mean():
    structure = STRUCTURES["actor"]
    tokens = NeuronTokens(structure)
    first, second, rest = tokens.encode(torch.zeros(1, structure.size))
    decoded = structure.unflatten(tokens.decode([first + 1, second + 3, rest + 5]))
    assert (decoded["fc1.weight"] == 1).all()
    assert (decoded["fc2.weight"] == 2).all()
    assert (decoded["fc3.weight"] == 3).all()
    assert (decoded["fc3.bias"] == 5).all()
    assert (decoded["log_std"] == 5).all()


def test_a_token_is_what_touches_one_unit():
    structure = Structure.of(MLP(2, 3, 2), MLP.symmetry)
    hidden, rest = NeuronTokens(structure).encode(torch.arange(float(structure.size))[None])
    net = structure.unflatten(torch.arange(float(structure.size)))
    for unit in range(3):
        expected = torch.cat([net["fc1.weight"][unit], net["fc1.bias"][unit : unit + 1], net["fc2.weight"][:, unit]])
        assert torch.equal(hidden[0, unit], expected)
    assert torch.equal(rest[0, 0], net["fc2.bias"])


def test_group_names_are_free():
    renamed = {"fc1.weight": ("rest", None), "fc1.bias": ("rest",), "fc2.weight": (None, "rest")}
    dotted = {name: tuple(g and "layers.1" for g in groups) for name, groups in MLP.symmetry.items()}
    for symmetry in (renamed, dotted):
        tokens = NeuronTokens(Structure.of(MLP(2, 3, 2), symmetry))
        assert tokens.shapes == ((3, 5), (1, 2))


def test_what_has_no_units_is_refused():
    with pytest.raises(StructureError, match="`symmetry` key"):
        NeuronTokens(Structure.of(MLP(2, 3, 2)))
    square = {"weight": ("n", "n")}
    with pytest.raises(StructureError, match="'weight' has the symmetry group 'n' on two axes"):
        NeuronTokens(Structure.of(nn.Linear(3, 3, bias=False), square))


def test_renaming_hidden_units_renames_the_output():
    structure = STRUCTURES["mlp"]
    draw = rng("cpu", 0, "equivariance")
    network = NeuronTransformer(NeuronTokens(structure), width=16, depth=2, heads=2).double()
    for parameter in network.parameters():  # heads and gates start at zero, which would hide everything
        nn.init.normal_(parameter, std=0.3, generator=draw)
    r_t, start = torch.randn(2, 4, structure.size, generator=draw, dtype=torch.float64)
    level = torch.rand(4, generator=draw, dtype=torch.float64)
    condition = torch.randn(4, 16, generator=draw, dtype=torch.float64)
    index = structure.permutation_index(structure.random_permutations(4, draw))
    plain = network(r_t, start, 1 - level, level, condition)
    renamed = network(r_t.gather(1, index), start.gather(1, index), 1 - level, level, condition)
    torch.testing.assert_close(renamed, plain.gather(1, index), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(renamed, plain)
