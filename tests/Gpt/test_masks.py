"""Class masks: the family, fair splits, the run map, and baselines against closed forms."""

import pytest
import torch

from Gpt import masks
from Gpt.errors import ConfigError, StructureError
from Gpt.networks import MLP, ConvNet
from Gpt.population.functional import Population, stack_initial
from Gpt.seeds import rng
from Gpt.structure import Structure


def as_set(rows: torch.Tensor) -> set[tuple[bool, ...]]:
    return {tuple(row) for row in rows.tolist()}


@pytest.fixture
def binary() -> tuple[MLP, Structure, torch.Tensor]:
    """Eight networks with two outputs."""
    with torch.random.fork_rng():
        net = MLP(5, 4, 2)
    structure = Structure.of(net, MLP.symmetry)
    return net, structure, stack_initial(lambda: MLP(5, 4, 2), structure, list(range(8)))


def test_the_family_is_complete_and_numbered_with_the_first_class_most_significant():
    family = masks.all_masks()
    assert len(as_set(family)) == 1022
    assert family.any(1).all() and not family.all(1).any()
    assert family[0].tolist() == [False] * 9 + [True]
    assert family[511].tolist() == [True] + [False] * 9
    numbers = (family * 2 ** torch.arange(9, -1, -1)).sum(1)
    assert torch.equal(numbers, torch.arange(1, 1023))


def test_complements_are_mirror_images_in_the_numbering():
    family = masks.all_masks()
    assert torch.equal(family.flip(0), ~family)


def test_label_map_gives_one_to_the_classes_of_the_mask():
    mapped = masks.label_map(masks.all_masks()[:3])
    assert mapped.dtype == torch.long
    assert mapped.tolist() == [[0] * 9 + [1], [0] * 8 + [1, 0], [0] * 8 + [1, 1]]


def test_hamming_counts_disagreements():
    family = masks.all_masks()
    distance = masks.hamming(family[:40], family)
    assert torch.equal(distance[0], torch.tensor([bin((i + 1) ^ 1).count("1") for i in range(1022)]))
    assert (distance.diagonal() == 0).all()
    assert torch.equal(masks.hamming(family[:5], ~family[:5]).diagonal(), torch.full((5,), 10))


