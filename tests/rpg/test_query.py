"""The query transformer: sets in, adapters out, nothing at first."""

import pytest
import torch

from Gpt.errors import ConfigError
from Gpt.structure import Structure
from rpg.query import Place, PromptPool, QueryTransformer

NAMES = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (8, 2),
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (8, 2),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (2, 8),
    "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (6, 2),
    "base_model.model.model.layers.10.mlp.down_proj.lora_B.weight": (8, 2),
    "base_model.model.lm_head.lora_B.weight": (11, 2),
}
STRUCTURE = Structure.of({name: torch.zeros(shape) for name, shape in NAMES.items()})


def network():
    torch.manual_seed(0)
    return QueryTransformer(STRUCTURE, 5, width=16, depth=1, heads=2, latents=3)


def alone(prompts):
    """Sentences `[B, N, features]` as the network reads them: one state each, none of them padding."""
    return prompts[:, :, None], torch.ones(*prompts.shape[:2], 1, dtype=torch.bool)


def with_random_heads(net):
    for head in net.heads:
        torch.nn.init.normal_(head.weight)
    return net


def test_starts_at_zero_with_gradients():
    net = network()
    written = net(*alone(torch.randn(4, 3, 5)))
    assert written.shape == (4, STRUCTURE.size)
    assert not written.any()
    (written * torch.randn_like(written)).sum().backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in net.heads)


@torch.no_grad()
def test_prompts_are_a_set():
    net, prompts = with_random_heads(network()), torch.randn(2, 6, 5)
    written = net(*alone(prompts))
    torch.testing.assert_close(net(*alone(prompts[:, torch.randperm(6)])), written, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(*alone(prompts.repeat(1, 3, 1))), written, rtol=1e-4, atol=1e-4)
    assert (net(*alone(prompts[:, :3])) - written).abs().max() > 1e-2
    torch.testing.assert_close(net(*alone(prompts[1:])), written[1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_not_read():
    """Token states in one row, in several, and with padding of whatever content are one set."""
    net, states = with_random_heads(network()), torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[[True, True, False], [True, False, False]]]).expand(2, -1, -1)
    written = net(states, mask)
    torch.testing.assert_close(net(torch.where(mask[..., None], states, 9.0), mask), written, rtol=1e-4, atol=1e-4)
    short = torch.stack([row[kept] for row, kept in zip(states, mask, strict=True)])
    torch.testing.assert_close(net(*alone(short)), written, rtol=1e-4, atol=1e-4)
    assert (net(states, torch.ones_like(mask)) - written).abs().max() > 1e-2


@torch.no_grad()
def test_each_tensor_is_written_by_its_module_in_its_place():
    """Silencing one head clears exactly the tensors of that kind."""
    net, prompts = with_random_heads(network()), torch.randn(1, 2, 5)
    before = STRUCTURE.unflatten(net(*alone(prompts))[0])
    for head, own in zip(net.heads, net.queries_of_head, strict=True):
        kept = head.weight.clone()
        head.weight.zero_()
        silent = [name for name, value in STRUCTURE.unflatten(net(*alone(prompts))[0]).items() if not value.any()]
        head.weight.copy_(kept)
        assert len(silent) == len(own)
        assert len({(Place.of(name).tensor, before[name].numel()) for name in silent}) == 1


@torch.no_grad()
def test_layers_and_modules_are_told_apart():
    written = STRUCTURE.unflatten(with_random_heads(network())(*alone(torch.randn(1, 2, 5)))[0])
    first, last = (written[f"base_model.model.model.layers.{i}.mlp.down_proj.lora_B.weight"] for i in (0, 10))
    assert (first - last).abs().max() > 1e-3


def test_places_are_read_off_peft_keys():
    place = Place.of("base_model.model.model.layers.10.mlp.down_proj.lora_B.weight")
    assert (place.layer, place.module) == (10, "base_model.model.model.layers.*.mlp.down_proj")
    assert Place.of("base_model.model.lm_head.lora_A.weight").module == "base_model.model.lm_head"
    assert Place.of("a.layers.1.q.lora_magnitude_vector.weight").module == Place.of("a.layers.2.q.lora_B.weight").module


def test_pool_has_a_vector_for_each_latent():
    assert PromptPool(5, 8, 4, 2)(torch.randn(3, 1, 5), torch.ones(3, 1).bool()).shape == (3, 4, 8)


def test_width_and_heads_must_fit():
    with pytest.raises(ConfigError, match="multiple of generator.heads=3"):
        QueryTransformer(STRUCTURE, 5, width=16, depth=1, heads=3, latents=3)
