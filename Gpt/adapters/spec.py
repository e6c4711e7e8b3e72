"""What an adapter is: a low-rank change of some linear layers of a frozen base model, as a network of its own.

LoRA (Hu et al. 2021) adds (alpha / rank) B A x to a layer's output W x, DoRA (Liu et al. 2024) also rescales its rows,
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides by the root of the rank, so that high ranks learn as fast as low.
By default all adapters share one frozen A, drawn from a seed, and consist of their Bs alone. B is then determined by
the change B A that it stands for, so that adapters may be averaged, compared and regressed; where A is trained too,
(B M, M^-1 A) is the same adapter for every invertible M, and none of that holds between adapters of different origin.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from Gpt.adapters.base import BaseModel, empty_model, load_base
from Gpt.errors import ConfigError
from Gpt.seeds import rng
from Gpt.structure import Structure

PREFIX = "base_model.model."  # what PEFT puts before a module's name
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """The form of an adapter.

    Attributes:
        rank: r, the inner dimension.
        alpha: the change is scaled by alpha / rank, with rslora by alpha / sqrt(rank).
        targets: last parts of the names of the linear layers that are changed.
        rslora: rank-stabilised scale.
        dora: also a magnitude for every output of a layer (weight-decomposed adaptation).
        train_a: A belongs to the adapter; otherwise it is frozen and the same in all adapters.
        a_seed: of A, or of its initial value.

    Raises:
        ConfigError: a number is out of range, or there are no targets.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    train_a: bool = False
    a_seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ConfigError(f"{self}: rank and alpha must be positive, and there must be targets")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class AdapterModule(nn.Module):
    """The generated tensors of one adapter under PEFT's names, in the base model's order; it cannot be called.

    Fresh, it is the base model: every `lora_B` is zero, `lora_A` (with `train_a`) as drawn from `a_seed`, and the
    magnitudes of DoRA those of the base weights. For those, and only for them, the base model's weights are loaded.

    Args:
        base: a base model or its name.

    Raises:
        ConfigError: the base model has no linear layer of that name.
    """

    def __init__(self, base: BaseModel | str, spec: AdapterSpec):
        super().__init__()
        for name, (outputs, inputs) in target_shapes(base, spec.targets).items():
            layer: Any = _submodule(self, PREFIX + name)
            if spec.train_a:
                layer.lora_A = _holder(draw_a(name, inputs, spec))
            layer.lora_B = _holder(torch.zeros(outputs, spec.rank))
            if spec.dora:
                loaded = load_base(base) if isinstance(base, str) else base
                weight = loaded.model.get_submodule(name).weight
                layer.lora_magnitude_vector = nn.Parameter(weight.float().norm(dim=1).cpu())


@lru_cache(maxsize=8)
def target_shapes(base: BaseModel | str, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """`{module name: (outputs, inputs)}` of the linear layers that an adapter changes, in the base model's order.

    The output head is not among them, for it often shares its weight with the embedding.

    Raises:
        ConfigError: a target matches no linear layer.
    """
    model = empty_model(base) if isinstance(base, str) else base.model
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    known = {name.rpartition(".")[2] for name in linear}
    if set(targets) - known:
        unknown = sorted(set(targets) - known)
        raise ConfigError(f"adapter targets {unknown}: the base model's linear layers are {sorted(known)}")
    return {name: shape for name, shape in linear.items() if name.rpartition(".")[2] in targets}


def draw_a(module: str, inputs: int, spec: AdapterSpec) -> Float[Tensor, "rank inputs"]:
    """A of one layer: uniform with variance 1/(3 inputs), as PEFT draws it, from `a_seed` and the layer's name."""
    uniform = torch.rand(spec.rank, inputs, generator=rng("cpu", spec.a_seed, "lora_A", module))
    return (2 * uniform - 1) / inputs**0.5


@lru_cache(maxsize=8)
def adapter_structure(base: BaseModel | str, spec: AdapterSpec) -> Structure:
    """The `Gpt.structure.Structure` of an adapter: what is in its flat row `[D]`, and where."""
    return Structure.of(AdapterModule(base, spec))


def _submodule(root: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path; modules that are not there yet are made."""
    for part in name.split("."):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _holder(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module
