import itertools

import pytest
import torch
from torch import nn

from Gpt.data import alignment
from Gpt.data.alignment import align, is_exact, mutual_distance, permutation_distance
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.population.functional import Population, stack_initial
from Gpt.structure import Structure


def small_mlp() -> MLP:
    return MLP(6, 4, 3)


CASES = {
    "mlp": (small_mlp, (6,)),
    "convnet": (ConvNet, (3, 8, 8)),
    "actor": (CartPoleActor, (4,)),
}


def networks(constructor, count: int, first: int = 0):
    structure = Structure.of(constructor(), constructor().symmetry)
    return structure, stack_initial(constructor, structure, list(range(first, first + count)))


def shuffled(structure: Structure, weights: torch.Tensor, seed: int = 0) -> torch.Tensor:
    permutations = structure.random_permutations(len(weights), torch.Generator().manual_seed(seed))
    return weights.gather(1, structure.permutation_index(permutations))


@pytest.mark.parametrize("name", CASES)
def test_recovers_a_planted_permutation(name):
    structure, weights = networks(CASES[name][0], 5)
    planted = shuffled(structure, weights)
    assert not torch.equal(planted, weights)
    aligned, permutations = align(planted, weights, structure)
    assert torch.equal(aligned, weights)
    assert torch.equal(planted.gather(1, structure.permutation_index(permutations)), aligned)


@pytest.mark.parametrize("name", CASES)
def test_computes_the_same_function_never_moves_away_and_is_idempotent(name):
    constructor, shape = CASES[name]
    structure, weights = networks(constructor, 6)
    reference, weights = weights[0], weights[1:]
    aligned, _ = align(weights, reference, structure)
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(1))
    template = constructor()
    torch.testing.assert_close(
        Population(template, structure, aligned)(x), Population(template, structure, weights)(x), rtol=1e-4, atol=1e-5
    )
    assert ((aligned - reference).norm(dim=1) <= (weights - reference).norm(dim=1) + 1e-4).all()
    again, permutations = align(aligned, reference, structure)
    assert torch.equal(again, aligned)
    assert all(torch.equal(p, torch.arange(p.shape[1]).expand_as(p)) for p in permutations.values())


def test_is_exact_for_one_hidden_layer():
    structure, weights = networks(small_mlp, 6)
    a, b = weights[:2], weights[2:]
    everything = torch.tensor(list(itertools.permutations(range(4))))
    index = structure.permutation_index({"hidden": everything})
    brute = (b[:, index][None] - a[:, None, None]).norm(dim=-1).min(-1).values
    assert is_exact(structure)
    torch.testing.assert_close(permutation_distance(a, b, structure), brute)


@pytest.mark.parametrize("candidates", [None, 3])
def test_near_copies_of_networks_with_units_that_hardly_differ_are_found_exactly(candidates):
    structure, weights = networks(small_mlp, 20)
    units = structure.permutation_index({"hidden": torch.tensor([[0, 0, 2, 3]])})[0]
    weights = weights[:, units] + 1e-3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    copies = shuffled(structure, weights) + 1e-3 * noise
    everything = torch.tensor(list(itertools.permutations(range(4))))
    index = structure.permutation_index({"hidden": everything})
    brute = (weights[:, index][None] - copies[:, None, None]).norm(dim=-1).min(-1).values
    found = permutation_distance(copies, weights, structure, candidates)
    torch.testing.assert_close(found.diagonal(), brute.diagonal(), rtol=1e-4, atol=0)


def test_is_an_upper_bound_close_to_the_optimum_for_two_hidden_layers():
    class Deep(nn.Module):
        symmetry = {
            "a.weight": ("h1", None),
            "a.bias": ("h1",),
            "b.weight": ("h2", "h1"),
            "b.bias": ("h2",),
            "c.weight": (None, "h2"),
        }

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    structure, weights = networks(Deep, 12)
    a, b = weights[:4], weights[4:]
    pairs = list(itertools.product(itertools.permutations(range(3)), itertools.permutations(range(4))))
    index = structure.permutation_index(
        {"h1": torch.tensor([p for p, _ in pairs]), "h2": torch.tensor([q for _, q in pairs])}
    )
    optimum = (b[:, index][None] - a[:, None, None]).norm(dim=-1).min(-1).values
    found = permutation_distance(a, b, structure)
    assert not is_exact(structure)
    assert (found >= optimum - 1e-5).all()
    assert (found / optimum).mean() < 1.05
    assert (found <= torch.cdist(a, b) + 1e-5).all()


def test_keeps_blocks_of_flattened_channels_together():
    class Flattened(nn.Module):
        symmetry = {"conv.weight": ("c", None, None, None), "conv.bias": ("c",), "fc.weight": (None, "c")}

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 5, 3), nn.Linear(5 * 4, 2)

        def forward(self, x):
            return self.fc(self.conv(x).relu().flatten(1))

    structure, weights = networks(Flattened, 3)
    assert torch.equal(align(shuffled(structure, weights), weights, structure)[0], weights)


