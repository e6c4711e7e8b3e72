"""Jobs done in threads while their caller goes on."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any


class Background:
    """A few jobs at once, each in a thread; what one raises, the caller is told when it asks."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int):
        self._pool, self._threads = pool, threads
        self._jobs: set[Future] = set()

    def check(self) -> None:
        """Raise what a job has raised."""
        finished = {job for job in self._jobs if job.done()}
        self._jobs -= finished
        for job in finished:
            job.result()

    def make_room(self, jobs: int = 1) -> None:
        """Wait until so many jobs could begin at once; raise what a job has raised."""
        self.check()
        while len(self._jobs) > self._threads - jobs:
            wait(self._jobs, return_when=FIRST_COMPLETED)
            self.check()

    def start(self, job: Callable[[], Any]) -> None:
        """Begin a job as soon as a thread is free; never raises."""
        self._jobs.add(self._pool.submit(job))


@contextmanager
def background(threads: int) -> Iterator[Background]:
    """Inside, jobs can be started; all have ended when it is left, be it by an error or Ctrl-C.

    Raises:
        what a job raised.
    """
    with ThreadPoolExecutor(threads) as pool:
        jobs = Background(pool, threads)
        yield jobs
        jobs.make_room(threads)
