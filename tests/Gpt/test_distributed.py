import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from Gpt import distributed
from Gpt.distributed import busy, from_first, in_chunks, largest, on_first_process, rank, share, together, total, world
from Gpt.errors import TaskError, UserError
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
    assert total(torch.tensor(2.0)) == 2 and largest(15) == 15
    with pytest.raises(TaskError, match="second chunk"):
        in_chunks(failing, COUNT, SIZE)


def in_processes(folder: Path, part: str, count: int = 2) -> list[subprocess.Popen]:
    """Run a part of this file in several processes, which have to end well within the limit."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    calls = [[sys.executable, __file__, part, str(folder), str(i), str(count)] for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(call, env=environment, **pipes) for call in calls]


def test_every_process_gets_the_rows_that_one_makes_and_the_errors_of_the_others(tmp_path, outputs_of):
    outputs = outputs_of(in_processes(tmp_path, "share"), 100)
    assert [output.splitlines()[-1] for output in outputs] == ["done", "done"], outputs


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
    {"share": _share, "die": _die}[part]()
    print("done")
    dist.destroy_process_group()
