"""One architecture as a flat vector: nothing is lost on the way there and back, and renamed units compute the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from Gpt.errors import StructureError
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.seeds import rng
from Gpt.structure import Structure


class Oddities(nn.Module):
    """One of everything that a state_dict may hold."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.quantised = nn.Parameter(torch.randn(3).half())
        self.precise = nn.Parameter(torch.rand(2, 2, dtype=torch.float64).float().double())
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 3))


class Flattening(nn.Module):
    """A convolution whose channels are flattened into a linear layer: each channel owns a block of nine inputs."""

    symmetry = {
        "conv.weight": ("channels", None, None, None),
        "conv.bias": ("channels",),
        "norm.weight": ("channels",),
        "norm.bias": ("channels",),
        "norm.running_mean": ("channels",),
        "norm.running_var": ("channels",),
        "fc1.weight": ("hidden", "channels"),
        "fc1.bias": ("hidden",),
        "fc2.weight": (None, "hidden"),
    }

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4 * 9, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.relu(self.norm(self.conv(x))).flatten(1))))


NETWORKS = {
    "mlp": (lambda: MLP(6, 5, 3), MLP.symmetry, (7, 6)),
    "convnet": (ConvNet, ConvNet.symmetry, (3, 3, 8, 8)),
    "actor": (CartPoleActor, CartPoleActor.symmetry, (7, 4)),
    "flattening": (Flattening, Flattening.symmetry, (4, 2, 5, 5)),
}


def drawn(structure: Structure, count: int, seed: int = 0) -> torch.Tensor:
    """Random networks with positive running variances."""
    weights = torch.randn(count, structure.size, generator=rng("cpu", seed, "weights"))
    for t in structure.tensors:
        if t.kind == "running_var":
            weights[:, t.slice] = weights[:, t.slice].abs() + 0.1
    return weights


@pytest.mark.parametrize("make", [Oddities, lambda: MLP(6, 5, 3), ConvNet, CartPoleActor, Flattening])
def test_a_state_dict_survives_the_flat_vector_to_the_bit(make):
    net = make()
    if isinstance(net, Oddities):
        net.norm.num_batches_tracked += 17
    state = net.state_dict()
    structure = Structure.of(net)
    back = structure.state_dict(structure.flatten(state))
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name
        assert back[name].data_ptr() != value.data_ptr() or value.numel() == 0
    make().load_state_dict(back)


def test_what_is_generated_what_is_tied_and_what_is_copied():
    structure = Structure.of(Oddities())
    kinds = {t.name: t.kind for t in structure.tensors}
    assert kinds == {
        "quantised": "scale",
        "precise": "weight",
        "temperature": "scalar",
        "embedding.weight": "weight",
        "norm.weight": "scale",
        "norm.bias": "bias",
        "norm.running_mean": "running_mean",
        "norm.running_var": "running_var",
    }
    assert structure.aliases == {"head.weight": "embedding.weight"}
    assert set(structure.fixed) == {"mask", "empty", "norm.num_batches_tracked"}
    assert structure.size == 20 + 4 * 4 + 3 + 4 + 1
    ends = [0, *(t.slice.stop for t in structure.tensors)]
    assert [t.offset for t in structure.tensors] == ends[:-1]


