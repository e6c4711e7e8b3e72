"""Asking a generator for networks: prompt ranges, prompt curves, recursive updates, unfamiliar starting networks."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.data.zoo import Zoo
from Gpt.evaluation.population import test_population
from Gpt.evaluation.results import PromptCurve
from Gpt.evaluation.statistics import bootstrap_interval, prompt_alignment
from Gpt.evaluation.writing import Request, Writer
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tasks import Task


@dataclass(frozen=True)
class Starts:
    """Starting networks and their validation metric, in the task's plain units."""

    name: str
    weights: Float[Tensor, "n D"]
    metric: Float[Tensor, " n"]


def update_request(starts: Starts, wanted: Float[Tensor, "n ..."], needs_start: bool) -> Request:
    """Networks from each start towards each of its wanted metrics (validation split, plain units), one after the other.

    The prompt is `{"target_metric": [B, 2]}`: the start's metric and the wanted one. For a generator that needs no
    start, the first is NaN (unknown), as in its training.
    """
    asked = wanted.reshape(len(wanted), -1)
    rows = torch.arange(len(asked)).repeat_interleave(asked.shape[1])
    given = starts.metric.cpu()[rows] if needs_start else torch.full((len(rows),), torch.nan)
    prompt = torch.stack([given, asked.flatten().cpu()], 1).to(starts.weights)
    start = starts.weights[rows.to(starts.weights.device)] if needs_start else None
    return Request(len(rows), {"target_metric": prompt}, start)


def write_updates(
    writer: Writer, starts: Starts, wanted: Float[Tensor, "n ..."], name: str
) -> Float[Tensor, "n ... D"]:
    """What `update_request` asks for; `name` names the noise."""
    return writer(update_request(starts, wanted, writer.generator.needs_start), name).unflatten(0, wanted.shape)


def validation_metric(zoo: Zoo, task: Task) -> Float[Tensor, "runs snapshots"]:
    """The zoo's column that prompts and selection use, on the CPU.

    Raises:
        ZooError: the zoo does not have it.
    """
    return zoo.column(f"validation_{task.metric}").float().cpu()


def initial_networks(zoo: Zoo, task: Task, split: str, count: int, device: torch.device | str) -> Starts:
    """The initial snapshots of the first `count` runs of a split."""
    runs = zoo.split(split)[:count].cpu()
    weights = zoo.read(runs, torch.zeros_like(runs)).to(device)
    return Starts(f"{split} starts", weights, validation_metric(zoo, task)[runs, 0])


def unfamiliar_networks(starts: Starts, task: Task, seed: int) -> list[Starts]:
    """The starts scaled by one half and by two, and normal ones with the same spread of every tensor, measured anew."""
    noise = torch.randn(starts.weights.shape, generator=rng("cpu", seed, "unfamiliar")).to(starts.weights)
    normal = noise * tensor_stds(starts.weights, task.structure).mean(0)
    variants = {"halved": 0.5 * starts.weights, "doubled": 2 * starts.weights, "normal": normal}
    found = []
    for name, weights in variants.items():
        for spec in task.structure.statistics:  # which are no initial weights
            weights[:, spec.slice] = starts.weights[:, spec.slice]
        metric = test_population(task, weights, "validation")[f"validation_{task.metric}"]
        found.append(Starts(f"{name} starts", weights, metric))
    return found


def tensor_stds(weights: Float[Tensor, "n D"], structure: Structure) -> Float[Tensor, "n D"]:
    """Root mean square deviation of every tensor of every network, repeated over the tensor's entries."""
    stds = [weights[:, t.slice].std(1, correction=0, keepdim=True).expand(-1, t.numel) for t in structure.tensors]
    return torch.cat(stds, 1)


def best_attained(zoo: Zoo, task: Task) -> float:
    """The best validation metric of any snapshot of a training run."""
    metric = validation_metric(zoo, task)[zoo.split("train").cpu()]
    metric = metric[metric.isfinite()]
    return float(metric.min() if task.minimize else metric.max())


