"""One training step of a population of CIFAR-10 ConvNets, by every way to batch their convolutions.

    python -m benchmarks.conv_population --device cuda --output outputs/conv_population.jsonl
    python -m benchmarks.conv_population --device cuda --only 'step/*' --networks 256
    python -m benchmarks.conv_population --small --device cpu

A step is the forward pass and the gradient of every network's own cross-entropy, in bfloat16 and compiled (`--small`:
neither), on mini-batches of its own; "metrics" is the forward pass on images that all networks share. Every way is
compared with double precision before it is timed. `snapshots_per_second` counts 50 epochs of 351 steps for 200
snapshots, training alone; a metrics case counts 17,000 images for each. "kernel" is one launch of an operator, with the
bytes of its maps, and "tile" all five of a step at other tile sizes, for the constants of
`Gpt.population.convolution_kernels`.

Floors on one H100 (990 TFLOP/s dense bfloat16, 3 TB/s) for 128 networks and 128 images each. The arithmetic is 2.58
MFLOP forward and 7.5 MFLOP a step for one network and image, 0.12 TFLOP in all: 0.12 ms at peak, 0.5 ms at the quarter
of it that tiles of 16 and 32 columns may reach. Traffic decides. An image has 6 KiB in bfloat16, the first layer's maps
8 KiB, the second's 16 KiB:

    grouped     the maps, their ReLUs and gradients pass memory once each: 188 KiB, 3.2 GB, 1.0 ms (prototype: 5.3 ms)
    unfold      and columns of 13.5 and 72 KiB, written and read in both directions: 590 KiB, 9.9 GB, 3.3 ms (7.4 ms)
    im2col      the same with channels last, which the compiler can fuse with ReLUs and sums
    shifted     nine products per layer that add to maps in memory: 960 KiB, 16 GB, 5.3 ms (6.1 ms)
    operator    columns stay in registers and shared memory, else as grouped: 188 KiB, 1.0 ms

For 400 snapshots a second with metrics, 128 networks may take 3.6 ms a step, metrics included: those are 200 passes
over 17,000 images in 17,550 steps, 25 images a step, at 100 KiB in float32 (no gradients) 0.35 GB, 0.12 ms of them.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from benchmarks.timing import Bench, measure, parser
from Gpt.networks import ConvNet
from Gpt.population import convolution
from Gpt.population.functional import stack_initial
from Gpt.seeds import rng
from Gpt.structure import Structure

STEPS, SNAPSHOTS, METRIC_IMAGES = 50 * 351, 200, 17_000

Convolution = Callable[[Tensor, Tensor, int], Tensor]
"""(images [P, N, C, H, W], kernels [P, O, C, 3, 3], stride) -> [P, N, O, Y, Z], padded by one."""


def grouped(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """What vmap makes of a convolution: all networks are groups of one."""
    side_by_side = images.transpose(0, 1).flatten(1, 2)
    maps = F.conv2d(side_by_side, kernels.flatten(0, 1), None, stride, 1, groups=len(kernels))
    return maps.unflatten(1, kernels.shape[:2]).transpose(0, 1)


def grouped_channels_last(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """The same, channels of all networks last."""
    side_by_side = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    flat = kernels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    maps = F.conv2d(side_by_side, flat, None, stride, 1, groups=len(kernels))
    return maps.unflatten(1, kernels.shape[:2]).transpose(0, 1)


def unfold(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """`F.unfold`, then one product for every network and image."""
    columns = F.unfold(images.flatten(0, 1), 3, padding=1, stride=stride).unflatten(0, images.shape[:2])
    return (kernels.flatten(2)[:, None] @ columns).unflatten(-1, _size(images, stride))


def im2col(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """Nine shifted copies side by side, channels last, then one product for every network."""
    columns = torch.cat(list(_shifts(images, stride)), -1)
    matrix = kernels.permute(0, 3, 4, 2, 1).flatten(1, 3)
    return _maps(torch.bmm(columns.flatten(1, 3), matrix), images, stride)


def shifted(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """The sum of nine products with shifted copies, channels last."""
    taps = kernels.permute(0, 3, 4, 2, 1).flatten(1, 2).unbind(1)
    shifts = [copy.flatten(1, 3) for copy in _shifts(images, stride)]
    total = torch.bmm(shifts[0], taps[0])
    for copy, tap in zip(shifts[1:], taps[1:], strict=True):
        total = torch.baddbmm(total, copy, tap)
    return _maps(total, images, stride)


def operator(images: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """`Gpt.population.convolution`: Triton kernels on a GPU."""
    return convolution.differentiable_conv2d(images, kernels, (stride, stride), (1, 1), True)


WAYS: dict[str, Convolution] = {
    way.__name__: way for way in (operator, grouped, grouped_channels_last, im2col, unfold, shifted)
}


def _size(images: Tensor, stride: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return (height - 1) // stride + 1, (width - 1) // stride + 1


def _shifts(images: Float[Tensor, "P N C H W"], stride: int):
    """The image under each of the nine taps: `[P, N, Y, Z, C]`."""
    height, width = _size(images, stride)
    padded = F.pad(images.permute(0, 1, 3, 4, 2), (0, 0, 1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            yield padded[:, :, i::stride, j::stride][:, :, :height, :width]


def _maps(rows: Float[Tensor, "P pixels O"], images: Tensor, stride: int) -> Tensor:
    return rows.unflatten(1, (images.shape[1], *_size(images, stride))).movedim(-1, 2)


def logits(convolve: Convolution, parameters: dict[str, Tensor], images: Tensor) -> Float[Tensor, "P N classes"]:
    """`Gpt.networks.ConvNet` of every network."""
    maps = F.relu(convolve(images, parameters["conv1.weight"], 2))
    features = F.relu(convolve(maps, parameters["conv2.weight"], 1)).mean((-2, -1))
    return torch.baddbmm(parameters["fc.bias"][:, None], features, parameters["fc.weight"].mT)


def loss(
    convolve: Convolution, dtype: torch.dtype, parameters: dict[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """Sum over networks of their mean cross-entropy, computed in `dtype`."""
    parameters = {name: value.to(dtype) for name, value in parameters.items()}
    scores = logits(convolve, parameters, images.to(dtype)).flatten(0, 1)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    return F.cross_entropy(scores, labels.flatten(), reduction="sum") / labels.shape[1]


def kernels(networks: int, images: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The five launches of the operators in one step."""

    def noise(channels: int, size: int) -> Tensor:
        return torch.randn(networks, images, size, size, channels, dtype=dtype, device=device).movedim(-1, 2)

    def taps(maps: int, channels: int) -> Tensor:
        return torch.randn(networks, maps, channels, 3, 3, dtype=dtype, device=device)

    data, first, second = noise(3, 32), noise(16, 16), noise(32, 16)
    two, one = ([2, 2], [1, 1]), ([1, 1], [1, 1])
    return {
        "first/forward": partial(convolution.population_conv2d, data, taps(16, 3), *two, True),
        "second/forward": partial(convolution.population_conv2d, first, taps(32, 16), *one, True),
        "second/by images": partial(convolution.images_gradient, second, taps(32, 16), [16, 16], *one, True),
        "second/by kernels": partial(convolution.kernels_gradient, first, second, [3, 3], *one),
        "first/by kernels": partial(convolution.kernels_gradient, data, first, [3, 3], *two),
    }


