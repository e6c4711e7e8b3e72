"""From prompts to adapter folders that `peft` loads, with a generator that main.py has trained.

    python -m rpg.write_adapter --run runs/lora_tiny --output adapters/mine --prompt "Give the first word."
    python -m rpg.write_adapter --run runs/lora_tiny --output adapters/mine --prompt-file prompts.txt
    python -m rpg.write_adapter --run runs/lora_tiny --output adapters --prompt-file tasks.jsonl

All prompts of one --prompt or of one text file (a prompt a line) describe one task, and become one adapter. In a file
that ends in .jsonl every line is a task, {"task": "name", "prompts": ["…", "…"]}, with a folder of that name.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from Gpt.adapters.conditions import prompt_states
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.peft_io import save_adapter
from Gpt.checkpoint import CheckpointFolder, write_json
from Gpt.conditions import Conditions, prompt_features
from Gpt.config import checked
from Gpt.data.adapter_batches import prompt_for
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.errors import CheckpointError, ConfigError, DataError, UserError, nearest
from Gpt.generator import Generator
from Gpt.recipes import AdapterRecipe
from Gpt.tasks import Task, get_task, load_task_modules
from rpg.adapters import GENERATORS
from rpg.generator import Rpg, RpgConfig

WRITERS: dict[str, tuple[type, Callable[..., Generator]]] = {**GENERATORS, "rpg": (RpgConfig, Rpg)}
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
        ConfigError: the run's generator does not write adapters.
        TaskError: the task is not known here, or not about adapters.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a run folder ({error}); train one with: python main.py --config-name lora_tiny"
        ) from error
    task = _task(config)
    adapter_parts(task)
    settings = dict(config["generator"])
    name = settings.pop("name")
    if name not in WRITERS:
        raise ConfigError(f"{folder}: generator.name={name} does not write adapters; {nearest(name, list(WRITERS))}")
    config_class, build = WRITERS[name]
    generator_config: Any = checked(config_class, settings, "generator.")
    condition, objective = config["condition"], config["objective"]
    conditions = Conditions(
        prompt_features(tuple(condition["names"])), getattr(generator_config, "width", 1), condition["dropout"]
    )
    path = (
        FlowMatching(objective["prediction"], objective["loss_space"], objective["times"])
        if objective["name"] == "flow"
        else DDPM(objective["prediction"])
    )
    generator = build(task.structure, conditions, path, generator_config)
    CheckpointFolder(folder / "checkpoints", {"architecture": task.structure.fingerprint}).load_best(generator)
    return generator.to(device).eval(), task


def _task(config: Mapping[str, Any]) -> Task:
    """The run's task, with its changes of the recipe."""
    load_task_modules(config["task_modules"])
    task = get_task(config["task"])
    changes, recipe = config["zoo"]["recipe"], cast(AdapterRecipe, task.recipe)
    return dataclasses.replace(task, recipe=dataclasses.replace(recipe, **changes)) if changes else task


if __name__ == "__main__":
    sys.exit(main())
