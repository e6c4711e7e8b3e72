"""What a generator of adapters reads: the prompts that describe a task, through a frozen sentence encoder.

A prompt is one vector (its token states, averaged) or, as in Drag-and-Drop LLMs (Liang et al. 2025, arXiv 2506.16406),
the state of every token. The default encoder is all-MiniLM-L6-v2; `encoder="sentences"` is the same, but hands out a
state for every sentence instead, so that what one sentence says colours no other. `encoder="hash"` needs no model: it
knows words and word pairs by their hash and nothing of their meaning (two wordings of one rule are as far apart as the
words they do not share), and serves tests and demonstrations of the machinery.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from Gpt.errors import ConfigError
from Gpt.text import SentenceEncoder

WIDTH = 384
ENCODERS = ("minilm", "sentences", "hash")
BETWEEN_SENTENCES = re.compile(r"(?<=\D[.?!])\s+|\n")  # "1. apple" is one


@dataclass(frozen=True)
class PromptStates:
    """Prompts as an encoder reads them, L states each; a pooled sentence is a prompt with L = 1.

    Attributes:
        states: zeros where there is padding.
        mask: which states are no padding.
    """

    states: Float[Tensor, "*batch L features"]
    mask: Bool[Tensor, "*batch L"]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index) -> "PromptStates":
        return PromptStates(self.states[index], self.mask[index])

    def to(self, device: torch.device | str) -> "PromptStates":
        return PromptStates(self.states.to(device), self.mask.to(device))

    def pooled(self) -> Float[Tensor, "*sets features"]:
        """The mean state of every set of prompts, `[…, N, L, features] -> […, features]`."""
        return self.states.sum((-3, -2)) / self.mask.sum((-2, -1))[..., None].clamp_min(1)


def prompt_states(
    prompts: Sequence[Sequence[str]],
    encoder: str = "minilm",
    tokens: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> PromptStates:
    """Every prompt of every task, `[members, prompts, L, 384]`, on the CPU.

    Args:
        prompts: equally many for each member, see `AdapterFamily.condition_prompts`.
        tokens: L, states of each prompt, padded, or cut with a warning; 0 for one unit-length pooled sentence.
        device: where MiniLM runs.

    Raises:
        ConfigError: the encoder is unknown, or not installed.
    """
    if encoder not in ENCODERS:
        raise ConfigError(f"prompt encoder {encoder!r} is not known, expected one of {', '.join(ENCODERS)}")
    flat = [prompt for member in prompts for prompt in member]
    embed = loaded_encoder(encoder, torch.device(device))
    if tokens:
        warn_of_cuts(flat, embed.lengths(flat), tokens)
        found = embed.token_states(flat, tokens)
    else:
        found = PromptStates(embed(flat)[:, None], torch.ones(len(flat), 1, dtype=torch.bool))
    shape = (len(prompts), -1)
    return PromptStates(found.states.unflatten(0, shape), found.mask.unflatten(0, shape))


def warn_of_cuts(prompts: Sequence[str], lengths: Sequence[int], tokens: int) -> None:
    """Say which prompts are longer than what is read of them."""
    longest = max(range(len(prompts)), key=lambda i: lengths[i])
    if lengths[longest] > tokens:
        cut = sum(length > tokens for length in lengths)
        warnings.warn(
            f"{cut} of {len(prompts)} prompts are longer than the {tokens} states that are read of each; the longest, "
            f"“{prompts[longest][:60]}…”, takes {lengths[longest]}. What follows is not read: make prompts shorter, or "
            "train with more (AdapterFamily.tokens)",
            stacklevel=3,
        )


@lru_cache(maxsize=2)
def loaded_encoder(name: str, device: torch.device) -> "TokenEncoder | HashedWords":
    """An encoder by its name; kept, as its model takes longer to load than a task's prompts to embed."""
    if name == "hash":
        return HashedWords()
    return SentenceStates(device=device) if name == "sentences" else TokenEncoder(device=device)


class TokenEncoder(SentenceEncoder):
    """A sentence encoder that also hands out what it averages."""

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        """How many states each would have."""
        return [len(ids) for ids in self._loaded()[0](list(sentences), verbose=False)["input_ids"]]

    @torch.no_grad()
    def token_states(self, sentences: Sequence[str], length: int, batch: int = 64) -> PromptStates:
        """The last hidden state of every token, the two special ones included, `[n, length, features]`."""
        tokenizer, model = self._loaded()
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        found = []
        for first in range(0, len(sentences), batch):
            tokens = tokenizer(list(sentences[first : first + batch]), **options).to(self.device)
            mask = tokens["attention_mask"].bool()
            states = model(**tokens).last_hidden_state.float() * mask[..., None]
            found.append((states.cpu(), mask.cpu()))
        return PromptStates(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class SentenceStates(TokenEncoder):
    """A sentence encoder whose states of a prompt are its sentences and lines, each embedded by itself."""

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        return [len(_sentences_of(prompt)) for prompt in sentences]

    def token_states(self, sentences: Sequence[str], length: int, batch: int = 64) -> PromptStates:
        """One unit-length state for each of a prompt's first `length` sentences."""
        split = [_sentences_of(prompt)[:length] for prompt in sentences]
        different = list(dict.fromkeys(part for parts in split for part in parts))
        embedded = dict(zip(different, self(different), strict=True))
        states, mask = torch.zeros(len(split), length, WIDTH), torch.zeros(len(split), length).bool()
        for i, parts in enumerate(split):
            states[i, : len(parts)] = torch.stack([embedded[part] for part in parts])
            mask[i, : len(parts)] = True
        return PromptStates(states, mask)


def _sentences_of(prompt: str) -> list[str]:
    return list(filter(None, BETWEEN_SENTENCES.split(prompt))) or [""]


class HashedWords:
    """Every word and every pair of neighbouring words is a signed unit vector that its hash chooses."""

    def __call__(self, sentences: Sequence[str]) -> Float[Tensor, "n 384"]:
        """The sum of a sentence's token states, at unit length."""
        return F.normalize(torch.stack([self._states(sentence).sum(0) for sentence in sentences]), dim=-1)

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        return [len(self._states(sentence)) for sentence in sentences]

    def token_states(self, sentences: Sequence[str], length: int) -> PromptStates:
        """A word and the pair that it begins; a sentence without words is one state of zeros."""
        states, mask = torch.zeros(len(sentences), length, WIDTH), torch.zeros(len(sentences), length).bool()
        for i, sentence in enumerate(sentences):
            found = self._states(sentence)[:length]
            states[i, : len(found)], mask[i, : len(found)] = found, True
        return PromptStates(states, mask)

    def _states(self, sentence: str) -> Float[Tensor, "words 384"]:
        words = re.findall(r"\w+|[^\w\s]", sentence.lower())
        states = torch.zeros(max(1, len(words)), WIDTH)
        for i, word in enumerate(words):
            for feature in (word, " ".join(words[i : i + 2])) if words[i + 1 :] else (word,):
                number = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
                states[i, number // 2 % WIDTH] += 1 - 2 * (number % 2)
        return states
