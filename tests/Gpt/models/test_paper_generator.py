"""The published G.pt as a generator: sizes of the five configurations, what reaches the network, what is refused."""

import pytest
import torch
from torch import nn

from Gpt.checkpoint import CheckpointFolder
from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import CheckpointError, ConfigError
from Gpt.generator import Batch
from Gpt.models.gpt_paper import PUBLISHED_MODELS
from Gpt.models.paper_generator import PaperConfig, PaperGpt
from Gpt.networks import MLP, CartPoleActor, ConvNet
from Gpt.report.logger import Loggers
from Gpt.run.command_line import compose
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.training import TrainerConfig, train

STRUCTURE = Structure.of(MLP(6, 4, 3), MLP.symmetry)
TINY = {"width": 16, "layers": 2, "heads": 4, "chunk": 5, "steps": 5}


def conditions(dropout: float = 0.0, **features: int) -> Conditions:
    return Conditions(features or {"target_metric": 2}, 1, dropout)


def generator(**settings) -> PaperGpt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PaperGpt(STRUCTURE, conditions(), DDPM(), PaperConfig(**TINY | {"weight_scale": 2.0} | settings))


def trained(**settings) -> PaperGpt:
    """As after training: no weight is zero any more."""
    model, noise = generator(**settings), rng("cpu", 0, "trained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model


def batch(count: int = 4, scale: float = 0.3) -> Batch:
    noise = rng("cpu", 0, "batch")
    start, target = (scale * torch.randn(count, STRUCTURE.size, generator=noise) for _ in range(2))
    return Batch(target, start, {"target_metric": torch.rand(count, 2, generator=noise)})


@pytest.mark.parametrize(
    ("network", "settings", "parameters"),
    [
        (MLP, {"width": 1536, "heads": 16, "chunk": 1000}, 378_283_008),
        (ConvNet, {"width": 2048, "heads": 16, "chunk": 576}, 639_459_328),
        (CartPoleActor, {"width": 1536, "heads": 12, "policy": "layer_by_layer", "chunk": None}, 347_351_040),
    ],
)
def test_a_generator_has_the_parameters_of_the_published_one_and_no_others(network, settings, parameters):
    structure = Structure.of(network(), network.symmetry)
    with torch.device("meta"):
        model = PaperGpt(structure, conditions(), DDPM(), PaperConfig(**settings))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "train_runs", "test_runs", "epoch", "epochs"),
    [
        ("mnist_loss", 10_228, 500, 100_800, 2_000),
        ("mnist_error", 10_228, 500, 100_800, 2_000),
        ("cifar10_loss", 54_790, 2_050, 100_800, 15_000),
        ("cifar10_error", 54_790, 2_050, 100_800, 15_000),
        ("cartpole", 47_976, 2_050, 806_400, 2_000),
    ],
)
def test_the_configurations_are_the_published_ones(name, train_runs, test_runs, epoch, epochs):
    config = compose(f"{name}_paper", [])
    published = PUBLISHED_MODELS[name]
    assert {key: config.generator[key] for key in vars(published)} == vars(published)
    assert config.task == name
    assert (config.zoo.runs - config.zoo.test_runs - config.zoo.validation_runs, config.zoo.test_runs) == (
        train_runs,
        test_runs,
    )
    # An epoch draws the same number of pairs from each run, and drops its last incomplete batch.
    assert config.trainer.steps == epochs * (epoch // train_runs * train_runs // config.trainer.batch_size)
    warmup = 10 if name == "cartpole" else 5
    assert config.trainer.warmup * epochs == config.trainer.steps * warmup
    assert (config.trainer.max_grad_norm is None) == (name == "cartpole")
    assert config.trainer.batch_size % config.trainer.slices == 0


def test_a_new_generator_returns_the_start():
    """The network returns its start, so every step denoises to it; the last step leaves no noise."""
    given = batch()
    torch.testing.assert_close(generator().sample(given.prompt, given.start), given.start)
    torch.testing.assert_close(generator(sampler="ddim").sample(given.prompt, given.start), given.start)


def test_the_loss_is_the_squared_error_of_scaled_weights():
    """A new network estimates the start, whatever the time and the noise."""
    given, factor = batch(), 3.0
    expected = (factor * (given.target - given.start)).square().mean()
    torch.testing.assert_close(generator(weight_scale=factor).loss(given, rng("cpu", 0, "loss")), expected)


def test_the_network_reads_scaled_weights_and_raw_metrics(monkeypatch):
    model, given, seen = generator(weight_scale=3.0), batch(), []
    monkeypatch.setattr(model.network, "forward", lambda *inputs: seen.append(inputs) or inputs[2])
    model.loss(given, rng("cpu", 0, "loss"))
    noised, t, start, before, wanted = seen[0]
    assert torch.equal(start, 3.0 * given.start)
    assert torch.equal(torch.stack([before, wanted], 1), given.prompt["target_metric"])
    assert noised.shape == given.target.shape and ((0 <= t) & (t <= 999) & (t == t.round())).all()


def test_fit_brings_all_weights_to_the_published_spread():
    given, model = batch(64, scale=0.07), generator(weight_scale=None)
    model.fit(given)
    both = torch.cat([given.start, given.target])
    assert (model.weight_scale * both).std().item() == pytest.approx(0.538, rel=1e-5)
    assert model.state_dict()["weight_scale"] == model.weight_scale
    fixed = generator(weight_scale=2.0)
    fixed.fit(given)
    assert fixed.weight_scale.item() == 2.0


def test_only_weights_of_linear_layers_decay():
    model = generator()
    decaying, others = model.parameter_groups(0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for p in (*decaying["params"], *others["params"]))
    expected = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {names[id(p)] for p in decaying["params"]} == expected
    assert all(".ln" in n or n.endswith(("bias", "pos_emb")) for p in others["params"] for n in [names[id(p)]])


def test_the_training_loop_sets_the_learning_rate_and_decay_of_every_group(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW):
        rates.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = TrainerConfig(
        steps=4, batch_size=4, learning_rate=1e-3, warmup=1, weight_decay=0.1, max_grad_norm=None, validate_every=0
    )
    checkpoints = CheckpointFolder(tmp_path, {})
    arguments = (lambda model: {"score": 0.0}, config, checkpoints, Loggers([]), torch.device("cpu"), 0)
    model = generator()
    train(model, lambda count, noise: batch(count), lambda count, noise: batch(count), *arguments)
    expected = [1e-3 * (1 - i / 4) for i in range(4)]
    assert [[rate for rate, _ in groups] for groups in rates] == [[e, e] for e in expected]
    assert all([decay for _, decay in groups] == [0.1, 0.0] for groups in rates)
    again = generator()
    optimizer = torch.optim.AdamW(again.parameter_groups(0.1))
    state = checkpoints.load(again, generator(), optimizer)
    assert (state.step, state.best_score, state.best_step) == (4, 0.0, 4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.state[again.network.decoder.pos_emb]["step"] == 4


def test_training_memorises_one_pair():
    model, given = generator(width=32, chunk=257), batch(1)  # a token for each tensor and code
    many = Batch(given.target.expand(64, -1), given.start.expand(64, -1), {"target_metric": torch.ones(64, 2)})
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=3e-3)
    for step in range(60):
        loss = model.loss(many, rng("cpu", step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = model.sample({"target_metric": torch.ones(1, 2)}, given.start, steps=20)
    assert (written - given.target).norm() < 0.2 * (given.start - given.target).norm()


def test_sampling_follows_the_seed_the_prompt_and_the_number_of_steps():
    model, given = trained().eval(), batch()
    networks = model.sample(given.prompt, given.start)
    assert torch.equal(networks, model.sample(given.prompt, given.start, steps=TINY["steps"]))
    assert not torch.allclose(networks, model.sample(given.prompt, given.start, seed=1))
    assert not torch.allclose(networks, model.sample(given.prompt, given.start, steps=TINY["steps"] - 1))
    other = {"target_metric": given.prompt["target_metric"] + 1}
    assert not torch.allclose(networks, model.sample(other, given.start))


def test_mixed_precision_samples_are_those_of_autocast_to_the_bit(monkeypatch):
    """Sampling casts the weights once; autocast would cast them in every step, to the same numbers."""
    model, given = trained().eval(), batch()
    full = model.sample(given.prompt, given.start)
    model.mixed_precision = True
    half = model.sample(given.prompt, given.start)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    monkeypatch.setattr(model, "_half_precision_copy", lambda: model.network)
    assert torch.equal(half, model.sample(given.prompt, given.start)) and not torch.equal(half, full)


def test_networks_are_a_smooth_function_of_given_noise():
    """A walk through noise is only a walk when nothing else is random: rows do not depend on seed, place or company."""
    model, given = trained().eval(), batch(1)
    noise = torch.randn(1, *model.noise_shape, generator=rng("cpu", 0, "noise"))
    rows = torch.cat([noise, noise + 1e-4, noise])
    prompt = {"target_metric": given.prompt["target_metric"].expand(3, 2)}
    written = model.sample(prompt, given.start.expand(3, -1), noise=rows, seed=1)
    alone = model.sample(given.prompt, given.start, noise=noise, seed=2)
    torch.testing.assert_close(written[[0, 2]], alone.expand(2, -1))
    assert 0 < (written[1] - written[0]).abs().max() < 1e-2


def test_a_state_dict_restores_the_generator():
    model, copy = trained(weight_scale=3.0), generator(weight_scale=None)
    copy.load_state_dict(model.state_dict())
    given = batch()
    assert torch.equal(model.sample(given.prompt, given.start), copy.sample(given.prompt, given.start))


def test_published_weights_are_loaded_by_name(tmp_path):
    published, model, given = trained(), generator(), batch()
    torch.save({"G_ema": published.network.state_dict()}, tmp_path / "mnist_loss.pt")
    model.load_published(tmp_path / "mnist_loss.pt")
    assert torch.equal(model.sample(given.prompt, given.start), published.sample(given.prompt, given.start))
    with pytest.raises(CheckpointError, match="nowhere.pt"):
        model.load_published(tmp_path / "nowhere.pt")
    with pytest.raises(ConfigError, match="weight_scale"):
        generator(weight_scale=None).load_published(tmp_path / "mnist_loss.pt")


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_weights_follow_torchs_random_state(seed):
    def build() -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PaperGpt(STRUCTURE, conditions(), DDPM(), PaperConfig(**TINY))
        return model.network.decoder.blocks[0].attn.key.weight

    assert torch.equal(build(), build())
    assert torch.equal(build(), generator().network.decoder.blocks[0].attn.key.weight) == (seed == 0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"conditions": conditions(text=8)}, "condition.names"),
        ({"conditions": conditions(target_metric=2, text=8)}, "text"),
        ({"conditions": conditions(0.1)}, "condition.dropout=0"),
        ({"objective": DDPM("eps")}, "objective=ddpm"),
        ({"objective": FlowMatching()}, "objective=ddpm"),
        ({"config": PaperConfig(**TINY | {"sampler": "euler"})}, "generator.sampler=euler"),
        ({"config": PaperConfig(**TINY | {"heads": 3})}, "heads"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    parts = {"conditions": conditions(), "objective": DDPM(), "config": PaperConfig(**TINY)} | parts
    with pytest.raises(ConfigError, match=message):
        PaperGpt(STRUCTURE, **parts)


def test_requests_that_do_not_fit_are_refused():
    model, given = generator(), batch()
    with pytest.raises(ConfigError, match="starting networks"):
        model.sample(given.prompt)
    with pytest.raises(ConfigError, match="guidance"):
        model.sample(given.prompt, given.start, guidance=2.0)
    with pytest.raises(ConfigError, match=r"\[4, 2\]"):
        model.sample({}, given.start)
    with pytest.raises(ConfigError, match="'start': 4, 'target_metric': 1"):
        model.sample({"target_metric": torch.ones(1, 2)}, given.start)
    with pytest.raises(ConfigError, match="text"):
        model.sample(given.prompt | {"text": torch.ones(4, 8)}, given.start)
