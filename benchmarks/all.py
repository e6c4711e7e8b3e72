"""All speed benchmarks, the most important first, each in a process of its own, until the budget is spent.

    python -m benchmarks.all --device cuda --output outputs/benchmarks --budget 480 --data DATA
    python -m benchmarks.all --small --device cpu --output outputs/benchmarks

A part is begun only if its expected duration still fits, and ended where it takes more than is left. Records are
appended to `records.jsonl`, logs are kept beside it, and one table of everything measured is printed last.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.timing import table


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        seconds: expected on one H100, compilation included.
        data: takes `--data`.
    """

    name: str
    module: str
    only: tuple[str, ...] = ()
    seconds: float = 60
    data: bool = False

    def command(self, options: argparse.Namespace) -> list[str]:
        """What to run."""
        command = [sys.executable, "-m", f"benchmarks.{self.module}", "--device", options.device]
        command += ["--seed", str(options.seed), "--output", str(options.output / "records.jsonl")]
        if options.small:
            command.append("--small")
        elif self.only:
            command += ["--only", *self.only]
        if self.data and options.data:
            command += ["--data", options.data]
        if self.module == "growth":
            command += ["--figure", str(options.output / "growth.png")]
        return command


PARTS = (
    Part("mnist zoo", "zoo_speed", ("mnist",), 60, data=True),
    Part("cart-pole zoo", "zoo_speed", ("cartpole",), 60),
    Part("published G.pt", "gpt_speed", ("*/mnist_paper/bfloat16 compiled",), 80),
    Part("default G.pt", "gpt_speed", ("*/mnist/bfloat16 compiled",), 40),
    Part("default RPG", "rpg_speed", ("*/resnet18/eager", "*/convnext_large/eager"), 50),
    Part("published RPG", "rpg_speed", ("*/resnet18_paper/*compiled",), 70),
    Part("published RPG, convolutions", "rpg_speed", ("denoiser/*",), 40),
    Part("growth", "growth", (), 60),
    Part("cifar10 zoo", "zoo_speed", ("cifar10",), 60, data=True),
    Part("published RPG, identities", "rpg_speed", ("train/resnet18_paper_identities/compiled",), 40),
    Part("default RPG, compiled", "rpg_speed", ("*/resnet18/compiled", "*/convnext_large/compiled"), 60),
    Part("published G.pt, without graphs", "gpt_speed", ("sample/mnist_paper/* graphs",), 40),
    Part("published G.pt, eager", "gpt_speed", ("*/mnist_paper/bfloat16", "*/mnist_paper/tf32"), 60),
    Part("published G.pt, CIFAR-10", "gpt_speed", ("*/cifar10_paper/*",), 90),
    Part("published G.pt, tf32", "gpt_speed", ("train/mnist_paper/tf32 compiled", "train/mnist_paper/float32"), 70),
    Part("default G.pt, others", "gpt_speed", ("sample/mnist/*",), 40),
)
SMALL_PARTS = tuple(Part(name, name) for name in ("zoo_speed", "gpt_speed", "rpg_speed", "growth"))


def run(part: Part, options: argparse.Namespace, seconds_left: float) -> str:
    """Run one part and say how it ended."""
    begun = perf_counter()
    log = options.output / f"{part.name.replace(' ', '_')}.log"
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                part.command(options), stdout=stream, stderr=subprocess.STDOUT, timeout=seconds_left
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{part.name}: ended by the budget after {perf_counter() - begun:.0f} s, see {log}"
    outcome = "done" if code == 0 else f"failed (exit status {code}), see {log}"
    return f"{part.name}: {outcome} after {perf_counter() - begun:.0f} s"


def read_records(path: Path, skip: int) -> list[dict[str, Any]]:
    """The records behind the first `skip`, which are of earlier runs."""
    return [json.loads(line) for line in path.read_text().splitlines()[skip:]] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what fits the budget; returns the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes: seconds on a CPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--budget", type=float, default=3600, help="seconds in all")
    parser.add_argument("--data", help="folder with MNIST and CIFAR-10; noise of the same shape by default")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file, begun = options.output / "records.jsonl", perf_counter()
    earlier = len(read_records(file, 0))
    for part in SMALL_PARTS if options.small else PARTS:
        if options.only and part.name not in options.only:
            continue
        left = options.budget - (perf_counter() - begun)
        expected = 0 if options.small else part.seconds
        told = f"{part.name}: skipped, {left:.0f} s are left of the budget" if left <= expected else ""
        print(told or run(part, options, left), flush=True)
    records = read_records(file, earlier)
    print("\n" + table(records))
    return records


if __name__ == "__main__":
    main()
