"""Work spread over the processes that torchrun starts; with one process, everything here is what it would be without.

All processes run the same program and take the same decisions. What they share out are rows, in chunks whose
boundaries do not depend on how many processes there are: a chunk is computed alike whoever computes it, so that a
result is a function of its seed alone.

Nor do they end alone: a signal that came in one is told to the others where they exchange something, see
`Gpt.interruption`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from Gpt.errors import UserError
from Gpt.interruption import Interrupted, at_once, noted

T = TypeVar("T")
Rows = dict[str, Tensor]
Failure = UserError | Interrupted  # what ends all processes when one meets it

# Longer than any piece of work that one process does while the others wait for it (importing a large zoo), and short
# enough that a process which lost its partners ends by itself.
TIMEOUT = timedelta(hours=1)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes of this torchrun know each other; started without it, there is only this one."""
    started = "LOCAL_RANK" in os.environ
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def primary() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part: every `world()`-th item."""
    return items[rank() :: world()]


def from_first(value: T) -> T:
    """The first process's value, in every process: for what must not differ between them, such as measured seconds."""
    if world() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def from_all(value: T) -> list[T]:
    """Everybody's value, in the order of the processes."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def total(value: Tensor) -> Tensor:
    """Sum over the processes."""
    if world() > 1:
        value = value.to(_transport(), copy=True)
        dist.all_reduce(value)
    return value


def largest(number: int) -> int:
    """The largest of the processes' numbers, in every process."""
    if world() == 1:
        return number
    found = torch.tensor(number, device=_transport())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def on_first_process(job: Callable[[], T]) -> T:
    """What `job` returns or, if the user can mend it, raises in the first process; the others only get it told.

    Args:
        job: exchanges nothing with other processes.

    Raises:
        Interrupted: a signal came in the first process.
    """
    attempt: tuple[Any, Failure | None] = _attempt(job) if primary() else (None, None)
    outcome, error = from_first(attempt)
    if error is not None:
        raise error
    return outcome


def together(job: Callable[[], T]) -> T:
    """Run `job` in every process; an error that the user can mend is raised in all when one process meets it.

    Args:
        job: exchanges nothing with other processes.

    Raises:
        Interrupted: a signal came in one of them.
    """
    outcome, error = _attempt(job)
    for found in from_all(error):
        if found is not None:
            raise found
    return outcome


def in_chunks(work: Callable[[slice], Rows], count: int, size: int) -> Rows:
    """`work` done for rows 0 … count - 1 in chunks of `size`, each by one process; every process gets all rows.

    Args:
        work: `chunk -> {name: [rows of the chunk, ...]}`; must itself be the same in every process.

    Raises:
        UserError: `work` raised it, here or in another process.
    """
    parts = [*in_parts(work, count, size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def in_parts(work: Callable[[slice], Rows], count: int, size: int) -> Iterator[Rows]:
    """`in_chunks`, chunk after chunk: for rows that are not to be in memory twice. Where there is one process, each
    chunk is done when it is asked for."""
    chunks = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    if world() == 1:
        yield from map(work, chunks)
    else:
        mine = together(lambda: [work(chunk) for chunk in share(chunks)])
        yield from _all_parts(mine, len(chunks))


def busy(count: int, size: int) -> int:
    """How many processes have work where `count` rows are done in chunks of `size`."""
    return min(world(), -(-count // size))


def _all_parts(mine: Sequence[Rows], chunks: int) -> Iterator[Rows]:
    """The rows of every chunk, sent by the process that has them."""
    described = from_all([{name: (v.shape, v.dtype, v.device.type) for name, v in rows.items()} for rows in mine])
    for chunk in range(chunks):
        turn, owner = divmod(chunk, world())
        rows = {}
        for name, (shape, dtype, home) in described[owner][turn].items():
            if owner == rank():
                value = mine[turn][name].to(_transport()).contiguous()
            else:
                value = torch.empty(shape, dtype=dtype, device=_transport())
            dist.broadcast(value, owner)
            rows[name] = value.to(home)
        yield rows


def _transport() -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _attempt(job: Callable[[], T]) -> tuple[Any, Failure | None]:
    if world() == 1:
        return job(), None
    try:
        with at_once():
            outcome = job()
    except (UserError, Interrupted) as error:
        return None, error
    return outcome, Interrupted(number) if (number := noted()) else None
