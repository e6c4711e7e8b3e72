"""What a generator of adapters reads: sentence embeddings of the prompts that describe each task.

The default encoder is a frozen all-MiniLM-L6-v2, as in DnD (Liang et al. 2025, arXiv 2506.16406), pooled to one
vector a prompt. `encoder="hash"` needs no model: it counts hashed words and word pairs. It knows nothing of meaning
(two wordings of one rule are as far apart as the words they do not share), and serves tests and demonstrations of the
machinery.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from Gpt.errors import ConfigError
from Gpt.text import SentenceEncoder

WIDTH = 384
ENCODERS = ("minilm", "hash")


def prompt_embeddings(
    prompts: Sequence[Sequence[str]],
    encoder: str = "minilm",
    *,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "members prompts 384"]:
    """One unit-length vector for every prompt of every task, on the CPU.

    Args:
        prompts: equally many for each member, see `AdapterFamily.condition_prompts`.
        cache: safetensors file that keeps what MiniLM has read, each sentence under a digest of its text.
        device: where MiniLM runs.

    Raises:
        ConfigError: the encoder is unknown, or not installed.
        DataError: the cache is damaged or belongs to another model.
    """
    if encoder not in ENCODERS:
        raise ConfigError(f"prompt encoder {encoder!r} is not known, expected one of {', '.join(ENCODERS)}")
    embed = hashed_words if encoder == "hash" else SentenceEncoder(cache=cache, device=device)
    rows = embed([prompt for member in prompts for prompt in member])
    return rows.unflatten(0, (len(prompts), -1))


def hashed_words(sentences: Sequence[str]) -> Float[Tensor, "n 384"]:
    """Words and pairs of neighbouring words, each a signed unit vector that its hash chooses, summed and normalised."""
    table = torch.zeros(len(sentences), WIDTH)
    for row, sentence in zip(table, sentences, strict=True):
        words = re.findall(r"\w+|[^\w\s]", sentence.lower())
        for feature in [*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))]:
            number = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
            row[number // 2 % WIDTH] += 1 - 2 * (number % 2)
    return F.normalize(table, dim=-1)
