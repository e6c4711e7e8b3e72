"""Adapters for a prompt set without a generator, distances between adapters, and prompts for controls.

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
from Gpt.adapters.spec import PREFIX, AdapterSpec, adapter_structure, draw_a, target_shapes
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


def delta_cosine(
    base: BaseModel, spec: AdapterSpec, first: Float[Tensor, "P D"], second: Float[Tensor, "n D"]
) -> Float[Tensor, "P n"]:
    """Cosine of the changes B A of every pair of adapters, all layers in one vector; magnitudes (DoRA) are left out.

    The inner product of B A and B' A' is the sum over the rank's pairs of (Bᵀ B') (A A'ᵀ), so no change is formed. An
    adapter that changes nothing has cosine 0 with all.
    """
    x, y = _factors(base, spec, first), _factors(base, spec, second)
    layers = [(_pairs(bx, by) * _pairs(ax.mT, ay.mT)).sum((2, 3)) for (bx, ax), (by, ay) in zip(x, y, strict=True)]
    lengths = _lengths(x)[:, None] * _lengths(y)
    return torch.stack(layers).sum(0) / lengths.clamp_min(1e-30)


def _factors(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"]) -> list[tuple[Tensor, Tensor]]:
    """(B `[P, out, r]`, A `[P or 1, r, in]`) of every adapted layer, in double precision."""
    tensors = adapter_structure(base, spec).unflatten(weights.double())
    found = []
    for name, (_, inputs) in target_shapes(base, spec.targets).items():
        own = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        shared = draw_a(name, inputs, spec).to(weights.device, torch.float64)[None]
        found.append((tensors[f"{PREFIX}{name}.lora_B.weight"], shared if own is None else own))
    return found


def _lengths(factors: list[tuple[Tensor, Tensor]]) -> Float[Tensor, " P"]:
    """Norm of every adapter's change."""
    squares = [(b.mT @ b * (a @ a.mT)).sum((1, 2)) for b, a in factors]
    return torch.stack(squares).sum(0).clamp_min(0).sqrt()


def _pairs(x: Float[Tensor, "P m r"], y: Float[Tensor, "n m s"]) -> Float[Tensor, "P n r s"]:
    return torch.einsum("pmr,nms->pnrs", x, y)


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
