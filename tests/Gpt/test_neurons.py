"""The graph of neurons: every weight has one place, and renaming units moves it with them."""

import pytest
import torch

from Gpt.errors import StructureError
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
    with pytest.raises(StructureError, match="hidden units that may be renamed.* `symmetry`"):
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
def test_renaming_hidden_units_reorders_tokens_rows_and_columns(name):
    structure = STRUCTURES[name]
    graph, groups = NeuronGraph(structure), list(structure.groups)
    permutations = structure.random_permutations(1, rng("cpu", 0))
    flat = torch.randn(1, structure.size, generator=rng("cpu", 1))
    tokens, joints = graph.encode(flat)
    renamed_tokens, renamed_joints = graph.encode(flat.gather(1, structure.permutation_index(permutations)))
    order = [permutations[group][0] for group in groups]
    for token, renamed, units in zip(tokens, renamed_tokens, order, strict=False):
        assert torch.equal(renamed, token[:, units])
    for joint, renamed, ends in zip(joints, renamed_joints, graph.joints, strict=True):
        rows, columns = (order[end] for end in ends.types)
        assert torch.equal(renamed, joint[:, rows][:, :, columns])


def test_what_has_no_order_is_a_mean_over_renamings():
    structure = STRUCTURES["actor"]
    graph = NeuronGraph(structure)
    flat = torch.randn(1, structure.size, generator=rng("cpu", 0), dtype=torch.float64)
    draws = structure.permutation_index(structure.random_permutations(20_000, rng("cpu", 1)))
    mean = torch.stack([flat[0, index] for index in draws]).mean(0, keepdim=True)
    torch.testing.assert_close(graph.without_order(flat), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(graph.without_order(flat)[0, draws[0]], graph.without_order(flat)[0])
