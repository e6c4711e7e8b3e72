"""The published G.pt transformer: sizes, initial function, dependence on each input."""

import math

import pytest
import torch

from Gpt.errors import ConfigError
from Gpt.models.gpt_paper import PUBLISHED_MODELS, FrequencyEmbedder, GptPaper, SelfAttention, side_by_side
from Gpt.seeds import rng

SIZES = (12, 3, 6, 2)
SIZES_OF = {"mnist": (7840, 10, 100, 10), "cifar10": (432, 4608, 320, 10), "cartpole": (1, 128, 32, 1024, 32, 32, 1)}


def tiny(policy: str = "chunk_within_layer", chunk: int | None = 5) -> GptPaper:
    return GptPaper(SIZES, width=16, layers=2, heads=4, policy=policy, chunk=chunk)


def trained(policy: str = "chunk_within_layer", chunk: int | None = 5) -> GptPaper:
    """As after training: no weight is zero any more."""
    model = tiny(policy, chunk).double()
    generator = rng("cpu", 0, "trained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(batch: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = rng("cpu", 0, "inputs")
    x_t, start = (torch.randn(batch, sum(SIZES), generator=g, dtype=dtype) for _ in range(2))
    t = torch.randint(1000, (batch,), generator=g).to(dtype)
    start_metric, target_metric = (torch.rand(batch, generator=g, dtype=dtype) for _ in range(2))
    return [x_t, t, start, start_metric, target_metric]


@pytest.mark.parametrize(
    "name, parameters, tokens",
    [
        ("mnist_loss", 378_283_008, 26),
        ("mnist_error", 378_283_008, 26),
        ("cifar10_loss", 639_459_328, 26),
        ("cifar10_error", 639_459_328, 26),
        ("cartpole", 347_351_040, 18),
    ],
)
def test_published_sizes(name, parameters, tokens):
    with torch.device("meta"):
        model = PUBLISHED_MODELS[name].build(SIZES_OF[name.split("_")[0]])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.decoder.pos_emb.shape[1] == tokens


@pytest.mark.parametrize("policy", ["chunk", "chunk_within_input", "chunk_within_layer", "layer_by_layer"])
def test_a_new_model_returns_the_start_exactly(policy):
    x_t, t, start, *metrics = inputs(dtype=torch.float32)
    assert torch.equal(tiny(policy)(x_t, t, start, *metrics), start)
    assert not torch.allclose(trained(policy).float()(x_t, t, start, *metrics), start, atol=0.1)


def test_every_input_matters_and_examples_do_not_mix():
    model, arguments = trained(), inputs()
    expected = model(*arguments)
    for position in range(5):
        changed = [a.clone() for a in arguments]
        changed[position][0] += 0.5
        output = model(*changed)
        assert (output[0] - expected[0]).abs().max() > 1e-3
        torch.testing.assert_close(output[1:], expected[1:])


def reference(weights: dict, x_t, t, start, before, wanted, *, heads: int) -> torch.Tensor:
    """The network of the paper for policy "layer_by_layer", written once more from the names of its weights."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"decoder.{name}.weight"].T + weights.get(f"decoder.{name}.bias", 0)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"decoder.{name}.weight"] + weights[f"decoder.{name}.bias"]

    def code(scalar: torch.Tensor) -> torch.Tensor:
        angles = scalar[:, None] * weights["scalar_embedder.frequencies"]
        return torch.cat([torch.sin(angles), torch.cos(angles), scalar[:, None]], 1)

    pieces = [*x_t.split(SIZES, 1), *start.split(SIZES, 1), *map(code, (t, wanted - before, wanted, before))]
    tokens = [linear(f"input_parameter_projections.{i}.0", piece) for i, piece in enumerate(pieces)]
    h = norm("ln_in", torch.stack(tokens, 1)) + weights["decoder.pos_emb"]
    for block in ("blocks.0", "blocks.1"):
        a = norm(f"{block}.ln1", h)
        q, k, v = (linear(f"{block}.attn.{name}", a).chunk(heads, -1) for name in ("query", "key", "value"))
        mixed = [
            torch.softmax(qi @ ki.mT / math.sqrt(qi.shape[-1]), -1) @ vi for qi, ki, vi in zip(q, k, v, strict=True)
        ]
        h = h + linear(f"{block}.attn.proj", torch.cat(mixed, -1))
        m = linear(f"{block}.mlp.0", norm(f"{block}.ln2", h))
        h = h + linear(f"{block}.mlp.2", m * (1 + torch.erf(m / math.sqrt(2))) / 2)
    h = norm("ln_f", h)
    return start + torch.cat([linear(f"output_parameter_projections.{i}.0", h[:, i]) for i in range(len(SIZES))], 1)


def test_the_network_is_that_of_the_paper():
    model, arguments = trained("layer_by_layer"), inputs()
    torch.testing.assert_close(model(*arguments), reference(model.state_dict(), *arguments, heads=4))


@pytest.mark.parametrize(
    ("policy", "constant"),
    # Twice 23 weights and four codes of 257 in pieces of 5: in a row, pieces 5 to 8 and 61 to 214 hold neither.
    [
        ("chunk", 4 + 154),
        ("chunk_within_input", 5 + 3 * 52),
        ("chunk_within_layer", 7 + 3 * 52),
        ("layer_by_layer", 4 + 3),
    ],
)
def test_tokens_without_noise_and_time_are_encoded_once_for_all_steps(policy, constant):
    model, (x_t, t, *known) = trained(policy), inputs()
    tokens = model.constant_tokens(*known)
    assert tokens.shape[1] == constant
    for step in (t, (t + 400) % 1000):  # whatever the noise and the time, they stand for themselves
        assert torch.equal(model(x_t * step[:, None], step, *known, tokens), model(x_t * step[:, None], step, *known))
    encoded = []
    for encoder in model.decoder.input_parameter_projections:
        encoder.register_forward_hook(lambda *_: encoded.append(1))
    model(x_t, t, *known, tokens)
    assert len(encoded) + constant == len(model.decoder.input_splits)


def test_a_single_token_of_everything_is_never_known_before():
    model, (x_t, t, *known) = trained("chunk", 10_000), inputs()
    tokens = model.constant_tokens(*known)
    assert tokens.shape == (3, 0, 16)
    assert torch.equal(model(x_t, t, *known, tokens), model(x_t, t, *known))


def test_the_last_block_computes_what_is_decoded_and_no_more():
    model, widths = trained(), []
    for block in model.decoder.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    model(*inputs())
    assert widths == [len(model.decoder.input_splits), len(model.decoder.output_parameter_projections)]


def test_attention_is_unmasked():
    """Without a mask the order of tokens is nothing to attention: permuting them permutes its output."""
    attention = SelfAttention(16, 4).double()
    x = torch.randn(2, 7, 16, generator=rng("cpu", 0, "x"), dtype=torch.float64)
    order = torch.randperm(7, generator=rng("cpu", 1, "order"))
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_every_output_token_sees_every_input_token():
    model, arguments = trained(), inputs(batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, *arguments[1:])[0], arguments[0])[:, 0]
    assert (jacobian.abs() > 1e-9).all()


def test_gradients_in_double_precision():
    model, arguments = trained(), [a.requires_grad_(i in (0, 2)) for i, a in enumerate(inputs(batch=2))]
    assert torch.autograd.gradcheck(model, arguments, fast_mode=True)


def test_frequency_code_of_a_scalar():
    code = FrequencyEmbedder().double()(torch.tensor([0.0, 0.3], dtype=torch.float64))
    assert code.shape == (2, 257)
    assert torch.equal(code[0], torch.cat([torch.zeros(128), torch.ones(128), torch.zeros(1)]).double())
    highest = 2.0**14
    expected = [math.sin(0.3), math.sin(0.3 * highest), math.cos(0.3), math.cos(0.3 * highest), 0.3]
    torch.testing.assert_close(code[1, [0, 127, 128, 255, 256]], torch.tensor(expected, dtype=torch.float64))


def test_initial_weights_follow_the_seed_and_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    first, second = tiny(), tiny()
    assert torch.equal(before, torch.random.get_rng_state())
    other = GptPaper(SIZES, width=16, layers=2, heads=4, chunk=5, seed=1)
    name = "decoder.blocks.0.attn.key.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    wide = GptPaper(SIZES, width=128, layers=1, heads=4).get_parameter("decoder.blocks.0.mlp.0.weight")
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)


def test_width_must_divide_into_heads():
    with pytest.raises(ConfigError, match="heads"):
        GptPaper(SIZES, width=10, heads=4)


def test_one_product_for_several_layers_is_each_of_them_with_its_gradient():
    attention, x = SelfAttention(8, 2).double(), inputs()[0][:, :8]
    layers = attention.query, attention.key, attention.value
    joined, apart = side_by_side(layers, x), tuple(layer(x) for layer in layers)
    torch.testing.assert_close(joined, apart)
    by_joined, by_apart = (
        torch.autograd.grad(sum(i * y.square().sum() for i, y in enumerate(outputs, 1)), layers[1].weight)[0]
        for outputs in (joined, apart)
    )
    torch.testing.assert_close(by_joined, by_apart)
