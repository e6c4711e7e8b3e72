"""Speed of making zoos: MNIST classifiers, CIFAR-10 ConvNets and cart-pole agents, through `data_gen.collect`.

    python -m benchmarks.zoo_speed --device cuda --data DATA --output outputs/zoo_speed.jsonl
    python -m benchmarks.zoo_speed --device cuda --only 'mnist*'
    python -m benchmarks.zoo_speed --small

Snapshots stay on the device and every one of them is measured on 2,000 training, 5,000 validation and 10,000 test
examples; a warm-up of the same population compiles the step and is reported apart. Without `--data` the images are
noise of the same shape.

Floors on one H100 (float32 at 45 TFLOP/s, 3 TB/s), populations of 2,048 MNIST MLPs: a step gathers 128 images for each,
0.8 GB, and reads them twice again, 1.1 ms; with 10,725 steps 12 s. The metrics of one snapshot are 0.55 TFLOP in one
product, 12 ms, and some 10 GB, 4 ms; with 200 snapshots 3 s. Together 27,000 snapshots a second. A complete cart-pole
run is 0.5 TFLOP and, with activations of 1 MB a tensor and agent, some 50 GB: 256 of them take 5 s, and 500 iterations
of some 600 launches as much.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.loop import dataless_task
from benchmarks.timing import Bench, measure, parser, synchronize
from data_gen.collect import snapshot_schedule, total_iterations, train_population
from Gpt.data import sources
from Gpt.recipes import PpoRecipe, SupervisedRecipe
from Gpt.seeds import rng
from Gpt.tasks import Task


@dataclasses.dataclass(frozen=True)
class Zoo:
    """A population and what part of its run is timed.

    Attributes:
        runs: trained at once.
        snapshots: of a complete run.
        examples: of the training, validation and test split, where they are noise.
        share: of a complete run, at its snapshots per iteration.
        recipe: changes to the task's.
    """

    task: str
    runs: int
    snapshots: int = 200
    examples: tuple[int, int, int] = (0, 0, 0)
    shape: tuple[int, ...] = ()
    share: float = 1.0
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


ZOOS = {
    "mnist": Zoo("mnist_loss", 2048, examples=(55_000, 5_000, 10_000), shape=(1, 28, 28)),
    "cartpole": Zoo("cartpole", 256),
    "cifar10": Zoo("cifar10_loss", 256, examples=(45_000, 5_000, 10_000), shape=(3, 32, 32), share=0.02),
}
SMALL_PPO = {"iterations": 2, "environments": 8, "horizon": 4, "epochs": 1}
SMALL_ZOOS = {
    "digits": Zoo("digits_loss", 4, 3, (96, 32, 32), (1, 8, 8), recipe={"epochs": 1, "batch_size": 32}),
    "cartpole": Zoo("cartpole", 2, 2, recipe=SMALL_PPO),
}


def task_of(zoo: Zoo, data: str | None, seed: int) -> Task:
    """The task, with its recipe changed and its images replaced by noise where none are given."""
    task = dataless_task(zoo.task)
    assert isinstance(task.recipe, SupervisedRecipe | PpoRecipe)
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, **zoo.recipe))
    if data is not None:
        sources.configure(data, download=False)
    elif zoo.shape:
        train, validation, test = (partial(noise_images, zoo.shape, n, seed) for n in zoo.examples)
        task = dataclasses.replace(task, train_data_fn=train, validation_data_fn=validation, data_fn=test)
    return task


def noise_images(shape: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images without content, and labels without reason."""
    generator = rng("cpu", seed, "benchmark images", count)
    labels = torch.randint(10, (count,), generator=generator)
    return torch.randn(count, *shape, generator=generator), labels


def collect(zoo: Zoo, bench: Bench, data: str | None) -> dict[str, Any]:
    """Train the population once, after a warm-up that compiles."""
    task = task_of(zoo, data, bench.seed)
    complete = total_iterations(task)
    iterations = round(zoo.share * complete)
    schedule = snapshot_schedule(iterations, max(2, round(zoo.share * zoo.snapshots)), "uniform", bench.seed)
    train = partial(train_population, task, list(range(zoo.runs)), bench.seed)
    begun = perf_counter()
    train([0, min(4, iterations)], bench.device)
    synchronize(bench.device)
    warmup = perf_counter() - begun
    metrics: dict[str, Tensor] = {}

    def work() -> None:
        metrics.update(train(schedule, bench.device)[1])

    timing = measure(work, bench.device, warmup=0, repeats=1)
    final = {f"final_{name}": values[:, -1].mean().item() for name, values in metrics.items()} if zoo.share == 1 else {}
    return (
        timing.facts(snapshots=zoo.runs * len(schedule))
        | final
        | {
            "runs_per_minute": 60 * zoo.runs * zoo.share / timing.median,
            "warmup_seconds": warmup,
            "runs": zoo.runs,
            "iterations": iterations,
            "of_iterations": complete,
            "snapshots": len(schedule),
        }
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the cases that are asked for; returns their records."""
    options = parser(__doc__)
    options.add_argument("--data", help="folder with the images; noise of the same shape by default")
    parsed = options.parse_args(arguments)
    bench = Bench(parsed)
    for name, zoo in (SMALL_ZOOS if bench.small else ZOOS).items():
        bench.case(name, partial(collect, zoo, bench, parsed.data))
    return bench.finish()


if __name__ == "__main__":
    main()
