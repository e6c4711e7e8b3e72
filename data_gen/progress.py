"""How far the training of some runs has come, counted in their snapshots."""

from collections.abc import Callable, Iterator

Progress = Callable[[int], None]


def iterations(snapshot_iterations: list[int], runs: int, progress: Progress | None) -> Iterator[int]:
    """0 up to the last snapshot's iteration; on the way, `progress` is told of new snapshots, of all runs in the end.

    They are counted as if they were spread evenly over the iterations. Where they really lie says little about what is
    done: half of them at the very beginning of a training, or all at its end.
    """
    last, snapshots, told = snapshot_iterations[-1], runs * len(snapshot_iterations), 0
    for iteration in range(last + 1):
        yield iteration
        done = snapshots * (iteration + 1) // (last + 1)
        if progress and done > told:
            progress(done - told)
            told = done
