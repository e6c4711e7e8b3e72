"""The training loop: what is killed continues to the bit, what is split adds up, what fails says so.

Run as a script, this file is one process: `test_training.py FOLDER kill-while-saving STEP`, `… process RANK WORLD`,
with sharded weights `… KIND RANK WORLD`, or `… stopped STEP PROCESSES RANK WORLD`, where these processes send
themselves a signal in that step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from Gpt import checkpoint, distributed, training
from Gpt.checkpoint import CheckpointFolder
from Gpt.errors import ConfigError, UserError
from Gpt.generator import Batch, Generator
from Gpt.interruption import Interrupted, handled, held_back
from Gpt.report.logger import JsonlLogger, Loggers, read_metrics
from Gpt.seeds import rng
from Gpt.training import TrainerConfig, _agreed, _optimizer, learning_rate_factor, train
from rpg.hyperconv import HyperConvDecoder

CONFIG = TrainerConfig(
    steps=12, batch_size=8, slices=2, learning_rate=0.05, warmup=3, ema_decay=0.9, weight_decay=0.1,
    validate_every=3, checkpoint_every=4, log_every=2, validation_batches=2,
)  # fmt: skip


MUON = replace(CONFIG, muon_learning_rate=0.02)


class Toy(Generator):
    """Denoises vectors; its loss depends on every source of randomness the loop has."""

    default_steps, needs_start = 1, False

    def __init__(self):
        nn.Module.__init__(self)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
        self.register_buffer("shift", torch.zeros(5))
        for i, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=rng("cpu", 0, "toy", i))

    def hidden_matrices(self):
        return [self.layers[0].weight]

    def loss(self, batch, rng):
        noise = torch.randn(batch.target.shape, generator=rng)
        return (self.layers(batch.target + noise) - batch.target + self.shift).square().mean()


class Convolving(Toy):
    """Denoises by hyper-convolutions too, whose weights have four axes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.decoder = HyperConvDecoder(((1, 1, 5), (3, 2, 4), (1, 1, 5)), 3)

    def loss(self, batch, rng):
        noise = torch.randn(batch.target.shape, generator=rng)
        written = self.decoder(self.layers(batch.target + noise)[:, None, None]).flatten(1)
        return (written - batch.target + self.shift).square().mean()


SHARDED = {"toy": Toy, "convolving": Convolving}


def draw(count: int, noise: torch.Generator) -> Batch:
    return Batch(torch.randn(count, 5, generator=noise))


def score(generator: Generator) -> dict[str, float]:
    """Best in the middle of training, so that the best weights are neither the first nor the last ones."""
    return {"score": abs(float(generator.layers[0].weight.abs().sum()) - 5.9)}


def run(
    folder: Path,
    config: TrainerConfig = CONFIG,
    generator: Generator | None = None,
    score=score,
    rank: int = 0,
    before_step=lambda step: None,
):
    """Train or go on, as main.py does; returns the generator and the final state."""
    generator = generator or Toy()
    checkpoints = CheckpointFolder(folder / "checkpoints", {"task": "toy"})
    logger = Loggers([JsonlLogger(folder, checkpoints.latest_step())] if rank == 0 else [])
    device = torch.device("cpu")
    try:
        with held_back() as signalled:
            state = train(
                generator, draw, draw, score, config, checkpoints, logger, device, 0, before_step, signalled
            )  # fmt: skip
    finally:
        logger.finish()
    return generator, state


