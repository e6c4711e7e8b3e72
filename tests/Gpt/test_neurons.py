"""The graph of neurons: every weight has one place, units are interchangeable, and the transformer keeps them so."""

import pytest
import torch
from torch import nn

from Gpt.errors import StructureError
from Gpt.models.graph_transformer import GraphTransformer
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.neurons import NeuronGraph
from Gpt.seeds import rng
from Gpt.structure import Structure

STRUCTURES = {
    "mlp": Structure.of(MLP(6, 5, 3), MLP.symmetry),
    "convnet": Structure.of(ConvNet(), ConvNet.symmetry),
    "actor": Structure.of(CartPoleActor(), CartPoleActor.symmetry),
}


def test_the_mnist_mlp_is_eleven_tokens():
    graph = NeuronGraph(Structure.of(MLP(), MLP.symmetry))
    assert graph.shapes == ((10, 784 + 1 + 10), (1, 10))
    assert graph.joints == ()


def test_a_token_is_what_touches_one_unit():
    structure = Structure.of(MLP(2, 3, 2), MLP.symmetry)
    (hidden, rest), _ = NeuronGraph(structure).encode(torch.arange(float(structure.size))[None])
    net = structure.unflatten(torch.arange(float(structure.size)))
    for unit in range(3):
        expected = torch.cat([net["fc1.weight"][unit], net["fc1.bias"][unit : unit + 1], net["fc2.weight"][:, unit]])
        assert torch.equal(hidden[0, unit], expected)
    assert torch.equal(rest[0, 0], net["fc2.bias"])


def test_group_names_are_free():
    renamed = {"fc1.weight": ("rest", None), "fc1.bias": ("rest",), "fc2.weight": (None, "rest")}
    dotted = {name: tuple(g and "layers.1" for g in groups) for name, groups in MLP.symmetry.items()}
    for symmetry in (renamed, dotted):
        assert NeuronGraph(Structure.of(MLP(2, 3, 2), symmetry)).shapes == ((3, 5), (1, 2))


def test_what_is_no_graph_is_refused():
    with pytest.raises(StructureError, match="`symmetry` key"):
        NeuronGraph(Structure.of(MLP(2, 3, 2)))
    cube = Structure.of({"core": torch.empty(2, 3, 4)}, {"core": ("a", "b", "c")})
    with pytest.raises(StructureError, match="'core' joins three hidden layers, \\['a', 'b', 'c'\\]"):
        NeuronGraph(cube)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_graph_holds_every_weight_once_and_gives_it_back(name):
    structure = STRUCTURES[name]
    graph = NeuronGraph(structure)
    flat = torch.randn(3, structure.size, generator=rng("cpu", 0), requires_grad=True)
    tokens, joints = graph.encode(flat)
    assert [tuple(token.shape[1:]) for token in tokens] == list(graph.shapes)
    assert [tuple(joint.shape[1:]) for joint in joints] == [(*joint.units, joint.entries) for joint in graph.joints]
    assert sum(block[0].numel() for block in (*tokens, *joints)) == structure.size
    decoded = graph.decode(tokens, joints)
    assert torch.equal(decoded, flat)
    upstream = torch.randn(decoded.shape, generator=rng("cpu", 1))
    assert torch.equal(torch.autograd.grad(decoded, flat, upstream)[0], upstream)


def test_a_joint_holds_the_weights_between_two_units():
    structure = STRUCTURES["convnet"]
    graph = NeuronGraph(structure)
    flat = torch.arange(float(structure.size))[None]
    (first, second, rest), (joint,) = graph.encode(flat)
    net = structure.unflatten(flat[0])
    assert (graph.joints[0].types, graph.joints[0].units) == ((1, 0), (32, 16))
    assert torch.equal(joint[0], net["conv2.weight"].flatten(2))
    assert torch.equal(first[0], net["conv1.weight"].flatten(1))
    assert torch.equal(second[0], net["fc.weight"].T)
    assert torch.equal(rest[0, 0], net["fc.bias"])


def test_blocks_of_an_axis_stay_with_their_unit():
    """Channels flattened into a linear layer: three channels of four pixels each, and one group on both axes."""
    symmetry = {
        "bias": ("channels",),
        "into": (None, "channels"),
        "on": ("hidden", "channels"),
        "back": ("hidden", "hidden"),
    }
    shapes = {"bias": (3,), "into": (2, 12), "on": (5, 12), "back": (5, 5)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    structure = Structure.of(state, symmetry)
    graph = NeuronGraph(structure)
    flat = torch.arange(float(structure.size))[None]
    (channels, _), (on, back) = graph.encode(flat)
    net = structure.unflatten(flat[0])
    assert graph.shapes == ((3, 1 + 8), (5, 0))
    assert torch.equal(channels[0, 2], torch.cat([net["bias"][2:], net["into"][:, 8:12].flatten()]))
    assert torch.equal(on[0, 4, 2], net["on"][4, 8:12])
    assert torch.equal(back[0, :, :, 0], net["back"])


@pytest.mark.parametrize("name", STRUCTURES)
def test_renaming_hidden_units_renames_the_output(name):
    structure = STRUCTURES[name]
    draw = rng("cpu", 0, "equivariance")
    network = GraphTransformer(NeuronGraph(structure), width=16, depth=2, heads=2, channels=4).double()
    for parameter in network.parameters():  # heads and gates start at zero, which would hide everything
        nn.init.normal_(parameter, std=0.3, generator=draw)
    r_t, start = torch.randn(2, 4, structure.size, generator=draw, dtype=torch.float64)
    level = torch.rand(4, generator=draw, dtype=torch.float64)
    condition = torch.randn(4, 16, generator=draw, dtype=torch.float64)
    index = structure.permutation_index(structure.random_permutations(4, draw))
    plain = network(r_t, start, condition, 1 - level, level)
    renamed = network(r_t.gather(1, index), start.gather(1, index), condition, 1 - level, level)
    torch.testing.assert_close(renamed, plain.gather(1, index), rtol=1e-9, atol=1e-9)
    for t in structure.tensors:
        assert not torch.allclose(renamed[:, t.slice], plain[:, t.slice]) or not any(t.groups), t.name
