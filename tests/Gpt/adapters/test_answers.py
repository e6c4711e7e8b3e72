"""One teacher-forced pass says what greedy decoding would write, and what it costs in nats."""

import pytest
import torch
import torch.nn.functional as F

from Gpt.adapters import answers as module
from Gpt.adapters.answers import Answers, answer_loss, answer_scores, encode_answers
from Gpt.adapters.base import load_base, load_tokenizer
from Gpt.adapters.forward import adapted_logits, attached
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import MINI

pytest.importorskip("transformers")

SPEC = AdapterSpec(rank=4, targets=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", "cpu", torch.float64)


def table(count: int) -> list[list[tuple[str, str]]]:
    return [MINI.examples(member, "test", count) for member in MINI.members[:2]]


def test_rows_hold_prompt_and_answer_and_nothing_is_lost():
    tokenizer, examples = load_tokenizer("tiny"), table(5)
    found = encode_answers(tokenizer, examples)
    for row, pairs in enumerate(examples):
        for column, (prompt, answer) in enumerate(pairs):
            cell = found[row, column]
            assert tokenizer.decode([cell.tokens.tolist()])[0] == prompt + answer
            assert tokenizer.decode([cell.targets[cell.valid].tolist()])[0] == answer
            assert int(cell.positions[0]) == len(tokenizer.encode([prompt])[0])


def test_trimming_takes_nothing_but_padding():
    whole = encode_answers(load_tokenizer("tiny"), table(4))
    wide = Answers(F.pad(whole.tokens, (0, 3)), F.pad(whole.positions, (0, 2)), F.pad(whole.valid, (0, 2)))
    trimmed = wide.trimmed()
    assert torch.equal(trimmed.tokens, whole.tokens) and torch.equal(trimmed.valid, whole.valid)


def test_loss_is_the_mean_cross_entropy_of_the_answers_tokens(base, drawn):
    answers, weights = encode_answers(base.tokenizer, table(3)), drawn(SPEC, 2)
    logits = adapted_logits(base, SPEC, weights, answers.tokens)
    for p in range(2):
        terms = [
            F.cross_entropy(logits[p, n, at - 1], answers.tokens[p, n, at])
            for n in range(3)
            for at in answers.positions[p, n][answers.valid[p, n]]
        ]
        torch.testing.assert_close(answer_loss(base, SPEC, weights, answers)[p], torch.stack(terms).mean())
    scores = answer_scores(base, SPEC, weights, answers)
    weighted = (scores.loss * answers.valid.sum(-1)).sum(1) / answers.valid.sum((1, 2))
    torch.testing.assert_close(weighted, answer_loss(base, SPEC, weights, answers))


def test_memory_bounds_do_not_change_scores(base, drawn, monkeypatch):
    answers, weights = encode_answers(base.tokenizer, table(7)), drawn(SPEC, 2)
    whole = answer_scores(base, SPEC, weights, answers)
    monkeypatch.setattr(module, "TOKENS", 40)  # two rows a pass
    parts = answer_scores(base, SPEC, weights, answers)
    torch.testing.assert_close(whole.loss, parts.loss)
    assert torch.equal(whole.predicted, parts.predicted) and torch.equal(whole.exact, parts.exact)


def test_adapters_with_examples_of_similar_length_share_a_pass(monkeypatch):
    """The order of the adapters does not matter, no pass is larger than memory allows, and by themselves the adapters
    of a pass are one pass again."""
    lengths = torch.tensor([9, 3, 8, 3, 9, 4])
    positions = (lengths - 1)[:, None, None].expand(6, 10, 1)
    answers = Answers(torch.zeros(6, 10, 9, dtype=torch.long), positions, torch.ones(6, 10, 1, dtype=torch.bool))
    monkeypatch.setattr(module, "TOKENS", 180)
    assert module.passes(answers, 5) == [[1, 3, 5], [2, 0], [4]]
    monkeypatch.setattr(module, "LOGITS", 100)
    assert module.passes(answers, 5) == [[1, 3], [5, 2], [0, 4]]
    assert all(module.passes(answers[some], 5) == [[0, 1]] for some in ([1, 3], [5, 2], [0, 4]))
    monkeypatch.setattr(module, "LOGITS", 10)
    assert module.passes(answers, 5) == [[1], [3], [5], [2], [0], [4]]


def test_exact_match_is_what_greedy_decoding_says(base, drawn):
    """Answers that the adapter itself generates, some spoilt in one token, are told apart exactly."""
    weights, prompts = drawn(SPEC, 2), [[prompt for prompt, _ in row] for row in table(6)]
    rows, truth = [], []
    for p in range(2):
        pairs = []
        for n, prompt in enumerate(prompts[p]):
            ids = torch.tensor(base.tokenizer.encode([prompt]))
            with attached(base, SPEC, weights[p : p + 1]):
                options = {"max_new_tokens": 4, "do_sample": False}
                written = base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            reply = written[0, ids.shape[1] :].tolist()
            if n % 2:
                reply[n % 4] = (reply[n % 4] + 1) % 900 + 2
            pairs.append((ids[0].tolist(), reply))
            truth.append(n % 2 == 0)
        rows.append(pairs)
    tokens = torch.tensor([[ids + reply for ids, reply in pairs] for pairs in rows])
    positions = torch.arange(tokens.shape[-1] - 4, tokens.shape[-1]).expand(2, 6, 4)
    answers = Answers(tokens, positions, torch.ones(2, 6, 4, dtype=torch.bool))
    assert answer_scores(base, SPEC, weights, answers).exact.flatten().tolist() == truth
