"""CUDA graphs: the kernels of a step, recorded once and launched together.

A step of a denoiser is a thousand kernels or more, at five to twenty microseconds of the host's time each; on a GPU
most of them take less than that. A replay launches all of them at once, and leaves the host free to run ahead.

What is recorded must do the same device work at every call: no reading back of values, no numbers of the host that
change. Its random draws come from one registered generator, whose state may be another at every replay.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from Gpt.generator import Batch

WARM_UPS = 2  # compilation and the libraries' workspaces first, then a run as it will be recorded

Result = TypeVar("Result")


class Graphed:
    """A function of CUDA tensors, without gradients, that is replayed from one graph per set of shapes.

    Other calls (on a CPU, with gradients, under a counter of operations) go to the function itself. A copy of this
    object records anew.

    Args:
        function: `(*tensors) -> tensor`.
        module: the module whose parameters the function reads; when they move in memory, it is recorded anew.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module):
        self._function, self._module = function, module
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._addresses: list[int] = []

    def __deepcopy__(self, memo: dict) -> "Graphed":
        return Graphed(copy.deepcopy(self._function, memo), copy.deepcopy(self._module, memo))

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not _recordable(inputs[0]):
            return self._function(*inputs)
        addresses = [p.data_ptr() for p in self._module.parameters()]
        if addresses != self._addresses:
            self._recorded, self._addresses = {}, addresses
        device = inputs[0].device
        mixed, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        kind = (mixed, dtype, *((x.shape, x.dtype) for x in inputs))
        if kind not in self._recorded:
            own = [x.clone() for x in inputs]
            # Cached casts of the weights would lie outside the graph's memory.
            with torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False):
                graph, output = record(lambda: self._function(*own), device)
            self._recorded[kind] = graph, own, output
        graph, own, output = self._recorded[kind]
        torch._foreach_copy_(own, list(inputs))
        graph.replay()
        return output.clone()  # the next replay writes into the same memory


class GraphedGradient:
    """The loss of a batch and its gradient, as one graph.

    A call leaves in `p.grad` the tensors that every call leaves there, overwritten: use them before the next one.

    Args:
        loss: `(batch, rng) -> scalar`; may depend on `batch.progress` through the phase alone.
        parameters: what is differentiated by.
        phase: of a batch; with another one, the loss is recorded anew.
    """

    def __init__(
        self,
        loss: Callable[[Batch, torch.Generator], Tensor],
        parameters: Sequence[nn.Parameter],
        phase: Callable[[Batch], int] = lambda batch: 0,
    ):
        self._loss, self._parameters, self._phase = loss, list(parameters), phase
        self._rng = torch.Generator(self._parameters[0].device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded_phase = 0
        self._own: list[Tensor] = []
        self._value: Tensor | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """The loss, detached; its draws are those that `rng` would give from its present state on.

        Batches must have the shapes of the first one.
        """
        tensors = _tensors(batch)
        if self._graph is None or self._recorded_phase != self._phase(batch):
            # The memory of a former graph is free for the next one once nothing it wrote is kept.
            self._graph, self._value, self._gradients = None, None, []
            self._recorded_phase = self._phase(batch)
            self._own = [x.clone() for x in tensors]
            own = _with_tensors(batch, self._own)
            self._graph, self._value = record(lambda: self._differentiate(own), self._rng.device, self._rng)
            self._gradients = [p.grad for p in self._parameters]
        assert self._value is not None
        torch._foreach_copy_(self._own, tensors)
        self._rng.set_state(rng.get_state())
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._value

    def _differentiate(self, batch: Batch) -> Tensor:
        for p in self._parameters:
            p.grad = None
        loss = self._loss(batch, self._rng)
        loss.backward()
        return loss.detach()


def _recordable(x: Tensor) -> bool:
    return x.is_cuda and not torch.is_grad_enabled() and not is_in_torch_dispatch_mode()


def record(
    work: Callable[[], Result], device: torch.device, rng: torch.Generator | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of some work, which does nothing before it is replayed, and the tensors that replays write.

    Other threads may go on using the device meanwhile, as those that collect a zoo in the background do.
    """
    graph = torch.cuda.CUDAGraph()
    if rng is not None:
        graph.register_generator_state(rng)
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
    return graph, result


def _tensors(batch: Batch) -> list[Tensor]:
    optional = [tensor for tensor in (batch.start, batch.masks) if tensor is not None]
    return [batch.target, *optional, *batch.prompt.values()]


def _with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with other tensors in place of `_tensors(batch)`."""
    rest = iter(tensors)
    target = next(rest)
    start, masks = (None if tensor is None else next(rest) for tensor in (batch.start, batch.masks))
    return Batch(target, start, dict(zip(batch.prompt, rest, strict=True)), batch.progress, masks)
