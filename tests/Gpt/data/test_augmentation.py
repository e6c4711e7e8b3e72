"""G.pt's `aug_fn` walk and its agreement with `symmetry`."""

import pytest
import torch

from Gpt.data.augmentation import random_index, walk_index
from Gpt.errors import TaskError
from Gpt.networks import MLP
from Gpt.population.functional import Population, stack_initial
from Gpt.seeds import rng
from Gpt.structure import Structure


def net() -> MLP:
    return MLP(6, 5, 3)


def walk(net, generator, permute_in, permute_out, permute_in_out, register):
    order = torch.randperm(5, generator=generator)
    permute_out((net.fc1.weight, net.fc1.bias), order)
    permute_in(net.fc2.weight, order)
    register(net.fc2.bias)


def outputs(weights: torch.Tensor) -> torch.Tensor:
    return Population(net(), Structure.of(net()), weights)(torch.randn(9, 6, generator=rng("cpu", 0, "inputs")))


@pytest.mark.parametrize("symmetry, aug_fn", [(MLP.symmetry, None), (None, walk)])
def test_renaming_moves_weights_and_keeps_the_function(symmetry, aug_fn):
    structure = Structure.of(net(), symmetry)
    weights = stack_initial(net, structure, [1, 2, 3])
    index = random_index(structure, aug_fn, net(), 3, rng("cpu", 0, "renaming"))
    renamed = weights.gather(1, index)
    assert not torch.equal(index[0], index[1])
    assert (renamed - weights).abs().max() > 0.01
    torch.testing.assert_close(outputs(renamed), outputs(weights))


def test_a_walk_is_used_where_there_is_one():
    structure = Structure.of(net(), MLP.symmetry)

    def stay(net, generator, permute_in, permute_out, permute_both, register):
        register(tuple(net.parameters()))

    index = random_index(structure, stay, net(), 2, rng("cpu", 0))
    assert torch.equal(index, torch.arange(structure.size).expand(2, -1))


def test_a_walk_permutes_rows_and_columns_of_one_tensor():
    columns, rows = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    linear = torch.nn.Linear(3, 2, bias=False)
    index = walk_index(lambda net, g, i, o, both, r: both(net.weight, columns, rows), linear, 6, rng("cpu", 0))
    expected = linear.weight[rows][:, columns]
    assert torch.equal(linear.weight.flatten()[index].view(2, 3), expected)


def test_a_task_without_symmetry_is_left_alone():
    structure = Structure.of(net())
    index = random_index(structure, None, net(), 2, rng("cpu", 0))
    assert torch.equal(index, torch.arange(structure.size).expand(2, -1))


def test_a_walk_that_forgets_a_tensor_is_refused():
    with pytest.raises(TaskError, match="visited 35 weights of 53"):
        walk_index(lambda net, g, i, o, b, register: register((net.fc1.weight, net.fc1.bias)), net(), 53, rng("cpu", 0))
