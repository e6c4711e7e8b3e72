"""Prompts through an encoder: one unit vector each, or a state for every token."""

import importlib.util
import warnings

import pytest
import torch

from Gpt.adapters import conditions
from Gpt.adapters.conditions import HashedWords, PromptStates, prompt_states
from Gpt.adapters.family import AdapterFamily
from Gpt.errors import ConfigError
from Gpt.text import BUNDLED

needs_minilm = pytest.mark.skipif(importlib.util.find_spec(BUNDLED) is None, reason="needs the extra text")

PROMPTS = [["Give the last word.", "Reverse the list."], ["Give the last word!", "give the LAST word."]]


def test_pooled_sentences_are_unit_vectors_that_depend_on_words_alone():
    found = prompt_states(PROMPTS, "hash")
    assert found.states.shape == (2, 2, 1, 384) and found.mask.all()
    rows = found.states.squeeze(2)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(rows[0, 0], rows[1, 1])
    assert (rows[0, 0] @ rows[0, 1]).abs() < 0.5 < rows[0, 0] @ rows[1, 0]


def pooled_by_hand(found, i, j):
    """The mean of the states that the mask keeps, at unit length."""
    return torch.nn.functional.normalize(found.states[i, j][found.mask[i, j]].mean(0), dim=-1)


def check_token_states(encoder, tokens):
    sentences, found = prompt_states(PROMPTS, encoder), prompt_states(PROMPTS, encoder, tokens)
    assert found.states.shape == (2, 2, tokens, 384) and found.mask.shape == (2, 2, tokens)
    assert not found.states[~found.mask].any()
    assert found.mask.any(-1).all() and not found.mask.all(-1).any()
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(pooled_by_hand(found, i, j), sentences.states[i, j, 0], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="4 of 4 prompts"):
        cut = prompt_states(PROMPTS, encoder, 3)
    assert cut.states.shape == (2, 2, 3, 384) and cut.mask.all()


def test_hashed_token_states_pool_to_the_sentence():
    check_token_states("hash", 12)
    found = prompt_states(PROMPTS, "hash", 12)
    assert found.mask[0, 0].sum() == 5  # four words and the full stop
    nothing = prompt_states([["", "a"]], "hash", 2)
    assert nothing.mask[0].tolist() == [[True, False], [True, False]] and not nothing.states[0, 0].any()


@needs_minilm
def test_minilm_token_states_pool_to_the_sentence():
    pytest.importorskip("transformers")
    check_token_states("minilm", 16)
    rows = prompt_states(PROMPTS).states.squeeze(2)
    assert rows[0, 0] @ rows[1, 0] > 0.8 > rows[0, 0] @ rows[0, 1]


@needs_minilm
def test_a_sentence_of_a_prompt_is_the_same_state_in_any_company():
    pytest.importorskip("transformers")
    alone = prompt_states([["Give the last word.", "Input: 1. apple 2. seven"]]).states.squeeze(2)
    prompts = ["Give the last word. Which one? That!\nInput: 1. apple 2. seven", "Give the last word.", ""]
    found = prompt_states([prompts], "sentences", 5)
    assert found.mask[0].sum(-1).tolist() == [4, 1, 1] and not found.states[~found.mask].any()
    torch.testing.assert_close(found.states[0, :2, 0], alone[0, :1].expand(2, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.states[0, 0, 3], alone[0, 1], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="1 of 3 prompts"):
        cut = prompt_states([prompts], "sentences", 2)
    torch.testing.assert_close(cut.states, found.states[:, :, :2], rtol=1e-4, atol=1e-5)


def test_the_mean_of_a_set_is_over_all_states_that_are_no_padding():
    states = torch.tensor([[[[1.0], [3.0]], [[5.0], [0.0]]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    assert PromptStates(states, mask).pooled().tolist() == [[3.0]]
    assert PromptStates(0 * states, torch.zeros_like(mask)).pooled().tolist() == [[0.0]]


def test_sets_of_hashed_prompts_in_known_wordings_tell_tasks_apart():
    prompts = AdapterFamily("mini", unseen_rules=1, unseen_combinations=1, validation=1).condition_prompts("train", 256)
    for tokens in (0, 40):
        found = prompt_states(prompts, "hash", tokens)
        first, second = found[:, :128].pooled(), found[:, 128:].pooled()
        assert (torch.cdist(first, second).argmin(1) == torch.arange(6)).sum() >= 5


def test_an_unknown_encoder_is_named():
    with pytest.raises(ConfigError, match="encoder 'bert' is not known, expected one of minilm, sentences, hash"):
        prompt_states(PROMPTS, "bert")


def test_an_encoder_is_loaded_once_for_all_prompts(monkeypatch):
    """A file of prompts has a task in every line."""
    loaded = []

    class Counted(HashedWords):
        def __init__(self, device):
            loaded.append(device)

    monkeypatch.setattr(conditions, "TokenEncoder", Counted)
    conditions.loaded_encoder.cache_clear()
    try:
        for prompts in PROMPTS:
            prompt_states([prompts], "minilm")
    finally:
        conditions.loaded_encoder.cache_clear()
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("encoder", "prompt", "length"),
    [
        ("hash", "Give the last word, please", 6),
        pytest.param("minilm", "Give the last word, please", 8, marks=needs_minilm),
        pytest.param("sentences", "Give the last word. Please.\nIn brackets!", 3, marks=needs_minilm),
    ],
)
def test_a_prompt_that_is_cut_is_told_of(encoder, prompt, length):
    """Commas are words, and MiniLM's two special tokens are states."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = prompt_states([[prompt, "short"]], encoder, length)
    assert whole.mask[0, 0].all()
    with pytest.warns(
        UserWarning, match=f"(?s)1 of 2 prompts are longer than the {length - 1} states .* takes {length}"
    ):
        cut = prompt_states([[prompt, "short"]], encoder, length - 1)
    if encoder != "minilm":  # whose states know what follows, and the last of which is a special one
        torch.testing.assert_close(cut.states[0, 0], whole.states[0, 0, :-1])
