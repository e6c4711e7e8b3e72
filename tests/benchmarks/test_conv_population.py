"""All ways to batch convolutions compute the same gradients, and the benchmark says so before it times them."""

import pytest
import torch

from benchmarks import conv_population
from Gpt.networks import ConvNet
from Gpt.population.functional import Population


def population(networks=3, images=2):
    return conv_population.Population(networks, images, torch.device("cpu"), 0, torch.float32, False)


@pytest.mark.parametrize("way", conv_population.WAYS.values(), ids=conv_population.WAYS)
def test_every_way_is_right_in_double_precision(way):
    networks = population()
    networks.images = networks.images.double()
    gradient = networks.gradient(way, torch.float64, False)(networks.weights.double())
    assert networks.error(gradient) < 1e-12
    assert networks.error(2 * gradient) == pytest.approx(1.0)


def test_the_network_is_the_project_s():
    networks = population()
    parameters = networks.structure.unflatten(networks.weights)
    found = conv_population.logits(conv_population.operator, parameters, networks.images)
    expected = Population(ConvNet(), networks.structure, networks.weights).each(networks.images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_runs_small_and_refuses_to_time_what_is_wrong(monkeypatch):
    wrong = {"wrong": lambda images, kernels, stride: 1.5 * conv_population.grouped(images, kernels, stride)}
    monkeypatch.setattr(conv_population, "WAYS", conv_population.WAYS | wrong)
    records = {record["name"]: record for record in conv_population.main(["--small", "--device", "cpu"])}
    steps = {name.removeprefix("step/") for name in records if name.startswith("step/")}
    assert steps == set(conv_population.WAYS)
    assert records["step/wrong"]["failed"].startswith("wrong") and "seconds" not in records["step/wrong"]
    kernels = {name.removeprefix("kernel/") for name in records if name.startswith("kernel/")}
    assert kernels == set(conv_population.KIBIBYTES)
    right = records["step/operator"]
    assert right["snapshots_per_second"] == pytest.approx(2 * 200 / (50 * 351) / right["seconds"])


def test_the_five_launches_are_those_of_a_step_and_move_what_is_said():
    calls = conv_population.kernels(2, 3, torch.device("cpu"), torch.bfloat16)
    for name, call in calls.items():
        images, kernels = call.args[:2]
        maps = call()
        moved = sum(t.numel() for t in (images, kernels, maps) if t.shape[1] == 3)  # maps, not kernels
        assert moved * 2 == 2 * 3 * conv_population.KIBIBYTES[name] * 1024
