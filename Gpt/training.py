"""The one training loop, for every generator, on CPU or GPU, in one process or several.

Step i is a function of (seed, i): its batch and its noise are drawn from named seeds, in slices that do not depend on
how many processes share the work. A run that is killed and resumed, or spread over more processes, therefore trains on
the same numbers.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from Gpt import distributed
from Gpt.checkpoint import CheckpointFolder, TrainingState
from Gpt.cuda_graphs import GraphedGradient
from Gpt.distributed import from_first, on_first_process
from Gpt.errors import ConfigError, UserError
from Gpt.generator import Batch, Generator, evaluating
from Gpt.interruption import Interrupted
from Gpt.muon import MuonAdamW
from Gpt.report.logger import Loggers
from Gpt.seeds import rng
from Gpt.sharding import Whole, copy_whole, local, sharded, synchronise_gradients, whole

Sampler = Callable[[int, torch.Generator], Batch]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]

AGREE_EVERY = 10  # steps at most, after which several processes ask each other whether to go on


@dataclass(frozen=True)
class TrainerConfig:
    """Optimisation and bookkeeping.

    Attributes:
        batch_size: examples per step, over all processes and slices.
        slices: equal parts of a batch that are drawn and differentiated one after the other; a multiple of the number
            of processes. More slices need less memory.
        muon_learning_rate: of the hidden matrices, which then go to Muon instead of AdamW, see `Gpt.muon`.
        warmup: steps of linear warm-up, at the beginning and wherever the loss becomes another; otherwise the learning
            rates fall linearly to zero ("linear") or along a cosine.
        max_grad_norm: gradients are scaled down to this norm; None leaves them alone.
        ema_decay: of the averaged weights, reached gradually: min(decay, (1 + step) / (10 + step)).
        precision: "float32"; "tf32" for its faster matrix products, in training and sampling; "bfloat16" for automatic
            mixed precision; "auto" is bfloat16 where the device multiplies it natively, float32 elsewhere.
        compile: compile the generator's networks with torch.compile; on a GPU, with one slice, also replay loss and
            gradient as a CUDA graph where the generator can.
        sharded: with several processes, each keeps a part of the weights, gradients, optimiser state and average, see
            `Gpt.sharding`; for generators that outgrow a card.
        validate_every, checkpoint_every: steps; 0 leaves it to the end.
        log_every: steps; 0 for never.
        validation_batches: batches behind one validation loss.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 256
    slices: PositiveInt = 1
    learning_rate: Rate = 4e-3
    muon_learning_rate: Rate | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: NonNegativeInt = 50
    weight_decay: Rate = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    max_grad_norm: PositiveFloat | None = 1.0
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.99
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "float32"
    compile: bool = False
    sharded: bool = False
    validate_every: NonNegativeInt = 250
    checkpoint_every: NonNegativeInt = 250
    log_every: NonNegativeInt = 10
    validation_batches: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.batch_size % self.slices:
            raise ConfigError(f"trainer.slices={self.slices} must divide trainer.batch_size={self.batch_size}")

    def check_shared(self, processes: int) -> None:
        """Raises:
        ConfigError: the processes cannot share the slices of a batch equally.
        """
        if self.slices % processes:
            raise ConfigError(f"trainer.slices={self.slices} must be a multiple of the {processes} processes")


