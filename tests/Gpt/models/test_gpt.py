"""The neuron-token G.pt: what an untrained one writes is known in closed form, and a trained one obeys its prompt."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.networks import MLP, CartPoleActor
from Gpt.seeds import rng
from Gpt.structure import Structure

CONFIG = GptConfig(width=16, depth=2, heads=2, channels=4, rounds=2)
STRUCTURE = Structure.of(MLP(6, 5, 3), MLP.symmetry)
DEEP = Structure.of(CartPoleActor(), CartPoleActor.symmetry)
WISH = {"target_metric": torch.tensor([[2.0, 0.5]]).expand(8, -1)}


def build(config=CONFIG, structure=STRUCTURE, objective=None, names=("target_metric",)) -> Gpt:
    """An untrained generator with parameters of its own."""
    features = {"target_metric": 2} if names else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conditions = Conditions(features, config.width, dropout=0.2)
        return Gpt(structure, conditions, objective or FlowMatching("x0", "x0", "logit_normal"), config)


def batch(count: int = 64, structure=STRUCTURE) -> Batch:
    """Targets that lie beside their starts, per tensor at another scale."""
    start = torch.randn(count, structure.size, generator=rng("cpu", 0, "start"))
    target = start + 0.1 * torch.randn(count, structure.size, generator=rng("cpu", 0, "target"))
    metrics = torch.rand(count, 2, generator=rng("cpu", 0, "metric"))
    return Batch(target, start, {"target_metric": metrics})


def shaken(generator: Gpt) -> Gpt:
    """All parameters drawn anew: at initialisation the heads are zero and hide what lies before them."""
    for i, parameter in enumerate(generator.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=rng("cpu", 0, "parameter", i))
    return generator


@pytest.fixture(scope="module")
def fitted() -> Gpt:
    generator = build()
    generator.fit(batch())
    return shaken(generator)


@pytest.fixture(scope="module")
def deep() -> Gpt:
    """Of networks with two hidden layers, whose weights between them are joints."""
    generator = build(structure=DEEP)
    generator.fit(batch(structure=DEEP))
    return shaken(generator)


def test_an_untrained_generator_describes_independent_gaussians():
    """With x_hat = alpha x / (alpha² + sigma²), one Euler step ends at 0 and the exact flow at the noise itself."""
    generator = build()
    generator.fit(batch())
    start = batch(8).start
    noise = torch.randn(start.shape, generator=rng("cpu", 1))
    mean, std = generator.normalizer.shift, generator.normalizer.scale
    once = generator.sample(WISH, start, steps=1, noise=noise)
    torch.testing.assert_close(once, mean.expand_as(once), rtol=1e-4, atol=1e-5)
    often = generator.sample(WISH, start, steps=400, noise=noise)
    assert ((often - mean) / std - noise).square().mean().sqrt() < 0.02


def test_what_is_learned_has_unit_variance_at_every_noise_level():
    """The heads speak in standard deviations of what unit-variance targets are, given noised ones: sigma² / (alpha² +
    sigma²) (Karras et al. 2022, table 1)."""
    generator, t = build(), torch.linspace(0.1, 1, 8)
    x_t = torch.randn(8, STRUCTURE.size, generator=rng("cpu", 1))
    network = generator._recalling(batch(8).start, generator.conditions(WISH, 8))
    silent = network(x_t, t)
    with torch.no_grad():
        for head in generator.network.heads:
            head.bias.fill_(1.0)
    open_part = t.square() / ((1 - t).square() + t.square())
    torch.testing.assert_close(network(x_t, t) - silent, open_part.sqrt()[:, None].expand_as(x_t))


def test_the_untrained_loss_is_that_of_the_best_linear_estimate():
    generator = build()
    generator.fit(batch())
    losses = torch.stack([generator.loss(batch(), rng("cpu", seed)) for seed in range(40)])
    t = generator.objective.draw_times(200_000, rng("cpu", 2), "cpu")
    alpha, sigma = generator.objective.alpha_sigma(t)
    expected = (generator.objective.weight(t) * sigma.square() / (alpha.square() + sigma.square())).mean()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=0.1)


def test_the_same_seed_gives_the_same_networks(fitted):
    start = batch(8).start
    first, again, other = (fitted.sample(WISH, start, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    before = torch.get_rng_state()
    fitted.sample(WISH, start)
    fitted.loss(batch(), rng("cpu", 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_given_noise_takes_the_place_of_the_seed(fitted):
    start = batch(8).start
    noise = torch.randn(start.shape, generator=rng("cpu", 5))
    first, again = (fitted.sample(WISH, start, seed=seed, noise=noise) for seed in (0, 1))
    assert torch.equal(first, again)
    wish = {"target_metric": WISH["target_metric"][:4]}
    parts = [fitted.sample(wish, start[half], noise=noise[half]) for half in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.cat(parts), first, rtol=1e-4, atol=1e-5)


def test_guidance_leans_away_from_the_unconditional_model(fitted):
    """One Euler step from t = 1 is the x0 estimate itself, in which guidance is linear."""
    start = batch(8).start
    noise = torch.randn(start.shape, generator=rng("cpu", 6))
    sample = {g: fitted.sample(WISH, start, steps=1, guidance=g, noise=noise) for g in (0.0, 1.0, 3.0)}
    without = fitted.sample({}, start, steps=1, noise=noise)
    torch.testing.assert_close(sample[0.0], without, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample[3.0], without + 3 * (sample[1.0] - without), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample[1.0], without, atol=1e-3)


def test_renaming_the_start_renames_the_sample(fitted):
    start = batch(8).start
    noise = torch.randn(start.shape, generator=rng("cpu", 7))
    index = STRUCTURE.permutation_index(STRUCTURE.random_permutations(8, rng("cpu", 8)))
    normalizer, generator = fitted.normalizer, fitted
    for constant in (normalizer.shift, normalizer.scale):  # one number per tensor
        assert torch.equal(constant.expand(8, -1).gather(1, index), constant.expand(8, -1))
    plain = generator.sample(WISH, start, noise=noise)
    renamed = generator.sample(WISH, start.gather(1, index), noise=noise.gather(1, index))
    torch.testing.assert_close(renamed, plain.gather(1, index), rtol=1e-3, atol=1e-3)
    assert not generator.augment


def test_an_eighth_of_the_starts_is_what_one_sampling_step_makes_of_them(fitted, monkeypatch):
    monkeypatch.setattr(fitted.conditions, "dropout", 0.0)
    examples, calls = batch(64), []
    hook = fitted.network.register_forward_pre_hook(lambda network, inputs: calls.append(inputs))
    fitted.loss(examples, rng("cpu", 0))
    hook.remove()
    (noise, given, *_), _, (_, starts, *_) = calls
    assert torch.equal(given, fitted.normalizer.encode(examples.start[:8]))
    assert torch.equal(starts[8:], fitted.normalizer.encode(examples.start[8:]))
    wish = {"target_metric": examples.prompt["target_metric"][:8]}
    monkeypatch.setattr(fitted, "rounds", 1)
    written = fitted.sample(wish, examples.start[:8], steps=1, noise=noise)
    torch.testing.assert_close(fitted.normalizer.decode(starts[:8]), written, rtol=1e-4, atol=1e-5)
    assert not starts.requires_grad


def test_half_of_the_examples_are_read_with_what_they_were_taken_for_without(fitted):
    calls = []

    def note(network, inputs, settings, output):
        calls.append((*inputs, settings["previous"], output))

    hook = fitted.network.register_forward_hook(note, with_kwargs=True)
    fitted.loss(batch(64), rng("cpu", 0))
    hook.remove()
    _, first, last = calls
    for before, now in zip(first[:5], last[:5], strict=True):  # noised, start, request and both scales
        assert torch.equal(before, now[32:])
    assert not first[5].any() and not last[5][:32].any()
    assert torch.equal(last[5][32:], first[6])
    assert not last[5].requires_grad and last[6].requires_grad


def test_sampling_hands_every_estimate_on(fitted):
    """Two levels of two rounds are four calls; each reads what the one before it returned, the first one nothing."""
    previous, estimates, noised = [], [], []

    def note(network, inputs, settings, output):
        noised.append(inputs[0])
        previous.append(settings["previous"])
        estimates.append(output)

    hook = fitted.network.register_forward_hook(note, with_kwargs=True)
    start = batch(8).start
    written = fitted.sample(WISH, start, steps=2)
    hook.remove()
    assert len(estimates) == 4 and not previous[0].any()
    assert all(torch.equal(read, made) for read, made in zip(previous[1:], estimates[:-1], strict=True))
    assert torch.equal(noised[0], noised[1]) and torch.equal(noised[2], noised[3])
    assert not torch.equal(estimates[2], estimates[3]), "what was estimated before counts"
    torch.testing.assert_close(written, fitted.normalizer.decode(estimates[-1]))


def test_guidance_recalls_what_either_side_estimated(fitted):
    """Guided by 0, only the unconditional side counts, whatever the other one estimated before."""
    start, noise = batch(8).start, torch.randn(8, STRUCTURE.size, generator=rng("cpu", 6))
    alone = fitted.sample({}, start, steps=3, noise=noise)
    guided = fitted.sample(WISH, start, steps=3, noise=noise, guidance=0.0)
    torch.testing.assert_close(guided, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "objective", [FlowMatching("x0", "x0", "logit_normal"), FlowMatching("x0", "velocity"), DDPM("x0")]
)
def test_loss_and_gradients_are_finite_in_mixed_precision(objective):
    config = replace(CONFIG, sampler="ddim")
    generator = build(config, objective=objective)
    generator.fit(batch())
    shaken(generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = generator.loss(batch(), rng("cpu", 0))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert generator.loss(batch(), rng("cpu", 0)).item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize("name", ["fitted", "deep"])
def test_every_parameter_learns(name, request):
    generator = request.getfixturevalue(name)
    generator.zero_grad()
    generator.loss(batch(structure=generator.structure), rng("cpu", 0)).backward()
    assert not [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    generator.zero_grad()


@pytest.fixture(scope="module")
def trained() -> Gpt:
    """It has learned targets that are the start, whose mean is about 0, moved by the wanted metric."""
    structure = Structure.of(MLP(2, 2, 2), MLP.symmetry)
    generator = build(structure=structure)

    def draw(draws: torch.Generator) -> Batch:
        start = 0.3 * torch.randn(128, structure.size, generator=draws)
        wanted = torch.rand(128, 1, generator=draws)
        return Batch(start + wanted, start, {"target_metric": torch.cat([torch.zeros_like(wanted), wanted], 1)})

    generator.fit(draw(rng("cpu", 0)))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=5e-3)
    for step in range(300):
        noise = rng("cpu", 1, step)
        generator.loss(draw(noise), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    return generator


def test_it_learns_to_write_what_the_prompt_says_however_often(trained):
    """An update of an update arrives where the first one did: it is no further step in the same direction."""
    wanted = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(64)
    wish = {"target_metric": torch.stack([torch.zeros_like(wanted), wanted], 1)}
    start = 0.3 * torch.randn(len(wanted), trained.structure.size, generator=rng("cpu", 2))
    network = start
    for update in range(5):
        network = trained.sample(wish, network, steps=8, seed=update)
        moved = network.mean(1).view(3, -1).mean(1)
        torch.testing.assert_close(moved, wanted[::64], rtol=0, atol=0.3 if update else 0.12)


def test_a_saved_generator_writes_the_same_networks(fitted):
    other = build()
    other.load_state_dict(fitted.state_dict())
    start = batch(8).start
    assert torch.equal(other.sample(WISH, start), fitted.sample(WISH, start))


def test_it_needs_no_prompt_where_it_has_no_conditions():
    generator = build(names=())
    assert generator.sample({}, batch(4).start).shape == (4, STRUCTURE.size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": replace(CONFIG, heads=3)}, "generator.width=16 is not a multiple of generator.heads=3"),
        ({"config": replace(CONFIG, sampler="eulr")}, "sampler 'eulr' is unknown; did you mean 'euler'"),
        ({"config": replace(CONFIG, sampler="ddpm")}, "'ddpm' belongs to DDPM, not to FlowMatching"),
        ({"objective": DDPM("x0")}, "'euler' belongs to FlowMatching, not to DDPM"),
        ({"objective": FlowMatching("velocity", "velocity")}, "objective.prediction=velocity does not fit"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(change, words):
    with pytest.raises(ConfigError, match=words):
        build(**change)


def test_sampling_needs_a_start(fitted):
    with pytest.raises(ConfigError, match="needs the starting networks"):
        fitted.sample(WISH)


@pytest.mark.parametrize("name", ["fitted", "deep"])
def test_compiled_blocks_give_the_same_loss_and_gradient(name, request, graph_compiler):
    eager = request.getfixturevalue(name)

    def loss_and_gradients(generator):
        loss = generator.loss(batch(8, generator.structure), rng("cpu", 3))
        return loss, torch.autograd.grad(loss, [*generator.parameters()])

    compiled = build(structure=eager.structure)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_networks()
    torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(eager), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one compilation at any depth
