"""Speed and memory of RPG, the published one and ours: training steps, and one whole network from noise.

    python -m benchmarks.rpg_speed --device cuda --output outputs/rpg_speed.jsonl
    python -m benchmarks.rpg_speed --device cuda --only '*resnet18*'
    python -m benchmarks.rpg_speed --small

Floors on one H100 (bfloat16 at 700 TFLOP/s, 3 TB/s). Published, ResNet-18 (1,448 tokens of 8192, 951 M parameters,
batches of 8): the two Mamba-2 layers are 814 M parameters, 57 TFLOP a step if every network of the batch has prototypes
of its own (identities), 7 TFLOP if not; the convolutions of 1,024 tokens 7 TFLOP and some 50 GB; the optimiser 63 GB,
21 ms. One network with DDPM-1000 is 3.8 PFLOP, 5.4 s; with DDIM-60 0.3 s.

Ours, width 1024 and 12 layers (`RPG`): a step for a ResNet-18 is 0.6 TFLOP and 0.4 GB, 1 ms; for ConvNeXt-L's shapes
(12,311 tokens of 16384) 12 TFLOP, two thirds of it attention, 17 ms, and 6 passes over 0.8 GB, 2 ms.

Only shapes matter to the time, so that weights are random; structures are those of torchvision on the meta device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.loop import time_training
from benchmarks.timing import Bench, measure, parser
from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import DDPM, FlowMatching
from Gpt.generator import Batch, Generator
from Gpt.networks import ConvNet
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.training import TrainerConfig
from rpg.generator import IDENTITY, Rpg, RpgConfig
from rpg.paper import BASE_CHANNELS, RpgPaper, RpgPaperConfig, TokenDenoiser

RPG = RpgConfig(policy="within_layer", token_size=8192, width=1024, depth=12, heads=16)
TRAINER = TrainerConfig(batch_size=8, learning_rate=3e-5, precision="bfloat16", max_grad_norm=None, ema_decay=0.999)

TARGETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "convnext_large": torchvision.models.convnext_large,
    "convnet": ConvNet,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A generator of one architecture's weights.

    Attributes:
        stored: how many networks it is trained on.
    """

    target: str
    config: RpgConfig | RpgPaperConfig
    batch_size: int
    stored: int

    @property
    def structure(self) -> Structure:
        """Of the target."""
        with torch.device("meta"):
            return Structure.of(TARGETS[self.target]())

    def build(self, device: torch.device) -> Generator:
        """The untrained generator, initialised on the device."""
        structure = self.structure
        with device, torch.random.fork_rng(devices=[]):
            if isinstance(self.config, RpgPaperConfig):
                generator: Generator = RpgPaper(structure, Conditions({}, 1), DDPM("eps"), self.config)
            else:
                conditions = Conditions({}, self.config.width)
                generator = Rpg(structure, conditions, FlowMatching(times="logit_normal"), self.config)
        return generator.to(device)


MODELS = {
    "resnet18_paper": Model("resnet18", RpgPaperConfig(), 8, 16),
    "resnet18_paper_identities": Model("resnet18", RpgPaperConfig(identities=16), 8, 16),
    "resnet18": Model("resnet18", RPG, 8, 16),
    "convnext_large": Model("convnext_large", dataclasses.replace(RPG, token_size=16384), 1, 2),
}
SMALL_RPG = dataclasses.replace(RPG, token_size=512, width=32, depth=2, heads=2, steps=2)
SMALL_MODELS = {
    "convnet_paper": Model("convnet", RpgPaperConfig(size="tiny", identities=2, token_batch=8, steps=2), 2, 2),
    "convnet": Model("convnet", SMALL_RPG, 2, 2),
}


