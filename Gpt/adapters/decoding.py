"""Free greedy decoding with many adapters at once, with a cache of keys and values; several processes share them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from Gpt.adapters.base import BaseModel
from Gpt.adapters.forward import attached
from Gpt.adapters.spec import AdapterSpec
from Gpt.distributed import Rows, in_chunks

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
    count = len(prompts[0])

    def decode(chunk: slice) -> Rows:
        flat = [prompt for row in prompts[chunk] for prompt in row]
        return {"written": _continued(base, spec, weights[chunk], flat, length).unflatten(0, (-1, count))}

    written = in_chunks(decode, len(prompts), max(1, ROWS // count))["written"]
    lines = [text.partition("\n") for text in base.tokenizer.decode(written.flatten(0, 1).tolist())]
    flat = [line + newline for line, newline, _ in lines]
    return [flat[i : i + count] for i in range(0, len(flat), count)]


def _continued(
    base: BaseModel, spec: AdapterSpec, weights: Tensor, prompts: Sequence[str], length: int
) -> Int[Tensor, "_ length"]:
    """The tokens after every prompt, padded at the end; prompts are padded at their front, where attention does not
    look."""
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
    # Decoding ends where all have ended, so that what is missing stands after a newline in every row.
    return F.pad(written, (0, longest + length - written.shape[1]), value=pad)[:, longest:]
