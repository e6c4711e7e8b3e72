"""Hidden units read off a network's computation: as by hand, complete where rules exist, and never wrong."""

import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from Gpt.data.alignment import align
from Gpt.networks import MLP, CartPoleActor, ConvNet, DeepMLP
from Gpt.networks_whole import cifar_resnet18, medium_cnn, small_cnn
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.symmetry import hidden_units

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's


def with_symmetry(net: nn.Module, *inputs: torch.Tensor) -> Structure:
    return Structure.of(net, hidden_units(net, Structure.of(net), inputs))


@torch.no_grad()
def change_by_renaming(net: nn.Module, structure: Structure, *inputs: torch.Tensor) -> float:
    """How much of the outputs changes when the hidden units of every group are renamed at random, in float64."""
    generator = rng("cpu", 0)
    net = net.double().eval()
    for name, value in net.state_dict().items():
        if value.is_floating_point():  # norms and biases start out the same for all units
            drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(0.5 + drawn if name.endswith("running_var") else value + 0.2 * (drawn - 0.5))
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    before = net(*inputs)
    index = structure.permutation_index(structure.random_permutations(1, generator))[0]
    assert not torch.equal(index, torch.arange(structure.size))
    state = net.state_dict()
    weights = torch.cat([state[t.name].flatten() for t in structure.tensors])
    for name, value in structure.unflatten(weights[index]).items():
        state[name].copy_(value)
    return float((net(*inputs) - before).norm() / before.norm())


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=rng("cpu", 1))


# ---- as by hand ----


@pytest.mark.parametrize(
    ("constructor", "shape"),
    [(MLP, (784,)), (DeepMLP, (64,)), (ConvNet, (3, 32, 32)), (CartPoleActor, (4,)), (small_cnn, (3, 28, 28)),
     (medium_cnn, (3, 32, 32))],
)  # fmt: skip
def test_the_built_in_networks_have_the_symmetry_that_is_written_down(constructor, shape):
    net = constructor()
    found = hidden_units(net, Structure.of(net), (torch.randn(2, *shape),))
    assert found.keys() == net.symmetry.keys()
    names = {}
    for name, groups in net.symmetry.items():
        for by_hand, group in zip(groups, found[name], strict=True):
            assert names.setdefault(by_hand, group) == group
    assert len(set(names.values())) == len(names)


# ---- architectures ----


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12
    )


@pytest.mark.parametrize(
    ("constructor", "side", "groups"),
    [
        # The residual stream of each of the four stages, and the units within each of the eight blocks.
        (cifar_resnet18, 16, 12),
        # One residual stream of tokens, and the units within each of the two blocks.
        (vision_transformer, 8, 3),
        (torchvision.models.mobilenet_v2, 32, 25),  # convolutions of single channels
        (torchvision.models.efficientnet_b0, 32, 40),  # channels weighted by what all channels say
        (torchvision.models.convnext_tiny, 32, 22),  # norms and scales of channels, moved to the end and back
        (torchvision.models.squeezenet1_1, 32, 9),  # channels side by side, which keep their places
    ],
)
def test_renaming_what_is_found_changes_no_architecture(constructor, side, groups):
    net = constructor()
    structure = with_symmetry(net, images(side))
    assert len(structure.groups) == groups
    assert change_by_renaming(net, structure, images(side)) < 1e-12


@pytest.mark.parametrize("left_out", ["conv1.bias", "conv2.weight", "fc2.weight"])
def test_renaming_with_a_tensor_left_out_changes_the_outputs(left_out):
    """So the tests above could fail."""
    net = medium_cnn()
    found = hidden_units(net, Structure.of(net), (images(32),))
    broken = Structure.of(net, {name: groups for name, groups in found.items() if name != left_out})
    assert change_by_renaming(net, broken, images(32)) > 1e-3


