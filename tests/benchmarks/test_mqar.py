"""The recall task asks what it should, and the benchmark runs from the command line to its figure and table."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from Gpt.errors import ConfigError
from Gpt.seeds import rng

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mqar.py"


@pytest.fixture(scope="module")
def mqar():
    spec = importlib.util.spec_from_file_location("mqar", SCRIPT)
    module = sys.modules["mqar"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mqar"]


class Lookup(torch.nn.Module):
    """Answers every token with the token that followed its first occurrence: recall by definition."""

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 32)
        for row, sequence in enumerate(tokens.tolist()):
            for place, token in enumerate(sequence):
                logits[row, place, sequence[min(sequence.index(token) + 1, len(sequence) - 1)]] = 1
        return logits


def test_every_key_is_asked_for_once_with_its_value(mqar):
    setting = mqar.Setting(vocabulary=64, length=40, pairs=8)
    tokens, targets = mqar.recall_batch(setting, 200, rng("cpu", 0, "test"))
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert ((keys >= 1) & (keys < 32)).all() and ((values >= 32) & (values < 64)).all()
    assert all(len(row.unique()) == 8 for row in (*keys, *values))
    for row in range(200):
        asked = (targets[row] != mqar.UNASKED).nonzero().flatten()
        assert (asked >= 16).all() and (asked % 2 == 0).all()
        answers = dict(zip(tokens[row, asked].tolist(), targets[row, asked].tolist(), strict=True))
        assert answers == dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert tokens[row, 16:].count_nonzero() == 8


def test_queries_follow_the_power_law_of_gaps(mqar):
    setting = mqar.Setting(vocabulary=64, length=34, pairs=1)
    _, targets = mqar.recall_batch(setting, 20000, rng("cpu", 0, "gaps"))
    frequency = (targets[:, 2::2] != mqar.UNASKED).float().mean(0)
    weights = torch.arange(1.0, 17) ** (mqar.GAP_EXPONENT - 1)
    torch.testing.assert_close(frequency, weights / weights.sum(), rtol=0, atol=0.01)


def test_a_lookup_solves_the_task(mqar):
    assert mqar.evaluate(mqar.Setting(), Lookup(), "test") == 1


def test_sequences_are_a_function_of_the_seed(mqar):
    first, again, other = (mqar.recall_batch(mqar.Setting(), 4, rng("cpu", seed, "x"))[0] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_hgrn2_grows_its_state_at_equal_parameters(mqar):
    setting = mqar.Setting(width=64)
    hgrn2 = [c for c in mqar.contenders(setting) if c.backbone == "hgrn2"]
    models = [mqar.build_model(setting, c) for c in hgrn2]
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1
    for contender, model in zip(hgrn2, models, strict=True):
        assert model.backbone.initial_state(1)[0][0].numel() == contender.state
    assert [c.state for c in hgrn2] == [64 * 2**i for i in range(6)]


def test_runs_to_its_figure_and_table(mqar, tmp_path):
    small = "--vocabulary 16 --length 8 --pairs 2 --width 16 --batch 8 --steps 2 --test-sequences 20"
    results = mqar.main([*small.split(), "--output", str(tmp_path)])
    assert len(results) == len(mqar.contenders(mqar.Setting(width=16)))
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "mqar.md").read_text()
    assert all(f"| {result.contender.label} |" in report for result in results)


def test_attention_recalls_where_guessing_scores_half(mqar):
    setting = mqar.Setting(vocabulary=16, length=8, pairs=2, width=16, batch=64, steps=500, solved=0.9)
    attention = next(c for c in mqar.contenders(setting) if c.backbone == "transformer")
    assert mqar.run(setting, attention, learning_rate=1e-2).accuracy > 0.75


def test_the_best_learning_rate_is_kept_and_a_solved_task_ends_the_sweep(mqar, monkeypatch):
    reached = {1.0: 0.3, 2.0: 0.6, 3.0: 0.5}

    def run(setting, contender, learning_rate):
        return mqar.Result(contender, learning_rate, 0, [(1, reached[learning_rate])], 0.0, 0.0)

    monkeypatch.setattr(mqar, "run", run)
    contender = mqar.Contender("any", "hgrn2", {}, 0)
    (best,) = mqar.compare(mqar.Setting(learning_rates=(1.0, 2.0, 3.0)), [contender])
    assert best.learning_rate == 2.0
    (first,) = mqar.compare(mqar.Setting(learning_rates=(1.0, 2.0), solved=0.3), [contender])
    assert first.learning_rate == 1.0


@pytest.mark.parametrize(("options", "message"), [({"pairs": 5}, "length 20"), ({"vocabulary": 8}, "above 8")])
def test_impossible_settings_are_refused(mqar, options, message):
    with pytest.raises(ConfigError, match=message):
        mqar.Setting(**options)
