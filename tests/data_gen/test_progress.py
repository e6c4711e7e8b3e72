"""Progress follows the iterations, wherever the snapshots lie, and ends with all of them."""

import pytest

from data_gen.collect import snapshot_schedule
from data_gen.progress import iterations


@pytest.mark.parametrize("spacing", ["log", "uniform", "tail"])
@pytest.mark.parametrize(("length", "snapshots", "runs"), [(1000, 7, 1), (40, 41, 3), (25, 5, 200), (3, 2, 1)])
def test_told_snapshots_follow_the_iterations(spacing, length, snapshots, runs):
    snapshots = min(snapshots, length) if spacing == "tail" else snapshots
    schedule, told = snapshot_schedule(length, snapshots, spacing), []
    for iteration in iterations(schedule, runs, told.append):
        behind = runs * snapshots * iteration / (length + 1) - sum(told)
        assert 0 <= behind < 1
    assert iteration == length
    assert sum(told) == runs * snapshots and min(told) > 0


def test_nobody_has_to_be_told():
    assert list(iterations([2, 3], 5, None)) == [0, 1, 2, 3]