def test_a_transposed_view_is_no_tie():
    """It has the same storage, and other values."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.detach().T)
    structure = Structure.of(net)
    assert structure.aliases == {}
    back = structure.state_dict(structure.flatten(net.state_dict()))
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())


def test_a_module_its_state_dict_and_its_meta_twin_have_one_structure():
    net = Flattening()
    with torch.device("meta"):
        meta = Flattening()
    structures = [Structure.of(source, Flattening.symmetry) for source in (net, net.state_dict(), meta)]
    assert len({s.fingerprint for s in structures}) == 1
    assert structures[0].tensors == structures[1].tensors == structures[2].tensors


def test_fingerprints_tell_architectures_apart():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    sources = [MLP(6, 5, 3), MLP(6, 4, 3), MLP(5, 6, 3), Renamed(), MLP(6, 5, 3).double()]
    assert len({Structure.of(source).fingerprint for source in sources}) == len(sources)
    assert Structure.of(MLP(6, 5, 3)).fingerprint == Structure.of(MLP(6, 5, 3), MLP.symmetry).fingerprint


def test_leading_axes_go_through():
    structure = Structure.of(MLP(6, 5, 3))
    weights = torch.randn(2, 4, structure.size, generator=rng("cpu", 0))
    parts = structure.unflatten(weights)
    assert parts["fc1.weight"].shape == (2, 4, 5, 6)
    assert torch.equal(structure.flatten(parts), weights)
    parts["fc1.weight"].zero_()
    assert (weights[..., :30] == 0).all()  # views, not copies


@pytest.mark.parametrize("name", NETWORKS)
def test_renamed_units_compute_the_same_function(name):
    make, symmetry, shape = NETWORKS[name]
    net = make().double().eval()
    structure = Structure.of(net, symmetry)
    draw = rng("cpu", 0, name)
    permutations = structure.random_permutations(5, draw)
    assert set(permutations) == set(structure.groups)
    weights = drawn(structure, 5).double()
    renamed = weights.gather(1, structure.permutation_index(permutations))
    assert not torch.equal(renamed, weights)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    for old, new in zip(weights, renamed, strict=True):
        outputs = [functional_call(net, structure.unflatten(w), (x,)) for w in (old, new)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def test_a_permutation_index_permutes_and_the_inverse_undoes_it():
    structure = Structure.of(Flattening(), Flattening.symmetry)
    permutations = structure.random_permutations(3, rng("cpu", 0))
    index = structure.permutation_index(permutations)
    assert torch.equal(index.sort(dim=1).values, torch.arange(structure.size).expand(3, -1))
    back = structure.permutation_index({group: p.argsort(-1) for group, p in permutations.items()})
    assert torch.equal(index.gather(1, back), torch.arange(structure.size).expand(3, -1))
    for group, permutation in permutations.items():
        single = structure.permutation_index({group: permutation[0]})
        assert single.shape == (structure.size,)
    identity = structure.permutation_index({group: torch.arange(n) for group, n in structure.groups.items()})
    assert torch.equal(identity, torch.arange(structure.size))


def test_new_unit_i_is_old_unit_permutation_i():
    structure = Structure.of(MLP(2, 3, 2), MLP.symmetry)
    net = structure.unflatten(torch.arange(float(structure.size)))
    order = torch.tensor([2, 0, 1])
    renamed = structure.unflatten(torch.arange(float(structure.size))[structure.permutation_index({"hidden": order})])
    assert torch.equal(renamed["fc1.weight"], net["fc1.weight"][order])
    assert torch.equal(renamed["fc1.bias"], net["fc1.bias"][order])
    assert torch.equal(renamed["fc2.weight"], net["fc2.weight"][:, order])
    assert torch.equal(renamed["fc2.bias"], net["fc2.bias"])


def test_random_permutations_are_uniform():
    structure = Structure.of(MLP(2, 3, 2), MLP.symmetry)
    permutations = structure.random_permutations(6000, rng("cpu", 0))["hidden"]
    counts = (permutations * torch.tensor([9, 3, 1])).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_weights_of_another_architecture_are_refused_by_name():
    structure = Structure.of(MLP(6, 5, 3))
    state = MLP(6, 5, 3).state_dict()
    with pytest.raises(StructureError, match=r"missing \['fc2.bias'\], unexpected \['fc3.bias'\]"):
        structure.flatten({k.replace("fc2.bias", "fc3.bias"): v for k, v in state.items()})
    others = {f"layer {i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(StructureError, match=r"unexpected \['layer 0', 'layer 1', 'layer 2'\] and 6 more$"):
        structure.flatten(state | others)
    with pytest.raises(StructureError, match=r"'fc1.weight' has shape \(4, 6\), the architecture has \(5, 6\)"):
        structure.flatten(MLP(6, 4, 3).state_dict())
    with pytest.raises(StructureError, match="flat weights have 7 entries, the architecture has 53"):
        structure.unflatten(torch.zeros(7))


@pytest.mark.parametrize(
    ("symmetry", "message"),
    [
        ({"fc9.weight": ("hidden", None)}, r"symmetry names \['fc9.weight'\], but the network has only"),
        ({"fc1.weight": ("hidden",)}, "symmetry of 'fc1.weight' names 1 axes, the tensor has 2"),
        ({"fc1.weight": ("hidden", "hidden")}, r"group 'hidden' have lengths \[5, 6\], not multiples"),
    ],
)
def test_a_symmetry_that_does_not_fit_is_refused_by_name(symmetry, message):
    with pytest.raises(StructureError, match=message):
        Structure.of(MLP(6, 5, 3), symmetry)


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(StructureError, match="no floating-point tensors"):
        Structure.of(nn.ReLU())
    with pytest.raises(StructureError, match="'phase' is complex"):
        Structure.of({"phase": torch.zeros(3, dtype=torch.complex64)})
