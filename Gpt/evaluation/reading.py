"""Sentences in the place of class masks: the reader that a run keeps, and how a reader copes with new wordings."""

import torch
from jaxtyping import Bool
from torch import Tensor

from Gpt.descriptions import Descriptions, wordings
from Gpt.errors import CheckpointError
from Gpt.text import SentenceEncoder, SentenceReader, TextHead, train_reader, train_text_head
from Gpt.vocabulary import compose, load_vocabulary


def kept_reader(vocabulary: str, encoder: SentenceEncoder) -> SentenceReader:
    """The reader of a vocabulary, trained at its first use and kept beside the encoder's embeddings, if these are kept.

    It is trained anew where the kept one is damaged or was trained with another encoder.

    Raises:
        ConfigError: the optional packages for text are missing.
    """
    file = encoder.cache_file and encoder.cache_file.with_name(f"{vocabulary}.safetensors")
    if file and file.is_file():
        try:
            return SentenceReader(encoder, TextHead.load(file, encoder.identity), load_vocabulary(vocabulary))
        except CheckpointError as error:
            print(error, flush=True)
    print(f"learning to read sentences about {vocabulary}, once …", flush=True)
    reader = train_reader(encoder, vocabulary)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        reader.head.save(file, encoder.identity)
    return reader


def heard(descriptions: Descriptions, masks: Bool[Tensor, "masks classes"]) -> Bool[Tensor, "masks sentences classes"]:
    """What a reader that was trained on the training wordings makes of every mask's test sentences; no class where it
    finds that a sentence fits none."""
    words = descriptions.vocabulary
    learned = compose(words.names, words.attributes, wordings("train"), seed=0)
    reader = SentenceReader(descriptions.embed, train_text_head(descriptions.embed, learned, words.classes), words)
    sentences = [descriptions.sentences(mask, "test") for mask in masks]
    readings = reader.read_all([sentence for group in sentences for sentence in group])
    return torch.stack([reading.mask for reading in readings]).unflatten(0, (len(masks), -1))
