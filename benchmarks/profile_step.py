"""Where the time of a step goes: G.pt's training and sampling, and the training of a zoo.

    python -m benchmarks.profile_step --device cuda --output outputs/profile.jsonl
    python -m benchmarks.profile_step --small --device cpu

Every part of a step is measured with the device idle before and after it: `_ms` until the device is done, `_host_ms`
until the host has issued the work. A part whose two figures agree is bound by launches. Parts of the complete loop
overlap, so that it takes less than their sum. Then come the kernels and operators that take most of a step; kernels
of replayed graphs are among them. `attention` compares ways to attend over a dozen tokens, forward and backward.
"""

import contextlib
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpt_speed import MODELS, SMALL_MODELS, Mode, Model, zoo_of_noise
from benchmarks.loop import time_training
from benchmarks.timing import Bench, measure, parser, synchronize
from benchmarks.zoo_speed import SMALL_ZOOS, ZOOS, Zoo, task_of
from data_gen import vision
from Gpt.cuda_graphs import GraphedGradient
from Gpt.data.batches import BatchConfig, BatchSampler
from Gpt.generator import Batch
from Gpt.models.attention import attend
from Gpt.models.gpt import GptConfig
from Gpt.recipes import SupervisedRecipe
from Gpt.seeds import rng
from Gpt.training import _average, _optimizer

WIDTHS = (1024, 512, 256)
TOP = 12  # kernels and operators that are listed


class Phases:
    """Milliseconds of named parts of a step, see the head of this file."""

    def __init__(self, device: torch.device):
        self._device = device
        self._host: dict[str, list[float]] = defaultdict(list)
        self._total: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        begun = perf_counter()
        yield
        issued = perf_counter()
        synchronize(self._device)
        self._host[name].append(1000 * (issued - begun))
        self._total[name].append(1000 * (perf_counter() - begun))

    def facts(self) -> dict[str, float]:
        """Medians."""
        total = {f"{name}_ms": statistics.median(values) for name, values in self._total.items()}
        return total | {f"{name}_host_ms": statistics.median(values) for name, values in self._host.items()}


