"""Write networks with a trained generator, and walk through its latent space.

    python playground.py                                     the generator of runs/digits_loss, trained by main.py
    python playground.py --config-name cifar10_loss wanted=1.3 count=16
    python playground.py updates=5                           the best networks: five updates in a row
    python playground.py run.name=mine keyframes=0           the generator of another run, no walk
    python playground.py --config-name digits_mask_rpg prompt="all even digits"      networks for a class mask, in words
    python playground.py --config-name digits_mask_rpg mask=1010101010               or in bits, class 0 first
    python playground.py --config-name digits_text_rpg prompt="one, two and nine"    the sentence itself is the prompt
    python playground.py --config-name digits_rpg            unprompted
    python playground.py --config-name lora_tiny prompt="Give the first word."       a LoRA adapter for a language task
    python playground.py --config-name lora_tiny prompts=tasks.jsonl out=adapters    a batch of them

Every network starts from a fresh initialisation (or from noise alone, if the generator needs no start). What is left in
the run folder, under playground/:

    network-000.safetensors …   a complete state_dict each
    networks.json               what was asked for, and what each network measures
    walk.gif                    one start, one prompt, a closed loop of noise: first-layer filters and the metric

An adapter is a folder that `peft` loads. All lines of a text file of prompts describe one task; in a file that ends in
.jsonl every line is a task, {"task": "name", "prompts": ["…", "…"]}, with a folder of that name.
"""

import contextlib
import dataclasses
import faulthandler
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from yaml import YAMLError

from Gpt.adapters.family import AdapterFamily
from Gpt.config import RunConfig, checked
from Gpt.errors import ConfigError, nearest
from Gpt.evaluation.prompting import Starts
from Gpt.evaluation.recalibration import check_recalibration, examples
from Gpt.files import save_tensors, write_json
from Gpt.generator import Generator
from Gpt.report.text import networks_table
from Gpt.report.walk import first_layer_filters, slerp_loop, walk_gif
from Gpt.run.command_line import DEFAULT, guard, launch, overlaid
from Gpt.run.experiment import Experiment
from Gpt.run.folder import check_unchanged, stored_config
from Gpt.run.trained import COUNT, TrainedRun, Wish, bits, moved
from Gpt.seeds import rng
from Gpt.tasks import Task
from rpg.generator import IDENTITY
from rpg.write_adapter import read_tasks, write_adapter

NETWORK = "network-{:03d}.safetensors"
WORDS = ("prompt", "prompts", "mask", "base_name", "out")  # options whose values are taken as they are


