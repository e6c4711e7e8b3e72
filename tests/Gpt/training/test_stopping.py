"""A training that is told to stop ends after a step, stores it, and continues to the bit."""

import signal
from dataclasses import replace

import pytest
from toy_training import CONFIG, assert_same, contents, lines, raising, run, score

from Gpt.checkpoint import CheckpointFolder
from Gpt.interruption import Interrupted, handled, held_back

# Losses are logged every 5 steps: where a training stops between, a part of their mean is of the session before.
STOPPED = replace(CONFIG, log_every=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_told_to_stop_ends_after_any_step_and_continues_to_the_bit(tmp_path, number):
    run(tmp_path / "unbroken", STOPPED)
    folder = tmp_path / "stopped"
    checkpoints = CheckpointFolder(folder / "checkpoints", {"task": "toy"})
    for step in range(CONFIG.steps):
        with pytest.raises(Interrupted, match=f"^at step {step + 1} of 12$") as caught, handled():
            run(folder, STOPPED, before_step=raising(number, step))
        assert caught.value.number == number
        assert checkpoints.latest_step() == step + 1
    run(folder, STOPPED)
    assert_same(contents(folder), contents(tmp_path / "unbroken"))
    assert lines(folder) == lines(tmp_path / "unbroken")


def test_a_signal_before_the_first_step_ends_a_training_that_has_nothing_to_store(tmp_path, unbroken):
    with pytest.raises(Interrupted, match="^at step 0 of 12$"), handled(), held_back():
        signal.raise_signal(signal.SIGTERM)
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))


def test_one_that_is_told_to_stop_in_a_validation_keeps_what_it_found(tmp_path, unbroken):
    def signalling(generator):
        signal.raise_signal(signal.SIGTERM)
        return score(generator)

    with pytest.raises(Interrupted, match="^at step 3 of 12$"), handled():
        run(tmp_path, score=signalling)
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))
    assert lines(tmp_path) == lines(unbroken)
