"""Speed and memory of G.pt, the published transformer and ours: training steps, and networks written in one batch.

    python -m benchmarks.gpt_speed --device cuda --output outputs/gpt_speed.jsonl
    python -m benchmarks.gpt_speed --device cuda --only 'train/mnist_paper/*' 'sample/mnist_paper/bfloat16 compiled'
    python -m benchmarks.gpt_speed --small

Floors on one H100 (bfloat16 at 700 TFLOP/s, 3 TB/s). A training example of the published MNIST model takes 3 x 17.2
GFLOP, so 13,600 samples/s; AdamW, clipping, averaging and casts move 66 bytes per parameter, 8 ms a step of 1,024. One
denoising step of 160 networks is 2.74 TFLOP, 3.9 ms, so 25 ms per network with 1,000 steps. Our default model at width
1024 takes 3.3 GFLOP per network and step.

Training is the loop of `Gpt.training`, batches drawn and permuted, with clipping, fused AdamW and averaged weights.
Sampling is `Generator.sample`. Compiled, both replay CUDA graphs. The weights of the model are random: they do not
matter to the time.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.loop import dataless_task, time_training
from benchmarks.timing import Bench, measure, parser
from Gpt.conditions import Conditions, prompt_features
from Gpt.data.batches import BatchConfig, BatchSampler
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.generator import Generator
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.models.paper_generator import PaperConfig, PaperGpt
from Gpt.seeds import rng
from Gpt.tasks import Task
from Gpt.training import TrainerConfig

PAPER_TRAINER = TrainerConfig(
    batch_size=1024, learning_rate=4e-4, betas=(0.9, 0.999), weight_decay=0.1, max_grad_norm=0.75, ema_decay=0.9999
)
TRAINER = TrainerConfig(batch_size=2048, learning_rate=4e-4, ema_decay=0.999)


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator, the loop that trains it, and how many networks it is asked for at once."""

    task_name: str
    config: PaperConfig | GptConfig
    trainer: TrainerConfig
    networks: int

    @property
    def task(self) -> Task:
        return dataless_task(self.task_name)

    def build(self, device: torch.device) -> Generator:
        """A fresh copy of the untrained generator."""
        return copy.deepcopy(_generator(self.task_name, self.config)).to(device)


@functools.cache
def _generator(task_name: str, config: PaperConfig | GptConfig) -> Generator:
    """Initialised once, on the CPU: several seconds for the large ones."""
    structure, features = dataless_task(task_name).structure, prompt_features(("target_metric",))
    if isinstance(config, PaperConfig):
        return PaperGpt(structure, Conditions(features, 1, 0.0), DDPM(), config)
    return Gpt(structure, Conditions(features, config.width), FlowMatching(times="logit_normal"), config)