@pytest.mark.parametrize("held_out, validation, radius", [(64, 32, 0), (20, 8, 1), (64, 0, 1), (4, 4, 2), (0, 0, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_disjoint_from_training_up_to_complement_and_radius(held_out, validation, radius, seed):
    split = masks.MaskSplit(held_out, validation, radius, seed)
    test, val, train = as_set(split.test_masks), as_set(split.validation_masks), as_set(split.train_masks)
    assert (len(test), len(val), len(train)) == (held_out, validation, len(split.train_masks))
    held = torch.cat([split.test_masks, split.validation_masks])
    pairs = as_set(held) | as_set(~held)
    assert len(pairs) == 2 * (held_out + validation)  # neither a repeated mask nor a complement among the held-out ones
    assert not pairs & train
    # Complete: a mask is in training exactly when no held-out mask or complement is within the radius.
    for mask in masks.all_masks():
        near = any(sum(a != b for a, b in zip(mask.tolist(), other, strict=True)) <= radius for other in pairs)
        assert (tuple(mask.tolist()) in train) != near


@pytest.mark.parametrize("radius", [0, 1])
def test_complements_stay_in_training_on_request(radius):
    fair, near = masks.MaskSplit(16, 8, radius), masks.MaskSplit(16, 8, radius, complements=True)
    assert torch.equal(fair.test_masks, near.test_masks)
    held = torch.cat([near.test_masks, near.validation_masks])
    assert not as_set(held) & as_set(near.train_masks)
    if radius == 0:  # else one may be another's neighbour
        assert as_set(~held) <= as_set(near.train_masks)
    assert as_set(fair.train_masks) < as_set(near.train_masks)


def test_a_larger_radius_trains_on_a_subset_and_tests_on_the_same_masks():
    splits = [masks.MaskSplit(16, 8, radius) for radius in (0, 1, 2)]
    for wide, narrow in zip(splits, splits[1:], strict=False):
        assert torch.equal(wide.test_masks, narrow.test_masks)
        assert as_set(narrow.train_masks) < as_set(wide.train_masks)


def test_the_split_depends_on_the_seed_alone():
    a, b, other = (masks.MaskSplit(64, 32, seed=seed) for seed in (3, 3, 4))
    torch.rand(3)  # the global random state plays no part
    assert torch.equal(a.test_masks, b.test_masks) and torch.equal(a.train_masks, b.train_masks)
    assert not torch.equal(a.test_masks, other.test_masks)


def test_held_out_masks_are_drawn_from_both_halves_of_the_family():
    first = masks.MaskSplit(200, 0).test_masks[:, 0].float().mean()
    assert 0.35 < first < 0.65


@pytest.mark.parametrize("runs_per_mask", [1, 3])
def test_run_ids_follow_the_splits_of_a_zoo(runs_per_mask):
    split = masks.MaskSplit(10, 6, radius=1, runs_per_mask=runs_per_mask)
    assert (split.test_runs, split.validation_runs) == (10 * runs_per_mask, 6 * runs_per_mask)
    n, first = len(split.train_masks), 16 * runs_per_mask
    runs = split.mask_of_runs(torch.arange(first + 2 * n))
    assert torch.equal(runs[: split.test_runs], split.test_masks.repeat(runs_per_mask, 1))
    assert torch.equal(runs[split.test_runs : first], split.validation_masks.repeat(runs_per_mask, 1))
    assert torch.equal(runs[first:], split.train_masks.repeat(2, 1))


def test_a_run_has_the_same_mask_whatever_it_is_asked_with():
    split = masks.MaskSplit(10, 6)
    everything = split.mask_of_runs(torch.arange(500))
    some = torch.tensor([499, 3, 12, 3, 77])
    assert torch.equal(split.mask_of_runs(some), everything[some])
    assert split.mask_of_runs(torch.arange(0)).shape == (0, 10)


def test_splits_without_test_or_validation_masks_train_from_run_zero():
    split = masks.MaskSplit(0, 0)
    assert as_set(split.mask_of_runs(torch.arange(1022))) == as_set(masks.all_masks())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"held_out": 500, "validation": 12}, "hold fewer"),
        ({"held_out": -1}, "negative"),
        ({"runs_per_mask": 0}, "at least 1"),
        ({"held_out": 300, "radius": 3}, "no mask to train on"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        masks.MaskSplit(**arguments)


def test_negative_run_ids_are_refused():
    with pytest.raises(ConfigError, match="count from 0"):
        masks.MaskSplit().mask_of_runs(torch.tensor([4, -1]))


def test_the_nearest_network_is_at_the_smallest_distance():
    split = masks.MaskSplit(64, 32, radius=1)
    seen, wanted = split.train_masks, split.test_masks
    weights = torch.arange(len(seen), dtype=torch.float32)[:, None]
    chosen = masks.nearest_network(wanted, seen, weights)[:, 0].long()
    distance = (wanted != seen[chosen]).sum(1)
    assert torch.equal(distance, masks.hamming(wanted, seen).min(1).values)
    assert (distance >= 2).all()


def test_a_seen_mask_gets_its_own_network():
    seen = masks.all_masks()[::7]
    weights = torch.randn(len(seen), 3, generator=rng("cpu", 0))
    assert torch.equal(masks.nearest_network(seen, seen, weights), weights)


def test_swapped_outputs_are_the_networks_with_outputs_exchanged(binary):
    net, structure, weights = binary
    x = torch.randn(6, 5, generator=rng("cpu", 1))
    before = Population(net, structure, weights)(x)
    after = Population(net, structure, masks.swap_outputs(weights, structure))(x)
    assert torch.equal(after, before.flip(-1))
    assert torch.equal(masks.swap_outputs(masks.swap_outputs(weights, structure), structure), weights)


def test_swapping_leaves_other_tensors_of_two_rows_alone():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2, bias=False))
    structure = Structure.of(net)
    weights = structure.flatten(net.state_dict())
    swapped = structure.unflatten(masks.swap_outputs(weights, structure))
    assert torch.equal(swapped["0.weight"], net[0].weight)
    assert torch.equal(swapped["0.bias"], net[0].bias)
    assert torch.equal(swapped["2.weight"], net[2].weight.flip(0))


