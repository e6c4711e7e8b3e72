"""The denoiser of both generators: renaming units renames its estimate, and every weight hears of every other."""

import pytest
import torch

from Gpt.errors import ConfigError
from Gpt.models.graph_transformer import GraphTransformer
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.neurons import NeuronGraph
from Gpt.seeds import rng
from Gpt.structure import Structure

CHAIN = {"first": ("a", None), "middle": ("b", "a"), "last": ("c", "b"), "out": (None, "c")}
STRUCTURES = {
    "mlp": Structure.of(MLP(6, 5, 3), MLP.symmetry),
    "convnet": Structure.of(ConvNet(), ConvNet.symmetry),
    "actor": Structure.of(CartPoleActor(), CartPoleActor.symmetry),
    # Units of b are touched by joints alone, so that their tokens begin empty.
    "chain": Structure.of({name: torch.empty(3, 3) for name in CHAIN}, CHAIN),
    "residual": Structure.of({"in": torch.empty(4, 2), "on": torch.empty(4, 4)}, {"in": ("a", None), "on": ("a", "a")}),
}
WIDTH = 16


def build(structure: Structure, seed: int | None = 0) -> GraphTransformer:
    """In float64; with a seed, all parameters are drawn: heads and gates start at zero, which would hide everything."""
    with torch.random.fork_rng(devices=[]):
        network = GraphTransformer(NeuronGraph(structure), WIDTH, depth=2, heads=2, channels=4).double()
    if seed is not None:
        draw = rng("cpu", seed, "parameters")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.3, generator=draw)
    return network


def inputs(structure: Structure, count: int = 4) -> list[torch.Tensor]:
    """Noised weights, a given network, a request, alpha and sigma."""
    draw = rng("cpu", 0, "inputs")
    noised, given = torch.randn(2, count, structure.size, generator=draw, dtype=torch.float64)
    request = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64)
    sigma = torch.rand(count, generator=draw, dtype=torch.float64)
    return [noised, given, request, 1 - sigma, sigma]


@pytest.mark.parametrize("name", STRUCTURES)
def test_renaming_hidden_units_renames_the_estimate(name):
    structure = STRUCTURES[name]
    network = build(structure)
    noised, given, *rest = inputs(structure)
    index = structure.permutation_index(structure.random_permutations(4, rng("cpu", 1)))
    plain = network(noised, given, *rest)
    renamed = network(noised.gather(1, index), given.gather(1, index), *rest)
    torch.testing.assert_close(renamed, plain.gather(1, index), rtol=1e-9, atol=1e-9)
    for t in structure.tensors:
        assert any(t.groups) != torch.allclose(renamed[:, t.slice], plain[:, t.slice]), t.name


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_weight_hears_of_every_other(name):
    structure = STRUCTURES[name]
    network = build(structure)
    noised, *rest = inputs(structure, count=1)
    noised.requires_grad_()
    estimate = network(noised, *rest)
    for t in structure.tensors:
        (heard,) = torch.autograd.grad(estimate[0, t.offset], noised, retain_graph=True)
        assert (heard != 0).all(), t.name


@pytest.mark.parametrize("name", STRUCTURES)
def test_untrained_it_is_the_best_estimate_of_each_number_alone(name):
    """Of unit-variance weights: alpha / (alpha² + sigma²) of what is seen."""
    structure = STRUCTURES[name]
    noised, given, request, alpha, sigma = inputs(structure)
    expected = (alpha / (alpha.square() + sigma.square()))[:, None] * noised
    torch.testing.assert_close(build(structure, seed=None)(noised, given, request, alpha, sigma), expected)


def test_codes_tell_units_apart():
    structure = STRUCTURES["actor"]
    network, (noised, _, *rest) = build(structure), inputs(structure)
    alike = torch.ones_like(noised)
    tokens = sum(units for units, _ in network.graph.shapes)
    codes = torch.randn(4, tokens, WIDTH, generator=rng("cpu", 2), dtype=torch.float64)
    without = structure.unflatten(network(alike, alike, *rest))["fc2.weight"]
    told = structure.unflatten(network(alike, alike, *rest, codes=codes))["fc2.weight"]
    assert without.flatten(1).std(1).max() < 1e-9 < 1e-3 < told.std(1).min() and told.std(2).min() > 1e-3


def test_muon_may_train_every_matrix_inside_the_blocks_but_the_modulation():
    network = build(STRUCTURES["actor"])
    found = {id(matrix) for matrix in network.hidden_matrices()}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in found}
    inside = {name for name, p in network.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert names == {name for name in inside if "modulation" not in name} and any("exchanges" in n for n in names)


def test_networks_too_large_for_a_state_of_every_weight_are_refused_before_memory_is():
    """ResNet-18's 1.2 million kernels, without a network of that size being built."""
    weight = torch.empty(1100, 1100, 3, 3, device="meta")
    structure = Structure.of({"a.weight": weight, "b.weight": weight}, {"a.weight": ("out", "in", None, None)})
    with pytest.raises(ConfigError, match=r"32 numbers .* 1,210,000 pairs of units .* 2.3 times .*policy=within_layer"):
        GraphTransformer(NeuronGraph(structure), width=8, depth=1, heads=1, channels=32)