@dataclass(frozen=True)
class PlaygroundConfig:
    """Options of this script; all others are those of main.py: they say which run the generator is from, and go on top
    of the settings that it was trained with.

    Attributes:
        count: networks to write, 8 where it is left out.
        wanted: metric to ask for, in the task's plain units; the task's best prompt when None.
        prompt: sentence that says which classes count as positive (tasks with a family of class masks), or what an
            adapter is for.
        prompts: file of prompts that adapters are for.
        mask: the classes in bits, the first class first.
        updates: in a row, each of what the one before wrote.
        base_name: what an adapter's folder says that its base model is called.
        seed: names the starting networks and the noise.
        steps, guidance: of the sampler, see `Generator.sample`.
        recalibrate: re-estimate the batch-norm statistics of what was written on training images.
        keyframes: noises that the walk passes through; 0 for no walk.
        frames: networks from each of those noises to the next.
        out: folder to write to; `playground` in the run folder when None.
    """

    count: PositiveInt | None = None
    wanted: FiniteFloat | None = None
    prompt: str | None = None
    prompts: str | None = None
    mask: str | None = None
    updates: PositiveInt = 1
    base_name: str = ""
    seed: int = 0
    steps: PositiveInt | None = None
    guidance: FiniteFloat = 1.0
    recalibrate: bool = False
    keyframes: NonNegativeInt = 6
    frames: PositiveInt = 20
    out: str | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `Generator.sample`."""
        return {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}


def play(experiment: Experiment, config: PlaygroundConfig) -> Path:
    """Write networks and the walk, or adapters; returns the folder.

    Raises:
        CheckpointError: there is no trained generator; says which command trains it.
        ConfigError: the generator cannot be asked for that.
        DataError: the file of prompts cannot be read.
    """
    run = TrainedRun(experiment)
    generator = run.generator  # before anything else is asked for
    folder = Path(config.out) if config.out else experiment.folder / "playground"
    if isinstance(run.task.family, AdapterFamily):
        write_adapters(generator, run.task, config, folder)
    else:
        write_networks(run, config, folder)
    return folder


def write_adapters(generator: Generator, task: Task, config: PlaygroundConfig, folder: Path) -> None:
    """One adapter for every task that prompts describe.

    Raises:
        ConfigError: it is not said by prompts, and by prompts alone, what the adapters are for.
        DataError: the file of prompts cannot be read.
    """
    if config.wanted is not None or config.mask is not None or config.count not in (None, 1) or config.updates > 1:
        raise ConfigError("wanted, mask, count, updates: adapters are written for prompts alone, one for each task")
    if config.recalibrate:
        raise ConfigError("recalibrate: adapters have no batch-norm statistics")
    if (config.prompt is None) == (config.prompts is None):
        raise ConfigError('say what the adapter is for, by prompt="Give the last word." or by prompts=FILE')
    tasks = {"": [config.prompt]} if config.prompt is not None else read_tasks(Path(config.prompts or ""))
    for name, prompts in tasks.items():
        seconds = write_adapter(generator, task, prompts, folder / name, config.base_name, **config.sampling)
        print(f"{folder / name}: an adapter, {1000 * seconds:.0f} ms from text to weights; prompts: {len(prompts)}")


def write_networks(run: TrainedRun, config: PlaygroundConfig, folder: Path) -> None:
    """Networks, what they measure, and a walk.

    Raises:
        ConfigError: the generator cannot be asked for that, or has to be told more.
    """
    if config.prompts is not None or config.base_name:
        raise ConfigError("prompts, base_name: they are for adapters of a language model; give one sentence, prompt=…")
    task, metric = run.task, f"validation_{run.task.metric}"
    if config.recalibrate:
        check_recalibration(task)
    wish, count = run.wish(wanted=config.wanted, mask=config.mask, prompt=config.prompt), config.count or COUNT
    print("".join(f"{line}\n" for line in wish.understood), end="")
    folder.mkdir(parents=True, exist_ok=True)
    starts = run.fresh_starts(count, config.seed, wish.mask) if run.generator.needs_start else None
    weights = run.grant(wish, count, starts, config.updates, **config.sampling)
    if config.recalibrate:
        weights = run.recalibrated(weights)
        print(f"batch-norm statistics re-estimated on {examples(task):,} training images")
    scores = {f"start_{metric}": starts.metric} if starts else {}
    scores |= run.measure(weights, "validation", wish.mask) | run.measure(weights, "test", wish.mask)
    if wish.wanted is not None:
        print(f"asked for {metric.replace('_', ' ')} {wish.wanted:g}")
    elif wish.mask is None:
        print("unprompted")
    print(networks_table(scores))
    networks = []
    remove_former(folder)
    for i, row in enumerate(weights.cpu()):
        file = NETWORK.format(i)
        save_tensors(task.structure.state_dict(row), folder / file)
        networks.append({"file": file} | {name: _finite(values[i]) for name, values in scores.items()})
    understood = {"wanted": wish.wanted, "mask": None if wish.mask is None else bits(wish.mask), "count": count}
    options = dataclasses.asdict(config) | understood
    facts = {"task": task.name, "run": str(run.experiment.folder), "options": options, "networks": networks}
    if config.keyframes:
        along = walk(run, wish, config, starts, folder / "walk.gif")
        facts["walk"] = {"file": "walk.gif", metric: [_finite(value) for value in along]}
    write_json(folder / "networks.json", facts)
    print(f"{count} networks, networks.json{' and walk.gif' if config.keyframes else ''} are in {folder}")


def remove_former(folder: Path) -> None:
    """The networks that the folder's networks.json tells of, of which there may be more than are written now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is not this script's
        count = len(json.loads((folder / "networks.json").read_text())["networks"])
        for i in range(count):
            (folder / NETWORK.format(i)).unlink(missing_ok=True)