KIBIBYTES = {
    "first/forward": 14,
    "second/forward": 24,
    "second/by images": 24,
    "second/by kernels": 24,
    "first/by kernels": 14,
}
"""That each moves for one network and image, in bfloat16."""


def time_kernel(name: str, networks: int, images: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One launch."""
    timing = measure(kernels(networks, images, device, dtype)[name], device, warmup=3, repeats=20)
    return timing.facts(gigabytes=networks * images * KIBIBYTES[name] * 1024 * dtype.itemsize / 2 / 1e9)


def time_tiles(
    pixels: int, warps: int, splits: int, networks: int, images: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All five launches with these constants."""
    from Gpt.population import convolution_kernels

    calls = kernels(networks, images, device, dtype).values()
    with mock.patch.multiple(convolution_kernels, PIXELS=pixels, WARPS=warps, SPLITS=splits):
        return measure(lambda: [call() for call in calls], device, warmup=3, repeats=20).facts()


class Population:
    """The networks, their mini-batches, and how precisely they are computed."""

    def __init__(self, networks: int, images: int, device: torch.device, seed: int, dtype: torch.dtype, compile: bool):
        self.structure = Structure.of(ConvNet())
        self.weights = stack_initial(ConvNet, self.structure, list(range(networks))).to(device)
        draw = rng("cpu", seed, "images")
        batch = torch.randn(networks, images, 32, 32, 3, generator=draw).to(device)
        self.images = batch.movedim(-1, 2)  # channels last, as augmentation leaves them
        self.labels = torch.randint(10, (networks, images), generator=draw).to(device)
        self.dtype, self.compile = dtype, compile
        if compile:
            convolution.tell_compiler()

    def gradient(self, convolve: Convolution, dtype: torch.dtype, compile: bool) -> Callable[[Tensor], Tensor]:
        """Flat weights `[P, D]` -> gradient `[P, D]`."""
        of = torch.func.grad(partial(loss, convolve, dtype))

        def gradient(weights: Tensor) -> Tensor:
            found = of(self.structure.unflatten(weights), self.images, self.labels)
            return torch.cat([found[t.name].flatten(1) for t in self.structure.tensors], 1)

        return torch.compile(gradient, dynamic=False) if compile else gradient

    def error(self, gradient: Tensor, networks: int = 4) -> float:
        """Relative distance of some networks' gradient from that of ordinary autograd in double precision."""
        reference = []
        for p in range(min(networks, len(self.weights))):
            net = ConvNet().to(self.weights.device).double()
            net.load_state_dict(self.structure.state_dict(self.weights[p]))
            F.cross_entropy(net(self.images[p].double()), self.labels[p]).backward()
            reference.append(torch.cat([value.grad.flatten() for value in net.parameters()]))
        expected = torch.stack(reference)
        return float((gradient[: len(expected)].double() - expected).norm() / expected.norm())

    def time_step(self, convolve: Convolution) -> dict[str, Any]:
        """Forward and backward pass of all networks."""
        gradient = self.gradient(convolve, self.dtype, self.compile)
        exact = self.gradient(convolve, torch.float32, False)
        errors = {"float32_error": self.error(exact(self.weights)), "error": self.error(gradient(self.weights))}
        if errors["float32_error"] > 5e-3 or errors["error"] > 0.1:  # cuDNN and cuBLAS may use TensorFloat-32
            return {"failed": f"wrong: {errors}"}
        timing = measure(lambda: gradient(self.weights), self.weights.device, warmup=3, repeats=20)
        return timing.facts(snapshots=len(self.weights) * SNAPSHOTS / STEPS) | errors

    def time_metrics(self, convolve: Convolution, dtype: torch.dtype) -> dict[str, Any]:
        """Forward pass of all networks on images that they share."""

        @torch.no_grad()
        def forward(weights: Tensor) -> Tensor:
            parameters = {name: value.to(dtype) for name, value in self.structure.unflatten(weights).items()}
            images = self.images[:1].to(dtype)
            if convolve is not operator:  # which reads the shared ones
                images = images.expand(len(weights), *images.shape[1:])
            return logits(convolve, parameters, images)

        run = torch.compile(forward, dynamic=False) if self.compile else forward
        timing = measure(lambda: run(self.weights), self.weights.device, warmup=3, repeats=20)
        return timing.facts(snapshots=len(self.weights) * self.images.shape[1] / METRIC_IMAGES)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the cases that are asked for; returns their records."""
    options = parser(__doc__)
    options.add_argument("--networks", type=int, default=128)
    parsed = options.parse_args(arguments)
    bench = Bench(parsed)
    size = (2, 3) if bench.small else (parsed.networks, 128)
    dtype = torch.float32 if bench.small else torch.bfloat16
    build = partial(Population, *size, bench.device, bench.seed, dtype, not bench.small)
    for name, way in WAYS.items():
        bench.case(f"step/{name}", lambda way=way: build().time_step(way))
    for name in ("operator", "grouped"):
        for precision in (dtype,) if bench.small else (torch.float32, torch.bfloat16):
            kind = str(precision).removeprefix("torch.")
            bench.case(f"metrics/{name}/{kind}", lambda name=name, p=precision: build().time_metrics(WAYS[name], p))
    for name in KIBIBYTES:
        bench.case(f"kernel/{name}", partial(time_kernel, name, *size, bench.device, dtype))
    for tile in itertools.product((64, 128, 256), (2, 4, 8), (4, 8)) if bench.device.type == "cuda" else ():
        bench.case("tile/" + "x".join(map(str, tile)), partial(time_tiles, *tile, *size, bench.device, dtype))
    return bench.finish()


if __name__ == "__main__":
    main()
