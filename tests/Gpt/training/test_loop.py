"""One training: slices add up, the best and the averaged weights are the right ones, what fails says so."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_training import CONFIG, Toy, assert_same, contents, draw, run, score

from Gpt.checkpoint import CheckpointFolder
from Gpt.errors import ConfigError, UserError
from Gpt.generator import Batch
from Gpt.report.logger import Loggers
from Gpt.seeds import rng
from Gpt.training import _optimizer, train


def test_slices_add_up_to_the_whole_batch(tmp_path):
    class Noiseless(Toy):
        def loss(self, batch, rng):
            return (self.layers(batch.target) - batch.target).square().mean()

    pool = torch.randn(8, 5, generator=rng("cpu", 0, "pool"))
    parts = iter(range(1000))

    def in_turn(count, noise):
        first = next(parts) * count % 8
        return Batch(pool[first : first + count])

    weights = []
    for slices in (1, 2, 8):
        parts = iter(range(1000))
        generator = Noiseless()
        checkpoints = CheckpointFolder(tmp_path / str(slices), {})
        config = replace(CONFIG, slices=slices, steps=3)
        train(generator, in_turn, draw, score, config, checkpoints, Loggers([]), torch.device("cpu"), seed=0)
        weights.append(torch.cat([p.flatten() for p in generator.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-5, atol=1e-6)


def test_the_best_weights_on_validation_are_kept(tmp_path):
    """Of equally good ones the later."""
    scores = {3: 1.0, 6: 1.0, 9: float("nan"), 12: 1.5}
    seen = {}

    def scripted(generator):
        step = 3 * (len(seen) + 1)
        seen[step] = {name: value.clone() for name, value in generator.state_dict().items()}
        return {"score": scores[step], "alignment": 0.5}

    generator, state = run(tmp_path, score=scripted)
    assert (state.best_score, state.best_step) == (1.0, 6)
    assert_same(generator.state_dict(), seen[6])
    facts = CheckpointFolder(tmp_path / "checkpoints", {"task": "toy"}).load_best(Toy())
    assert (facts["step"], facts["score"], facts["alignment"]) == (6, 1.0, 0.5)


def test_validation_leaves_no_trace_in_the_weights(tmp_path):
    """Batch statistics above all: a network in training mode would gather those of the validation examples."""

    class Normed(Toy):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5, affine=False)

        def loss(self, batch, rng):
            assert self.training == torch.is_grad_enabled()
            return (self.layers(self.norm(batch.target)) - batch.target).square().mean()

    stored = []
    for count in (1, 5):
        generator, _ = run(tmp_path / str(count), replace(CONFIG, validation_batches=count), Normed())
        assert generator.training
        found = contents(tmp_path / str(count))
        stored.append({name: value for name, value in found.items() if isinstance(value, torch.Tensor)})
    assert "norm.running_var" in {name.rpartition(":")[2] for name in stored[0]}
    assert_same(*stored)


def test_training_and_validation_have_the_same_terms(tmp_path):
    """Losses gain terms on the way, and batches say how far that is."""
    seen = {True: [], False: []}

    class Watching(Toy):
        def loss(self, batch, rng):
            seen[self.training].append(batch.progress)
            return super().loss(batch, rng)

    run(tmp_path, replace(CONFIG, validation_batches=1), Watching())
    steps, every = CONFIG.steps, CONFIG.validate_every
    assert seen[True][:: CONFIG.slices] == [step / steps for step in range(steps)]
    assert seen[False] == [step / steps for step in range(every, steps + 1, every)]


def test_weight_decay_reaches_muons_matrices_too():
    generator = Toy()
    generator.hidden_matrices = lambda: [generator.layers[0].weight]
    config = replace(CONFIG, weight_decay=0.1, muon_learning_rate=0.02)
    groups = _optimizer(generator, config, torch.device("cpu")).param_groups
    assert {group["weight_decay"] for group in groups if any(p.dim() > 1 for p in group["params"])} == {0.1}
    assert any(group.get("muon") for group in groups)


def test_the_average_is_the_one_written_down(tmp_path):
    """w_ema <- w_ema + (1 - min(decay, (1 + n) / (10 + n))) (w - w_ema), and a copy at the first step."""
    snapshots = []

    class Watched(Toy):
        def loss(self, batch, rng):
            if self.training and torch.is_grad_enabled():
                snapshots.append(self.layers[0].weight.detach().double().clone())
            return super().loss(batch, rng)

    config = replace(CONFIG, slices=1, validate_every=0, checkpoint_every=0)
    generator, _ = run(tmp_path, config, Watched(), lambda g: {"score": 0.0})
    latest = load_file(tmp_path / "checkpoints" / "step-00000012" / "model.safetensors")
    snapshots.append(latest["layers.0.weight"].double())
    average = snapshots[1]
    for n, weight in enumerate(snapshots[2:], start=1):
        average = average + (1 - min(config.ema_decay, (1 + n) / (10 + n))) * (weight - average)
    torch.testing.assert_close(generator.layers[0].weight.double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpoint_every", [1, 4])
@pytest.mark.parametrize("log_every", [0, 1, 5])
def test_a_loss_that_is_not_finite_ends_the_run_with_good_checkpoints_only(tmp_path, checkpoint_every, log_every):
    class Exploding(Toy):
        calls = 0

        def loss(self, batch, rng):
            self.calls += 1
            return super().loss(batch, rng) * (float("nan") if self.calls > 7 * CONFIG.slices else 1.0)

    config = replace(CONFIG, validate_every=0, checkpoint_every=checkpoint_every, log_every=log_every)
    with pytest.raises(UserError, match=r"(loss|gradient norm) is nan at step .*trainer\.learning_rate"):
        run(tmp_path, config, Exploding())
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", {"task": "toy"})
    assert checkpoints.latest_step() == (7 if checkpoint_every == 1 else 4)
    for tensors in (value for value in contents(tmp_path).values() if isinstance(value, torch.Tensor)):
        assert tensors.isfinite().all()


def test_the_global_random_state_is_neither_read_nor_advanced(tmp_path, unbroken):
    generator = Toy()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    run(tmp_path, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(contents(tmp_path), contents(unbroken))


def test_batches_that_cannot_be_split_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.slices=3 .*trainer\.batch_size=8"):
        run(tmp_path, replace(CONFIG, slices=3))


def test_mixed_precision_trains(tmp_path):
    config = replace(CONFIG, precision="bfloat16", steps=4)
    generator, _ = run(tmp_path, config)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in generator.parameters())
