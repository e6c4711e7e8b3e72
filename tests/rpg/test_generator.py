"""The default generator of whole networks: what it learns, and what sampling promises."""

import pytest
import torch
from torch import nn

from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.structure import Structure
from rpg.generator import Rpg, RpgConfig

WIDTH = 32
POLICIES = ("flat", "within_layer", "by_channel", "neuron", "aligned_neuron")
SYMMETRY = {"0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")}
STRUCTURE = Structure.of(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), SYMMETRY)
CENTERS = torch.randn(2, STRUCTURE.size, generator=torch.Generator().manual_seed(0))


def build(seed: int = 0, **settings) -> Rpg:
    """For networks that agree on which hidden unit is which, unless the settings say otherwise."""
    sizes = {"width": WIDTH, "depth": 2, "heads": 2, "token_size": 8, "rank": 4, "channels": 4}
    settings = {**sizes, "policy": "aligned_neuron", "backbone": "gru"} | settings
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conditions = Conditions({"class_mask": 2}, settings["width"], 0.2)
        return Rpg(STRUCTURE, conditions, FlowMatching("x0"), RpgConfig(**settings))


def build_unprompted() -> Rpg:
    config = RpgConfig(width=WIDTH, depth=1, heads=2, token_size=8, policy="within_layer", backbone="gru")
    return Rpg(STRUCTURE, Conditions({}, WIDTH), FlowMatching("x0"), config)


def untrained(**settings) -> Rpg:
    """Nothing is zero any more, as after training."""
    model, rng = build(**settings), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    model.fit(two_clusters(256, rng))
    return model


