"""Many networks of one architecture as one callable, and their gradients.

How many networks meet how many examples in one pass is decided here, by the size of their activations: on a CPU a pass
fits the caches, which makes populations of convolutional networks four to ten times as fast; on a GPU it fits memory.
"""

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from Gpt.population.convolution import accelerated
from Gpt.population.layers import PopulationConv2d, for_populations
from Gpt.seeds import own_random_state
from Gpt.structure import Structure

CPU_NUMBERS = 2**22  # that one pass may hold: a cache, 16 MiB in float32
CUDA_GRADIENT_NUMBERS = 2**31


class Population:
    """P networks that share an architecture, applied together (`torch.func.vmap` over their weights) and in eval mode.

    Examples are treated one by one by networks in eval mode, so they are passed in pieces of bounded memory.

    Args:
        template: a module of the architecture; its own values are ignored.
        structure: its structure.
        weights: `[P, D]`, one flat row per network; the attribute may be set to others on the same device.
    """

    def __init__(self, template: nn.Module, structure: Structure, weights: Float[Tensor, "P D"]):
        self.structure = structure
        self.weights = weights
        self._template = template
        self._prepared: dict[tuple[int, ...], tuple[nn.Module, int]] = {}  # by the shape of one example

    def __len__(self) -> int:
        return self.weights.shape[0]

    def __call__(self, inputs: Tensor) -> Tensor:
        """All networks on the same inputs `[N, ...]` -> `[P, N, ...]`."""
        net, (networks, examples) = self._prepare(inputs)[0], self.piece(inputs)
        rows = []
        for weights in self.weights.split(networks):
            parts = inputs.split(examples)
            rows.append(_joined([self._apply(net, weights, part, None) for part in parts], 1))
        return _joined(rows, 0)

    def each(self, inputs: Float[Tensor, "P ..."]) -> Tensor:
        """Network p on its own inputs: `[P, N, ...]` -> `[P, N, ...]`."""
        net, (networks, examples) = self._prepare(inputs[0])[0], self.piece(inputs[0])
        rows = []
        for weights, own in zip(self.weights.split(networks), inputs.split(networks), strict=True):
            parts = own.split(examples, 1)
            rows.append(_joined([self._apply(net, weights, part, 0) for part in parts], 1))
        return _joined(rows, 0)

    def _apply(self, net: nn.Module, weights: Float[Tensor, "p D"], inputs: Tensor, axis: int | None) -> Tensor:
        def one(weights: Tensor, x: Tensor) -> Tensor:
            return functional_call(net, self.structure.unflatten(weights), (x,), tie_weights=True)

        if len(weights) == 1:  # vmap would only cost
            return one(weights[0], inputs if axis is None else inputs[0])[None]
        return vmap(one, in_dims=(0, axis), randomness="error")(weights, inputs)

    def piece(self, inputs: Float[Tensor, "N ..."]) -> tuple[int, int]:
        """How many networks, and how many of these examples, one pass takes."""
        return piece(self._prepare(inputs)[1], len(inputs), self.weights.device, len(self))

    def _prepare(self, inputs: Tensor) -> tuple[nn.Module, int]:
        shape = tuple(inputs.shape[1:])
        if shape not in self._prepared:
            self._prepared[shape] = prepared(self._template, inputs[:1])
        return self._prepared[shape]


