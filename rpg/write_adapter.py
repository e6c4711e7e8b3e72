"""Adapters for prompts, as folders that `peft` loads; and files of prompts."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from Gpt.adapters.conditions import prompt_states
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.peft_io import save_adapter
from Gpt.data.adapter_batches import prompt_for
from Gpt.errors import DataError
from Gpt.files import write_json
from Gpt.generator import Generator
from Gpt.tasks import Task

FOLDER_NAME = re.compile(r"[\w.\- ]*[\w\-]")


def write_adapter(
    generator: Generator,
    task: Task,
    prompts: Sequence[str],
    folder: Path,
    base_name: str = "",
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    seed: int = 0,
) -> float:
    """One adapter folder for the prompts of one task; returns the seconds from text to weights.

    Args:
        base_name: what the folder says that its base model is called.
        steps, guidance, seed: see `Generator.sample`.

    Raises:
        DataError: there is no prompt, or one without words.
        ConfigError: the generator cannot be guided.
    """
    if not prompts or not all(map(str.strip, prompts)):
        raise DataError(f"{folder}: there is no prompt to write an adapter for; say in words what it should do")
    family, recipe = adapter_parts(task)
    device = next(generator.parameters()).device
    began = time.perf_counter()
    embedded = prompt_states([prompts], family.encoder, family.tokens, device=device).to(device)
    prompt = prompt_for(generator, embedded)
    weights = generator.sample(prompt, count=1, steps=steps, guidance=guidance, seed=seed)[0].cpu()
    seconds = time.perf_counter() - began
    save_adapter(folder, weights, recipe.spec, recipe.base, base_name=base_name)
    write_json(folder / "prompts.json", {"task": task.name, "prompts": list(prompts), "seed": seed})
    return seconds


def read_tasks(file: Path) -> dict[str, list[str]]:
    """`{folder name: prompts}`: of .jsonl, a task a line; of a text file, whose lines describe one task, under no name.

    Raises:
        DataError: the file cannot be read, or a line is not a task; names the line.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable text file ({error})") from error
    if not lines:
        expected = "of its lines should be a task" if file.suffix == ".jsonl" else "line should be a prompt of one task"
        raise DataError(f"{file} is empty; each {expected}")
    if file.suffix != ".jsonl":
        return {"": lines}
    tasks: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            name, prompts = _task_of(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file}, line {number}: expected {{"task": "name", "prompts": ["…"]}} with a name that can be a '
                f"folder's ({error})"
            ) from error
        if name in tasks:
            raise DataError(f"{file}, line {number}: there is a task {name!r} before; each needs a name of its own")
        tasks[name] = prompts
    return tasks


def _task_of(line: Mapping[str, Any]) -> tuple[str, list[str]]:
    name, prompts = line["task"], line["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise TypeError("prompts must be a list of strings that say something")
    if not prompts:
        raise ValueError("there is no prompt")
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"the name is {name!r}")
    return name, prompts
