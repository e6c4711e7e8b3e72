import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import scaling


def test_two_processes_are_compared_with_one(monkeypatch):
    """Sharded training in two processes; sampling, which is to be compared, in this one."""
    in_processes = scaling.in_processes

    def here(arguments, work, count):
        if work != "sample":
            return in_processes(arguments, work, count)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            scaling.one_of_several(Namespace(**vars(arguments) | {"work": work}))
        return json.loads(printed.getvalue()) | {"processes": count}

    monkeypatch.setenv("PYTHONPATH", str(Path(scaling.__file__).parents[1]))
    monkeypatch.setattr(scaling, "WORK", ("sample", "train sharded"))
    monkeypatch.setattr(scaling, "in_processes", here)
    records = {r["name"]: r for r in scaling.main(["--small", "--device", "cpu"])}
    assert set(records) == {"train sharded/2 processes", "sample/1 processes", "sample/2 processes"}
    one, two = (records[f"sample/{count} processes"] for count in (1, 2))
    assert one["efficiency_per_process"] == 1
    assert one["networks_per_second"] == pytest.approx(4 / one["seconds"])
    assert two["efficiency_per_process"] == pytest.approx(two["networks_per_second"] / 2 / one["networks_per_second"])
    assert records["train sharded/2 processes"]["samples_per_second"] > 0
