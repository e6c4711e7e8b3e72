"""Prompt embeddings: one unit vector for each prompt, the same every time."""

import importlib.util

import pytest
import torch

from Gpt.adapters.conditions import hashed_words, prompt_embeddings
from Gpt.adapters.family import AdapterFamily
from Gpt.errors import ConfigError
from Gpt.text import BUNDLED

PROMPTS = [["Give the last word.", "Reverse the list."], ["Give the last word!", "give the LAST word."]]


def test_hashed_words_are_unit_vectors_that_depend_on_words_alone():
    rows = prompt_embeddings(PROMPTS, "hash")
    assert rows.shape == (2, 2, 384)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(rows[0, 0], rows[1, 1])
    assert (rows[0, 0] @ rows[0, 1]).abs() < 0.5 < rows[0, 0] @ rows[1, 0]
    assert torch.equal(hashed_words([PROMPTS[0][1]])[0], rows[0, 1])


def test_sets_of_hashed_prompts_in_known_wordings_tell_tasks_apart():
    prompts = AdapterFamily("mini", unseen_rules=1, unseen_combinations=1, validation=1).condition_prompts("train", 96)
    sets = prompt_embeddings(prompts, "hash").unflatten(1, (2, 48)).mean(2)
    found = torch.cdist(sets[:, 0], sets[:, 1]).argmin(1)
    assert (found == torch.arange(6)).sum() >= 5


def test_an_unknown_encoder_is_named():
    with pytest.raises(ConfigError, match="encoder 'bert' is not known, expected one of minilm, hash"):
        prompt_embeddings(PROMPTS, "bert")


@pytest.mark.skipif(importlib.util.find_spec(BUNDLED) is None, reason="needs the extra text")
def test_minilm_keeps_what_it_has_read(tmp_path):
    pytest.importorskip("transformers")
    cache = tmp_path / "prompts.safetensors"
    rows = prompt_embeddings(PROMPTS, cache=cache)
    assert rows.shape == (2, 2, 384) and cache.is_file()
    assert torch.equal(prompt_embeddings(PROMPTS, cache=cache), rows)
    assert rows[0, 0] @ rows[1, 0] > 0.8 > rows[0, 0] @ rows[0, 1]