def test_a_bias_of_the_whole_network_is_not_that_of_its_last_layer():
    net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    net.register_parameter("bias", torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    structure = Structure.of(net)
    weights = structure.flatten(net.state_dict())
    swapped = structure.unflatten(masks.swap_outputs(weights, structure))
    assert torch.equal(swapped["bias"], net.bias)
    assert torch.equal(swapped["0.bias"], net[0].bias.flip(0))
    alone = Structure.of(torch.nn.Linear(4, 2))
    assert torch.equal(masks.swap_outputs(torch.arange(10.0), alone)[8:], torch.tensor([9.0, 8.0]))


def test_networks_without_two_outputs_cannot_be_swapped():
    structure = Structure.of(ConvNet())
    with pytest.raises(StructureError, match="fc.weight"):
        masks.swap_outputs(torch.zeros(structure.size), structure)


def test_a_seen_complement_serves_with_its_outputs_swapped(binary):
    _, structure, weights = binary
    seen = masks.all_masks()[:8]
    written = masks.nearest_or_complement(~seen, seen, weights, structure)
    assert torch.equal(written, masks.swap_outputs(weights, structure))
    assert torch.equal(masks.nearest_or_complement(seen, seen, weights, structure), weights)


@pytest.mark.parametrize("products", [False, True])
def test_ridge_recovers_weights_that_are_linear_in_its_features(products):
    split = masks.MaskSplit(64, 32)
    signs = 2.0 * masks.all_masks().double() - 1
    pairs = torch.stack([signs[:, i] * signs[:, j] for i in range(10) for j in range(i + 1, 10)], 1)
    features = torch.cat([signs, pairs], 1) if products else signs
    coefficients = torch.randn(features.shape[1], 7, generator=rng("cpu", 2), dtype=torch.float64)
    truth = (3 + features @ coefficients).float()
    number = {tuple(m): i for i, m in enumerate(masks.all_masks().tolist())}

    def rows(some):
        return truth[[number[tuple(m)] for m in some.tolist()]]

    written = masks.ridge_networks(
        split.test_masks, split.train_masks, rows(split.train_masks), penalty=1e-6, products=products
    )
    torch.testing.assert_close(written, rows(split.test_masks), rtol=1e-5, atol=1e-5)


def test_ridge_is_the_minimiser_of_its_objective():
    """The gradient of |y - b - X c|^2 + penalty |c|^2 vanishes at the fitted values: checked by autograd in float64."""
    seen = masks.all_masks()[::37]
    y = torch.randn(len(seen), 2, generator=rng("cpu", 3), dtype=torch.float64)
    fitted = masks.ridge_networks(seen, seen, y, penalty=5.0)
    x = torch.cat([torch.ones(len(seen), 1, dtype=torch.float64), 2.0 * seen.double() - 1], 1)
    solution = torch.linalg.lstsq(x, fitted, driver="gelsd").solution.requires_grad_()
    loss = (y - x @ solution).square().sum() + 5 * solution[1:].square().sum()
    loss.backward()
    assert solution.grad.abs().max() < 1e-8


def test_a_huge_penalty_is_the_mean_network():
    split = masks.MaskSplit(8, 4)
    weights = torch.randn(len(split.train_masks), 5, generator=rng("cpu", 4))
    ridge = masks.ridge_networks(split.test_masks, split.train_masks, weights, penalty=1e12)
    torch.testing.assert_close(ridge, masks.mean_network(split.test_masks, weights))
    assert ridge.shape == (8, 5)


def test_a_penalty_must_be_positive():
    seen = masks.all_masks()[:4]
    with pytest.raises(ConfigError, match="penalty"):
        masks.ridge_networks(seen, seen, torch.zeros(4, 2), penalty=0.0)
