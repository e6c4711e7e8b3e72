"""A training that takes no time, what it leaves, and ways to break it off; shared by the tests beside this file.

Run as a script, this file is one process: `toy_training.py FOLDER kill-while-saving STEP`, `… process RANK WORLD`,
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

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from Gpt import distributed, files
from Gpt.checkpoint import CheckpointFolder
from Gpt.generator import Batch, Generator
from Gpt.interruption import Interrupted, handled, held_back
from Gpt.report.logger import JsonlLogger, Loggers, read_metrics
from Gpt.seeds import rng
from Gpt.training import TrainerConfig, train
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
        with held_back(tells=distributed.primary()) as signalled:
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


def lines(folder: Path) -> list[dict[str, float]]:
    """All that was logged, but when."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches SIGKILL."""


class Killer:
    """Stops the run at the n-th operation on files; nothing reaches the disk from then on, clean-up included."""

    def __init__(self, monkeypatch, n: int):
        self.left = n
        for place, name in (
            (files, "save_file"), (os, "replace"), (Path, "rename"), (shutil, "rmtree"),
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


def raising(number: int, when: int):
    """A `before_step` that sends this process a signal in the step after `when` of them."""
    return lambda step: signal.raise_signal(number) if step == when else None


def subprocess_of(*arguments: object) -> subprocess.Popen:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _kill_while_saving(step: int) -> None:
    """From now on, writing the averaged weights of that step ends in SIGKILL, half-way through the file."""
    save = files.save_file

    def killing(tensors, file, metadata):
        save(tensors, file, metadata)
        if file.name.startswith(".ema.") and file.parent.name.startswith(f"step-{step:08d}"):
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.save_file = killing


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
