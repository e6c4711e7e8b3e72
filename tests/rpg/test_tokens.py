"""Tokens of a complete state_dict: exact, complete, and the same for every architecture."""

import math
import warnings
from itertools import accumulate

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from Gpt.errors import ConfigError, StructureError
from Gpt.structure import Structure
from rpg.tokens import CUTS, Latents, Layout, PositionCode, cut, sinusoids, token_coordinates, token_sizes

ARCHITECTURES = torchvision.models.list_models(module=torchvision.models)


class Weightless(TorchFunctionMode):
    """Layers allocate nothing; what constructors compute with (regnet's widths) stays real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "meta"} if function is torch.empty else kwargs))


def weightless(name: str) -> nn.Module:
    with warnings.catch_warnings(), Weightless():
        warnings.filterwarnings("ignore", message="The default weight initialization", category=FutureWarning)
        return torchvision.models.get_model(name)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Other values everywhere, counters included; variances positive, ties kept."""
    rng = torch.Generator().manual_seed(seed)
    seen = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape) if value.numel() else name
        if key not in seen:
            seen[key] = torch.randn(value.shape, generator=rng).to(value.dtype)
            if name.endswith("running_var"):
                seen[key] = seen[key].exp()
            if not value.is_floating_point():
                seen[key] = torch.randint(1, 1000, value.shape, generator=rng).to(value.dtype)
        state[name] = seen[key]
    return state


