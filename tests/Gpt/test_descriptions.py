"""Sentences about masks: right, in wordings that no two splits share, and the same every time."""

import pytest
import torch

from Gpt.adapters.conditions import HashedWords
from Gpt.descriptions import HELD_OUT_WORDINGS, SENTENCES, Descriptions, wordings
from Gpt.masks import all_masks
from Gpt.vocabulary import WORDINGS

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def words() -> Descriptions:
    return Descriptions("digits", HashedWords())


def test_splits_share_no_wording():
    parts = [set(wordings(split)) for split in SPLITS]
    assert set.union(*parts) == set(WORDINGS) and sum(map(len, parts)) == len(WORDINGS)
    assert [len(part) for part in parts[1:]] == [HELD_OUT_WORDINGS] * 2


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_is_put_in_a_wording_of_its_split_and_no_two_masks_share_one(words, split):
    ends = [wording.split("{}") for wording in wordings(split)]
    seen = set()
    for mask in all_masks()[::40]:
        sentences = words.sentences(mask, split)
        assert len(sentences) == SENTENCES and sentences == words.sentences(mask, split)
        for sentence in sentences:
            assert any(sentence.startswith(before) and sentence.endswith(after) for before, after in ends)
        assert len(set(sentences)) > 1 and not seen & set(sentences)
        seen |= set(sentences)


def test_embeddings_are_those_of_the_sentences_whatever_stands_beside_them(words):
    masks = all_masks()[[7, 300, 7]]
    found = words(masks, "test")
    assert found.shape == (3, SENTENCES, 384) and torch.equal(found[0], found[2])
    assert torch.equal(found[1], HashedWords()(words.sentences(masks[1], "test")))
    assert not torch.equal(found[1], words(masks, "train")[1])
