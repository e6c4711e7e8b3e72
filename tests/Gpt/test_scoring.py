"""The test functions of the built-in tasks, against closed forms and double precision."""

import pytest
import torch
from torch import nn

from Gpt import scoring
from Gpt.networks import MLP
from Gpt.population.functional import Population, stack_initial
from Gpt.seeds import rng
from Gpt.structure import Structure


def test_loss_and_error_in_closed_form():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    y = torch.tensor([0, 0, 1])
    loss, error = scoring.classification_loss(logits, y, nn.Identity())
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, y).item())
    assert error.item() == pytest.approx(100 / 3)
    assert scoring.classification_error(logits, y, nn.Identity()) == (error, loss)
    assert scoring.classification_correct(logits, y, nn.Identity()).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(10,), (3, 10)])
def test_the_error_on_a_mask_in_double_precision(shape):
    draw = rng("cpu", 0, "masks")
    x, y = torch.randn(40, 64, generator=draw), torch.randint(10, (40,), generator=draw)
    mask = torch.rand(shape, generator=draw) < 0.5
    net = MLP(64, 16, 2)
    population = Population(net, Structure.of(net), stack_initial(lambda: MLP(64, 16, 2), Structure.of(net), [1, 2, 3]))
    networks = population if len(shape) == 2 else net
    error, loss = scoring.mask_error(x, y, mask, networks)
    correct = scoring.mask_correct(x, y, mask, networks)
    logits = networks(x).double()
    wanted = torch.stack([row[y] for row in mask.reshape(-1, 10)]).long().view(*shape[:-1], 40)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
    torch.testing.assert_close(loss.double(), reference.view(*shape[:-1], 40).mean(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(correct, logits.argmax(-1) == wanted)
    torch.testing.assert_close(error, 100 * (~correct).float().mean(-1))
