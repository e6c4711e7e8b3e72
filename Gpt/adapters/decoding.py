"""Free greedy decoding with many adapters at once, with a cache of keys and values."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.adapters.base import BaseModel
from Gpt.adapters.forward import attached
from Gpt.adapters.spec import AdapterSpec

ROWS = 2048  # sequences that are decoded at once


@torch.no_grad()
def greedy_replies(
    base: BaseModel,
    spec: AdapterSpec,
    weights: Float[Tensor, "P D"],
    prompts: Sequence[Sequence[str]],
    length: int,
) -> list[list[str]]:
    """What adapter p writes after each of `prompts[p]`, equally many for all: the first line of at most `length`
    tokens, with its newline if it came to that."""
    together = max(1, ROWS // len(prompts[0]))
    replies: list[list[str]] = []
    for first in range(0, len(prompts), together):
        some = prompts[first : first + together]
        written = _continued(base, spec, weights[first : first + together], [p for row in some for p in row], length)
        lines = [text.partition("\n") for text in base.tokenizer.decode(written)]
        flat = [line + newline for line, newline, _ in lines]
        count = len(some[0])
        replies += [flat[i : i + count] for i in range(0, len(flat), count)]
    return replies


def _continued(
    base: BaseModel, spec: AdapterSpec, weights: Tensor, prompts: Sequence[str], length: int
) -> list[list[int]]:
    """The tokens after every prompt; prompts are padded at their front, where attention does not look."""
    encoded = base.tokenizer.encode(prompts)
    longest = max(map(len, encoded))
    padding = [longest - len(ids) for ids in encoded]
    pad = base.tokenizer.pad_id
    tokens = torch.tensor([[pad] * n + ids for n, ids in zip(padding, encoded, strict=True)], device=base.device)
    mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
    newline = base.tokenizer.encode(["\n"])[0][-1]  # after the space that some tokenizers begin every text with
    with attached(base, spec, weights):
        written = base.model.generate(
            input_ids=tokens,
            attention_mask=mask.long().to(base.device),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=newline,
            pad_token_id=pad,
        )
    return written[:, longest:].tolist()
