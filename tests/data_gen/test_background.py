import threading

import pytest

from data_gen.background import background


def test_jobs_run_beside_their_caller_and_no_more_at_once_than_there_are_threads():
    go, running, most, lock = threading.Event(), 0, 0, threading.Lock()

    def job():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        assert go.wait(30)
        with lock:
            running -= 1

    with background(2) as jobs:
        for _ in range(2):
            jobs.start(job)  # returns although the job cannot end
        jobs.start(job)  # is queued
        threading.Timer(0.05, go.set).start()
        jobs.make_room()
        assert go.is_set()
    assert (running, most) == (0, 2)


def fail():
    raise OSError("the disk is full")


def failed():
    """A job that fails, and when it has."""
    ended = threading.Event()

    def job():
        ended.set()
        fail()

    return job, ended


@pytest.mark.parametrize("call", ["check", "make_room", "end"])
def test_the_caller_is_told_what_a_job_raised(call):
    job, ended = failed()
    with pytest.raises(OSError, match="disk is full"), background(1) as jobs:
        jobs.start(job)
        assert ended.wait(30)
        if call == "check":
            while True:  # until the thread has put the error down
                jobs.check()
        elif call == "make_room":
            jobs.make_room()
            pytest.fail("nothing was raised")


def test_an_error_of_the_caller_waits_for_the_jobs():
    go, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), background(1) as jobs:
        jobs.start(lambda: done.append(go.wait(30)))
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert done == [True]
