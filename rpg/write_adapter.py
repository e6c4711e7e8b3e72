"""From prompts to adapter folders that `peft` loads, with a generator that main.py has trained.

    python -m rpg.write_adapter --run runs/lora_tiny --output adapters/mine --prompt "Give the first word."
    python -m rpg.write_adapter --run runs/lora_tiny --output adapters/mine --prompt-file prompts.txt
    python -m rpg.write_adapter --run runs/lora_tiny --output adapters --prompt-file tasks.jsonl

All prompts of one --prompt or of one text file (a prompt a line) describe one task, and become one adapter. In a file
that ends in .jsonl every line is a task, {"task": "name", "prompts": ["…", "…"]}, with a folder of that name.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from Gpt.adapters.conditions import prompt_states
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.peft_io import save_adapter
from Gpt.checkpoint import CheckpointFolder, write_json
from Gpt.config import RunConfig, checked
from Gpt.data.adapter_batches import prompt_for
from Gpt.errors import CheckpointError, DataError, UserError
from Gpt.generator import Generator
from Gpt.tasks import Task, get_task, load_task_modules
from rpg.registry import build_generator

FOLDER_NAME = re.compile(r"[\w.\- ]*[\w\-]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rpg.write_adapter", description="Write adapters for prompts.")
    parser.add_argument("--run", type=Path, required=True, help="run folder of main.py")
    parser.add_argument("--output", type=Path, required=True, help="adapter folder, or the folder of a batch's folders")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="may be given several times: all describe one task")
    asked.add_argument("--prompt-file", type=Path, help="a prompt a line, or .jsonl with a task a line")
    parser.add_argument("--base-name", default="", help="what the folder says that its base model is called")
    parser.add_argument("--seed", type=int, default=0, help="names the noise, for a generator that draws some")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        tasks = {"": options.prompt} if options.prompt else read_tasks(options.prompt_file)
        generator, task = load_run(options.run, options.device)
        for name, prompts in tasks.items():
            folder = options.output / name
            seconds = write_adapter(generator, task, prompts, folder, options.base_name, options.seed)
            print(f"{folder}: an adapter, {1000 * seconds:.0f} ms from text to weights; prompts: {len(prompts)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_adapter(
    generator: Generator, task: Task, prompts: Sequence[str], folder: Path, base_name: str = "", seed: int = 0
) -> float:
    """One adapter folder for the prompts of one task; returns the seconds from text to weights.

    Raises:
        DataError: there is no prompt.
    """
    if not prompts:
        raise DataError(f"{folder}: there is no prompt to write an adapter for")
    family, recipe = adapter_parts(task)
    device = next(generator.parameters()).device
    began = time.perf_counter()
    embedded = prompt_states([prompts], family.encoder, family.tokens, device=device).to(device)
    weights = generator.sample(prompt_for(generator, embedded), count=1, seed=seed)[0].cpu()
    seconds = time.perf_counter() - began
    save_adapter(folder, weights, recipe.spec, recipe.base, base_name=base_name)
    write_json(folder / "prompts.json", {"task": task.name, "prompts": list(prompts), "seed": seed})
    return seconds


def read_tasks(file: Path) -> dict[str, list[str]]:
    """`{folder name: prompts}`; the name is empty for a file that describes one task.

    Raises:
        DataError: the file cannot be read, or a line is not a task; names the line.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable text file ({error})") from error
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
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a list of strings")
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"the name is {name!r}")
    return name, prompts


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[Generator, Task]:
    """The trained generator of a run folder, and the task that it was trained for.

    Raises:
        CheckpointError: there is no trained run.
        ConfigError: its configuration is of another version.
        TaskError: the task is not known here, or not about adapters.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a run folder ({error}); train one with: python main.py --config-name lora_tiny"
        ) from error
    config = checked(RunConfig, values)
    load_task_modules(config.task_modules)
    task = get_task(config.task).with_recipe(config.zoo.recipe)
    adapter_parts(task)
    generator = build_generator(config, task.structure)
    CheckpointFolder(folder / "checkpoints", {"architecture": task.structure.fingerprint}).load_best(generator)
    return generator.to(device).eval(), task


if __name__ == "__main__":
    sys.exit(main())
