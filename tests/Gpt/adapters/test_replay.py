"""Replays are the loss itself: on a GPU where there is one, and with a stand-in for graphs on a CPU."""

import pytest
import torch

from Gpt.adapters import replay
from Gpt.adapters.answers import answer_loss, encode_answers
from Gpt.adapters.base import load_base
from Gpt.adapters.replay import AnswerLoss
from Gpt.adapters.spec import AdapterSpec, adapter_structure
from Gpt.adapters.suite import MINI
from Gpt.seeds import rng

SPEC = AdapterSpec(rank=2)


def adapters(base, seed=0, count=2):
    drawn = torch.randn(count, adapter_structure(base, SPEC).size, generator=rng("cpu", seed))
    return (0.05 * drawn).to(base.device).requires_grad_()


def examples(base, seed=0):
    """Two tasks whose answers differ in length, and padding that no batch needs."""
    rows = [MINI.examples(member, "train", 40, seed) for member in MINI.members[:2]]
    return encode_answers(base.tokenizer, rows).to(base.device)


class StandIn:
    """Does the recorded work again, and puts what it gives where a graph would; counts its replays."""

    def __init__(self, work):
        self.work, self.results, self.replays = work, work(), 0

    def replay(self):
        self.replays += 1
        for own, new in zip(self.results, self.work(), strict=True):
            own.copy_(new)


@pytest.fixture
def stand_in(monkeypatch):
    made = []

    def record(work, device):
        made.append(StandIn(work))
        return made[-1], made[-1].results

    monkeypatch.setattr(replay, "_recordable", lambda weights: weights.requires_grad)
    monkeypatch.setattr(replay, "record", record)
    return made


def check_steps(base, **tolerance):
    """Values and gradients of several steps of descent, on other examples each."""
    pool, loss, weights = examples(base), AnswerLoss(base, SPEC), adapters(base)
    for step in range(3):
        batch = pool[:, 8 * step : 8 * step + 8]
        value = loss(weights, batch)
        expected = answer_loss(base, SPEC, weights, batch.trimmed())
        share = torch.tensor([1.0, 2.0], device=value.device)
        gradient, wanted = (torch.autograd.grad(x @ share, weights)[0] for x in (value, expected))
        torch.testing.assert_close(value, expected, **tolerance)
        torch.testing.assert_close(gradient, wanted, **tolerance)
        weights = (weights - gradient).detach().requires_grad_()
    return loss


def test_it_is_the_loss_of_answers():
    check_steps(load_base("tiny"), rtol=1e-4, atol=1e-6)


def test_it_is_recorded_once_and_replayed(stand_in):
    check_steps(load_base("tiny"), rtol=1e-4, atol=1e-6)
    assert [graph.replays for graph in stand_in] == [3]


def test_other_shapes_and_calls_without_gradients_are_computed(stand_in):
    base = load_base("tiny")
    loss = check_steps(base, rtol=1e-4, atol=1e-6)
    few = examples(base)[:, :3]
    torch.testing.assert_close(loss(adapters(base), few), answer_loss(base, SPEC, adapters(base), few))
    with torch.no_grad():
        loss(adapters(base).detach(), examples(base)[:, :8])
    assert [graph.replays for graph in stand_in] == [3]


def test_where_it_cannot_be_recorded_it_says_so_once_and_goes_on(monkeypatch):
    def refuse(work, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "_recordable", lambda weights: weights.requires_grad)
    monkeypatch.setattr(replay, "record", refuse)
    base, loss = load_base("tiny"), AnswerLoss(load_base("tiny"), SPEC)
    weights, batch = adapters(base), examples(base)[:, :4]
    with pytest.warns(UserWarning, match="learn slower.*is capturing"):
        first = loss(weights, batch)
    torch.testing.assert_close(first, answer_loss(base, SPEC, weights, batch))
    torch.testing.assert_close(loss(weights, batch), first)  # warnings are errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_the_loss_and_its_gradient_on_a_gpu(dtype):
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    loss = check_steps(load_base("tiny", "cuda", dtype), **tolerance)
    assert loss._recorded is not None