def top(work: Callable[[], Any], device: torch.device, calls: int) -> dict[str, Any]:
    """Kernels and operators of `calls` calls by their time, in milliseconds and number per call; prints them."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(calls):
            work()
        synchronize(device)
    events = profiler.key_averages()
    kernels = [(e.self_device_time_total, e.count, e.key) for e in events if e.device_type != DeviceType.CPU]
    operators = [(e.self_cpu_time_total, e.count, e.key) for e in events if e.device_type == DeviceType.CPU]
    facts: dict[str, Any] = {}
    for name, found in (("kernels", kernels), ("operators", operators)):
        found.sort(reverse=True)
        listed = [(time / 1000 / calls, count / calls, key[:90]) for time, count, key in found]
        facts |= {f"{name}_ms": sum(ms for ms, *_ in listed), f"{name}_per_call": sum(n for _, n, _ in listed)}
        facts[f"top_{name}"] = listed[:TOP]
        print(f"  {name}, ms and number per call:")
        print("\n".join(f"    {ms:9.3f} {count:8.1f}  {key}" for ms, count, key in listed[:TOP]))
    return facts


def train(model: Model, bench: Bench, repeats: int) -> dict[str, Any]:
    """One training step: the loop as it is, its parts, and its kernels without the graph."""
    task, generator, device = model.task, model.build(bench.device), bench.device
    compiled = device.type == "cuda"
    config = dataclasses.replace(model.trainer, precision="bfloat16", compile=compiled, muon_learning_rate=0.02)
    zoo = zoo_of_noise(task, 16 if bench.small else 2048, device, bench.seed)
    draw = BatchSampler(zoo, task, "train", ("target_metric",), BatchConfig(), with_start=True, permute=False)
    generator.fit(draw(64, rng(device, bench.seed, "fit")))
    loop = time_training(generator, draw, config, device, warmup=3, repeats=repeats, seed=bench.seed)

    averaged, optimizer = deepcopy(generator), _optimizer(generator, config, device)

    def loss_of(batch: Batch, noise: torch.Generator) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return generator.loss(batch, noise)

    graphed = GraphedGradient(loss_of, list(generator.parameters())) if device.type == "cuda" else None

    def step(phases: Callable[[str], contextlib.AbstractContextManager]) -> None:
        noise = rng(device, bench.seed, "profile")
        with phases("draw"):
            batch = draw(config.batch_size, noise)
        if graphed is not None:
            with phases("graph_of_both"):
                graphed(batch, noise)
            optimizer.zero_grad(set_to_none=True)
        with phases("forward"):
            loss = loss_of(batch, noise)
        with phases("backward"):
            loss.backward()
        with phases("clip"):
            torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        with phases("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with phases("averaging"):
            _average(averaged, generator, 0.01)

    for _ in range(2):
        step(lambda name: contextlib.nullcontext())
    phases = Phases(device)
    for _ in range(repeats):
        step(phases)
    graphed = None
    return {"loop_ms": 1000 * loop.median, **phases.facts()} | top(
        lambda: step(lambda name: contextlib.nullcontext()), device, 2
    )


def sample(model: Model, mode: Mode, bench: Bench, steps: int) -> dict[str, Any]:
    """One step of sampling, in a call of several."""
    generator, device = model.build(bench.device), bench.device
    zoo = zoo_of_noise(model.task, model.networks, device, bench.seed)
    rows = torch.arange(model.networks, device=device)
    start, prompt = zoo.read(rows, 0 * rows), {"target_metric": torch.rand(len(rows), 2, device=device)}
    mode.prepare(generator)
    few, many = (partial(generator.sample, prompt, start, steps=n) for n in (steps, 2 * steps))
    few()
    phases = Phases(device)
    for _ in range(3):
        with phases("few"):
            few()
        with phases("many"):
            many()
    found = phases.facts()
    per_step = {f"step_{kind}": (found[f"many_{kind}"] - found[f"few_{kind}"]) / steps for kind in ("ms", "host_ms")}
    return per_step | {"call_ms": found["few_ms"], "steps": steps} | top(few, device, 1)


def zoo_step(zoo: Zoo, precision: torch.dtype | None, bench: Bench, repeats: int) -> dict[str, Any]:
    """One iteration of a population, and the metrics of one snapshot; `precision` None is the default."""
    task, device = task_of(zoo, None, bench.seed), bench.device
    assert isinstance(task.recipe, SupervisedRecipe)
    chosen = contextlib.nullcontext() if precision is None else _training_in(precision)
    with chosen:
        step = vision.TrainingStep(task, task.recipe, device, compile=device.type == "cuda")
    state = step.initial_state(list(range(zoo.runs)), bench.seed)
    for _ in range(2):
        step(state)
        vision.measure(task, state["weights"])
    phases = Phases(device)
    for _ in range(repeats):
        with phases("iteration"):
            step(state)
        with phases("metrics"):
            vision.measure(task, state["weights"])
    iterations = measure(lambda: [step(state) for _ in range(10)], device, warmup=0, repeats=3).median / 10
    print("  an iteration:")
    facts = phases.facts() | {"iteration_of_ten_ms": 1000 * iterations} | top(lambda: step(state), device, 5)
    print("  the metrics of a snapshot:")
    metrics = top(lambda: vision.measure(task, state["weights"]), device, 1)
    return facts | {f"metrics_{name}": value for name, value in metrics.items()}


def _training_in(precision: torch.dtype) -> Any:
    return patch.object(vision, "training_precision", lambda template, device: precision)


def attention(bench: Bench, shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """Milliseconds of attention, and of attention with its gradient, by `Gpt.models.attention` and torch's backends."""
    q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)

    def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    ways: dict[str, Callable[..., Tensor]] = {"ours": attend, "default": F.scaled_dot_product_attention}
    if bench.device.type == "cuda":
        names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
        ways |= {name.lower(): partial(by_backend, getattr(SDPBackend, name)) for name in names}
    facts: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            forward = measure(partial(way, q, k, v), bench.device, repeats=repeats)
            both = measure(lambda way=way: way(q, k, v).backward(gradient), bench.device, repeats=repeats)
        except RuntimeError as error:
            facts[name] = str(error).splitlines()[0]
        else:
            facts |= {f"{name}_forward_ms": 1000 * forward.median, f"{name}_ms": 1000 * both.median}
    return facts


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Profile what is asked for; returns the records."""
    bench = Bench(parser(__doc__).parse_args(arguments))
    eager = bench.device.type != "cuda"
    graphed, ungraphed = Mode(compile=not eager), Mode(compile=not eager, graphs=False)
    repeats = 2 if bench.small else 8
    if bench.small:
        bench.case("train/digits", partial(train, SMALL_MODELS["digits"], bench, repeats))
        bench.case("zoo/digits", partial(zoo_step, SMALL_ZOOS["digits"], None, bench, repeats))
        bench.case("sample/digits_paper", partial(sample, SMALL_MODELS["digits_paper"], graphed, bench, 2))
        bench.case("attention", partial(attention, bench, (2, 2, 11, 8), repeats))
        return bench.finish()
    published, ours = MODELS["mnist_paper"], MODELS["mnist"]
    widths = {n: dataclasses.replace(ours, config=GptConfig(width=n, depth=12, heads=16, steps=10)) for n in WIDTHS}
    for tokens, width in ((11, 64), (11, 32), (26, 96), (64, 64)):
        bench.case(f"attention/{tokens}x{width}", partial(attention, bench, (2048, 16, tokens, width), repeats))
    bench.case("zoo/mnist", partial(zoo_step, ZOOS["mnist"], None, bench, repeats))
    bench.case("zoo/cifar10", partial(zoo_step, ZOOS["cifar10"], None, bench, repeats))
    bench.case("train/512", partial(train, widths[512], bench, repeats))
    bench.case("sample/mnist_paper", partial(sample, published, graphed, bench, 20))
    bench.case("sample/mnist", partial(sample, widths[1024], graphed, bench, 10))
    bench.case("train/1024", partial(train, widths[1024], bench, repeats))
    bench.case("train/256", partial(train, widths[256], bench, repeats))
    bench.case("sample/mnist_paper without graphs", partial(sample, published, ungraphed, bench, 20))
    bench.case("zoo/mnist float32", partial(zoo_step, ZOOS["mnist"], torch.float32, bench, repeats))
    return bench.finish()


if __name__ == "__main__":
    main()
