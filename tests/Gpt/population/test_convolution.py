"""Population convolutions are what vmap makes of ordinary ones; here in their plain implementation, on a CPU."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, vmap

from Gpt.networks import MLP, ConvNet
from Gpt.population import convolution
from Gpt.population.convolution import differentiable_conv2d, population_conv2d, tell_compiler
from Gpt.population.functional import Population, population_gradient, prepared, stack_initial
from Gpt.population.layers import PopulationConv2d, for_populations
from Gpt.seeds import rng
from Gpt.structure import Structure


class Flattened(nn.Module):
    """The textbook network that looks at the memory layout: `view` between convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 7 * 6, 5)

    def forward(self, x):
        return self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).view(x.shape[0], -1))


def random_network(seed: int) -> nn.Sequential:
    """Two to three convolutions of random geometry with norms, non-linearities and pools between them."""
    draw = rng("cpu", seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    layers, channels = [], 3
    for _ in range(pick(2, 3)):
        maps, taps = pick(1, 4, 5), pick(1, 2, 3, (3, 2))
        layers.append(nn.Conv2d(channels, maps, taps, pick(1, 2, (1, 2)), pick(0, 1, (1, 0)), bias=pick(True, False)))
        layers.append(pick(nn.ReLU(), nn.SELU(), nn.BatchNorm2d(maps)))
        channels = maps
    layers += [pick(nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(*layers)


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr("Gpt.population.functional.accelerated", lambda device: True)


MODELS = {"ConvNet": ConvNet, "view": Flattened} | {
    f"random {seed}": lambda seed=seed: random_network(seed) for seed in range(6)
}


def population_of(make):
    """Three networks, four images for all of them, four of its own for each, and their labels."""
    template = make()
    structure = Structure.of(template)
    weights = stack_initial(make, structure, [1, 2, 3])
    shared = torch.randn(4, 3, 16, 15, generator=rng("cpu", 1))
    own = torch.randn(3, 4, 3, 16, 15, generator=rng("cpu", 2))
    labels = torch.randint(5, (3, 4), generator=rng("cpu", 3))
    return template, structure, weights, shared, own, labels


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_populations_and_their_gradients_are_those_of_vmap(make, monkeypatch):
    template, structure, weights, shared, own, labels = population_of(make)
    found = []
    for fast in (False, True):
        monkeypatch.setattr("Gpt.population.functional.accelerated", lambda device, fast=fast: fast)
        population, trained = Population(template, structure, weights), weights.clone()
        gradient = population_gradient(template, structure, shared[:1])(trained, own, labels)
        found.append([population(shared), population.each(own), gradient, trained])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_match_ordinary_autograd_in_double_precision(shared):
    images = torch.randn(1 if shared else 3, 2, 4, 6, 5, dtype=torch.float64, generator=rng("cpu", 1))
    kernels = torch.randn(3, 5, 4, 3, 2, dtype=torch.float64, generator=rng("cpu", 2))

    def ordinary(x, w):
        return F.conv2d(x, w, None, (2, 1), (1, 0)).sin().sum()

    def ours(x, w):
        return differentiable_conv2d(x[None], w[None], (2, 1), (1, 0), True).sin().sum()

    x, axis = (images[0], None) if shared else (images, 0)
    both = (0, 1)
    inside = [vmap(grad(f, both), (axis, 0))(x, kernels) for f in (ordinary, ours)]
    outside = [grad(lambda *t, f=f: vmap(f, (axis, 0))(*t).sum(), both)(x, kernels) for f in (ordinary, ours)]
    for expected, found in zip(inside[0] + outside[0], inside[1] + outside[1], strict=True):
        torch.testing.assert_close(found, expected)


def test_images_that_networks_share_are_not_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(convolution, "_has_kernels", lambda images: seen.append(tuple(images.shape)))
    kernels = torch.randn(7, 4, 3, 3, 3, generator=rng("cpu", 0))
    images = torch.randn(2, 3, 8, 8, generator=rng("cpu", 1))
    maps = vmap(lambda w: differentiable_conv2d(images[None], w[None], (1, 1), (0, 0), False)[0])(kernels)
    assert seen == [(1, 2, 3, 8, 8)]
    torch.testing.assert_close(maps, torch.stack([F.conv2d(images, w) for w in kernels]), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_kernels_with_channels_last(everywhere, monkeypatch):
    """An average over pixels hands its gradient on in the usual layout, which the kernels would read with strides."""
    template, structure, weights, shared, own, labels = population_of(ConvNet)
    gradient = population_gradient(template, structure, shared[:1])
    seen = []
    monkeypatch.setattr(convolution, "_has_kernels", lambda maps: seen.append(maps.movedim(2, -1).is_contiguous()))
    gradient(weights, own.movedim(2, -1).contiguous().movedim(-1, 2), labels)
    assert seen == 5 * [True]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_keep_their_promises_to_the_compiler(channels_last):
    images = torch.randn(2, 3, 4, 6, 5, generator=rng("cpu", 0))
    kernels = torch.randn(2, 5, 4, 3, 3, generator=rng("cpu", 1))
    tests = ("test_schema", "test_faketensor")
    geometry = [2, 1], [1, 0]
    torch.library.opcheck(population_conv2d, (images, kernels, *geometry, channels_last), test_utils=tests)
    maps = population_conv2d(images, kernels, *geometry, channels_last)
    operands = (maps, kernels, [6, 5], *geometry, channels_last)
    torch.library.opcheck(convolution.images_gradient, operands, test_utils=tests)
    torch.library.opcheck(convolution.kernels_gradient, (images, maps, [3, 3], *geometry), test_utils=tests)
    assert maps.movedim(2, -1).is_contiguous() == channels_last


def test_a_compiled_gradient_goes_through_the_operators():
    tell_compiler()
    images = torch.randn(2, 3, 3, 8, 8, generator=rng("cpu", 0))
    kernels = torch.randn(2, 4, 3, 3, 3, generator=rng("cpu", 1)), torch.randn(2, 5, 4, 3, 3, generator=rng("cpu", 2))

    def net(first, second, x):
        maps = differentiable_conv2d(x[None], first[None], (2, 2), (1, 1), True)
        return differentiable_conv2d(maps.relu(), second[None], (1, 1), (1, 1), True)[0].square().mean((-1, -2))

    gradient = grad(lambda kernels, x: vmap(net)(*kernels, x).sum())
    operators = []

    def record(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if "gpt_weights" in str(node.target))
        return graph

    compiled = torch.compile(gradient, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    torch.testing.assert_close(compiled(kernels, images), gradient(kernels, images))
    called = Counter(name.split(".")[1].removeprefix("population_conv2d") for name in operators)
    assert called == {"": 2, "_kernels_gradient": 2, "_images_gradient": 1}  # none by the data


def test_mixed_precision_computes_in_bfloat16(everywhere):
    template = ConvNet()
    structure = Structure.of(template)
    weights = stack_initial(ConvNet, structure, [1, 2])
    images = torch.randn(2, 8, 3, 8, 8, generator=rng("cpu", 0))
    labels = torch.randint(10, (2, 8), generator=rng("cpu", 1))
    full, mixed = (
        population_gradient(template, structure, images[0, :1], precision)(weights, images, labels)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert mixed.dtype == torch.float32
    error = (mixed - full).norm() / full.norm()
    assert 1e-4 < error < 0.1


def test_other_convolutions_are_left_alone():
    odd = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 3),
    )
    fitted = for_populations(odd, torch.zeros(1, 4, 16, 16))
    assert [isinstance(module, PopulationConv2d) for module in fitted] == [False] * 5 + [True]


def test_the_layout_follows_what_the_network_can_take(everywhere):
    example = torch.zeros(1, 3, 8, 8)
    assert prepared(ConvNet(), example)[0].conv1.channels_last
    assert not prepared(Flattened(), torch.zeros(1, 3, 16, 15))[0].conv.channels_last
    assert prepared(MLP(6, 5, 3), torch.zeros(1, 6))[1] == 2 * (5 + 3)


def test_one_image_is_a_batch_of_one_without_its_axis():
    net, image = ConvNet().conv2, torch.randn(16, 5, 5, generator=rng("cpu", 0))
    fast = for_populations(nn.Sequential(copy.deepcopy(net)), image[None])
    torch.testing.assert_close(functional_call(fast, {}, (image,)), net(image))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_gpu_finds_what_the_cpu_finds(make):
    template, structure, weights, shared, own, labels = population_of(make)
    found = []
    for device in ("cpu", "cuda"):
        here = [t.to(device) for t in (weights, shared, own, labels)]
        population = Population(template, structure, here[0])
        gradient = population_gradient(template, structure, here[1][:1])
        found.append([population(here[1]), population.each(here[2]), gradient(here[0].clone(), here[2], here[3])])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2, atol=1e-3)  # linear layers may use TensorFloat-32
