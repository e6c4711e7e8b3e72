"""Adapters for a prompt set without a generator, distances to stored ones, and prompts for controls.

Means and mixtures are taken of the flat rows as they are. That makes sense where all adapters share one frozen A, so
that sums of rows are sums of the changes B A; see `Gpt.adapters.peft_io.gauge_report`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from Gpt.adapters.answers import Answers
from Gpt.adapters.base import BaseModel
from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.replay import AnswerLoss
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import Member
from Gpt.seeds import rng


def similarity(wanted: PromptStates, seen: PromptStates) -> Float[Tensor, "B n"]:
    """Cosine of the mean prompts of every wanted and every seen task."""
    return F.normalize(wanted.pooled(), dim=-1) @ F.normalize(seen.pooled(), dim=-1).T


def nearest(similar: Float[Tensor, "B n"], weights: Float[Tensor, "n D"]) -> Float[Tensor, "B D"]:
    """The stored adapter of the most similar task."""
    return weights[similar.argmax(1)]


def softmax_mix(similar: Float[Tensor, "B n"], weights: Float[Tensor, "n D"], temperature: float) -> Tensor:
    """`[B, D]` stored adapters averaged with weights softmax(similarity / temperature)."""
    return (similar / temperature).softmax(1) @ weights


def task_arithmetic(
    wanted: Sequence[tuple[str, str]], seen: Sequence[tuple[str, str]], weights: Float[Tensor, "n D"]
) -> Float[Tensor, "B D"]:
    """Mean of the rule's adapters plus mean of the format's minus mean of all (Ilharco et al. 2023, arXiv 2212.04089).

    Unlike a generator, it is told which rule and which format are wanted. A rule or format that was never seen counts
    as the mean of all.

    Args:
        wanted, seen: (rule, format) of the wanted and of the stored adapters.
    """
    center = weights.mean(0)

    def mean_where(part: int, name: str) -> Float[Tensor, " D"]:
        rows = [i for i, member in enumerate(seen) if member[part] == name]
        return weights[rows].mean(0) if rows else center

    return torch.stack([mean_where(0, rule) + mean_where(1, form) - center for rule, form in wanted])


def nearest_distance(cosine: Float[Tensor, "B n"], same: Bool[Tensor, "B n"] | None = None) -> Float[Tensor, " B"]:
    """1 - cosine to the nearest stored adapter, those left out that are `same`."""
    if same is not None:
        cosine = cosine.masked_fill(same, -torch.inf)
    return (1 - cosine.amax(1)).clamp_min(0)


def multitask_adapter(
    base: BaseModel,
    spec: AdapterSpec,
    fresh: Float[Tensor, " D"],
    examples: Answers,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
) -> Float[Tensor, " D"]:
    """One adapter trained on all tasks at once: AdamW, the learning rate falls linearly to zero.

    Args:
        fresh: the adapter to begin with.
        examples: `[tasks, examples]` to draw from, evenly over the tasks.
        batch: examples of one step.
    """
    weights = fresh.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weights], learning_rate, weight_decay=0.0)
    loss = AnswerLoss(base, spec)
    tasks, count = examples.tokens.shape[:2]
    for step in range(steps):
        draw = rng(weights.device, seed, "multi-task batch", step)
        chosen = torch.randint(tasks * count, (batch,), generator=draw, device=weights.device)
        some = examples[chosen // count, chosen % count]
        (weights.grad,) = torch.autograd.grad(loss(weights[None], some[None]).sum(), weights)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
    return weights.detach()


# --- controls ---------------------------------------------------------------------------------------------------------


def other_tasks(members: Sequence[Member], further: Sequence[Member] = ()) -> list[int]:
    """For each of `members` another task, as its number in `[*members, *further]`.

    It is the next one, cyclically, with another rule and another format; where there is none, the first such of
    `further`; without one there either, the next, or the first of `further`.
    """
    count, known = len(members), [*members, *further]

    def other(i: int) -> int:
        following = [*((i + step) % count for step in range(1, count)), *range(count, len(known))]
        apart = [j for j in following if known[j].rule != known[i].rule and known[j].format != known[i].format]
        return (apart or following or [i])[0]

    return [other(i) for i in range(count)]


def repeated(prompts: PromptStates, count: int) -> PromptStates:
    """The same prompts of every task over and over, until there are `count`."""
    return prompts[:, torch.arange(count, device=prompts.mask.device) % prompts.mask.shape[1]]
