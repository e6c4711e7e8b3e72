"""Cost against the size of the network that is written: time and memory, training and sampling, 10 k to 200 M weights.

    python -m benchmarks.growth --device cuda --output outputs/growth.jsonl --figure outputs/growth.png
    python -m benchmarks.growth --small

One design for all sizes, the one of `benchmarks.rpg_speed` with tokens of 16384 weights: D weights are D / 16384
tokens. What a token costs is constant, but for attention, whose share passes one half at 100 M weights; the exponent
printed last is the slope between the two largest sizes on logarithmic axes.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.loop import time_training
from benchmarks.rpg_speed import RPG, SMALL_RPG, TRAINER
from benchmarks.timing import Bench, measure, parser
from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import FlowMatching
from Gpt.generator import Batch
from Gpt.seeds import rng
from Gpt.structure import Structure
from rpg.generator import Rpg, RpgConfig

SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 50_000_000, 200_000_000)
SMALL_SIZES = (10_000, 30_000)
CONFIG = dataclasses.replace(RPG, token_size=16384)


def target(size: int) -> Structure:
    """A network of about `size` weights in four square matrices."""
    side = math.isqrt(size // 4)
    return Structure.of({f"layer{i}.weight": torch.empty(side, side, device="meta") for i in range(4)})


def build(size: int, config: RpgConfig, bench: Bench) -> tuple[Rpg, torch.Tensor]:
    """The untrained generator, and two networks to train it on."""
    structure = target(size)
    with bench.device, torch.random.fork_rng(devices=[]):
        generator = Rpg(structure, Conditions({}, config.width), FlowMatching(times="logit_normal"), config)
    noise = rng(bench.device, bench.seed, "growth", size)
    networks = 0.05 * torch.randn(2, structure.size, generator=noise, device=bench.device)
    generator = generator.to(bench.device)
    generator.fit(Batch(networks))
    return generator, networks


def train(size: int, config: RpgConfig, bench: Bench, repeats: int) -> dict[str, Any]:
    """Steps of the training loop, one network a step."""
    generator, networks = build(size, config, bench)
    loop = dataclasses.replace(TRAINER, batch_size=1)
    timing = time_training(
        generator, lambda count, _: Batch(networks[:count]), loop, bench.device, warmup=2, repeats=repeats
    )
    return timing.facts(networks=1) | {"weights": generator.structure.size, "work": "training step"}


def sample(size: int, config: RpgConfig, bench: Bench, repeats: int) -> dict[str, Any]:
    """One network at the default steps."""
    generator, networks = build(size, config, bench)
    del networks
    generator.mixed_precision = True
    generator.eval()
    timing = measure(lambda: generator.sample({}, count=1), bench.device, warmup=1, repeats=repeats)
    label = f"one network, {generator.default_steps} steps"
    return timing.facts(networks=1) | {"weights": generator.structure.size, "work": label}


def exponents(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slope of log seconds over log weights between the two largest sizes, for each kind of work."""
    slopes = {}
    for work, points in curves(records).items():
        if len(points) > 1:
            (small, before, _), (large, after, _) = points[-2:]
            slopes[work] = math.log(after / before) / math.log(large / small)
    return slopes


def curves(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float, float | None]]]:
    """`{work: (weights, seconds, GiB)}`, by weights; sizes that did not fit are missing."""
    found: dict[str, list[tuple[int, float, float | None]]] = {}
    for record in records:
        if "seconds" in record:
            found.setdefault(record["work"], []).append((record["weights"], record["seconds"], record["peak_gib"]))
    return {work: sorted(points) for work, points in found.items()}


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds on the left and, where it was measured, memory on the right, both against the target's weights."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for work, points in curves(records).items():
        weights, seconds, gib = zip(*points, strict=True)
        (line,) = time.plot(weights, seconds, "o-", label=work)
        if None not in gib:
            memory.plot(weights, gib, "o-", color=line.get_color(), label=work)
    for axes, label in ((time, "seconds"), (memory, "peak memory [GiB]")):
        axes.set(xscale="log", yscale="log", xlabel="weights of the target network", ylabel=label)
        axes.grid(alpha=0.3)
    time.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run all sizes, draw the figure, print the exponents; returns the records."""
    options = parser(__doc__)
    options.add_argument("--figure", type=Path, help="where the plot goes (.png)")
    parsed = options.parse_args(arguments)
    bench = Bench(parsed)
    config = dataclasses.replace(SMALL_RPG, token_size=1024) if bench.small else CONFIG
    repeats = 1 if bench.small else 3
    for size in SMALL_SIZES if bench.small else SIZES:
        bench.case(f"train/{size:,}", partial(train, size, config, bench, repeats))
        bench.case(f"sample/{size:,}", partial(sample, size, config, bench, repeats))
    records = bench.finish()
    if parsed.figure is not None:
        draw(records, parsed.figure)
    for work, slope in exponents(records).items():
        print(f"{work}: seconds grow as weights^{slope:.2f} between the two largest sizes")
    return records


if __name__ == "__main__":
    main()
