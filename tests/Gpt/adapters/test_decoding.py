"""Free decoding: each adapter its own prompts, whatever stands beside them; and it agrees with the one-pass score."""

import pytest
import torch

import Gpt.adapters.decoding as module
from Gpt.adapters.answers import answer_scores, encode_answers
from Gpt.adapters.base import load_base
from Gpt.adapters.decoding import greedy_replies
from Gpt.adapters.forward import adapted_logits
from Gpt.adapters.spec import AdapterSpec

SPEC = AdapterSpec(rank=4)
LENGTH = 5


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", "cpu", torch.float64)


@pytest.fixture
def prompts():
    """Of different lengths, three for each of two adapters."""
    lists = ["worm, fox", "1. 45 2. 7 3. 12", "tree", "12, 13, 14, 15", "1. pear", "lamp, lamp"]
    texts = [f"Input: {shown}\nOutput:" for shown in lists]
    return [texts[:3], texts[3:]]


def slowly(base, weights, prompt):
    """Token by token, without a cache or padding."""
    (ids,) = base.tokenizer.encode([prompt])
    start = len(ids)
    while len(ids) < start + LENGTH and base.tokenizer.decode([ids[start:]])[0][-1:] != "\n":
        ids.append(int(adapted_logits(base, SPEC, weights[None], torch.tensor([[ids]]))[0, 0, -1].argmax()))
    return base.tokenizer.decode([ids[start:]])[0]


def test_replies_are_those_of_one_prompt_at_a_time(base, drawn, prompts, monkeypatch):
    weights = drawn(SPEC, 2)
    assert len({len(ids) for row in prompts for ids in base.tokenizer.encode(row)}) > 1
    together = greedy_replies(base, SPEC, weights, prompts, LENGTH)
    for row, some, replies in zip(weights, prompts, together, strict=True):
        assert replies == [slowly(base, row, prompt) for prompt in some]
    monkeypatch.setattr(module, "ROWS", 3)
    assert greedy_replies(base, SPEC, weights, prompts, LENGTH) == together


def test_a_reply_ends_with_its_line(base, drawn, monkeypatch):
    lines = ["one\ntwo\n", "\n", "three"]
    rows = [torch.tensor(ids) for ids in base.tokenizer.encode(lines)]
    written = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=base.tokenizer.pad_id)
    monkeypatch.setattr(module, "_continued", lambda *_: written)
    assert greedy_replies(base, SPEC, drawn(SPEC, 1), [["a", "b", "c"]], 9) == [["one\n", "\n", "three"]]


def test_a_newline_may_be_several_tokens(base, drawn, prompts, monkeypatch):
    """As for tokenizers that begin every text with a space; the last of them ends a reply."""
    expected = greedy_replies(base, SPEC, drawn(SPEC, 2), prompts, LENGTH)
    encode, ends = base.tokenizer.encode, []
    longer = {"\n": [*encode([" "])[0], *encode(["\n"])[0]]}
    monkeypatch.setattr(base.tokenizer, "encode", lambda texts: [longer.get(t) or encode([t])[0] for t in texts])
    generate = base.model.generate
    monkeypatch.setattr(base.model, "generate", lambda **o: ends.append(o["eos_token_id"]) or generate(**o))
    assert greedy_replies(base, SPEC, drawn(SPEC, 2), prompts, LENGTH) == expected
    assert ends == [encode(["\n"])[0][0]]


def test_exact_match_in_one_pass_is_that_of_free_decoding(base, drawn, prompts):
    """Of answers that the adapters write themselves, and of others."""
    weights = drawn(SPEC, 2)
    replies = greedy_replies(base, SPEC, weights, prompts, LENGTH)
    wrong = [[reply if i else " zzz\n" for i, reply in enumerate(row)] for row in replies]
    for answers in (replies, wrong):
        pairs = [list(zip(some, row, strict=True)) for some, row in zip(prompts, answers, strict=True)]
        scores = answer_scores(base, SPEC, weights, encode_answers(base.tokenizer, pairs))
        same = [[a == b for a, b in zip(*rows, strict=True)] for rows in zip(replies, answers, strict=True)]
        assert scores.exact.tolist() == same
