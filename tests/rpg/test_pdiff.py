"""p-diff: shapes, what reaches which part, and networks that look like those it was trained on."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.networks import MLP
from Gpt.seeds import rng
from Gpt.structure import Structure
from rpg.pdiff import Autoencoder, Pdiff, PdiffConfig

STRUCTURE = Structure.of(MLP(5, 4, 3))
TINY = dict(channels=(4, 8), latent=6, width=24, depth=2)


def build(objective=None, **changes):
    torch.manual_seed(0)
    settings = PdiffConfig(**{**TINY, "sampler": "ddim", "steps": 10} | changes)
    return Pdiff(STRUCTURE, Conditions({}, 1), objective or FlowMatching(), settings)


def networks(count, seed=0):
    """A mean network and two directions, at scales that differ between tensors."""
    basis = torch.randn(3, STRUCTURE.size, generator=rng("cpu", 99))
    coefficients = torch.randn(count, 2, generator=rng("cpu", seed))
    return 2 * basis[0] + coefficients @ basis[1:] * torch.linspace(0.01, 1, STRUCTURE.size)


@pytest.mark.parametrize(
    ("size", "stride", "channels"), [(39, 2, (4, 8)), (40, 2, (4,)), (1000, 5, (2, 3, 4)), (3, 2, (4, 4))]
)
def test_the_autoencoder_takes_vectors_of_any_length(size, stride, channels):
    model = Autoencoder(size, channels, stride, latent=5)
    x = torch.randn(2, size)
    mean, log_variance = model.encode(x)
    assert mean.shape == log_variance.shape == (2, 5)
    assert model.decode(mean).shape == (2, size)
    assert model.encoder(nn.functional.pad(x, (0, model.padding))[:, None]).shape[-1] == model.length


def test_the_kl_term_is_that_of_the_posterior_from_a_standard_gaussian():
    losses = []
    for weight in (0.0, 10.0):
        generator = build(kl_weight=weight)
        generator.fit(Batch(networks(50)))
        losses.append(generator.loss(Batch(networks(8)), rng("cpu", 0)))
    mean, log_variance = generator.autoencoder.encode(generator.latents.encode(networks(8)))
    posterior, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)
    torch.testing.assert_close(losses[1] - losses[0], 10 * kl_divergence(posterior, prior).mean(), rtol=1e-3, atol=1e-4)


def test_diffusion_does_not_move_the_autoencoder():
    generator = build()
    generator.fit(Batch(networks(50)))
    batch, names = Batch(networks(8)), []
    generator.loss(batch, rng("cpu", 0)).backward()
    whole = {name: p.grad.clone() for name, p in generator.named_parameters()}
    generator.zero_grad()
    for p in generator.denoiser.parameters():
        p.requires_grad_(False)
        p.zero_()
    generator.scale.reset_running_stats()
    generator.loss(batch, rng("cpu", 0)).backward()
    for name, p in generator.autoencoder.named_parameters():
        torch.testing.assert_close(p.grad, whole[f"autoencoder.{name}"])
        names.append(name)
    assert any("posterior" in name for name in names)


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM("eps")])
def test_written_networks_are_distributed_like_the_training_networks(objective):
    generator = build(objective, latent=4, kl_weight=1e-3, width=48)
    weights = networks(256)
    generator.fit(Batch(weights))
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        draws = rng("cpu", 1, step)
        loss = generator.loss(Batch(weights[torch.randint(256, (64,), generator=draws)]), draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator.eval()
    written = generator.sample({}, count=500, steps=20, seed=3)
    unit = generator.latents.encode(weights).std(0)
    found = generator.latents.encode(written)
    assert found.mean(0).abs().max() < 0.45
    assert 0.6 < (found.std(0)[unit > 0.3] / unit[unit > 0.3]).mean() < 1.3
    directions = torch.linalg.svd(generator.latents.encode(weights), full_matrices=False).Vh[:2]
    outside = (found - found @ directions.T @ directions).square().mean() / found.square().mean()
    assert outside < 0.15  # the two directions that training networks differ in hold nearly everything


def test_sampling_is_a_function_of_the_seed_and_keeps_what_never_varies():
    generator = build()
    weights = networks(40)
    weights[:, :7] = 0.25
    generator.fit(Batch(weights))
    generator.loss(Batch(weights), rng("cpu", 0))
    generator.eval()
    first, again, other = (generator.sample({}, count=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[:, :7] == 0.25).all()
    noise = torch.randn(2, *generator.noise_shape, generator=rng("cpu", 0))
    assert generator.sample({}, noise=noise).shape == (2, STRUCTURE.size)


def test_what_p_diff_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="knows no conditions"):
        Pdiff(STRUCTURE, Conditions({"class_mask": 10}, 4), FlowMatching(), PdiffConfig(**TINY, sampler="ddim"))
    with pytest.raises(ConfigError, match="larger generator.stride"):
        Autoencoder(11_000_000, (64, 256, 384, 512, 64), 2, 1024)
    with pytest.raises(ConfigError, match="no guidance"):
        build().eval().sample({}, count=1, guidance=2.0)