def walk(
    run: TrainedRun, wish: Wish, config: PlaygroundConfig, starts: Starts | None, path: Path
) -> Float[Tensor, " networks"]:
    """Animate the networks along a closed loop of noise, from the first start; returns their validation metrics.

    A generator of several runs' networks keeps to the first run's identity.
    """
    generator, task, device, name = run.generator, run.task, run.device, f"validation_{run.task.metric}"
    shape = config.keyframes, *generator.noise_shape
    keyframes = torch.randn(shape, generator=rng(device, config.seed, "playground", "walk"), device=device)
    if generator.identities is not None:
        wish = replace(wish, told=wish.told | {IDENTITY: torch.tensor(0)})
    first = starts and replace(starts, weights=starts.weights[:1], metric=starts.metric[:1])
    filters, metric = [], []
    at_once = min(config.frames, run.experiment.config.evaluation.max_batch)
    for noise in slerp_loop(keyframes, config.frames).split(at_once):
        request = wish.request(len(noise), first, device)
        weights = generator.sample(request.prompt, request.start, count=len(noise), noise=noise, **config.sampling)
        if config.recalibrate:
            weights = run.recalibrated(weights)
        filters.append(first_layer_filters(task.structure, weights))  # of large networks, all that is kept
        metric.append(run.measure(weights, "validation", wish.mask)[name])
    along = torch.cat(metric)
    walk_gif(np.concatenate(filters), along.tolist(), path, name=name.replace("_", " "))
    return along


def split_arguments(arguments: list[str]) -> tuple[PlaygroundConfig, list[str]]:
    """This script's options, and the arguments that are main.py's.

    Raises:
        ConfigError: a key is misspelt (names the nearest right one) or a value is of the wrong type.
    """
    own = [f.name for f in dataclasses.fields(PlaygroundConfig)]
    known = [*own, *(f.name for f in dataclasses.fields(RunConfig))]
    mine, others, words = [], [], {}
    for argument in arguments:
        key, assigns, text = argument.partition("=")
        if assigns and key in WORDS:  # 0101 is no number, and a sentence may hold anything
            words[key] = text
        elif assigns and key in own:
            mine.append(argument)
        elif assigns and key.isidentifier() and key not in known:
            raise ConfigError(f"configuration: there is no key {key!r}; {nearest(key, known)}")
        else:
            others.append(argument)
    values: Any = {}
    for argument in mine:
        try:
            values |= OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{argument!r} cannot be read; write key=value, and a number as it is") from error
    return checked(PlaygroundConfig, values | words), others


def run_of(config: RunConfig, name: str, settings: list[str]) -> Experiment:
    """The run with the settings that it was trained with, and those of the command line on top.

    Raises:
        ConfigError: one of these is another than what the weights were trained with, or the named configuration is
            about another task; names it.
    """
    given = Experiment(config, name)
    stored = stored_config(given.folder)
    if stored is None:
        return given
    if name != DEFAULT and config.task != stored.task:
        raise ConfigError(
            f"--config-name {name} is about task {config.task!r}, the run in {given.folder} about {stored.task!r}; "
            "leave --config-name out, or name another run: run.name=NAME"
        )
    stored = moved(stored, given.folder, config.device, config.data.root)
    chosen = overlaid(stored, config, settings)
    check_unchanged(stored, chosen, given.folder)
    return Experiment(chosen, name)


def _finite(value: Float[Tensor, ""]) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value.item() if math.isfinite(value) else None


def main() -> None:
    """Command-line entry."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{PlaygroundConfig.__doc__}")
        return
    options, others = guard(lambda: split_arguments(sys.argv[1:]))
    settings = [argument for argument in others if argument.startswith("~") or "=" in argument and argument[0] != "-"]
    launch(
        lambda config, name: play(run_of(config, name, settings), options), others, interrupted=lambda _: "starts over"
    )


if __name__ == "__main__":
    faulthandler.enable()  # compiled kernels can end a process without a word; this says where it was
    main()
