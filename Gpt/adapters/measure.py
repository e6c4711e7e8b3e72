"""Adapters on the examples of the members that they are for; where there are none, beside a stored adapter."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.adapters.answers import Answers, answer_scores
from Gpt.adapters.base import BaseModel, load_base
from Gpt.adapters.changes import apart
from Gpt.adapters.family import AdapterFamily
from Gpt.errors import TaskError
from Gpt.recipes import AdapterRecipe
from Gpt.tasks import Task


def adapter_parts(task: Task) -> tuple[AdapterFamily, AdapterRecipe]:
    """The family and the recipe of a task that is about adapters.

    Raises:
        TaskError: it is not.
    """
    if not isinstance(task.family, AdapterFamily) or not isinstance(task.recipe, AdapterRecipe):
        raise TaskError(
            f"task {task.name!r} is not about adapters; make its entry with Gpt.catalogue.adapters.adapter_entry, or "
            "give it an AdapterFamily as its family and an AdapterRecipe as its recipe"
        )
    return task.family, task.recipe


def measure(
    task: Task, base: BaseModel, weights: Float[Tensor, "P D"], members: Int[Tensor, " P"]
) -> dict[str, Float[Tensor, " P"]]:
    """Adapter p on member `members[p]`: the columns `<split>_loss`, nats a token of the answers, and `<split>_error`,
    percent of answers that are not exactly right, of the splits validation and test.
    """
    _, recipe = adapter_parts(task)
    columns: dict[str, Tensor] = {}
    for split in ("validation", "test"):
        tokens, positions, valid, _ = task.data(split, base.device)
        answers = Answers(tokens, positions, valid)[members.to(base.device)]
        scores = answer_scores(base, recipe.spec, weights.to(base.device), answers)
        columns |= {f"{split}_loss": scores.loss.mean(1), f"{split}_error": 100 * (1 - scores.exact.float().mean(1))}
    return columns


def library_columns(
    task: Task, weights: Float[Tensor, "P D"], members: Int[Tensor, " P"], device: torch.device | str
) -> dict[str, Float[Tensor, " P"]]:
    """What a library's adapters measure, on the CPU: `measure`; or, without answers and without the language model,
    `<split>_distance`, 1 - cosine of the change of the first adapter of the same member."""
    family, recipe = adapter_parts(task)
    if family.answered:
        found = measure(task, load_base(recipe.base, device), weights, members)
        return {name: values.cpu() for name, values in found.items()}
    first = {member: row for row, member in reversed([*enumerate(members.tolist())])}
    distance, _ = apart(recipe.base, recipe.spec, weights, weights[[first[member] for member in members.tolist()]])
    return {f"{split}_distance": distance.float() for split in ("validation", "test")}