def stored_networks(model: Model, bench: Bench) -> Callable[[int, torch.Generator], Batch]:
    """Draws batches from a few networks of random weights; positive ones, as running variances are."""
    noise = rng(bench.device, bench.seed, "benchmark networks")
    weights = 0.1 * torch.rand(model.stored, model.structure.size, generator=noise, device=bench.device)

    def draw(count: int, generator: torch.Generator) -> Batch:
        rows = torch.randint(model.stored, (count,), generator=generator, device=bench.device)
        return Batch(weights[rows], prompt={IDENTITY: rows} if model.config.identities else {})

    return draw


def train(model: Model, compile: bool, bench: Bench, warmup: int, repeats: int) -> dict[str, Any]:
    """Steps of the training loop."""
    generator, draw = model.build(bench.device), stored_networks(model, bench)
    generator.fit(draw(model.stored, rng(bench.device, bench.seed, "fit")))
    config = dataclasses.replace(TRAINER, batch_size=model.batch_size, compile=compile)
    timing = time_training(generator, draw, config, bench.device, warmup=warmup, repeats=repeats, seed=bench.seed)
    return timing.facts(networks=model.batch_size) | sizes(generator)


def sample(model: Model, sampler: tuple[str, int] | None, compile: bool, bench: Bench, repeats: int) -> dict[str, Any]:
    """One network from noise; a published sampler is timed over 20 steps, which are all alike."""
    generator, draw = model.build(bench.device), stored_networks(model, bench)
    generator.fit(draw(model.stored, rng(bench.device, bench.seed, "fit")))
    del draw
    generator.mixed_precision = True
    generator.eval()
    if compile:
        generator.compile_networks()
    timed = steps = generator.default_steps
    if sampler is not None:
        generator.sampler, steps = sampler
        timed = min(20, steps)
    timing = measure(
        lambda: generator.sample({}, count=1, steps=timed, seed=bench.seed), bench.device, warmup=1, repeats=repeats
    )
    return (
        timing.facts(networks=1)
        | sizes(generator)
        | {"steps": timed, f"seconds_at_{steps}_steps": timing.median * steps / timed}
    )


def denoise(compiled: bool, bench: Bench, repeats: int) -> dict[str, Any]:
    """Forward and backward pass of the published denoiser alone."""
    size, count = (64, 4) if bench.small else (8192, 1024)
    with bench.device:
        denoiser = TokenDenoiser(size, size, BASE_CHANNELS)
        x, t, prototypes = torch.randn(count, size), torch.full((count,), 7.0), torch.randn(count, size)
    if compiled:
        denoiser.compile()

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = denoiser(x, t, prototypes).float().square().mean()
        loss.backward()
        denoiser.zero_grad()

    return measure(step, bench.device, warmup=3, repeats=repeats).facts(tokens=count)


def sizes(generator: Generator) -> dict[str, int]:
    """How large the generator and its networks are."""
    parameters = sum(p.numel() for p in generator.parameters())
    return {"parameters": parameters, "weights": generator.structure.size}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the cases that are asked for; returns their records."""
    bench = Bench(parser(__doc__).parse_args(arguments))
    warmup, repeats = (1, 1) if bench.small else (4, 10)
    modes = (False,) if bench.small else (False, True)
    for name, model in (SMALL_MODELS if bench.small else MODELS).items():
        published = isinstance(model.config, RpgPaperConfig)
        samplers = [("ddim", 60), ("ddpm", 1000)] if published and not bench.small else [None]
        for compiled in modes:
            suffix = "compiled" if compiled else "eager"
            bench.case(f"train/{name}/{suffix}", partial(train, model, compiled, bench, warmup, repeats))
            for sampler in samplers:
                label = "" if sampler is None else f"/{sampler[0]}"
                work = partial(sample, model, sampler, compiled, bench, 1 if bench.small else 5)
                bench.case(f"sample/{name}{label}/{suffix}", work)
    for compiled in modes:
        label = "compiled" if compiled else "eager"
        bench.case(f"denoiser/{label}", partial(denoise, compiled, bench, 1 if bench.small else 10))
    return bench.finish()


if __name__ == "__main__":
    main()