def train(
    generator: Generator,
    draw: Sampler,
    draw_validation: Sampler,
    score: Callable[[Generator], dict[str, float]],
    config: TrainerConfig,
    checkpoints: CheckpointFolder,
    logger: Loggers,
    device: torch.device,
    seed: int,
    before_step: Callable[[int], None] = lambda step: None,
    signalled: Callable[[], int] = lambda: 0,
) -> TrainingState:
    """Train, and leave the averaged weights in `generator`: the best ones by `score` where it was measured.

    Args:
        draw, draw_validation: `(count, rng) -> Batch`, from training and from validation runs.
        score: measures the averaged generator on validation data; its key "score" (lower is better) picks the best
            weights.
        before_step: is told the number of each step before its batch is drawn (a zoo that is kept fresh).
        signalled: the number of a signal that asks the training to end, 0 while none has; see `Gpt.interruption`.

    Raises:
        Interrupted: `signalled` here or in another process; all have ended after the same step, and a checkpoint of it
            is written.
        ConfigError: the processes cannot share the slices of a batch equally.
        UserError: the loss or its gradient is not finite; the latest checkpoint is from before.
        CheckpointError: a checkpoint cannot be read or written.
    """
    rank, world = distributed.rank(), distributed.world()
    config.check_shared(world)
    session = Session(generator, config, checkpoints, device)
    state, resumed = session.state, session.state.step
    if config.compile:
        session.trained.compile_networks()
    backward = Backward(session.trained, config, device)
    bar = tqdm(total=config.steps, initial=resumed, desc="training", unit="step", disable=rank > 0)
    begun = time.perf_counter() - state.seconds
    running = torch.tensor(state.unlogged_loss if rank == 0 else 0.0, device=device)
    since, norm = resumed - state.unlogged_steps, torch.zeros(())

    while True:
        last, fresh = state.step >= config.steps, state.step > resumed  # else validated and saved in an earlier session
        if fresh and (last or _due(state.step, config.validate_every)):
            _check_finite("gradient norm", norm.item(), state.step, config)
            judged = session.judged()
            facts = from_first(_validate(judged, draw_validation, score, config, device, seed, state.step))
            logger.log({f"validation/{name}": value for name, value in facts.items()}, state.step)
            session.keep_if_best(judged, facts)
            bar.set_postfix({name: f"{value:.3g}" for name, value in facts.items()})
        interrupted = _agreed(signalled(), state.step, config)
        state.seconds = time.perf_counter() - begun
        if fresh and (last or interrupted or _due(state.step, config.checkpoint_every)):
            _check_finite("gradient norm", norm.item(), state.step, config)
            state.unlogged_steps, state.unlogged_loss = state.step - since, distributed.total(running).item()
            logger.flush()
            session.save()
        if last or interrupted:
            break

        before_step(state.step)
        for part in range(rank, config.slices, world):
            noise = rng(device, seed, "batch", state.step, part)
            batch = draw(config.batch_size // config.slices, noise)
            batch.progress = state.step / config.steps
            running += backward(batch, noise, final=part + world >= config.slices)
        norm = session.update()
        bar.update()

        if _due(state.step, config.log_every):
            value = distributed.total(running).item() / (state.step - since)
            _check_finite("loss", value, state.step, config)
            facts = {
                "train/loss": value,
                "train/grad_norm": norm.item(),
                "train/learning_rate": session.learning_rate,
                "train/phase": generator.phase(batch),
            }
            logger.log(facts, state.step)
            running.zero_()
            since = state.step

    bar.close()
    if interrupted:
        raise Interrupted(interrupted, f"at step {state.step} of {config.steps}")
    checkpoints.load_best(generator)
    return state


class Session:
    """What checkpoints keep of a training: weights, their average, the optimiser, and how far it has come.

    Attributes:
        trained, averaged: the generator itself and a copy; of a sharded training both are copies, in parts.
        state: continued from the latest checkpoint, if there is one.
    """

    def __init__(
        self, generator: Generator, config: TrainerConfig, checkpoints: CheckpointFolder, device: torch.device
    ):
        self._generator, self._config, self._checkpoints = generator, config, checkpoints
        in_parts = config.sharded and distributed.world() > 1
        self.trained = sharded(generator, device) if in_parts else generator
        self.averaged = sharded(generator, device) if in_parts else copy.deepcopy(generator)
        self._optimizer = _optimizer(self.trained, config, device)
        stored: list[Any] = [self.trained, self.averaged, self._optimizer]
        self._views = [Whole(part) for part in stored] if in_parts else []
        self._stored = self._views or stored
        self.state = checkpoints.load(*self._stored) if checkpoints.exists() else TrainingState()

    @property
    def learning_rate(self) -> float:
        """AdamW's, of the last update."""
        return self._optimizer.param_groups[0]["lr"]

    def update(self) -> Tensor:
        """One step along the gradient, with the learning rate of its place in the schedule; returns the norm."""
        config, step = self._config, self.state.step
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, config, self.trained.turns)
        norm = whole(nn.utils.clip_grad_norm_(self.trained.parameters(), config.max_grad_norm or math.inf))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        _average(self.averaged, self.trained, 1 - decay)
        self.state.step += 1
        return norm

    def judged(self) -> Generator:
        """The averaged generator, whole in every process."""
        if not self._views:
            return self.averaged
        copy_whole(self.averaged, self._generator)
        return self._generator

    def keep_if_best(self, judged: Generator, facts: dict[str, float]) -> None:
        """Store the averaged weights if no score before was lower."""
        state = self.state
        if facts["score"] <= state.best_score:  # of equals the later, as where nothing works yet
            state.best_score, state.best_step = facts["score"], state.step
            on_first_process(lambda: self._checkpoints.save_best(state, judged, {"step": state.step, **facts}))

    def save(self) -> None:
        """Write a checkpoint."""
        for view in self._views:
            view.gather()
        on_first_process(lambda: self._checkpoints.save(self.state, *self._stored))