def test_a_group_on_both_axes_of_a_tensor_still_only_improves():
    class Residual(nn.Module):
        symmetry = {"inp.weight": ("r", None), "mix.weight": ("r", "r"), "out.weight": (None, "r")}

        def __init__(self):
            super().__init__()
            self.inp, self.mix, self.out = (nn.Linear(*s, bias=False) for s in ((3, 6), (6, 6), (6, 2)))

    structure, weights = networks(Residual, 8)
    reference, others = weights[0], weights[1:]
    aligned, _ = align(others, reference, structure)
    assert ((aligned - reference).norm(dim=1) <= (others - reference).norm(dim=1)).all()
    assert torch.equal(align(shuffled(structure, weights), weights, structure)[0], weights)


@pytest.mark.parametrize("name", CASES)
def test_candidates_find_permuted_copies_and_bound_the_rest_from_above(name):
    structure, stored = networks(CASES[name][0], 20)
    copies = shuffled(structure, stored[5:8], seed=3)
    exact = permutation_distance(copies, stored, structure)
    quick = permutation_distance(copies, stored, structure, candidates=4)
    assert torch.equal(quick.argmin(1), torch.tensor([5, 6, 7]))
    assert (quick.min(1).values == 0).all()
    assert (quick >= exact - 1e-4).all()


@pytest.mark.parametrize("name", CASES)
def test_how_many_are_aligned_at_once_changes_nothing(name, monkeypatch):
    structure, weights = networks(CASES[name][0], 7)
    mixed, references = shuffled(structure, weights), weights.flip(0)
    for reference in (weights[0], references):
        whole, permutations = align(mixed, reference, structure)
        monkeypatch.setattr(alignment, "ELEMENTS", 3 * structure.size)
        parts, same = align(mixed, reference, structure)
        monkeypatch.undo()
        assert torch.equal(parts, whole)
        assert all(torch.equal(same[group], permutations[group]) for group in structure.groups)


@pytest.mark.parametrize("name", CASES)
def test_several_threads_assign_as_one_does(name, monkeypatch):
    structure, weights = networks(CASES[name][0], 6)
    alone = align(shuffled(structure, weights), weights[0], structure)[0]
    monkeypatch.setattr(alignment, "THREADED_UNITS", 2)
    assert torch.equal(align(shuffled(structure, weights), weights[0], structure)[0], alone)


@pytest.mark.parametrize("name", CASES)
def test_mutual_distances_are_those_of_every_pair_once(name):
    structure, weights = networks(CASES[name][0], 5)
    copies = shuffled(structure, weights[:2], seed=1)
    found = mutual_distance(torch.cat([weights, copies]), structure)
    pairs = permutation_distance(*[torch.cat([weights, copies])] * 2, structure)
    rows, columns = torch.triu_indices(7, 7, offset=1)
    torch.testing.assert_close(found, pairs[rows, columns])
    assert (found == 0).sum() == 2, "each copy lies on its original, in whatever order its units are"


def test_without_groups_it_is_the_plain_distance_and_networks_stay():
    structure, weights = networks(small_mlp, 4)
    structure = Structure.of(small_mlp())
    assert torch.equal(align(weights, weights[0], structure)[0], weights)
    plain = torch.cdist(weights, weights)
    torch.testing.assert_close(permutation_distance(weights, weights[:2], structure), plain[:, :2])
    torch.testing.assert_close(mutual_distance(weights, structure), plain[*torch.triu_indices(4, 4, offset=1)])


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def test_running_statistics_are_renamed_and_do_not_count():
    hidden = {name: ("hidden",) for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")}
    structure = Structure.of(normed(), {"0.weight": ("hidden", None), "3.weight": (None, "hidden"), **hidden})
    weights = stack_initial(normed, structure, [0, 1, 2, 3])
    measured = weights.clone()
    for t in structure.statistics:
        measured[:, t.slice] = 1000 * torch.rand(4, t.numel, generator=torch.Generator().manual_seed(0))
    planted = shuffled(structure, measured)
    aligned, permutations = align(planted, weights, structure)
    assert torch.equal(aligned, measured), "every unit finds its place, and its statistics go with it"
    assert torch.equal(planted.gather(1, structure.permutation_index(permutations)), aligned)
    assert torch.equal(
        permutation_distance(planted, weights, structure), permutation_distance(weights, weights, structure)
    )
    assert torch.equal(mutual_distance(measured, structure), mutual_distance(weights, structure))


def test_broken_networks_are_infinitely_far():
    structure, weights = networks(small_mlp, 4)
    broken = weights.clone()
    broken[0, 3] = torch.nan
    broken[1, 0] = torch.inf
    distance = permutation_distance(broken, weights, structure)
    assert distance[:2].isinf().all() and distance[2:].isfinite().all()