def one_hot(cluster: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(cluster, 2).float()


def two_clusters(count: int, rng: torch.Generator) -> Batch:
    """Networks within 0.1 of one of two centres, described by a class mask that says which."""
    cluster = torch.randint(2, (count,), generator=rng)
    weights = CENTERS[cluster] + 0.1 * torch.randn(count, STRUCTURE.size, generator=rng)
    return Batch(weights, None, {"class_mask": one_hot(cluster), "identity": cluster})


def train(model: Rpg, steps: int, identity: bool = False) -> Rpg:
    rng = torch.Generator().manual_seed(2)
    model.fit(two_clusters(256, rng))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(steps):
        batch = two_clusters(64, rng)
        del batch.prompt["class_mask" if identity else "identity"]
        loss = model.loss(batch, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def distances(weights: torch.Tensor) -> torch.Tensor:
    """Root-mean-square distance to each centre, `[B, 2]`."""
    return (weights[:, None] - CENTERS).square().mean(-1).sqrt()


@pytest.fixture(scope="module")
def trained() -> Rpg:
    return train(build(), 150)


def test_it_writes_networks_of_the_cluster_it_is_asked_for(trained):
    asked = torch.arange(200) % 2
    written = trained.sample({"class_mask": one_hot(asked)}, seed=3)
    near = distances(written)
    # A network of the zoo is 0.1 away from its centre and 1.4 from the other one.
    assert near[torch.arange(200), asked].quantile(0.9) < 0.4
    assert near[torch.arange(200), 1 - asked].min() > 0.8
    assert 0.05 < written[asked == 0].std(0).mean() < 0.4  # not one network over and over


def test_without_a_prompt_it_writes_both_clusters(trained):
    for written in (trained.sample({}, count=200), trained.sample({"class_mask": torch.ones(200, 2)}, guidance=0.0)):
        near = distances(written)
        assert near.min(1).values.median() < 0.7
        assert 0.2 < near.argmin(1).float().mean() < 0.8


def test_guidance_follows_the_prompt_more_closely(trained):
    asked = torch.arange(100) % 2
    prompt = {"class_mask": one_hot(asked)}
    noise = torch.randn(100, STRUCTURE.size, generator=torch.Generator().manual_seed(0))
    away = [distances(trained.sample(prompt, guidance=g, noise=noise)) for g in (0.0, 0.5, 1.0)]
    right = [(d.argmin(1) == asked).float().mean().item() for d in away]
    assert right[0] < right[1] <= right[2] == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backbone", ["none", "gru", "mamba2", "transformer"])
def test_sampling_in_passes_is_sampling_at_once(policy, backbone):
    model = untrained(policy=policy, backbone=backbone, weights_per_pass=3 * STRUCTURE.size, identities=5)
    whole = untrained(policy=policy, backbone=backbone, identities=5)
    prompt = {"class_mask": torch.rand(7, 2, generator=torch.Generator().manual_seed(0))}
    written, sizes = [], []
    for m in (model, whole):
        seen = []
        m.denoiser.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(len(inputs[0])))
        written.append(m.sample(prompt, steps=3, guidance=2.0, seed=4))
        sizes.append(seen)
    torch.testing.assert_close(*written, rtol=1e-4, atol=1e-5)
    assert sizes == [[3] * 6 + [3] * 6 + [1] * 6, [7] * 6]  # three steps, each with the prompt and without


def test_a_network_larger_than_a_pass_is_a_pass_of_its_own():
    model, seen = untrained(weights_per_pass=STRUCTURE.size - 1), []
    model.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    assert len(model.sample({}, count=3, steps=1)) == 3
    assert seen == [1, 1, 1]


def test_prototypes_that_all_networks_share_are_computed_once():
    plain, told, seen = build_unprompted(), build(), []
    for model in (plain, told):
        model.prototypes.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        batch = two_clusters(5, torch.Generator())
        batch.prompt = {"class_mask": batch.prompt["class_mask"]} if model is told else {}
        model.fit(batch)
        model.loss(batch, torch.Generator())
        model.sample(batch.prompt, count=5)
    assert seen == [1, 1, 5, 5]


def test_the_seed_names_the_networks():
    model = untrained(identities=3)
    state = torch.random.get_rng_state()
    first, same, other = (model.sample({}, count=4, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert (first - other).abs().max() > 0.1
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_untrained_generator_writes_noise_around_the_mean_checkpoint(policy):
    model = build(policy=policy, backbone="none")
    rng = torch.Generator().manual_seed(0)
    model.fit(two_clusters(4096, rng))
    written = model.sample({}, count=256, steps=20)
    latents = model.latents.encode(written)
    assert latents.mean(0).abs().max() < 0.35
    assert 0.7 < latents.std() < 1.1  # x0 = alpha / (alpha² + sigma²) x_t integrates to unit variance


def test_what_is_learned_has_unit_variance_at_every_noise_level():
    """The head speaks in standard deviations of what unit-variance data are, given noised ones: sigma² / (alpha² +
    sigma²) (Karras et al. 2022, table 1)."""
    model = build(policy="flat")
    z_t, t = torch.randn(5, STRUCTURE.size, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1, 5)
    network = model._network(model._request({}, None, 5))
    silent = network(z_t, t)
    with torch.no_grad():
        model.denoiser.heads[0].bias.fill_(1.0)
    open_part = t.square() / ((1 - t).square() + t.square())
    torch.testing.assert_close(network(z_t, t) - silent, open_part.sqrt()[:, None].expand_as(z_t))


def test_hidden_units_are_interchangeable_where_networks_do_not_agree_on_them():
    """Renaming units of the noise renames units of the result."""
    model = untrained(policy="neuron")
    order = {"hidden": torch.tensor([[2, 0, 3, 1]]).expand(5, -1)}
    index = STRUCTURE.permutation_index(order)
    noise = torch.randn(5, STRUCTURE.size, generator=torch.Generator().manual_seed(0))
    prompt = {"class_mask": torch.ones(5, 2)}
    plain, renamed = (model.sample(prompt, steps=3, noise=n) for n in (noise, noise.gather(1, index)))
    torch.testing.assert_close(renamed, plain.gather(1, index), rtol=1e-4, atol=1e-5)


def test_the_request_reaches_every_token_and_tokens_meet():
    model = untrained(policy="within_layer")
    noise = torch.randn(1, STRUCTURE.size, generator=torch.Generator().manual_seed(0))

    def change(prompt: dict, other: torch.Tensor) -> torch.Tensor:
        """Largest change in each token between the asked network and a variant of it."""
        plain = model.sample({"class_mask": torch.tensor([[0.0, 1.0]])}, steps=1, noise=noise)
        difference = (model.sample(prompt, steps=1, noise=other) - plain).abs()
        return model.layout.graph.encode(difference)[0][0].amax(-1)

    assert (change({"class_mask": torch.tensor([[1.0, 0.0]])}, noise) > 1e-4).all()
    nudged = noise.clone()
    nudged[0, 0] += 5
    assert (change({"class_mask": torch.tensor([[0.0, 1.0]])}, nudged) > 1e-5).all()


def test_identities_are_learned_and_drawn_where_none_is_named():
    model = train(build(identities=2), 100, identity=True)
    asked = torch.arange(40) % 2
    near = distances(model.sample({"identity": asked}))
    assert (near.argmin(1) == asked).all()
    drawn = distances(model.sample({}, count=100)).argmin(1).float().mean()
    assert 0.3 < drawn < 0.7


def test_the_loss_leaves_out_what_never_varies():
    model = untrained(policy="flat")
    rng = torch.Generator().manual_seed(0)
    frozen = two_clusters(256, rng)
    frozen.target[:, :20] = 0.25
    model.fit(frozen)
    batch = two_clusters(16, rng)
    del batch.prompt["identity"]
    losses = []
    for value in (0.25, 7.0):
        batch.target[:, :20] = value
        losses.append(model.loss(batch, torch.Generator().manual_seed(5)))
    assert torch.equal(*losses)
    assert torch.equal(model.sample({}, count=3, steps=2)[:, :20], torch.full((3, 20), 0.25))


def test_the_loss_is_the_mean_over_what_varies():
    """Of an untrained denoiser, which estimates each number alone: alpha z_t / (alpha² + sigma²)."""
    model, rng = build(policy="flat"), torch.Generator().manual_seed(0)
    batch = two_clusters(64, rng)
    batch.target[:, :20] = 0.25
    del batch.prompt["identity"]
    model.fit(batch)
    latents, draws = model.latents.encode(batch.target), torch.Generator().manual_seed(5)
    t = model.objective.draw_times(64, draws, "cpu")[:, None]
    noise = torch.randn(latents.shape, generator=draws)
    estimate = (1 - t) / ((1 - t).square() + t.square()) * ((1 - t) * latents + t * noise)
    expected = (estimate - latents)[:, 20:].square().mean()
    torch.testing.assert_close(model.loss(batch, torch.Generator().manual_seed(5)), expected)


def test_every_parameter_learns():
    model = untrained(identities=2, position="learned", policy="by_channel")
    model.loss(two_clusters(32, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_saved_generator_is_the_same_generator(tmp_path):
    model = untrained(identities=2)
    torch.save(model.state_dict(), tmp_path / "rpg.pt")
    loaded = build(seed=7, identities=2)
    loaded.load_state_dict(torch.load(tmp_path / "rpg.pt", weights_only=True))
    assert torch.equal(*(m.sample({}, count=3, steps=2) for m in (model, loaded)))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="heads=5"):
        build(heads=5)
    with pytest.raises(ConfigError, match="'eular' is unknown; did you mean 'euler'"):
        build(sampler="eular")
    with pytest.raises(ConfigError, match="predicts x0"):
        Rpg(STRUCTURE, Conditions({}, 32), DDPM("eps"), RpgConfig(width=32, heads=2))
    with pytest.raises(ConfigError, match="identities=2"):
        batch = two_clusters(4, torch.Generator())
        del batch.prompt["identity"]
        build(identities=2).loss(batch, torch.Generator())
    with pytest.raises(ConfigError, match="leave out `start`"):
        build().sample({}, torch.zeros(2, STRUCTURE.size))
    with pytest.raises(ConfigError, match="give `count`"):
        build().sample({})
    with pytest.raises(ConfigError, match="'count': 4, 'class_mask': 3"):
        build().sample({"class_mask": torch.zeros(3, 2)}, count=4)


def test_hidden_matrices_are_the_denoisers_and_no_embedding_or_head():
    model = build()
    found = {id(matrix) for matrix in model.hidden_matrices()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert len(names) == 4 * model.config.depth
    assert all(name.startswith("denoiser.blocks.") and "modulation" not in name for name in names)
