"""The published generator: sizes, the denoiser layer by layer, where conditions reach, sampling token by token."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.structure import Structure
from rpg.paper import (
    BASE_CHANNELS,
    LARGE_CHANNELS,
    PAPER_SIZES,
    PaperSize,
    RpgPaper,
    RpgPaperConfig,
    TokenDenoiser,
    time_features,
)

STRUCTURE = Structure.of(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
MASK = {"class_mask": 10}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zoo(count: int, seed: int = 0) -> Batch:
    weights = torch.randn(count, STRUCTURE.size, generator=rng(seed)).abs()
    mask = torch.randint(2, (count, 10), generator=rng(seed)).float()
    return Batch(weights, None, {"class_mask": mask, "identity": torch.arange(count) % 3})


@pytest.fixture
def small(monkeypatch):
    """A size for tests: tokens of 4 weights, so that the toy network has 22 of them."""
    monkeypatch.setitem(PAPER_SIZES, "tiny", PaperSize(4, 32, 64, 8, (1, 4, 6, 8, 6, 4, 1)))


def build(conditions: dict[str, int] | None = None, **settings) -> RpgPaper:
    settings = {"size": "tiny", "sampler": "ddim", "steps": 4, "token_batch": None} | settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RpgPaper(STRUCTURE, Conditions(conditions or {}, 1), DDPM("eps"), RpgPaperConfig(**settings))
    model.fit(zoo(64))
    return model


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "size, mamba, condition, time, convolutions, total",
    [
        ("tiny", 0.8, 0.07, 0.13, 144_769, 1.2),
        ("small", 205, 16.8, 17.8, 144_769, 240),
        ("base", 814, 67, 69, 144_769, 951),
        ("large", 2266, 269, 273, 87_585, 2808),
    ],
)
def test_published_sizes_in_millions(size, mamba, condition, time, convolutions, total):
    structure = Structure.of(nn.Linear(8192, 100))
    with torch.device("meta"):
        config = RpgPaperConfig(size=size, identities=50)
        model = RpgPaper(structure, Conditions({}, 1), DDPM("eps"), config)
    millions = {"mamba": model.backbone, "condition": model.denoiser.condition, "time": model.denoiser.time}
    counted = {name: parameters(module) / 1e6 for name, module in millions.items()}
    assert counted == pytest.approx({"mamba": mamba, "condition": condition, "time": time}, rel=0.07)
    assert parameters(model.denoiser.convolutions) == convolutions
    assert parameters(model) / 1e6 == pytest.approx(total, rel=0.005 if total > 100 else 0.05)


@pytest.mark.parametrize("channels", [BASE_CHANNELS, LARGE_CHANNELS])
def test_the_denoiser_layer_by_layer(channels):
    """Every convolution reads (x + c) t, and the first outputs return before the last layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenDenoiser(12, 7, channels).eval()
    x, prototypes = torch.randn(3, 12, generator=rng()), torch.randn(3, 7, generator=rng(1))
    t = torch.tensor([0.0, 500.0, 999.0])
    c = (prototypes @ model.condition.weight.T + model.condition.bias)[:, None]
    first, _, second = model.time
    m = (F.silu(time_features(t) @ first.weight.T + first.bias) @ second.weight.T + second.bias)[:, None]

    def layer(i: int, y: torch.Tensor) -> torch.Tensor:
        weights = model.convolutions[i]
        if i == len(channels) - 2:
            return F.conv1d((y + c) * m, weights.weight, weights.bias, padding=3)
        y = F.conv1d((y + c) * m, weights[0].weight, weights[0].bias, padding=3)
        return F.elu(y / (1 + 1e-5) ** 0.5)  # running statistics of a new BatchNorm: mean 0, variance 1

    if channels == BASE_CHANNELS:
        e1 = layer(0, x[:, None])
        e2 = layer(1, e1)
        d1 = layer(4, layer(3, layer(2, e2)) + e2)
        expected = layer(5, d1 + e1)
    else:
        e1 = layer(0, x[:, None])
        expected = layer(3, layer(2, layer(1, e1)) + e1)
    torch.testing.assert_close(model(x, t, prototypes), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_the_compiled_denoiser_gives_the_same_noise_gradients_and_statistics(graph_compiler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eager = TokenDenoiser(token_size=16, width=8, channels=(1, 2, 3, 2, 1))
    compiled = copy.deepcopy(eager)
    compiled.compile()
    inputs = torch.randn(5, 16, generator=rng()), 200.0 * torch.arange(5), torch.randn(5, 8, generator=rng(1))
    found = []
    for network in (eager, compiled):
        estimate = network(*inputs)
        gradients = torch.autograd.grad(estimate.square().sum(), [*network.parameters()])
        found.append([estimate.detach(), *gradients, *network.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_time_features_tell_all_steps_apart():
    features = time_features(torch.arange(1000.0))
    assert torch.pdist(features).min() > 0.1
    assert features.abs().max() <= 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("condition, reached", [("head", range(14, 22)), ("full", range(22))])
def test_which_tokens_the_condition_reaches(condition, reached):
    model = build(MASK, condition=condition)
    assert len(model.tokens) == 22
    masks = torch.eye(10)[:2]
    prototypes = model._prototypes({"class_mask": masks}, 2)
    change = (prototypes[1] - prototypes[0]).abs().amax(1)
    assert change.nonzero().flatten().tolist() == list(reached)


@pytest.mark.usefixtures("small")
def test_prototypes_look_back_only():
    model = build(position="learned")
    before = model._prototypes({}, 1)
    with torch.no_grad():
        model.position.code[7] += 1
    change = (model._prototypes({}, 1) - before).abs().amax(-1)[0]
    assert not change[:7].any() and change[7:].all()


@pytest.mark.parametrize("backbone", ["mamba2", "mamba", "hgrn2", "lstm", "gru", "transformer", "none"])
def test_any_sequence_model_reads_the_positions(backbone, monkeypatch):
    monkeypatch.setitem(PAPER_SIZES, "tiny", PaperSize(4, 32, 32, 8, (1, 4, 1)))
    model = build(backbone=backbone)
    x = model.position()[None].detach().requires_grad_()
    middle = len(model.tokens) // 2
    model.backbone(x)[0, middle].sum().backward()
    reached = x.grad[0].abs().sum(1) > 0
    assert reached[middle], "a prototype depends on its own position"
    assert not reached[middle + 1 :].any(), "and never on later ones"
    assert reached[:middle].any() == (backbone != "none"), "without recurrence not on earlier ones either"
    model.loss(zoo(4), rng()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("settings", "rows"), [({}, 1), ({"identities": 3}, 5)])
def test_prototypes_that_all_networks_share_are_computed_once(settings, rows):
    model, seen = build(**settings), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    assert len(model._prototypes({"identity": torch.arange(5) % 3}, 5)) == 5
    assert seen == [rows]


@pytest.mark.usefixtures("small")
def test_identities_are_drawn_where_none_is_named():
    model, drawn = build(identities=3, steps=1), []
    model.identities.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[0]))
    model.sample({}, count=60, seed=1)
    assert torch.cat(drawn).bincount(minlength=3).min() > 10


@pytest.mark.usefixtures("small")
def test_the_loss_is_the_mean_over_all_weights_and_no_padding():
    model = build().eval()
    batch = zoo(5, seed=1)
    loss = model.loss(Batch(batch.target), rng(3))

    g = rng(3)  # the draws of the loss, once more
    tokens = model.tokens.encode(model.latents.encode(batch.target)).flatten(0, 1)
    order = torch.randperm(len(tokens), generator=g)
    t = model.objective.draw_times(len(order), g, "cpu")
    noise = torch.randn(tokens.shape, generator=g)
    alpha, sigma = model.objective.alpha_sigma(t)
    x_t = alpha[:, None] * tokens[order] + sigma[:, None] * noise
    predicted = model.denoiser(x_t, t, model._prototypes({}, 5).flatten(0, 1)[order])
    real = model.tokens.mask.repeat(5, 1)[order]
    torch.testing.assert_close(loss, (predicted - noise)[real].square().mean())
    assert not real.all()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("token_batch", "networks"), [(7, 1), (50, 2), (None, 5)])
@pytest.mark.parametrize("settings", [{"identities": 3}, {"condition": "full", "conditions": MASK}])
def test_prototypes_are_of_no_more_networks_at_once_than_have_so_many_tokens(settings, token_batch, networks):
    model, seen = build(**settings, token_batch=token_batch), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    prompt = {
        name: value for name, value in zoo(5).prompt.items() if (name == "identity") == ("identities" in settings)
    }
    model.sample(prompt, count=5, seed=1)
    assert max(seen) == networks and sum(seen) == 5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("condition, conditions, prompt", [("none", {}, {}), ("full", MASK, zoo(3).prompt)])
def test_batches_of_tokens_write_the_same_networks(condition, conditions, prompt):
    prompt = {name: value for name, value in prompt.items() if name in conditions}
    settings = {"condition": condition, "identities": 0 if conditions else 4}
    parts, whole = build(conditions, token_batch=7, **settings), build(conditions, **settings)
    seen = []
    parts.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    written = [model.sample(prompt, count=3, seed=5) for model in (parts, whole)]
    torch.testing.assert_close(*written, rtol=1e-4, atol=1e-5)
    assert set(seen) == {7, 3 * len(parts.tokens) % 7}  # nothing larger is ever in memory
    assert parts.training
    assert torch.equal(written[0], parts.sample(prompt, count=3, seed=5))
    assert not torch.equal(written[0], parts.sample(prompt, count=3, seed=6))


@pytest.mark.usefixtures("small")
def test_it_learns_which_checkpoint_is_which():
    model = build(identities=3)
    checkpoints = zoo(3).target
    identity = torch.arange(12) % 3
    everything = Batch(checkpoints.repeat(4, 1), None, {"identity": identity})
    model.fit(everything)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    g = rng(1)
    for _ in range(200):
        loss = model.loss(everything, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    wrong = Batch(everything.target, None, {"identity": (identity + 1) % 3})
    right_loss, wrong_loss = (model.loss(batch, rng(2)).item() for batch in (everything, wrong))
    assert right_loss < 0.25 * wrong_loss


@pytest.mark.usefixtures("small")
def test_ancestral_sampling_takes_any_number_of_steps():
    model = build(sampler="ddpm", identities=2)
    nn.init.zeros_(model.denoiser.convolutions[-1].weight)
    nn.init.zeros_(model.denoiser.convolutions[-1].bias)
    assert model.noise_shape == (22, 4)
    for steps in (1, 7, 50):  # no noise is ever predicted, so that x0 = x_t / alpha
        noise = 0.01 * torch.randn(2, 22, 4, generator=rng())
        written = model.sample({}, steps=steps, noise=noise)
        assert written.shape == (2, STRUCTURE.size)
        assert torch.equal(written, model.sample({}, steps=steps, noise=noise))


def test_tokens_are_no_longer_than_the_largest_tensor():
    model = build()
    assert model.tokens.width == 30 < PAPER_SIZES["tiny"].token_size
    assert model.loss(zoo(2), rng()).isfinite()


@pytest.mark.usefixtures("small")
def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="predicts noise"):
        RpgPaper(STRUCTURE, Conditions({}, 1), DDPM("x0"), RpgPaperConfig())
    with pytest.raises(ConfigError, match="tiny, small, base, large"):
        build(size="huge")
    with pytest.raises(ConfigError, match="class mask alone"):
        build({"target_metric": 2}, condition="head")
    with pytest.raises(ConfigError, match="class mask alone"):
        build(MASK, condition="none")
    with pytest.raises(ConfigError, match="guidance=2"):
        build().sample({}, count=1, guidance=2.0)
    with pytest.raises(ConfigError, match="class_mask"):
        build(MASK, condition="head").sample({}, count=1)
    with pytest.raises(ConfigError, match="identities=3"):
        build(identities=3).loss(Batch(zoo(2).target), rng())