def contents(folder: Path) -> dict[str, object]:
    """Everything in the checkpoints to use, less the time it took."""
    latest = json.loads((folder / "checkpoints" / "latest.json").read_text())
    found: dict[str, object] = {"latest": latest}
    for file in (file for name in filter(None, latest.values()) for file in (folder / "checkpoints" / name).iterdir()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found |= {f"{name}:{key}": value for key, value in load_file(file).items()}
        elif file.suffix == ".json":
            facts = json.loads(file.read_text())
            facts.get("state", {}).pop("seconds", None)
            found[name] = facts
    return found


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Killer:
    """Stops the run at the n-th operation on files; nothing reaches the disk from then on, clean-up included."""

    def __init__(self, monkeypatch, n: int):
        self.left = n
        for place, name in (
            (checkpoint, "save_file"), (checkpoint.os, "replace"), (Path, "rename"), (checkpoint.shutil, "rmtree"),
        ):  # fmt: skip
            monkeypatch.setattr(place, name, self.wrapped(getattr(place, name), name))

    def wrapped(self, operation, name: str):
        def killing(*args, **kwargs):
            self.left -= 1
            if self.left >= 0:
                return operation(*args, **kwargs)
            if self.left == -1 and name == "save_file":
                args[1].write_bytes(b"half a file")
            raise Killed

        return killing


def file_operations(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, 10_000)
        run(folder)
    return 10_000 - killer.left


def test_a_run_killed_at_any_file_operation_continues_to_the_bit(tmp_path, unbroken):
    total = file_operations(tmp_path / "count")
    assert total > 40
    for n in range(total):
        folder = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Killer(patch, n)
            run(folder)
        run(folder)
        assert_same(contents(folder), contents(unbroken))


@pytest.mark.parametrize("kills", [(0,), (1,), (5, 6), (4, 3, 2), (11,)])
def test_a_run_killed_between_steps_continues_to_the_bit(tmp_path, unbroken, kills):
    class Fragile(Toy):
        def __init__(self, steps: int):
            super().__init__()
            self.calls_left = CONFIG.slices * steps

        def loss(self, batch, rng):
            self.calls_left -= torch.is_grad_enabled()
            if self.calls_left < 0:
                raise Killed
            return super().loss(batch, rng)

    for steps_of_session in kills:
        with pytest.raises(Killed):
            run(tmp_path, generator=Fragile(steps_of_session))
    generator, state = run(tmp_path)
    assert state.step == CONFIG.steps
    assert_same(contents(tmp_path), contents(unbroken))
    again, _ = run(tmp_path)
    assert_same(again.state_dict(), generator.state_dict())


def test_hidden_matrices_of_muon_continue_to_the_bit_too(tmp_path):
    run(tmp_path / "muon", MUON)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 20)
        run(tmp_path / "killed", MUON)
    assert CheckpointFolder(tmp_path / "killed" / "checkpoints", {}).latest_step() == 4
    run(tmp_path / "killed", MUON)
    assert_same(contents(tmp_path / "killed"), contents(tmp_path / "muon"))


def test_no_line_is_written_twice_and_none_is_lost(tmp_path, unbroken):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 33)
        run(tmp_path)
    run(tmp_path)
    run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = read_metrics(unbroken / "metrics.jsonl")
    assert [set(line) | {line["step"]} for line in lines] == [set(line) | {line["step"]} for line in expected]
    validated = [line["step"] for line in lines if "validation/loss" in line]
    assert validated == [3, 6, 9, 12]


def test_a_finished_run_is_left_alone(tmp_path, unbroken):
    folder = shutil.copytree(unbroken, tmp_path / "again")
    before = {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}
    run(folder)
    assert {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")} == before


def subprocess_of(*arguments: object) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_sigkill_in_the_middle_of_a_checkpoint(tmp_path, unbroken):
    child = subprocess_of(tmp_path, "kill-while-saving", 8)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, output
    assert [f.name for f in (tmp_path / "checkpoints").glob("step-*") if ".tmp" not in f.name] == ["step-00000004"]
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))


# Losses are logged every 5 steps: where a training stops between, a part of their mean is of the session before.
STOPPED = replace(CONFIG, log_every=5)


def raising(number: int, when: int):
    """A `before_step` that sends this process a signal in the step after `when` of them."""
    return lambda step: signal.raise_signal(number) if step == when else None


