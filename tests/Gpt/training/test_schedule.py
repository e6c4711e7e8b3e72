"""The learning rate warms up, at the beginning and wherever the loss becomes another, and decays."""

import pytest
from toy_training import CONFIG, Toy, lines, run

from Gpt import training
from Gpt.training import TrainerConfig, learning_rate_factor


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_warms_up_and_decays(schedule, half):
    config = TrainerConfig(steps=1000, warmup=10, schedule=schedule)
    factors = [learning_rate_factor(step, config) for step in range(1001)]
    assert factors[0] == pytest.approx(0.1, rel=1e-6)
    assert factors[500] == pytest.approx(half)
    assert factors[1000] == pytest.approx(0, abs=1e-12)
    assert max(factors) <= 1
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_a_training_warms_up_anew_at_its_turns(tmp_path, monkeypatch):
    rates = []

    class Turning(Toy):
        turns = (0.5,)

    update = training.Session.update

    def watched(session):
        norm = update(session)
        rates.append(session.learning_rate)
        return norm

    monkeypatch.setattr(training.Session, "update", watched)
    run(tmp_path, generator=Turning())
    factors = [learning_rate_factor(step, CONFIG, (0.5,)) for step in range(CONFIG.steps)]
    assert rates == pytest.approx([CONFIG.learning_rate * factor for factor in factors])
    assert factors != [learning_rate_factor(step, CONFIG) for step in range(CONFIG.steps)]
    logged = {line["step"]: line["train/learning_rate"] for line in lines(tmp_path) if "train/loss" in line}
    assert logged and logged == {step: rates[step - 1] for step in logged}


@pytest.mark.parametrize("turn", [0.5, 0.4996])
def test_learning_rate_warms_up_anew_where_the_loss_becomes_another(turn):
    config = TrainerConfig(steps=1000, warmup=10)
    once, again = ([learning_rate_factor(step, config, turns) for step in range(1000)] for turns in ((), (turn,)))
    assert again[:500] == once[:500]
    warm = [new / old for new, old in zip(again[500:510], once[500:510], strict=True)]
    assert warm[0] == pytest.approx(0.1 * (1 + 500 - 1000 * turn))
    assert warm == sorted(warm) and warm[-1] == pytest.approx(1)
    assert again[510:] == once[510:]
