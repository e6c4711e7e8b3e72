"""Ctrl-C and SIGTERM: at once, or held back until the work inside has ended; afterwards as before."""

import pickle
import signal
import threading
from signal import SIGINT, SIGTERM

import pytest

from Gpt.interruption import SIGNALS, Interrupted, at_once, handled, held_back, noted


@pytest.fixture(autouse=True)
def untouched():
    """The handlers of before are there again after every test, whatever it did."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_work_where_it_is(number):
    with pytest.raises(Interrupted) as caught, handled():
        signal.raise_signal(number)
        pytest.fail("the work went on")
    assert caught.value.number == number and str(caught.value) == ""
    assert not isinstance(caught.value, Exception)  # as a tracker's failure is, which is passed over


def test_what_is_cleaned_up_then_is_interrupted_by_ctrl_c_alone():
    done = []
    with pytest.raises(Interrupted) as caught, handled():
        try:
            signal.raise_signal(SIGTERM)
        finally:
            signal.raise_signal(SIGTERM)
            done.append("the second SIGTERM")
            signal.raise_signal(SIGINT)
            done.append("Ctrl-C")
    assert done == ["the second SIGTERM"] and caught.value.number == SIGINT


@pytest.mark.parametrize("numbers", [(SIGINT,), (SIGTERM,), (SIGTERM, SIGTERM)])
def test_a_signal_that_is_held_back_is_told_once_and_ends_what_follows(numbers, capfd):
    done = []
    with pytest.raises(Interrupted) as caught, handled():
        with held_back() as signalled:
            assert signalled() == 0
            for number in numbers:
                signal.raise_signal(number)
            done.append(signalled())
        done.append("what follows")
    assert done == [numbers[0]] and caught.value.number == numbers[0]
    assert capfd.readouterr().err.count("the training ends after a step") == 1


@pytest.mark.parametrize(("first", "second"), [(SIGINT, SIGINT), (SIGTERM, SIGINT), (SIGINT, SIGTERM)])
def test_another_signal_ends_at_once_what_is_ending(first, second):
    """A second Ctrl-C comes to torchrun's workers as SIGTERM."""
    with pytest.raises(Interrupted) as caught, handled(), held_back():
        signal.raise_signal(first)
        signal.raise_signal(second)
        pytest.fail("the work went on")
    assert caught.value.number == second


def test_an_error_is_not_hidden_by_a_signal_that_was_held_back():
    with pytest.raises(ZeroDivisionError), handled(), held_back():
        signal.raise_signal(SIGTERM)
        raise ZeroDivisionError


def test_signals_are_held_back_no_longer_than_asked_for():
    with pytest.raises(Interrupted), handled():
        with held_back():
            pass
        signal.raise_signal(SIGTERM)
        pytest.fail("the work went on")


def test_without_handlers_python_does_as_it_does():
    with pytest.raises(KeyboardInterrupt) as caught, held_back() as signalled:
        assert signalled() == 0
        signal.raise_signal(SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_other_threads_leave_the_handlers_alone():
    found = []

    def work():
        with handled(), held_back() as signalled:
            found.extend([*map(signal.getsignal, SIGNALS), signalled()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [*map(signal.getsignal, SIGNALS), 0]


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted) as caught, handled(), held_back() as signalled:
            signal.raise_signal(SIGINT)
            assert signalled() == 0
            signal.raise_signal(SIGTERM)
            assert signalled() == SIGTERM
        assert signal.getsignal(SIGINT) is signal.SIG_IGN and caught.value.number == SIGTERM
    finally:
        signal.signal(SIGINT, before)


# --- of several processes: noted, until they exchange something, as in test_distributed.py ----------------------------


def test_the_signal_of_one_of_several_processes_is_noted_and_ends_work_that_needs_no_other():
    done = []
    with pytest.raises(Interrupted) as caught, handled(shared=True):
        signal.raise_signal(SIGTERM)
        done.append(noted())
        with at_once():
            pytest.fail("the work began")
    assert done == [SIGTERM] and caught.value.number == SIGTERM


def test_it_ends_such_work_in_its_midst_and_the_next_is_noted_again():
    with pytest.raises(Interrupted) as caught, handled(shared=True):
        with pytest.raises(Interrupted), at_once():
            signal.raise_signal(SIGTERM)
            pytest.fail("the work went on")
        assert noted() == SIGTERM
    assert caught.value.number == SIGTERM  # the end of everything is the last place


def test_a_second_ctrl_c_does_not_wait_for_other_processes():
    with pytest.raises(Interrupted), handled(shared=True):
        signal.raise_signal(SIGINT)
        signal.raise_signal(SIGINT)
        pytest.fail("the work went on")


def test_a_training_is_told_and_what_it_stores_is_stored_whole(capfd):
    done = []
    with pytest.raises(Interrupted), handled(shared=True):
        with held_back(tells=False) as signalled:
            with at_once():
                signal.raise_signal(SIGTERM)
                done.append("stored")
            done.append((signalled(), noted()))
        done.append(noted())
    assert done == ["stored", (SIGTERM, 0), SIGTERM] and capfd.readouterr().err == ""


def test_an_interruption_can_be_sent():
    found = pickle.loads(pickle.dumps(Interrupted(SIGTERM, "at step 3 of 4")))
    assert (found.number, str(found)) == (SIGTERM, "at step 3 of 4")
