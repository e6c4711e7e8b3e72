import pytest

from benchmarks import scaling


def test_two_processes_are_compared_with_one(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(scaling.__file__).rsplit("/", 2)[0])
    monkeypatch.setattr(scaling, "WORK", ("sample", "train sharded"))
    records = {r["name"]: r for r in scaling.main(["--small", "--device", "cpu"])}
    assert set(records) == {"train sharded/2 processes", "sample/1 processes", "sample/2 processes"}
    one, two = (records[f"sample/{count} processes"] for count in (1, 2))
    assert one["efficiency_per_process"] == 1
    assert two["efficiency_per_process"] == pytest.approx(two["networks_per_second"] / 2 / one["networks_per_second"])
    assert two["networks_per_second"] == pytest.approx(8 / two["seconds"])