class Oddities(nn.Module):
    """A tie, a learned scalar, half precision, a counter, a mask, an empty tensor, a constant layer, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.gate = nn.Parameter(torch.ones(1))
        self.half = nn.Linear(5, 3).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0))
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.embedding.weight


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("policy", CUTS)
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "oddities"])
def test_a_state_dict_survives_tokens_to_the_bit(name, policy):
    module = Oddities() if name == "oddities" else torchvision.models.get_model(name)
    state = randomised(module.state_dict(), seed=1)
    structure = Structure.of(state)
    tokens = cut(structure, policy, 1000 if name != "oddities" else 4)
    coded = tokens.encode(structure.flatten(state)[None])
    assert not coded[:, ~tokens.mask].any()
    garbage = torch.where(tokens.mask, coded, 1e9)
    assert_same(structure.state_dict(tokens.decode(garbage)[0]), state)


def test_ties_scalars_and_counters():
    state = randomised(Oddities().state_dict(), seed=2)
    structure = Structure.of(state)
    assert structure.aliases == {"decoder.weight": "embedding.weight"}
    assert set(structure.fixed) == {"mask", "empty", "norm.num_batches_tracked"}
    assert {"logit_scale", "gate"} <= {spec.name for spec in structure.tensors}  # learned scalars are generated


def test_every_torchvision_architecture_is_cut_without_gaps_or_straddling_and_comes_back():
    assert len(ARCHITECTURES) >= 80
    for name in ARCHITECTURES:
        state = {key: value.to("meta") for key, value in weightless(name).state_dict().items()}
        structure = Structure.of(state)
        boundaries, flat = {spec.offset for spec in structure.tensors}, structure.flatten(state)[None]
        for policy in CUTS:
            sizes = token_sizes(structure, policy, 16384)
            starts = list(accumulate(sizes[:-1], initial=0))
            assert sum(sizes) == structure.size and 1 <= min(sizes) and max(sizes) <= 16384, (name, policy)
            assert policy == "flat" or boundaries <= set(starts), (name, policy)
            layer, chunk = token_coordinates(structure, sizes).unbind(1)
            assert len((layer * len(sizes) + chunk).unique()) == len(sizes), (name, policy)
            if policy == "within_layer":
                assert len(sizes) == sum(math.ceil(spec.numel / 16384) for spec in structure.tensors), name
            tokens = cut(structure, policy, 16384)
            flat = tokens.decode(tokens.encode(flat))
        returned = structure.state_dict(flat[0])
        found, expected = ([(key, t.shape, t.dtype) for key, t in kept.items()] for kept in (returned, state))
        assert found == expected, name


@pytest.mark.parametrize(
    "name, token_size, tensors, tokens",
    [("resnet18", 8192, 102, 1510), ("vit_b_16", 16384, 152, 5378), ("convnext_large", 16384, 344, 12311)],
)
def test_sequence_lengths_of_the_paper(name, token_size, tensors, tokens):
    structure = Structure.of(weightless(name))
    assert len(structure.tensors) == tensors
    assert len(token_sizes(structure, "within_layer", token_size)) == tokens


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (10,), (97,), (5, 130, 3), (1, 1, 500), (13, 11)])
def test_by_channel_keeps_channels_whole_where_they_fit(shape):
    limit = 100
    structure = Structure.of({"w": torch.zeros(shape)})
    sizes = token_sizes(structure, "by_channel", limit)
    starts = list(accumulate(sizes, initial=0))
    row = math.prod(shape)
    for length in shape:  # the largest row that fits, or the single number
        if row <= limit:
            break
        row //= length
    assert starts[-1] == math.prod(shape)
    assert all(start % row == 0 for start in starts)
    fullest = limit // row * row
    assert len(sizes) <= 2 * math.ceil(math.prod(shape) / fullest)


def test_adapters_are_structures_like_any_other():
    names = [f"base_model.model.layers.{i}.{p}.lora_{ab}.weight" for i in range(3) for p in "qv" for ab in "AB"]
    state = {n: gaussian(*((4, 48) if "lora_A" in n else (48, 4)), seed=i) for i, n in enumerate(names)}
    structure = Structure.of(state)
    for policy in CUTS:
        tokens = cut(structure, policy, 64)
        assert_same(structure.state_dict(tokens.decode(tokens.encode(structure.flatten(state)[None]))[0]), state)
    sizes = token_sizes(structure, "by_channel", 64)
    assert sizes[:4] == [48] * 4  # rows of A; rows of B share tokens, 16 at a time
    assert sizes[4:7] == [64] * 3


def test_an_adapter_of_peft_survives_tokens_and_peft_loads_it():
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in net.parameters():
                nn.init.normal_(parameter)
            config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True, init_lora_weights=False)
            return peft.get_peft_model(net, config)

    trained, fresh, x, adapter_of = adapted(), adapted(), gaussian(4, 6), peft.get_peft_model_state_dict
    state = {key: gaussian(*value.shape, seed=i) for i, (key, value) in enumerate(adapter_of(trained).items())}
    peft.set_peft_model_state_dict(trained, state)
    structure = Structure.of(state)
    assert len(structure.tensors) == 6  # A, B and magnitudes of two layers
    for policy in CUTS:
        tokens = cut(structure, policy, 4)
        returned = structure.state_dict(tokens.decode(tokens.encode(structure.flatten(state)[None]))[0])
        assert_same(returned, adapter_of(trained))
    assert not torch.equal(fresh(x), trained(x))
    peft.set_peft_model_state_dict(fresh, returned)
    assert torch.equal(fresh(x), trained(x))


@pytest.fixture
def networks() -> tuple[Structure, torch.Tensor]:
    """Forty networks, half of whose BatchNorm never moved."""
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.BatchNorm1d(2))
    structure = Structure.of(module)
    rows = []
    for seed in range(40):
        state = randomised(module.state_dict(), seed)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"3.{leaf}"] = torch.full((2,), 0.1)
        rows.append(structure.flatten(state))
    return structure, torch.stack(rows)


@pytest.mark.parametrize("residual", [True, False])
def test_latents_have_unit_variance_per_tensor_and_round_trip(networks, residual):
    structure, weights = networks
    latents = Latents(structure, residual)
    latents.fit(weights)
    z = latents.encode(weights)
    torch.testing.assert_close(latents.decode(z), weights, rtol=1e-4, atol=1e-6)
    for spec in structure.tensors:
        block = z[:, spec.slice].double()
        if spec.name.startswith("3."):
            assert not block.any()
            continue
        assert block.square().mean().item() == pytest.approx(1, abs=1e-5)
        means = block.mean(0) if residual else block.mean()
        assert means.abs().max() < 1e-5


@pytest.mark.parametrize("residual", [True, False])
def test_what_never_varies_is_written_to_the_bit_whatever_the_latents_say(networks, residual):
    structure, weights = networks
    latents = Latents(structure, residual)
    latents.fit(weights)
    written = structure.unflatten(latents.decode(100 * gaussian(3, structure.size)))
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(written[f"3.{leaf}"], torch.full((3, 2), 0.1))
    assert (written["1.running_var"] >= 0).all()


def test_running_variances_follow_the_published_logarithm(networks):
    structure, weights = networks
    latents = Latents(structure, residual=False)
    latents.fit(weights)
    where = next(spec.slice for spec in structure.tensors if spec.name == "1.running_var")
    variance = weights[:, where].double()
    logged = (variance / (0.95 * variance.mean()) + 0.05).log()
    expected = (logged - logged.mean()) / logged.std(correction=0)
    torch.testing.assert_close(latents.encode(weights)[:, where].double(), expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_with_the_former_name_of_the_scales_of_variances_still_load(networks):
    structure, weights = networks
    latents, loaded = Latents(structure), Latents(structure)
    latents.fit(weights)
    former = latents.state_dict()
    former["variance_scale"] = former.pop("variances.scale")
    loaded.load_state_dict(former)
    assert torch.equal(loaded.encode(weights), latents.encode(weights))
    plain = Structure.of(nn.Linear(2, 2))
    without = Latents(plain).state_dict()
    assert "variances.scale" not in without
    Latents(plain).load_state_dict(without | {"variance_scale": torch.ones(0)})


def test_residuals_resolve_checkpoints_that_differ_by_millionths():
    structure = Structure.of(nn.Linear(50, 50))
    mean = gaussian(structure.size)
    weights = mean + 1e-5 * gaussian(30, structure.size, seed=1)
    residual, plain = Latents(structure), Latents(structure, residual=False)
    for latents in (residual, plain):
        latents.fit(weights)
    assert residual.encode(weights).std() > 0.9
    assert plain.encode(weights).std(0).mean() < 1e-4
    torch.testing.assert_close(residual.decode(residual.encode(weights)), weights, rtol=0, atol=1e-6)
    noise = residual.decode(gaussian(30, structure.size, seed=2)) - weights.mean(0)
    assert noise.std().item() == pytest.approx(1e-5, rel=0.1)


def test_the_anchor_tells_weights_apart_only_where_networks_agree_on_them():
    structure = Structure.of(nn.Linear(50, 50))
    agreed, chaotic = Latents(structure), Latents(structure)
    agreed.fit(gaussian(structure.size) + 0.1 * gaussian(400, structure.size, seed=1))
    chaotic.fit(gaussian(400, structure.size, seed=1))
    assert agreed.anchor.std() > 0.9
    assert chaotic.anchor.std() < 0.1


def test_the_anchor_counts_in_deviations_of_each_tensor():
    structure = Structure.of(nn.Linear(50, 50))
    unit = gaussian(20, structure.size)
    anchors = []
    for scale, shift in ((1.0, 0.0), (1e-3, 7.0)):
        latents = Latents(structure)
        latents.fit(scale * unit + shift)
        anchors.append(latents.anchor)
    weight = unit[:, : 50 * 50].double()
    expected = (weight.mean(0) - weight.mean()) / weight.std(correction=0)
    torch.testing.assert_close(anchors[0][: 50 * 50], expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(anchors[1], anchors[0], rtol=1e-2, atol=1e-3)


def test_networks_that_are_not_finite_are_refused(networks):
    structure, weights = networks
    weights[3, 5] = torch.nan
    with pytest.raises(StructureError, match="NaN"):
        Latents(structure).fit(weights)


def test_sinusoids_equal_the_formula():
    expected = [[f(p / 10000 ** (2 * i / 8)) for i in range(4) for f in (math.sin, math.cos)] for p in (0, 1, 37, 1000)]
    torch.testing.assert_close(sinusoids(torch.tensor([0, 1, 37, 1000]), 8), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["layer_chunk", "index", "learned"])
def test_position_codes_differ_from_place_to_place(name):
    coordinates = torch.tensor([[layer, chunk] for layer in range(9) for chunk in range(layer + 1)])
    code = PositionCode(name, coordinates, 64)
    assert torch.pdist(code()).min() > 1e-2
    assert len(list(code.parameters())) == (name == "learned")


def test_layer_and_chunk_have_half_the_code_each():
    code = PositionCode("layer_chunk", torch.tensor([[0, 0], [0, 5], [3, 5], [3, 0]]), 16)()
    assert torch.equal(code[0, 8:], code[1, 8:]) and torch.equal(code[2, 8:], code[3, 8:])
    assert torch.equal(code[0, :8], code[3, :8]) and torch.equal(code[1, :8], code[2, :8])


@pytest.mark.parametrize("policy", [*CUTS, "neuron", "aligned_neuron"])
@pytest.mark.parametrize("hidden_layers", [1, 2])
def test_layouts_hold_every_weight(policy, hidden_layers):
    structure = mlp(hidden_layers)
    layout = Layout(structure, policy, 5)
    latents = gaussian(3, structure.size)
    tokens, joints = layout.graph.encode(latents)
    assert [tuple(block.shape[1:]) for block in tokens] == list(layout.graph.shapes)
    assert len(joints) == (hidden_layers - 1) * ("neuron" in policy)
    assert torch.equal(layout.graph.decode(tokens, joints), latents)
    assert len(layout.place) == sum(count for count, _ in layout.graph.shapes)
    assert layout.place.unique().tolist() == list(range(len(layout.coordinates)))


def test_hidden_units_stand_nowhere_in_particular_unless_networks_agree_on_them():
    assert Layout(mlp(1), "neuron", 1).place.tolist() == [0, 0, 0, 0, 1]
    assert Layout(mlp(2), "neuron", 1).place.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert Layout(mlp(1), "aligned_neuron", 1).coordinates.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def mlp(hidden_layers: int) -> Structure:
    if hidden_layers == 1:
        symmetry = {"0.weight": ("h", None), "0.bias": ("h",), "1.weight": (None, "h")}
        return Structure.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), symmetry)
    symmetry = {"0.weight": ("a", None), "0.bias": ("a",), "1.weight": ("b", "a"), "1.bias": ("b",)}
    symmetry["2.weight"] = (None, "b")
    return Structure.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)), symmetry)


def test_mistakes_are_named():
    structure = mlp(1)
    with pytest.raises(ConfigError, match="by_channel"):
        token_sizes(structure, "per_channel", 8)
    with pytest.raises(ConfigError, match="aligned_neuron"):
        Layout(structure, "neurons", 8)
    with pytest.raises(ConfigError, match="token_size=0"):
        token_sizes(structure, "flat", 0)
    with pytest.raises(ConfigError, match="layer_chunk"):
        PositionCode("2d", torch.zeros(1, 2, dtype=torch.long), 8)
    with pytest.raises(ConfigError, match="width=6"):
        PositionCode("index", torch.zeros(1, 2, dtype=torch.long), 6)
