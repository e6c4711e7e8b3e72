"""Every speed benchmark runs small on a CPU, and what it reports adds up."""

import fnmatch
import json
import math
import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import all as everything
from benchmarks import gpt_speed, growth, profile_step, rpg_speed, timing, zoo_speed
from Gpt.models.gpt_paper import GptPaper
from rpg.tokens import token_sizes

SMALL = ["--small", "--device", "cpu"]


def named(records):
    return {record["name"]: record for record in records}


def test_gpt_speed():
    records = named(gpt_speed.main(SMALL))
    assert set(records) == {
        f"{work}/{model}/bfloat16" for work in ("train", "sample") for model in gpt_speed.SMALL_MODELS
    }
    written = records["sample/digits_paper/bfloat16"]
    assert written["steps"] == 20 and written["networks_per_second"] == pytest.approx(4 / written["seconds"])
    assert written["ms_per_network_at_default_steps"] == pytest.approx(250 * written["seconds"])


def test_the_published_sizes_are_the_published_ones():
    sizes = {"mnist_paper": 378_283_008, "cifar10_paper": 639_459_328}
    for name, parameters in sizes.items():
        model = gpt_speed.MODELS[name]
        config = {key: getattr(model.config, key) for key in ("width", "layers", "heads", "policy", "chunk")}
        with torch.device("meta"):
            network = GptPaper([t.numel for t in model.task.structure.tensors], **config)
        assert sum(p.numel() for p in network.parameters()) == parameters
    for name, size, tokens in (("resnet18_paper", 8192, 1_448), ("convnext_large", 16384, 12_311)):
        assert len(token_sizes(rpg_speed.MODELS[name].structure, "within_layer", size)) == tokens


def test_rpg_speed():
    records = named(rpg_speed.main(SMALL))
    whole = {f"{work}/{model}/eager" for work in ("train", "sample") for model in rpg_speed.SMALL_MODELS}
    assert set(records) == whole | {"denoiser/eager"}
    assert all(records[name]["weights"] == 5370 for name in whole)


def test_zoo_speed(monkeypatch):
    monkeypatch.setattr("Gpt.environments.EPISODE_STEPS", 10)
    records = named(zoo_speed.main(SMALL))
    assert records["digits"]["snapshots_per_second"] == pytest.approx(12 / records["digits"]["seconds"])
    assert 0 <= records["digits"]["final_test_error"] <= 100
    assert records["cartpole"]["runs_per_minute"] == pytest.approx(120 / records["cartpole"]["seconds"])


def test_growth_draws_its_curves(tmp_path):
    records = growth.main([*SMALL, "--figure", str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert [record["weights"] for record in records] == [10_000, 10_000, 29_584, 29_584]
    assert all(math.isfinite(slope) for slope in growth.exponents(records).values())


def test_exponents_are_slopes_on_logarithmic_axes():
    records = [{"work": "step", "weights": 10**i, "seconds": 3 * 10 ** (1.5 * i), "peak_gib": None} for i in (4, 2, 3)]
    assert growth.exponents(records) == {"step": pytest.approx(1.5)}
    assert growth.exponents([*records[:1], {"failed": "out of memory", "name": "x"}]) == {}


def test_all_runs_what_fits_the_budget(tmp_path, monkeypatch, capsys):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"name": "of an earlier run", "failed": "long ago"}) + "\n")

    def run(command, *, timeout, **streams):
        if "benchmarks.rpg_speed" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        with file.open("a") as stream:
            stream.write(json.dumps({"name": command[2], "exponent": 1.0}) + "\n")
        return subprocess.CompletedProcess(command, int("benchmarks.growth" in command))

    monkeypatch.setattr(everything.subprocess, "run", run)
    records = everything.main([*SMALL, "--output", str(tmp_path)])
    assert [record["name"] for record in records] == [f"benchmarks.{m}" for m in ("zoo_speed", "gpt_speed", "growth")]
    told = capsys.readouterr().out
    assert "zoo_speed: done" in told and "rpg_speed: ended by the budget" in told and "growth: failed" in told
    assert everything.main(["--output", str(tmp_path), "--budget", "0"]) == []
    assert capsys.readouterr().out.count("skipped") == len(everything.PARTS)


def test_every_part_names_cases_that_exist(monkeypatch):
    modules = {module.__name__.partition(".")[2]: module for module in (gpt_speed, growth, rpg_speed, zoo_speed)}
    names: list[str] = []
    monkeypatch.setattr(timing.Bench, "case", lambda self, name, work: names.append(name))
    for part in everything.PARTS:
        names.clear()
        modules[part.module].main(["--device", "cpu"])
        for pattern in part.only:
            assert fnmatch.filter(names, pattern), f"{part.name}: no case is called {pattern}"


class WatchForWaits(TorchDispatchMode):
    """Counts what would make a host wait for a GPU: numbers read back, and small tensors made on the host."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.waits:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def waits(network, *inputs):
    with WatchForWaits() as watch, torch.no_grad():
        network(*inputs)
    return watch.found


def test_a_step_of_the_published_sampler_never_waits_for_the_device():
    model = gpt_speed.SMALL_MODELS["digits_paper"]
    generator = model.build(torch.device("cpu"))
    weights, scalars = torch.randn(2, 3, generator.structure.size), torch.rand(3, 3)
    assert waits(generator.network, weights[0], scalars[0], weights[1], scalars[1], scalars[2]) == []
    denoiser = generator.objective.denoiser(lambda x, t: x)
    assert waits(denoiser, weights[0], torch.full((3,), 7.0)) == []


@pytest.mark.parametrize("name", rpg_speed.SMALL_MODELS)
def test_a_step_of_rpg_never_waits_for_the_device(name):
    generator = rpg_speed.SMALL_MODELS[name].build(torch.device("cpu")).eval()
    x, t = torch.randn(2, *generator.noise_shape), torch.tensor([0.5, 0.5])
    if name == "convnet":
        network = generator._network(generator._request({}, None, 2))
    else:
        x, network = x[0], generator._network(torch.randn(generator.noise_shape[0], 256))
        t = torch.full(x.shape[:1], 3.0)
    assert waits(network, x, t) == []


def test_profile_step():
    records = named(profile_step.main(SMALL))
    step = records["train/digits"]
    parts = ("draw", "forward", "backward", "clip", "optimizer", "averaging")
    assert all(0 < step[f"{part}_host_ms"] <= step[f"{part}_ms"] for part in parts)
    times = [ms for ms, count, name in step["top_operators"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= step["operators_ms"]
    assert any("mm" in name for *_, name in step["top_operators"])
    assert records["zoo/digits"]["metrics_ms"] > 0 and records["sample/digits_paper"]["steps"] == 2
    assert 0 < records["attention"]["default_forward_ms"]