def test_a_resnet_with_its_units_renamed_is_brought_back():
    net = cifar_resnet18()
    structure = with_symmetry(net, images(16))
    weights = structure.flatten(net.state_dict())
    near = weights + 0.01 * torch.randn(weights.shape, generator=rng("cpu", 0))
    index = structure.permutation_index(structure.random_permutations(1, rng("cpu", 1)))
    aligned, _ = align(near[index], weights, structure)
    assert torch.equal(aligned[0], near)


# ---- operations ----


class Two(nn.Module):
    """Two linear layers 4-6-3 and what is between them."""

    def __init__(self, between, last: int = 6):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(last, 3)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Masked(Two):
    """A mask that no state_dict holds tells the units apart."""

    def __init__(self):
        super().__init__(lambda x: x * self.mask)
        self.register_buffer("mask", torch.arange(6.0), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(6, 4)
        self.decode.weight = nn.Parameter(self.encode.weight.t())
        self.again = self.encode

    def forward(self, x):
        return F.linear(F.relu(self.encode(x)), self.again.weight.t())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.scale = nn.Linear(4, 6), nn.Parameter(torch.ones(6))
        self.mix, self.outputs = nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = self.inputs(x)
        return self.outputs(x + self.scale * F.gelu(self.mix(x)))


class Products(nn.Module):
    """Matrix products written out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return torch.addmm(torch.ones(3, dtype=x.dtype), F.relu(x @ self.a), self.b)


class Attention(nn.Module):
    """Queries, keys and values of two heads; a feed-forward layer after it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = self.norm(self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.down(F.silu(self.up(x)))


X = torch.randn(5, 4, generator=rng("cpu", 2))
TOKENS = torch.randn(5, 3, 8, generator=rng("cpu", 2))


@pytest.mark.parametrize(
    ("net", "x", "groups"),
    [
        (Two(F.relu), X, {"first": 6}),
        (Two(lambda x: x.softmax(-1) + x.sum(-1, keepdim=True)), X, {"first": 6}),
        (Two(lambda x: (x[:, None, :] * x[:, :, None]).mean(1)), X, {"first": 6}),
        (Two(lambda x: x.view(-1, 3, 2).amax(2), last=3), X, {"first": 3}),  # pairs of units go together
        (Two(lambda x: x.view(-1, 3, 2).transpose(1, 2).flatten(1)), X, {}),  # units of two kinds
        (Two(lambda x: x.repeat_interleave(2, 1), last=12), X, {}),  # has no rule
        (Two(lambda x: x[:, :5], last=5), X, {}),
        (Two(lambda x: torch.cat([x, x[:, :1]], 1), last=7), X, {}),
        (Two(lambda x: x.cumsum(1)), X, {}),
        (Two(lambda x: x * torch.arange(6)), X, {}),
        (Two(lambda x: x.clamp(min=torch.arange(6.0, dtype=x.dtype))), X, {}),
        (Two(lambda x: x - x.amax() + x.sum(0) * x.mean()), X, {"first": 6}),
        (Two(lambda x: sum(x.unbind(1))[:, None], last=1), X, {}),
        (Masked(), X, {}),
        (Tied(), X, {"encode": 6}),
        (Residual(), X, {"scale": 6}),
        (Products(), X, {"a": 6}),
        (Two(nn.PReLU(6)), X, {"first": 6}),
        (Attention(), TOKENS, {"up": 12}),
        (nn.Linear(4, 3), X, {}),
        (nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)), torch.tensor([[1, 2]]), {"0": 5}),
        (nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 3, 1)), X[:, :, None], {"0": 6}),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1)), images(8), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_operations_keep_tie_or_fix_units(net, x, groups):
    structure = with_symmetry(net, x)
    assert structure.groups == groups
    if groups:
        assert change_by_renaming(net, structure, x) < 1e-12


def test_a_forward_that_depends_on_values_names_no_units_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert hidden_units(Two(lambda x: x if x.sum() > 0 else -x), Structure.of(Two(F.relu)), (X,)) == {}
    assert "of Two may be renamed cannot be read off" in caplog.text and "`symmetry`" in caplog.text