def prompt_range(
    best: float, start_metric: Float[Tensor, " n"], count: int, coefficient: float
) -> Float[Tensor, "n p"]:
    """Evenly spaced wishes for each start, from `best` to `coefficient` times its own metric (Peebles et al. 2022)."""
    fraction = torch.linspace(0, 1, count)
    return best + fraction * (coefficient * start_metric[:, None] - best)


def achieved_metric(
    writer: Writer, task: Task, starts: Starts, wanted: Float[Tensor, "n p"], samples: int, name: str
) -> Float[Tensor, "n p"]:
    """Validation metric of what is written for every wish, mean over `samples` networks each."""
    weights = write_updates(writer, starts, wanted[..., None].expand(-1, -1, samples), name)
    metric = test_population(task, weights.flatten(0, -2), "validation")[f"validation_{task.metric}"]
    return metric.view(*wanted.shape, samples).mean(-1)


def prompt_curve(
    name: str, kind: str, prompted: Float[Tensor, "n p"], achieved: Float[Tensor, "n p"], seed: int
) -> PromptCurve:
    """One line per network, with the interval of its R² over networks."""
    alignment = bootstrap_interval(prompt_alignment(prompted, achieved), seed)
    return PromptCurve(name, kind, prompted.tolist(), achieved.tolist(), alignment)


def shuffled(wanted: Float[Tensor, "n p"], seed: int) -> Float[Tensor, "n p"]:
    """The same wishes handed to the wrong starts and places: what alignment looks like when the prompt says nothing."""
    order = torch.randperm(wanted.numel(), generator=rng("cpu", seed, "shuffled"))
    return wanted.flatten()[order].view_as(wanted)


def achieved_recursively(
    writer: Writer, task: Task, starts: Starts, wanted: Float[Tensor, "n p"], updates: int, name: str
) -> Float[Tensor, "n p"]:
    """Validation metric after several updates in a row, each of which asks for the same wish."""
    rows = torch.arange(len(wanted)).repeat_interleave(wanted.shape[1])
    repeated = replace(starts, weights=starts.weights[rows.to(starts.weights.device)], metric=starts.metric[rows])
    generations = recursive_updates(writer, task, repeated, wanted.flatten(), updates, "fixed", name)
    return generations[-1].metric.view_as(wanted)


def recursive_updates(
    writer: Writer,
    task: Task,
    starts: Starts,
    target: float | Float[Tensor, " n"],
    updates: int,
    mode: str,
    name: str,
) -> list[Starts]:
    """Feed what was written back to the generator, again and again.

    Args:
        target: validation metric to arrive at, of all or of each.
        mode: "fixed" asks for the target every time (Peebles et al. 2022); "stepped" moves the wish in equal parts
            from the start's metric to the target.

    Returns:
        `updates + 1` generations, the starts first.
    """
    generations, target = [starts], torch.as_tensor(target).to(starts.metric).expand_as(starts.metric)
    for update in range(1, updates + 1):
        fraction = update / updates if mode == "stepped" else 1.0
        wanted, before = torch.lerp(starts.metric, target, fraction), generations[-1]
        # A prompt has to be finite: a network broken beyond measure is announced with the metric of its start.
        announced = torch.where(before.metric.isfinite(), before.metric, starts.metric)
        weights = write_updates(writer, replace(before, metric=announced), wanted, f"{name}/{update}")
        metric = test_population(task, weights, "validation")[f"validation_{task.metric}"]
        generations.append(replace(starts, weights=weights, metric=metric))
    return generations


def select_prompt(achieved: Float[Tensor, "n p"], minimize: bool) -> int:
    """The place in the prompt range whose networks are best on average."""
    mean = achieved.mean(0)
    return int(mean.argmin() if minimize else mean.argmax())


def best_of(metric: Float[Tensor, "n samples"], minimize: bool) -> Int[Tensor, " n"]:
    """The better one of several networks for each start."""
    return metric.argmin(1) if minimize else metric.argmax(1)
