"""Readers: kept in a folder and not trained twice; sentences in wordings that they never met are understood."""

from functools import partial

import torch

from Gpt.adapters.conditions import HashedWords
from Gpt.descriptions import SENTENCES, Descriptions
from Gpt.evaluation import reading
from Gpt.evaluation.reading import heard, kept_reader
from Gpt.masks import all_masks
from Gpt.text import SentenceEncoder, SentenceReader, TextHead, train_text_head
from Gpt.vocabulary import load_vocabulary


def test_most_masks_are_understood_in_new_wordings(monkeypatch):
    monkeypatch.setattr(reading, "train_text_head", partial(train_text_head, steps=150))
    masks = all_masks()[torch.tensor([0, 1, 4, 100, 511, 700])]
    found = heard(Descriptions("digits", HashedWords()), masks)
    assert found.shape == (6, SENTENCES, 10)
    right = found == masks[:, None]
    assert right.float().mean() > 0.85 and right.all(-1).float().mean() > 0.3


def test_a_reader_is_trained_once_and_kept_until_the_encoder_is_another(tmp_path, monkeypatch):
    class Encoder(SentenceEncoder):
        identity = "words"
        cache_file = tmp_path / "text" / "embeddings.safetensors"

        def __init__(self):
            pass

        def __call__(self, sentences):
            return HashedWords()(sentences)

    trained = []

    def train(encoder, vocabulary):
        trained.append(vocabulary)
        return SentenceReader(
            encoder, TextHead([str(i) for i in range(10)], hidden=8).eval(), load_vocabulary(vocabulary)
        )

    monkeypatch.setattr(reading, "train_reader", train)
    first, again = (kept_reader("digits", Encoder()) for _ in range(2))
    assert trained == ["digits"]
    assert [file.name for file in (tmp_path / "text").iterdir()] == ["digits.safetensors"]
    known, kept = (reader.read("any nines").probabilities for reader in (first, again))
    assert torch.equal(known, kept)
    monkeypatch.setattr(Encoder, "identity", "other words")
    for _ in range(2):
        kept_reader("digits", Encoder())
    assert trained == ["digits", "digits"]
    monkeypatch.setattr(Encoder, "cache_file", None)
    kept_reader("digits", Encoder())
    assert trained == ["digits"] * 3