MODELS = {
    "mnist_paper": Model("mnist_loss", PaperConfig(weight_scale=4.185), PAPER_TRAINER, 160),
    "cifar10_paper": Model(
        "cifar10_loss",
        PaperConfig(width=2048, chunk=576, weight_scale=1.646),
        dataclasses.replace(PAPER_TRAINER, batch_size=550, max_grad_norm=0.1),
        160,
    ),
    "mnist": Model("mnist_loss", GptConfig(width=1024, depth=12, heads=16, steps=10), TRAINER, 256),
}
SMALL_MODELS = {
    "digits_paper": Model(
        "digits_loss",
        PaperConfig(width=32, layers=2, heads=2, chunk=64, weight_scale=4.0, steps=20),
        dataclasses.replace(PAPER_TRAINER, batch_size=8),
        4,
    ),
    "digits": Model(
        "digits_loss", GptConfig(width=32, depth=2, heads=2), dataclasses.replace(TRAINER, batch_size=8), 4
    ),
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the arithmetic is done."""

    precision: str = "bfloat16"
    compile: bool = True
    graphs: bool = True

    @property
    def name(self) -> str:
        return self.precision + (" compiled" if self.compile else "") + ("" if self.graphs else " without graphs")

    def prepare(self, generator: Generator) -> None:
        """Set a generator up for sampling."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        generator.mixed_precision = self.precision == "bfloat16"
        if self.compile:
            generator.compile_networks()
            generator.graphs = self.graphs
        generator.eval()


FAST, EAGER = Mode(), Mode(compile=False)
# By importance: what the published figures are compared with comes first.
TRAINING = (FAST, Mode("tf32"), EAGER, Mode("tf32", compile=False), Mode("float32", compile=False))
SAMPLING = (FAST, EAGER, Mode("tf32", compile=False))
UNGRAPHED = Mode(graphs=False)


def zoo_of_noise(task: Task, runs: int, device: torch.device, seed: int) -> Zoo:
    """A zoo of random weights: batches of it cost what those of a real one do."""
    noise = rng(device, seed, "benchmark zoo")
    weights = 0.1 * torch.randn(runs, 8, task.structure.size, generator=noise, device=device)
    losses = torch.rand(runs, 8, generator=noise, device=device)
    metrics = {f"{split}_{task.metric}": losses for split in ("validation", "test")}
    return Zoo.from_tensors(weights, metrics, list(range(runs)), list(range(8)), task.structure)


def train(model: Model, mode: Mode, bench: Bench, warmup: int, repeats: int) -> dict[str, Any]:
    """Steps of the training loop."""
    task, generator = model.task, model.build(bench.device)
    torch.set_float32_matmul_precision("high" if mode.precision == "tf32" else "highest")
    zoo = zoo_of_noise(task, 256, bench.device, bench.seed)
    draw = BatchSampler(
        zoo, task, "train", ("target_metric",), BatchConfig(), with_start=True, permute=generator.augment
    )
    generator.fit(draw(64, rng(bench.device, bench.seed, "fit")))
    config = dataclasses.replace(model.trainer, precision=mode.precision, compile=mode.compile)
    timing = time_training(generator, draw, config, bench.device, warmup=warmup, repeats=repeats, seed=bench.seed)
    return timing.facts(samples=config.batch_size) | {"parameters": sum(p.numel() for p in generator.parameters())}


def sample(model: Model, mode: Mode, bench: Bench, repeats: int, steps: int | None) -> dict[str, Any]:
    """Networks written at once; `steps` None takes the default number, which is the one to report."""
    generator = model.build(bench.device)
    zoo = zoo_of_noise(model.task, model.networks, bench.device, bench.seed)
    rows = torch.arange(model.networks, device=bench.device)
    start = zoo.read(rows, torch.zeros_like(rows))
    prompt = {"target_metric": torch.rand(model.networks, 2, device=bench.device)}
    mode.prepare(generator)
    generator.sample(prompt, start, steps=min(5, generator.default_steps))
    syncs = {}
    if bench.device.type == "cuda":
        two, four = (host_syncs(partial(generator.sample, prompt, start, steps=n)) for n in (2, 4))
        syncs = {"host_syncs_per_step": (four - two) / 2}
    timing = measure(lambda: generator.sample(prompt, start, steps=steps), bench.device, warmup=0, repeats=repeats)
    steps = steps or generator.default_steps
    per_step = timing.median / steps
    return (
        timing.facts(networks=model.networks)
        | syncs
        | {
            "steps": steps,
            "ms_per_network": 1000 * timing.median / model.networks,
            "ms_per_network_at_default_steps": 1000 * per_step * generator.default_steps / model.networks,
            "ms_per_step": 1000 * per_step,
        }
    )


def host_syncs(work: Callable[[], Any]) -> int:
    """How often the host waits for the device during some work."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the cases that are asked for; returns their records."""
    bench = Bench(parser(__doc__).parse_args(arguments))
    models = SMALL_MODELS if bench.small else MODELS
    warmup, repeats = (1, 2) if bench.small else (5, 15)
    modes = (EAGER,) if bench.small else TRAINING
    for name, model in models.items():
        published = isinstance(model.config, PaperConfig)
        for mode in modes if name in ("mnist_paper", *SMALL_MODELS) else modes[:1]:
            bench.case(f"train/{name}/{mode.name}", partial(train, model, mode, bench, warmup, repeats))
        sampling = {"mnist_paper": (*SAMPLING, UNGRAPHED), "cifar10_paper": (FAST,), "mnist": (*SAMPLING, UNGRAPHED)}
        for mode in sampling.get(name, (EAGER,)):
            # 1,000 steps take seconds and are all alike: only the fastest mode is shown in full, the others by 100.
            steps = None if bench.small or not published or mode == FAST else 100
            bench.case(f"sample/{name}/{mode.name}", partial(sample, model, mode, bench, 2 if published else 5, steps))
    return bench.finish()


if __name__ == "__main__":
    main()