class Backward:
    """Adds the gradient of one slice of a batch to what the parameters have; with several processes, the final slice's
    call also adds up their gradients."""

    def __init__(self, generator: Generator, config: TrainerConfig, device: torch.device):
        self._generator, self._slices = generator, config.slices
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision(config.precision, device))
        self._loss = _Loss(generator)
        in_parts = isinstance(generator, FSDPModule)
        self._parallel = DistributedDataParallel(self._loss) if distributed.world() > 1 and not in_parts else None
        graphs = generator.graphs and config.slices == 1 and device.type == "cuda"
        self._graphed = GraphedGradient(self._mixed, list(generator.parameters()), generator.phase) if graphs else None

    def __call__(self, batch: Batch, noise: torch.Generator, final: bool) -> Tensor:
        """The slice's part of the mean loss of the batch, detached."""
        if self._graphed is not None:
            return self._graphed(batch, noise)
        world = distributed.world()
        kept: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self._generator, FSDPModule):
            synchronise_gradients(self._generator, final)
        elif self._parallel is not None and not final:
            kept = self._parallel.no_sync()
        with kept:
            loss = self._mixed(batch, noise) * world / self._slices
            loss.backward()
        return loss.detach() / world

    def _mixed(self, batch: Batch, noise: torch.Generator) -> Tensor:
        with self._autocast:
            return (self._parallel or self._loss)(batch, noise)


class _Loss(nn.Module):
    """`Generator.loss` as a forward pass, which DistributedDataParallel hooks into."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, batch: Batch, noise: torch.Generator) -> Tensor:
        return self.generator.loss(batch, noise)


def mixed_precision(precision: str, device: torch.device) -> bool:
    """Whether products are computed in bfloat16; "auto" asks the device."""
    if precision == "auto":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.9
        return device.type == "cuda" or capabilities.get("avx512_bf16", False)
    return precision == "bfloat16"


def learning_rate_factor(step: int, config: TrainerConfig, turns: Sequence[float] = ()) -> float:
    """Warm-up times decay, 1 at most.

    It warms up anew after each of the `turns`, shares of the training at which the loss becomes another: the optimiser
    knows gradients of another size and direction by then, and its first long steps would undo what was learned.
    """
    progress = step / config.steps
    began = config.steps * max((turn for turn in turns if turn <= progress), default=0.0)
    warm = min(1.0, (step - began + 1) / max(1, config.warmup))
    return warm * ((1 - progress) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def _optimizer(generator: Generator, config: TrainerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the generator's groups; its hidden matrices go to Muon where `muon_learning_rate` is set."""
    groups = generator.parameter_groups(config.weight_decay)
    matrices = generator.hidden_matrices() if config.muon_learning_rate else []
    if matrices:
        taken = {id(p) for p in matrices}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        muon = {"muon": True, "lr": config.muon_learning_rate, "weight_decay": config.weight_decay}
        groups.append({"params": matrices, **muon})
    optimizer = MuonAdamW(groups, lr=config.learning_rate, betas=config.betas, fused=device.type == "cuda")
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


@torch.no_grad()
def _average(averaged: Generator, generator: Generator, share: float) -> None:
    """Move the averaged parameters towards the current ones by `share`; buffers are those of the moment."""
    torch._foreach_lerp_([local(p) for p in averaged.parameters()], [local(p) for p in generator.parameters()], share)
    buffers = list(averaged.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(generator.buffers()))


@torch.no_grad()
def _validate(
    generator: Generator,
    draw: Sampler,
    score: Callable[[Generator], dict[str, float]],
    config: TrainerConfig,
    device: torch.device,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Validation loss on the same examples and noise every time, with the terms that training has at that step, and the
    score of written networks."""
    total = 0.0
    with evaluating(generator):
        for i in range(config.validation_batches):
            noise = rng(device, seed, "validation", i)
            batch = draw(config.batch_size // config.slices, noise)
            batch.progress = step / config.steps
            total += generator.loss(batch, noise).item()
    return {"loss": total / config.validation_batches, **score(generator)}


def _check_finite(name: str, value: float, step: int, config: TrainerConfig) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"training: the {name} is {value} at step {step}; train anew (resume=never) with a lower "
            f"trainer.learning_rate (now {config.learning_rate:g}); the checkpoints of this run are from before"
        )


def _agreed(signalled: int, step: int, config: TrainerConfig) -> int:
    """The signal that ends the training after this step, in all processes alike; 0 for none.

    One process decides alone, after any step. Several ask each other after some of them: after every step it would have
    the hosts wait for each other and for their GPUs. torchrun kills them 30 s after its own signal.
    """
    if distributed.world() == 1:
        return signalled
    together = step >= config.steps or _due(step, min(config.log_every or AGREE_EVERY, AGREE_EVERY))
    return distributed.largest(signalled) if together else 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
