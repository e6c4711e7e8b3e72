"""Many adapters in one pass through their frozen base model, differentiable in the adapters.

Adapter p sees its own N sequences. All P x N sequences go through the base model as one batch; after every adapted
layer, a batched product adds each adapter's branch to its own sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from Gpt.adapters.base import BaseModel
from Gpt.adapters.spec import PREFIX, AdapterSpec, adapter_structure, draw_a, target_shapes


def adapted_logits(
    base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"], tokens: Int[Tensor, "P N L"]
) -> Float[Tensor, "P N L V"]:
    """Logits of adapter p on its sequences; attention is causal, so that padding belongs at the end."""
    with attached(base, spec, weights):
        logits = base.model(input_ids=tokens.flatten(0, 1), use_cache=False).logits
    return logits.unflatten(0, tokens.shape[:2])


def adapted_answer_logits(
    base: BaseModel,
    spec: AdapterSpec,
    weights: Float[Tensor, "P D"],
    tokens: Int[Tensor, "P N L"],
    positions: Int[Tensor, "P N K"],
) -> Float[Tensor, "P N K V"]:
    """Logits for the tokens at `positions` (each predicted from what stands before it), and for no others."""
    with attached(base, spec, weights):
        mask = _causal_mask(base, tokens.shape[-1])
        inputs = {"input_ids": tokens.flatten(0, 1), "attention_mask": mask}
        hidden = base.model.base_model(**inputs, use_cache=False).last_hidden_state
        before = (positions - 1).flatten(0, 1)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = base.model.get_output_embeddings()(hidden.gather(1, before))
    return logits.unflatten(0, tokens.shape[:2])


def _causal_mask(base: BaseModel, length: int) -> Float[Tensor, "1 1 length length"]:
    """What is added to the scores of attention. Without it, transformers reads values back from the device, to see
    whether a row holds several sequences."""
    lowest = torch.finfo(base.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=base.dtype, device=base.device).triu(1)


@contextmanager
def attached(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"]) -> Iterator[None]:
    """While it is open, the base model treats its batch as P equal groups of sequences, one for each adapter."""
    scaled = _tensors(base, spec, (spec.scale * weights).to(base.dtype))  # all Bs at once
    exact = _tensors(base, spec, weights) if spec.train_a or spec.dora else {}
    handles = []
    try:
        for name in target_shapes(base, spec.targets):
            layer = base.model.get_submodule(name)
            key = PREFIX + name
            a = exact[f"{key}.lora_A.weight"].to(base.dtype) if spec.train_a else frozen_a(base, spec)[name]
            b, magnitude = scaled[f"{key}.lora_B.weight"], exact.get(f"{key}.lora_magnitude_vector")
            gain = None if magnitude is None else _dora_gain(layer, a, b, magnitude)
            handles.append(layer.register_forward_hook(partial(_add_branch, a=a, b=b, gain=gain)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"]) -> dict[str, Float[Tensor, "P ..."]]:
    """As `Structure.unflatten`, by one split: hundreds of slices would each fill a gradient of P x D numbers."""
    tensors = adapter_structure(base, spec).tensors
    parts = weights.split([t.numel for t in tensors], dim=1)
    return {t.name: part.unflatten(1, t.shape) for t, part in zip(tensors, parts, strict=True)}


@lru_cache(maxsize=8)
def frozen_a(base: BaseModel, spec: AdapterSpec) -> dict[str, Float[Tensor, "rank _"]]:
    """The shared A of every adapted layer, on the base model's device and in its dtype."""
    shapes = target_shapes(base, spec.targets)
    return {name: draw_a(name, inputs, spec).to(base.device, base.dtype) for name, (_, inputs) in shapes.items()}


def _add_branch(
    layer: nn.Linear,
    arguments: tuple[Tensor, ...],
    output: Float[Tensor, "*batch out"],
    *,
    a: Float[Tensor, "*shared rank in"],
    b: Float[Tensor, "P out rank"],
    gain: Float[Tensor, "P 1 out"] | None,
) -> Float[Tensor, "*batch out"]:
    grouped = arguments[0].reshape(len(b), -1, a.shape[-1])
    plain = output.reshape(len(b), -1, b.shape[1])
    adapted = torch.baddbmm(plain, grouped @ a.mT, b.mT)
    if gain is not None:
        bias = 0 if layer.bias is None else layer.bias
        adapted = gain * (adapted - bias) + bias
    return adapted.view_as(output)


def _dora_gain(layer: nn.Linear, a: Tensor, b: Tensor, magnitude: Float[Tensor, "P out"]) -> Float[Tensor, "P 1 out"]:
    """magnitude / |row of W + B A|, B scaled, the norm taken as a constant (Liu et al. 2024, section 4.3).

    The squared norm is |W|^2 + 2 (W A^T).B + B (A A^T).B row by row, so that no P copies of W are made.
    """
    with torch.no_grad():
        w, a, b = layer.weight.detach(), a.detach(), b.detach()
        if w.dtype.itemsize < 4:
            w, a, b = w.float(), a.float(), b.float()
        squares = w.square().sum(1) + 2 * ((w @ a.mT) * b).sum(-1) + ((b @ (a @ a.mT)) * b).sum(-1)
    return (magnitude / squares.sqrt()).to(layer.weight.dtype)[:, None]
