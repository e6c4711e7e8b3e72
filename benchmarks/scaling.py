"""How training and sampling of the default G.pt scale over the processes of one host, a GPU each.

    python -m benchmarks.scaling --device cuda --processes 1 2 --output outputs/scaling.jsonl
    python -m benchmarks.scaling --small --device cpu

Weak scaling: every process trains on a batch of its own size and writes as many networks, whatever their number, so
that efficiency is the rate of n processes over n times the rate of one. Training is the loop of `Gpt.training` with
replicated and with sharded weights; sampling is the evaluation's `Writer`, exchange of the networks included. A step of
replicated training sends each process 2 (n - 1) / n times its gradient, 4 bytes a parameter: 233 M parameters over
links of 400 GB/s take 2.3 ms for n = 2.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpt_speed import EAGER, FAST, MODELS, SMALL_MODELS, Model, zoo_of_noise
from benchmarks.loop import time_training
from benchmarks.timing import Bench, measure, parser
from Gpt.data.batches import BatchConfig, BatchSampler
from Gpt.distributed import primary, processes, world
from Gpt.evaluation.prompting import Starts, update_request
from Gpt.evaluation.writing import Writer
from Gpt.seeds import rng

WORK = ("train", "train sharded", "sample")


def train(model: Model, bench: Bench, sharded: bool) -> dict[str, Any]:
    """Steps of the training loop, a slice of the batch for each process."""
    generator, mode = model.build(bench.device), EAGER if bench.small else FAST
    zoo = zoo_of_noise(model.task, 256, bench.device, bench.seed)
    draw = BatchSampler(
        zoo, model.task, "train", ("target_metric",), BatchConfig(), with_start=True, permute=generator.augment
    )
    generator.fit(draw(64, rng(bench.device, bench.seed, "fit")))
    config = dataclasses.replace(
        model.trainer,
        batch_size=model.trainer.batch_size * world(),
        slices=world(),
        precision=mode.precision,
        compile=mode.compile,
        sharded=sharded,
    )
    warmup, repeats = (1, 2) if bench.small else (5, 15)
    timing = time_training(generator, draw, config, bench.device, warmup=warmup, repeats=repeats, seed=bench.seed)
    return timing.facts(samples=config.batch_size)


def sample(model: Model, bench: Bench) -> dict[str, Any]:
    """A batch of networks for each process, which then all have all of them."""
    count, device = model.networks * world(), bench.device
    generator = model.build(device)
    (EAGER if bench.small else FAST).prepare(generator)
    zoo = zoo_of_noise(model.task, count, device, bench.seed)
    rows = torch.arange(count, device=device)
    metric = torch.rand(count, generator=rng("cpu", bench.seed, "metric"))
    starts = Starts("starts", zoo.read(rows, torch.zeros_like(rows)), metric)
    writer, request = Writer(generator, max_batch=model.networks), update_request(starts, metric / 2, True)
    timing = measure(lambda: writer(request, "scaling"), device, warmup=2, repeats=3 if bench.small else 10)
    return timing.facts(networks=count)


def in_processes(arguments: argparse.Namespace, work: str, count: int) -> dict[str, Any]:
    """One kind of work in so many processes; the facts that the first one prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--work", work, "--device", arguments.device, "--seed", str(arguments.seed)]
    command = [*launcher, "-m", "benchmarks.scaling", *options, *(["--small"] if arguments.small else [])]
    threads = {"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {}
    ended = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{work} in {count} processes:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1]) | {"processes": count}


def one_of_several(arguments: argparse.Namespace) -> None:
    """What each process does that torchrun starts."""
    bench = Bench(arguments)
    model = SMALL_MODELS["digits"] if bench.small else MODELS["mnist"]
    with processes():
        if bench.device.type == "cuda":
            bench.device = torch.device("cuda", torch.cuda.current_device())
        job = partial(sample, model, bench)
        if arguments.work != "sample":
            job = partial(train, model, bench, arguments.work == "train sharded")
        facts = job()
        if primary():
            print(json.dumps(facts))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Every kind of work in every number of processes; returns the records, with the efficiency in each."""
    options = parser(__doc__)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, 1 first")
    options.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parsed = options.parse_args(arguments)
    if parsed.work:
        one_of_several(parsed)
        return []
    bench = Bench(parsed)
    alone: dict[str, float] = {}  # rates of one process

    def measured(work: str, count: int) -> dict[str, Any]:
        facts = in_processes(parsed, work, count)
        rate, kind = facts["networks_per_second" if work == "sample" else "samples_per_second"], work.split()[0]
        if count == 1:
            alone[kind] = rate
        return facts | ({"efficiency_per_process": rate / count / alone[kind]} if kind in alone else {})

    for work in WORK:
        for count in parsed.processes:
            if work != "train sharded" or count > 1:  # one process has nothing to share out
                bench.case(f"{work}/{count} processes", partial(measured, work, count))
    return bench.finish()


if __name__ == "__main__":
    main()
