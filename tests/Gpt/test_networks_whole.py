"""The published sizes, the CNNs' symmetry, and outputs of the right shape."""

import pytest
import torch
from torch.func import functional_call

from Gpt.networks_whole import cifar_resnet18, cifar_vit_tiny, medium_cnn, small_cnn
from Gpt.seeds import rng
from Gpt.structure import Structure

SIZES = [
    (small_cnn, 2_864, 2_864, 28),
    (medium_cnn, 10_853, 10_853, 32),
    (cifar_resnet18, 11_173_962, 11_183_562, 32),
    (cifar_vit_tiny, 5_362_762, 5_362_762, 32),
]


@pytest.mark.parametrize(("constructor", "parameters", "entries", "side"), SIZES)
def test_sizes_are_the_published_ones(constructor, parameters, entries, side):
    net = constructor().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert Structure.of(net).size == entries
    with torch.no_grad():
        assert net(torch.randn(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(("constructor", "side"), [(small_cnn, 28), (medium_cnn, 32)])
def test_renaming_hidden_units_leaves_the_function(constructor, side):
    net = constructor()
    structure = Structure.of(net, net.symmetry)
    weights = structure.flatten(net.state_dict())[None]
    index = structure.permutation_index(structure.random_permutations(1, rng("cpu", 0)))
    renamed = weights.gather(1, index)
    assert not torch.equal(renamed, weights)
    x = torch.randn(4, 3, side, side, generator=rng("cpu", 1))
    outputs = [functional_call(net, structure.unflatten(row), (x,)) for row in (weights[0], renamed[0])]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
