"""The form of an adapter: names, sizes, what a fresh one is."""

import pytest
import torch

from Gpt.adapters.base import load_base
from Gpt.adapters.spec import ALL_LINEAR, AdapterModule, AdapterSpec, adapter_structure, draw_a, target_shapes
from Gpt.errors import ConfigError

pytest.importorskip("transformers")


def test_sizes_follow_from_shapes_and_rank():
    shapes = target_shapes("tiny", ALL_LINEAR)
    outputs, inputs = (sum(side) for side in zip(*shapes.values(), strict=True))
    assert len(shapes) == 2 * 7
    assert adapter_structure("tiny", AdapterSpec(rank=3)).size == 3 * outputs
    assert adapter_structure("tiny", AdapterSpec(rank=3, train_a=True)).size == 3 * (outputs + inputs)
    assert adapter_structure("tiny", AdapterSpec(rank=3, dora=True)).size == 4 * outputs
    assert target_shapes(load_base("tiny"), ALL_LINEAR) == shapes


def test_the_state_dict_holds_exactly_the_generated_tensors_by_layer():
    names = list(AdapterModule("tiny", AdapterSpec(targets=("q_proj", "down_proj"), train_a=True)).state_dict())
    layer = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert names == [layer.format(i, module, factor) for i in (0, 1) for module in modules for factor in "AB"]


def test_fresh_adapters_differ_in_nothing_but_the_seed_of_a():
    fresh = AdapterModule("tiny", AdapterSpec(train_a=True)).state_dict()
    assert all((value == 0).all() for name, value in fresh.items() if "lora_B" in name)
    other = AdapterModule("tiny", AdapterSpec(train_a=True, a_seed=1)).state_dict()
    assert not any(torch.equal(fresh[name], other[name]) for name in fresh if "lora_A" in name)
    again = AdapterModule("tiny", AdapterSpec(train_a=True, targets=("v_proj",))).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in again.items()), "A depends on its layer's name alone"


def test_a_has_the_variance_of_pefts():
    a = draw_a("layer", 400, AdapterSpec(rank=64))
    assert abs(float(a.var()) * 3 * 400 - 1) < 0.03 and float(a.abs().max()) <= 400**-0.5


def test_dora_begins_with_the_norms_of_the_base_weights():
    module = AdapterModule("tiny", AdapterSpec(dora=True, targets=("k_proj",)))
    layer = "model.layers.1.self_attn.k_proj"
    weight = load_base("tiny").model.get_submodule(layer).weight
    torch.testing.assert_close(
        module.state_dict()[f"base_model.model.{layer}.lora_magnitude_vector"], weight.square().sum(1).sqrt()
    )


def test_the_rank_stabilised_scale():
    assert AdapterSpec(rank=4, alpha=8).scale == 2
    assert AdapterSpec(rank=4, alpha=8, rslora=True).scale == 4


def test_wrong_forms_are_refused():
    with pytest.raises(ConfigError, match=r"adapter targets \['w_proj'\].*'down_proj'.*'q_proj'"):
        AdapterModule("tiny", AdapterSpec(targets=("w_proj", "q_proj")))
    with pytest.raises(ConfigError, match=r"adapter targets \['lm_head'\]"):
        AdapterModule("tiny", AdapterSpec(targets=("lm_head",)))
    for fields in ({"rank": 0}, {"alpha": 0}, {"targets": ()}):
        with pytest.raises(ConfigError, match="must be positive"):
            AdapterSpec(**fields)