def prepared(template: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """A copy in eval mode on the example's device, as fast as can be there for populations, and its `activations`.

    Args:
        example: `[1, ...]`.
    """
    net = copy.deepcopy(template).to(example.device).eval()
    if example.device.type == "cpu":
        keep_freed_memory()
    if accelerated(example.device):
        net = for_populations(net, example)
    return net, activations(net, example)


def piece(numbers: int, examples: int, device: torch.device, population: int = 2**40) -> tuple[int, int]:
    """How many networks, and how many of the examples, one pass without gradients takes.

    On a GPU a pass takes all the networks there are before it takes more than 1,024 examples: few and long passes, for
    `vmap` keeps the host busy for milliseconds in each.

    Args:
        numbers: activations of one network for one example, see `activations`.
        population: how many networks there are.
    """
    if device.type == "cuda":
        limit = cuda_numbers(device)
        most = max(1024, limit // max(1, numbers * population))
    else:
        limit, most = CPU_NUMBERS, 256
    examples = max(1, min(examples, most, limit // numbers))
    return max(1, limit // (numbers * examples)), examples


@cache
def cuda_numbers(device: torch.device) -> int:
    """Numbers that one pass may hold on a GPU: an eighth of its memory in float32, so that passes outlast launches."""
    return torch.cuda.get_device_properties(device).total_memory // (8 * 4)


@torch.no_grad()
def activations(net: nn.Module, example: Tensor) -> int:
    """Numbers that one pass holds for one network and example `[1, ...]`: the outputs of leaf modules, twice.

    Twice, because a non-linearity that is called as a function stands behind most of them.
    """
    total = 0

    def count(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, Tensor) else 0

    hooks = [module.register_forward_hook(count) for module in net.modules() if not any(module.children())]
    net(example)
    for hook in hooks:
        hook.remove()
    return max(2 * total, 1)


@cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, instead of handing it back after every layer.

    Its thresholds for that follow the largest block freed so far, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Below
    them every layer's output is mapped, zeroed page by page and unmapped, which doubles the time of small
    convolutions. The block itself is never touched, hence takes no memory.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


# --- gradients --------------------------------------------------------------------------------------------------------

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def training_precision(template: nn.Module, device: torch.device) -> torch.dtype:
    """bfloat16 where it brings half the time, float32 elsewhere.

    On a GPU that is wherever mini-batches and feature maps are most of what is read and written: in linear layers, and
    in population convolutions. Other convolutions gain nothing, and under vmap autocast does not reach them.
    """
    convolutions = [module for module in template.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    gains = accelerated(device) and all(PopulationConv2d.fits(module) for module in convolutions)
    return torch.bfloat16 if gains else torch.float32


def population_gradient(
    template: nn.Module, structure: Structure, example: Tensor, precision: torch.dtype = torch.float32
) -> Gradient:
    """(weights [P, D], inputs [P, B, ...], labels [P, B]) -> gradient [P, D] of every network's mean cross-entropy.

    Networks are in training mode, but for dropout, which is left out. Running statistics that the forward pass updates
    are written back into `weights`.

    Args:
        example: `[1, ...]`, an input on the device that is used.
        precision: bfloat16 computes with mixed precision (autocast).
    """
    device = example.device
    net, numbers = prepared(template, example)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    fixed = {name: value.to(device) for name, value in structure.fixed.items()}
    buffers = [t for t in structure.tensors if t.name in dict(net.named_buffers())]
    limit = CUDA_GRADIENT_NUMBERS if device.type == "cuda" else CPU_NUMBERS

    def forward(parameters: dict, statistics: dict, inputs: Tensor) -> tuple[Tensor, dict]:
        # The network updates its buffers in place, hence the copies.
        copies = {name: value.clone() for name, value in (statistics | fixed).items()}
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = functional_call(net, parameters | copies, (inputs,), tie_weights=True)
        return logits.float(), {name: copies[name] for name in statistics}

    def loss(parameters: dict, statistics: dict, inputs: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        logits, updated = vmap(forward)(parameters, statistics, inputs)
        # Summed over networks: no weight of one touches the loss of another. Classes as axis 1, because torch's CPU
        # softmax over a short last axis is seven times slower.
        return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="sum") / labels.shape[1], updated

    def of_piece(weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        parameters = structure.unflatten(weights)
        statistics = {t.name: parameters.pop(t.name) for t in buffers}
        gradients, updated = grad(loss, has_aux=True)(parameters, statistics, inputs, labels)
        for t in buffers:
            weights[:, t.slice] = updated[t.name].flatten(1)
            gradients[t.name] = torch.zeros_like(updated[t.name])
        return structure.flatten(gradients)

    def gradient(weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        networks = max(1, limit // (numbers * inputs.shape[1]))
        pieces = zip(weights.split(networks), inputs.split(networks), labels.split(networks), strict=True)
        return _joined([of_piece(*part) for part in pieces], 0)

    return gradient


def stack_initial(constructor, structure: Structure, seeds: list[int]) -> Float[Tensor, "P D"]:
    """Freshly constructed networks, one per seed, as flat rows on the CPU; the global random state stays as it is."""
    rows = []
    with own_random_state(0):  # put back once, not for each of thousands
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(structure.flatten(constructor().state_dict()))
    return torch.stack(rows)
