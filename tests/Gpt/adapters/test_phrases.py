"""Prompts in new words, position by position in those of the library."""

import pytest
import torch

from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.phrases import SHRINKAGE, PhraseBook
from Gpt.errors import ConfigError
from Gpt.seeds import rng

PAIRS = [(rule, form) for rule in range(4) for form in range(3) if rule != form]  # the combination (i, i) is new
PROMPTS, FEATURES = 40, 16


def said(pairs, draw, prompts=PROMPTS):
    """Prompts of two positions, rule and format, each a direction of its own and as much noise again."""
    directions = torch.linalg.qr(torch.randn(FEATURES, 7, generator=rng("cpu", 0, "directions")))[0].T
    rule, form = torch.tensor(pairs).T
    states = torch.stack([directions[rule], directions[4 + form]], 1)[:, None]
    states = states + 0.25 * torch.randn(len(pairs), prompts, 2, FEATURES, generator=draw)
    return PromptStates(states, torch.ones(states.shape[:-1], dtype=torch.bool))


@pytest.fixture
def known():
    return said(PAIRS, rng("cpu", 0, "known"))


@pytest.fixture
def book(known):
    book = PhraseBook()
    book.fit(known)
    return book


def test_new_combinations_are_put_together_from_known_positions(book, known):
    new = [(0, 0), (1, 1), (2, 2)]
    task = book.recognise(sets := said(new, rng("cpu", 1, "new"), prompts=8))
    assert [(PAIRS[a][0], PAIRS[b][1]) for a, b in task.tolist()] == new
    found = book(sets)
    for position in range(2):
        torch.testing.assert_close(found.states[:, :, position], known.states[task[:, position], :8, position])
    assert found.mask.all()


def test_the_nearest_task_is_meant_by_mahalanobis_distance(book, known):
    states = known.states[:, :, 1].double()
    centers = states.mean(1, keepdim=True)
    covariance = (states - centers).flatten(0, 1).T.cov(correction=0)
    covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(FEATURES)
    asked = 3 * torch.randn(50, FEATURES, generator=rng("cpu", 7, "asked"), dtype=torch.float64)
    difference = asked[:, None] - centers[:, 0]
    distance = torch.einsum("atf,fg,atg->at", difference, covariance.inverse(), difference)
    sets = PromptStates(asked.float()[:, None, None].expand(-1, 1, 2, -1), torch.ones(50, 1, 2, dtype=torch.bool))
    assert torch.equal(book.recognise(sets)[:, 1], distance.argmin(1))


def test_one_prompt_of_each_task_is_enough(known):
    book = PhraseBook()
    book.fit(few := known[:, :1])
    assert torch.equal(book.recognise(few), torch.arange(len(PAIRS))[:, None].expand(-1, 2))


def test_the_order_of_prompts_does_not_matter_and_sets_do_not_see_each_other(book):
    sets = said(PAIRS, rng("cpu", 2, "new"))
    task = book.recognise(sets)
    assert torch.equal(book.recognise(sets[:, torch.randperm(PROMPTS, generator=rng("cpu", 0, "order"))]), task)
    assert torch.equal(book.recognise(sets[3:4]), task[3:4])


def test_padding_is_not_read_and_stays_padding(book, known):
    sets = said([(0, 0)], rng("cpu", 3, "new"))
    mask = sets.mask.clone()
    mask[..., 1] = False
    disturbed = sets.states.clone()
    disturbed[..., 1, :] = 100.0
    found = book(PromptStates(disturbed, mask))
    assert book.recognise(PromptStates(disturbed, mask))[0, 1] == -1
    assert not found.mask[..., 1].any() and not found.states[..., 1, :].any()
    torch.testing.assert_close(found.states[..., 0, :], book(sets).states[..., 0, :])

    short = PhraseBook()
    short.fit(PromptStates(known.states, known.mask & torch.tensor([True, False])))
    assert short.recognise(sets)[0, 1] == -1 and short.recognise(sets)[0, 0] >= 0

    silent = known.mask.clone()
    silent[:3, :, 0] = False  # tasks that say nothing there are not what is meant there
    short.fit(PromptStates(known.states, silent))
    assert (short.recognise(said(PAIRS, rng("cpu", 3, "new")))[:, 0] >= 3).all()


def test_more_prompts_than_are_kept_begin_again(book):
    kept = book.mask.shape[1]
    found = book(said([(0, 0)], rng("cpu", 4, "new"), prompts=kept + 3))
    torch.testing.assert_close(found.states[:, kept:], found.states[:, :3])


def test_a_book_is_its_state_dict(book):
    other = PhraseBook()
    other.load_state_dict(book.state_dict())
    sets = said(PAIRS, rng("cpu", 5, "new"))
    torch.testing.assert_close(other(sets).states, book(sets).states, rtol=0, atol=0)


def test_other_prompts_than_the_librarys_are_told(book):
    sets = said([(0, 0)], rng("cpu", 6, "new"))
    with pytest.raises(ConfigError, match="prompts have 1 states each, and those of the library had 2"):
        book(PromptStates(sets.states[:, :, :1], sets.mask[:, :, :1]))
