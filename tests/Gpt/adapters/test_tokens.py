"""Adapter tokens: every weight has one place, whatever the base model, rank and targets."""

import json

import pytest
import torch

from Gpt.adapters.tokens import AdapterTokens
from Gpt.errors import ConfigError, StructureError
from Gpt.structure import Structure


def structure(shapes):
    return Structure.of({name: torch.zeros(shape) for name, shape in shapes.items()})


def llama(rank, width, hidden, keys, layers=2, train_a=True, dora=False):
    shapes = {}
    square, grouped, up, down = (width, width), (keys, width), (hidden, width), (width, hidden)
    sizes = {"q_proj": square, "k_proj": grouped, "up_proj": up, "down_proj": down}
    for layer in range(layers):
        for module, (out, inputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.block.{module}"
            if train_a:
                shapes[f"{name}.lora_A.weight"] = (rank, inputs)
            shapes[f"{name}.lora_B.weight"] = (out, rank)
            if dora:
                shapes[f"{name}.lora_magnitude_vector.weight"] = (out,)
    return structure(shapes)


STRUCTURES = {
    "smollm2": llama(8, 576, 1536, 192, train_a=False),
    "both": llama(8, 576, 1536, 192),
    "qwen": llama(8, 896, 4864, 128),
    "coprime": llama(3, 35, 77, 16),
    "dora": llama(4, 64, 128, 32, dora=True),
    "high rank": llama(64, 48, 96, 16),
}


@pytest.mark.parametrize("columns", [None, 1, 7, 192, 10_000])
@pytest.mark.parametrize("name", STRUCTURES)
def test_round_trip_is_exact_and_covers_everything(name, columns):
    tokens = AdapterTokens(STRUCTURES[name], columns)
    weights = torch.randn(2, STRUCTURES[name].size)
    grid = tokens.encode(weights)
    assert grid.shape == (2, *tokens.shape)
    assert torch.equal(tokens.decode(grid), weights)
    assert torch.equal(tokens.decode(grid + 3 * ~tokens.mask), weights), "padding leaks into weights"
    assert int(tokens.mask.sum()) == STRUCTURES[name].size
    assert not grid[:, ~tokens.mask].any()


def test_published_cut_of_smollm2_needs_no_padding():
    tokens = AdapterTokens(STRUCTURES["smollm2"])
    per_layer = (576 + 192 + 1536 + 576) // 192
    assert tokens.shape == (2 * per_layer, 8, 192)
    assert tokens.mask.all()


def test_published_count_of_qwen():
    """179 tokens a layer for the seven modules of Qwen2.5-0.5B at width 128; here its q, k, up and down."""
    assert len(AdapterTokens(STRUCTURES["qwen"], 128)) == 2 * (14 + 8 + 45 + 45)


def test_tokens_are_columns_of_the_laid_tensors():
    s = structure({"m.lora_A.weight": (2, 6), "m.lora_B.weight": (4, 2)})
    a, b = torch.arange(12.0).reshape(2, 6), 100 + torch.arange(8.0).reshape(4, 2)
    grid = AdapterTokens(s, 3).encode(s.flatten({"m.lora_A.weight": a, "m.lora_B.weight": b})[None])[0]
    assert torch.equal(grid[1], a[:, 3:])
    assert torch.equal(grid[2], b.T[:, :3])
    assert torch.equal(grid[3], torch.tensor([[106.0, 0, 0], [107.0, 0, 0]]))


@pytest.mark.parametrize("per", ["token", "module"])
def test_scales_make_every_group_unit(per):
    tokens = AdapterTokens(STRUCTURES["coprime"], 10)
    deviations = torch.randn(5, len(tokens.token)) * (1 + tokens.token)
    last = STRUCTURES["coprime"].tensors[-1]
    deviations[:, last.slice] = 0
    scaled = deviations / tokens.scale(deviations, per)
    for spec in STRUCTURES["coprime"].tensors[:-1]:
        torch.testing.assert_close(scaled[:, spec.slice].square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
    if per == "token":
        means = tokens.mean(scaled.square()).mean(0)
        kept = tokens.mean((tokens.scale(deviations, per) != 1).float()) > 0
        torch.testing.assert_close(means[kept], torch.ones(int(kept.sum())), rtol=1e-4, atol=0)
    assert torch.equal(tokens.scale(deviations, per)[last.slice], torch.ones(last.numel))


def test_manifest_survives_json_and_tells_another_adapter():
    tokens = AdapterTokens(STRUCTURES["both"])
    manifest = json.loads(json.dumps(tokens.manifest()))
    assert manifest["coverage"] == 1.0
    tokens.check_manifest(manifest)
    with pytest.raises(StructureError, match="rows is 8 there and 4 here"):
        AdapterTokens(llama(4, 576, 1536, 192)).check_manifest(manifest)
    with pytest.raises(StructureError, match="tensors is"):
        AdapterTokens(llama(8, 576, 1536, 192, layers=3)).check_manifest(manifest)


def test_what_is_no_adapter_is_told():
    with pytest.raises(StructureError, match="conv.weight"):
        AdapterTokens(structure({"conv.weight": (4, 4, 3, 3)}))
    with pytest.raises(ConfigError, match="columns"):
        AdapterTokens(STRUCTURES["both"], 0)
