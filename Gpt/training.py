"""The one training loop, for every generator, on CPU or GPU, in one process or several.

Step i is a function of (seed, i): its batch and its noise are drawn from named seeds, in slices that do not depend on
how many processes share the work. A run that is killed and resumed, or spread over more processes, therefore trains on
the same numbers.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from Gpt import distributed
from Gpt.checkpoint import CheckpointFolder, TrainingState
from Gpt.cuda_graphs import GraphedGradient
from Gpt.distributed import from_first, on_first_process
from Gpt.errors import ConfigError, UserError
from Gpt.generator import Batch, Generator
from Gpt.muon import MuonAdamW
from Gpt.report.logger import Loggers
from Gpt.seeds import rng
from Gpt.sharding import Whole, copy_whole, local, sharded, synchronise_gradients, whole

Sampler = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True)
class TrainerConfig:
    """Optimisation and bookkeeping.

    Attributes:
        batch_size: examples per step, over all processes and slices.
        slices: equal parts of a batch that are drawn and differentiated one after the other; a multiple of the number
            of processes. More slices need less memory.
        muon_learning_rate: of the hidden matrices, which then go to Muon instead of AdamW, see `Gpt.muon`.
        warmup: steps of linear warm-up; then the learning rates fall linearly to zero ("linear") or along a cosine.
        max_grad_norm: gradients are scaled down to this norm; None leaves them alone.
        ema_decay: of the averaged weights, reached gradually: min(decay, (1 + step) / (10 + step)).
        precision: "float32"; "tf32" for its faster matrix products, in training and sampling; "bfloat16" for automatic
            mixed precision; "auto" is bfloat16 where the device multiplies it natively, float32 elsewhere.
        compile: compile the generator's networks with torch.compile; on a GPU, with one slice, also replay loss and
            gradient as a CUDA graph where the generator can.
        sharded: with several processes, each keeps a part of the weights, gradients, optimiser state and average, see
            `Gpt.sharding`; for generators that outgrow a card.
        validate_every, checkpoint_every: steps; 0 leaves it to the end.
        validation_batches: batches behind one validation loss.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 256
    slices: PositiveInt = 1
    learning_rate: float = 4e-3
    muon_learning_rate: float | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.99
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "float32"
    compile: bool = False
    sharded: bool = False
    validate_every: int = 250
    checkpoint_every: int = 250
    log_every: int = 10
    validation_batches: PositiveInt = 4


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
) -> TrainingState:
    """Train, and leave the averaged weights in `generator`: the best ones by `score` where it was measured.

    Args:
        draw, draw_validation: `(count, rng) -> Batch`, from training and from validation runs.
        score: measures the averaged generator on validation data; its key "score" (lower is better) picks the best
            weights.
        before_step: is told the number of each step before its batch is drawn (a zoo that is kept fresh).

    Raises:
        ConfigError: the processes cannot share the slices of a batch equally.
        UserError: the loss or its gradient is not finite; the latest checkpoint is from before.
        CheckpointError: a checkpoint cannot be read or written.
    """
    rank, world = distributed.rank(), distributed.world()
    if config.slices % world or config.batch_size % config.slices:
        raise ConfigError(
            f"trainer.slices={config.slices} must be a multiple of the {world} processes and divide "
            f"trainer.batch_size={config.batch_size}"
        )
    in_parts = config.sharded and world > 1
    trained = sharded(generator, device) if in_parts else generator
    averaged = sharded(generator, device) if in_parts else copy.deepcopy(generator)
    optimizer = _optimizer(trained, config, device)
    views = [Whole(part) for part in (trained, averaged, optimizer)] if in_parts else []
    stored: list[Any] = [*views] or [trained, averaged, optimizer]
    state = checkpoints.load(*stored) if checkpoints.exists() else TrainingState()
    if config.compile:
        trained.compile_networks()
    step_loss = _Loss(trained)
    parallel = DistributedDataParallel(step_loss) if world > 1 and not in_parts else None
    model = parallel or step_loss
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision(config.precision, device))
    graphed = _graphed_gradient(step_loss, autocast) if generator.graphs and config.slices == 1 else None
    bar = tqdm(total=config.steps, initial=state.step, desc="training", unit="step", disable=rank > 0)
    begun = time.perf_counter() - state.seconds
    running, since, norm = torch.zeros((), device=device), state.step, torch.zeros(())
    settled = state.step  # resumed at this step, which was validated and saved by the session before

    while True:
        last = state.step >= config.steps
        validate = state.step > settled and (last or _due(state.step, config.validate_every))
        save = state.step > settled and (last or _due(state.step, config.checkpoint_every))
        if validate or save:
            _check_finite("gradient norm", norm.item(), state.step, config)
        if validate:
            if in_parts:
                copy_whole(averaged, generator)
            judged = generator if in_parts else averaged
            facts = from_first(_validate(judged, draw_validation, score, config, device, seed))
            logger.log({f"validation/{name}": value for name, value in facts.items()}, state.step)
            if facts["score"] < state.best_score:
                state.best_score, state.best_step = facts["score"], state.step
                on_first_process(partial(checkpoints.save_best, state, judged, {"step": state.step, **facts}))
            bar.set_postfix({name: f"{value:.3g}" for name, value in facts.items()})
        state.seconds = time.perf_counter() - begun
        if save:
            for view in views:
                view.gather()
            on_first_process(partial(checkpoints.save, state, *stored))
        if last:
            break

        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(state.step, config)
        before_step(state.step)
        for part in range(rank, config.slices, world):
            noise = rng(device, seed, "batch", state.step, part)
            batch = draw(config.batch_size // config.slices, noise)
            batch.progress = state.step / config.steps
            final = part + world >= config.slices
            if in_parts:
                synchronise_gradients(trained, final)
            if graphed is not None:
                loss = graphed(batch, noise)
            else:
                with autocast, contextlib.nullcontext() if final or parallel is None else parallel.no_sync():
                    loss = model(batch, noise) * world / config.slices
                loss.backward()
            running += loss.detach() / world
        norm = whole(nn.utils.clip_grad_norm_(trained.parameters(), config.max_grad_norm or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step)) if state.step else 0.0
        _average(averaged, trained, 1 - decay)
        state.step += 1
        bar.update()

        if _due(state.step, config.log_every):
            value = distributed.total(running).item() / (state.step - since)
            _check_finite("loss", value, state.step, config)
            logger.log({"train/loss": value, "train/grad_norm": norm.item()}, state.step)
            running.zero_()
            since = state.step

    bar.close()
    checkpoints.load_best(generator)
    return state


def mixed_precision(precision: str, device: torch.device) -> bool:
    """Whether products are computed in bfloat16; "auto" asks the device."""
    if precision == "auto":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.9
        return device.type == "cuda" or capabilities.get("avx512_bf16", False)
    return precision == "bfloat16"


def learning_rate_factor(step: int, config: TrainerConfig) -> float:
    """Warm-up times decay, 1 at most."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    progress = step / config.steps
    return warm * ((1 - progress) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class _Loss(nn.Module):
    """`Generator.loss` as a forward pass, which DistributedDataParallel hooks into."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, batch: Batch, noise: torch.Generator) -> Tensor:
        return self.generator.loss(batch, noise)


def _graphed_gradient(step_loss: _Loss, autocast: torch.autocast) -> GraphedGradient | None:
    """Loss and gradient as one CUDA graph; None on other devices."""

    def mixed(batch: Batch, noise: torch.Generator) -> Tensor:
        with autocast:
            return step_loss(batch, noise)

    parameters = list(step_loss.parameters())
    return GraphedGradient(mixed, parameters) if parameters[0].is_cuda else None


def _optimizer(generator: Generator, config: TrainerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the generator's groups; its hidden matrices go to Muon where `muon_learning_rate` is set."""
    groups = generator.parameter_groups(config.weight_decay)
    matrices = generator.hidden_matrices() if config.muon_learning_rate else []
    if matrices:
        taken = {id(p) for p in matrices}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        groups.append({"params": matrices, "muon": True, "lr": config.muon_learning_rate, "weight_decay": 0.0})
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
) -> dict[str, float]:
    """Validation loss on the same examples and noise every time, and the score of written networks."""
    total = 0.0
    for i in range(config.validation_batches):
        noise = rng(device, seed, "validation", i)
        total += generator.loss(draw(config.batch_size // config.slices, noise), noise).item()
    return {"loss": total / config.validation_batches, **score(generator)}


def _check_finite(name: str, value: float, step: int, config: TrainerConfig) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"training: the {name} is {value} at step {step}; train anew (resume=never) with a lower "
            f"trainer.learning_rate (now {config.learning_rate:g}); the checkpoints of this run are from before"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