def lines(folder: Path) -> list[dict[str, float]]:
    """All that was logged, but when."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_told_to_stop_ends_after_any_step_and_continues_to_the_bit(tmp_path, number):
    run(tmp_path / "unbroken", STOPPED)
    folder = tmp_path / "stopped"
    checkpoints = CheckpointFolder(folder / "checkpoints", {"task": "toy"})
    for step in range(CONFIG.steps):
        with pytest.raises(Interrupted, match=f"^at step {step + 1} of 12$") as caught, handled():
            run(folder, STOPPED, before_step=raising(number, step))
        assert caught.value.number == number
        assert checkpoints.latest_step() == step + 1
    run(folder, STOPPED)
    assert_same(contents(folder), contents(tmp_path / "unbroken"))
    assert lines(folder) == lines(tmp_path / "unbroken")


def test_a_signal_before_the_first_step_ends_a_training_that_has_nothing_to_store(tmp_path, unbroken):
    with pytest.raises(Interrupted, match="^at step 0 of 12$"), handled(), held_back():
        signal.raise_signal(signal.SIGTERM)
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))


def test_one_that_is_told_to_stop_in_a_validation_keeps_what_it_found(tmp_path, unbroken):
    def signalling(generator):
        signal.raise_signal(signal.SIGTERM)
        return score(generator)

    with pytest.raises(Interrupted, match="^at step 3 of 12$"), handled():
        run(tmp_path, score=signalling)
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))
    assert lines(tmp_path) == lines(unbroken)


@pytest.fixture(scope="session")
def two_processes(outputs_of):
    """`(folder, *mode) -> what both print`; they end by themselves and well."""

    def run_both(folder: Path, *mode: object) -> list[str]:
        children = [subprocess_of(folder, *mode, rank, 2) for rank in range(2)]
        outputs = outputs_of(children, 120)
        assert [child.returncode for child in children] == [0, 0], outputs
        return outputs

    return run_both


def assert_close(folder: Path, expected_folder: Path) -> None:
    """Checkpoints of the same names and shapes, and both they and the losses equal up to the order of sums."""
    found, expected = contents(folder), contents(expected_folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    losses = [[line.get("train/loss") for line in read_metrics(f / "metrics.jsonl")] for f in (folder, expected_folder)]
    assert losses[0] == pytest.approx(losses[1], nan_ok=True)


def test_two_processes_train_what_one_trains(tmp_path, unbroken, two_processes):
    two_processes(tmp_path, "process")
    assert_close(tmp_path, unbroken)


@pytest.mark.parametrize("kind", SHARDED)
def test_two_processes_with_a_part_of_the_weights_each_train_what_one_trains(tmp_path, kind, two_processes):
    run(tmp_path / "one", MUON, SHARDED[kind]())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 20)
        run(tmp_path / "two", MUON, SHARDED[kind]())
    assert CheckpointFolder(tmp_path / "two" / "checkpoints", {}).latest_step() == 4
    two_processes(tmp_path / "two", kind)
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def unbroken_pair(tmp_path_factory, two_processes) -> Path:
    folder = tmp_path_factory.mktemp("unbroken-pair")
    two_processes(folder, "process")
    return folder


@pytest.mark.parametrize(("step", "told"), [(4, "0"), (5, "1"), (6, "01")])
def test_two_processes_stop_after_the_same_step_whoever_is_told(tmp_path, unbroken_pair, step, told, two_processes):
    """Where they ask each other, every 2 steps here; the signal that both end with is the same."""
    outputs = two_processes(tmp_path, "stopped", step, told)
    stop = step + 2 - step % 2
    expected = f"SIGTERM at step {stop} of 12" if "1" in told else f"SIGINT at step {stop} of 12"
    assert [expected in output.splitlines() for output in outputs] == [True, True], outputs
    assert [output.count("the training ends after a step") for output in outputs] == [int("0" in told), 0]
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    two_processes(tmp_path, "process")
    assert_same(contents(tmp_path), contents(unbroken_pair))
    assert lines(tmp_path) == lines(unbroken_pair)


@pytest.mark.parametrize(("log_every", "expected"), [(5, [5, 10, 12]), (0, [10, 12]), (50, [10, 12])])
def test_processes_ask_each_other_within_ten_steps_and_at_the_end(monkeypatch, log_every, expected):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "largest", lambda number: max(number, signal.SIGINT))
    config = replace(CONFIG, log_every=log_every)
    assert [step for step in range(13) if _agreed(0, step, config) == signal.SIGINT] == expected
    assert _agreed(signal.SIGTERM, 10, config) == signal.SIGTERM and _agreed(signal.SIGTERM, 9, config) == 0


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


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_warms_up_and_decays(schedule, half):
    config = TrainerConfig(steps=1000, warmup=10, schedule=schedule)
    factors = [learning_rate_factor(step, config) for step in range(1001)]
    assert factors[0] == pytest.approx(0.1, rel=1e-6)
    assert factors[500] == pytest.approx(half)
    assert factors[1000] == pytest.approx(0, abs=1e-12)
    assert max(factors) <= 1
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_a_training_warms_up_anew_at_its_turns(tmp_path, monkeypatch):
    rates = []

    class Turning(Toy):
        turns = (0.5,)

    update = training.Session.update

    def watched(session):
        norm = update(session)
        rates.append(session._optimizer.param_groups[0]["lr"])
        return norm

    monkeypatch.setattr(training.Session, "update", watched)
    run(tmp_path, generator=Turning())
    factors = [learning_rate_factor(step, CONFIG, (0.5,)) for step in range(CONFIG.steps)]
    assert rates == pytest.approx([CONFIG.learning_rate * factor for factor in factors])
    assert factors != [learning_rate_factor(step, CONFIG) for step in range(CONFIG.steps)]


@pytest.mark.parametrize("turn", [0.5, 0.4996])
def test_learning_rate_warms_up_anew_where_the_loss_becomes_another(turn):
    config = TrainerConfig(steps=1000, warmup=10)
    once, again = ([learning_rate_factor(step, config, turns) for step in range(1000)] for turns in ((), (turn,)))
    assert again[:500] == once[:500]
    warm = [new / old for new, old in zip(again[500:510], once[500:510], strict=True)]
    assert warm[0] == pytest.approx(0.1 * (1 + 500 - 1000 * turn))
    assert warm == sorted(warm) and warm[-1] == pytest.approx(1)
    assert again[510:] == once[510:]


def test_mixed_precision_trains(tmp_path):
    config = replace(CONFIG, precision="bfloat16", steps=4)
    generator, _ = run(tmp_path, config)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in generator.parameters())


def _kill_while_saving(step: int) -> None:
    """From now on, writing the averaged weights of that step ends in SIGKILL, half-way through the file."""
    save = checkpoint.save_file

    def killing(tensors, file):
        save(tensors, file)
        if file.name == "ema.safetensors" and file.parent.name.startswith(f"step-{step:08d}"):
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = killing


def _script(folder: Path, mode: str, *numbers: str) -> None:
    torch.set_num_threads(1)
    if mode == "kill-while-saving":
        _kill_while_saving(int(numbers[0]))
        run(folder)
    else:
        *stop, rank, world = numbers
        store = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(world))
        generator = SHARDED[mode]() if mode in SHARDED else Toy()
        config = replace(MUON, sharded=True) if mode in SHARDED else CONFIG
        told = stop and rank in stop[1]
        number = signal.SIGTERM if int(rank) else signal.SIGINT
        before_step = raising(number, int(stop[0])) if told else lambda step: None
        try:
            with handled():
                run(folder, config, generator, rank=int(rank), before_step=before_step)
        except Interrupted as error:
            print(signal.Signals(error.number).name, error)
        dist.destroy_process_group()


if __name__ == "__main__":
    _script(Path(sys.argv[1]), *sys.argv[2:])
