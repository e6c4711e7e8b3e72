import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from Gpt import distributed
from Gpt.distributed import (
    busy,
    from_all,
    from_first,
    in_chunks,
    in_parts,
    largest,
    on_first_process,
    rank,
    share,
    together,
    total,
    world,
)
from Gpt.errors import TaskError, UserError
from Gpt.interruption import Interrupted, handled, held_back
from Gpt.seeds import rng

COUNT, SIZE = 23, 5


def work(chunk: slice) -> dict[str, torch.Tensor]:
    """Rows of several types, with noise named by the chunk."""
    rows = chunk.stop - chunk.start
    noise = torch.randn(rows, 3, 2, generator=rng("cpu", 0, "work", chunk.start))
    return {"noise": noise.mT, "positive": noise[:, 0, 0] > 0, "row": torch.arange(chunk.start, chunk.stop)}


def failing(chunk: slice) -> dict[str, torch.Tensor]:
    if chunk.start == SIZE:  # the second process's
        raise TaskError("the second chunk is broken")
    return work(chunk)


def test_one_process_does_everything():
    found = in_chunks(work, COUNT, SIZE)
    assert found["row"].tolist() == list(range(COUNT))
    assert found["noise"].shape == (COUNT, 2, 3)
    assert list(share("abc")) == list("abc") and world() == 1 and busy(COUNT, SIZE) == 1
    assert (from_first(3), on_first_process(lambda: 4), together(lambda: 5)) == (3, 4, 5)
    assert total(torch.tensor(2.0)) == 2 and largest(15) == 15 and from_all(6) == [6]
    with pytest.raises(TaskError, match="second chunk"):
        in_chunks(failing, COUNT, SIZE)


def test_one_process_does_a_part_when_it_is_asked_for_it():
    done = []
    parts = in_parts(lambda chunk: done.append(chunk.start) or work(chunk), COUNT, SIZE)
    assert next(parts)["row"].tolist() == list(range(SIZE)) and done == [0]


def in_processes(folder: Path, part: str, count: int = 2) -> list[subprocess.Popen]:
    """Run a part of this file in several processes, which have to end well within the limit."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    calls = [[sys.executable, __file__, part, str(folder), str(i), str(count)] for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(call, env=environment, **pipes) for call in calls]


def test_every_process_gets_the_rows_that_one_makes_and_the_errors_of_the_others(tmp_path, outputs_of):
    outputs = outputs_of(in_processes(tmp_path, "share"), 100)
    assert [output.splitlines()[-1] for output in outputs] == ["done", "done"], outputs


@pytest.mark.parametrize("place", ["between", "first", "job", "chunk", "training"])
def test_a_signal_in_one_process_ends_both_where_they_exchange_something(tmp_path, outputs_of, place):
    """And none before: the other would wait for it."""
    outputs = outputs_of(in_processes(tmp_path, place), 100)
    assert [output.splitlines()[-2:] for output in outputs] == [["SIGTERM", "done"]] * 2, outputs


def test_a_process_that_dies_does_not_leave_the_others_waiting(tmp_path, outputs_of):
    survivor, dead = outputs_of(in_processes(tmp_path, "die"), 100)
    assert "done" not in survivor and "Error" in survivor
    assert "done" not in dead and "Error" not in dead


def _share() -> None:
    alone = torch.cat([work(slice(first, min(first + SIZE, COUNT)))["noise"] for first in range(0, COUNT, SIZE)])
    found = in_chunks(work, COUNT, SIZE)
    assert torch.equal(found["noise"], alone)
    assert torch.equal(found["positive"], alone[:, 0, 0] > 0)
    assert found["row"].tolist() == list(range(COUNT))
    assert in_chunks(work, SIZE, SIZE)["row"].tolist() == list(range(SIZE))  # only one process has work
    assert busy(COUNT, SIZE) == 2 and busy(SIZE, SIZE) == 1
    assert from_first(rank()) == 0 and total(torch.tensor(rank() + 1.0)) == 3 and largest(2 - rank()) == 2
    assert from_all(rank()) == [0, 1]
    assert list(share("abcde")) == list(("ace", "bd")[rank()])
    for job in (
        lambda: in_chunks(failing, COUNT, SIZE),
        lambda: together(lambda: _fail_in(1)),
        lambda: on_first_process(lambda: _fail_in(0)),
    ):
        with pytest.raises(UserError, match="broken"):
            job()
    assert on_first_process(lambda: f"from {rank()}") == "from 0"


def _fail_in(process: int) -> None:
    if rank() == process:
        raise UserError(f"process {process} is broken")


def _signalled(place: str) -> None:
    """Process 1 has a signal, or 0 where it alone decides, and the other waits for it in an exchange."""
    told = place != "first"

    def tell(*_) -> None:
        if rank() == told:
            time.sleep(0.5)
            signal.raise_signal(signal.SIGTERM)

    def failing_work(chunk: slice) -> dict[str, torch.Tensor]:
        tell()
        return work(chunk)

    def rest() -> None:
        """What follows in a job is not done any more, what follows elsewhere is."""
        tell()
        assert rank() != told

    def between() -> None:
        tell()
        together(lambda: None)

    def first() -> None:
        tell()
        on_first_process(lambda: None)

    def training() -> None:
        with held_back(tells=False):
            tell()
            assert together(lambda: 3) == 3
        together(lambda: None)

    jobs = {
        "between": between, "first": first, "job": lambda: together(rest),
        "chunk": lambda: in_chunks(failing_work, COUNT, SIZE), "training": training,
    }  # fmt: skip
    with pytest.raises(Interrupted) as caught, handled(shared=True):
        jobs[place]()
        raise AssertionError("nobody was told")
    assert from_all(rank()) == [0, 1]  # they are still in step
    print(signal.Signals(caught.value.number).name)


def _die() -> None:
    if rank() == 1:
        os._exit(1)
    in_chunks(work, COUNT, SIZE)


if __name__ == "__main__":
    part, folder, number, count = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(number), world_size=int(count),
        timeout=distributed.TIMEOUT,
    )  # fmt: skip
    {"share": _share, "die": _die}.get(part, lambda: _signalled(part))()
    print("done")
    dist.destroy_process_group()
