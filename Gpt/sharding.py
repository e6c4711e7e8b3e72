"""A generator spread over the processes: each keeps a part of every parameter, its gradient and its optimiser state.

Fully sharded data parallelism (Rajbhandari et al. 2020, ZeRO stage 3), by torch's `fully_shard`. A block's parameters
are whole only while it computes, so that the five copies that training keeps of the weights (weights, gradient, two
moments, average) are divided by the number of processes. Checkpoints hold whole tensors: the same files whether or not,
and over however many processes, training was sharded.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from Gpt.distributed import primary, world
from Gpt.generator import Generator

G = TypeVar("G", bound=Generator)
STACKS = ("blocks", "layers", "decoder")  # what the lists of blocks are called, in every network


def sharded(generator: G, device: torch.device) -> G:
    """A copy whose blocks, and together whatever lies outside of them, are spread over the processes.

    Buffers are whole in all. `loss` may be called, other methods may not.
    """
    found = copy.deepcopy(generator)
    mesh = init_device_mesh(device.type, (world(),))
    for block in reversed(blocks(found)):  # inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(found, mesh=mesh)
    register_fsdp_forward_method(found, "loss")
    return found


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks with parameters of every stack in a module."""
    stacks = [stack for name, stack in module.named_modules() if name.rpartition(".")[2] in STACKS]
    lists = [stack for stack in stacks if isinstance(stack, nn.ModuleList | nn.Sequential)]
    return [block for stack in lists for block in stack.children() if any(True for _ in block.parameters())]


def synchronise_gradients(generator: Generator, now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all processes, or keeps its own for a later one."""
    assert isinstance(generator, FSDPModule)
    generator.set_requires_gradient_sync(now)


def whole(value: Tensor) -> Tensor:
    """A tensor put together from its parts; every process has to ask for it. Other tensors are themselves."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_of(part: Tensor, parameter: Tensor) -> Tensor:
    """Put together what has the parts of a parameter, such as a gradient's local part."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut into parts as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and buffers of a sharded module into one that is not."""
    state = source.state_dict()
    for name, value in target.state_dict().items():
        value.copy_(whole(state[name]))


class Whole:
    """A sharded module or optimiser as checkpoints see it: with the `state_dict` of an unsharded one."""

    def __init__(self, inner: nn.Module | torch.optim.Optimizer):
        self.inner = inner
        self._state: dict[str, Any] = {}

    def gather(self) -> "Whole":
        """Put the tensors together, in all processes at the same time; only the first keeps them, on the CPU."""
        self._state = _gathered(self.inner.state_dict())
        return self

    def state_dict(self) -> dict[str, Any]:
        """What `gather` found, in the first process."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Every process takes its parts."""
        if isinstance(self.inner, nn.Module):
            own = self.inner.state_dict()
            # A name that is not its own is left to the module, which says so.
            self.inner.load_state_dict({n: like(v, own[n]) if n in own else v for n, v in state.items()})
            return
        parameters = [p for group in self.inner.param_groups for p in group["params"]]
        cut = {
            index: {n: like(v, parameters[index]) if v.shape == parameters[index].shape else v for n, v in of.items()}
            for index, of in state["state"].items()
        }
        self.inner.load_state_dict({"state": cut, "param_groups": state["param_groups"]})


def _gathered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _gathered(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        value = whole(value)
        return value.cpu() if primary() else None
    return value
