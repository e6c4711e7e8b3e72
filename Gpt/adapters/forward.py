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
from torch.utils.checkpoint import checkpoint

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
    *,
    chunk: int | None = None,
) -> Float[Tensor, "P N K V"]:
    """Logits for the tokens at `positions` (each predicted from what stands before it), and for no others.

    Args:
        chunk: adapters of one pass; what is between the base model's layers is then computed again for the gradient
            instead of kept, pass after pass. By default all go in one pass and nothing is recomputed.
    """
    if chunk is None or chunk >= len(weights) and not torch.is_grad_enabled():
        return _answer_logits(base, spec, weights, tokens, positions)
    run = partial(checkpoint, partial(_answer_logits, base, spec), use_reentrant=False, preserve_rng_state=False)
    parts = zip(weights.split(chunk), tokens.split(chunk), positions.split(chunk), strict=True)
    return torch.cat([run(*part) for part in parts])


def _answer_logits(
    base: BaseModel, spec: AdapterSpec, weights: Tensor, tokens: Tensor, positions: Tensor
) -> Float[Tensor, "P N K V"]:
    # The hooks live inside the function that is checkpointed, for it runs again during the backward pass.
    with attached(base, spec, weights):
        hidden = base.model.base_model(input_ids=tokens.flatten(0, 1), use_cache=False).last_hidden_state
        before = (positions - 1).flatten(0, 1)[..., None].expand(-1, -1, hidden.shape[-1])
        logits = base.model.get_output_embeddings()(hidden.gather(1, before))
    return logits.unflatten(0, tokens.shape[:2])


@contextmanager
def attached(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"]) -> Iterator[None]:
    """While it is open, the base model treats its batch as P equal groups of sequences, one for each adapter."""
    low, full = (_tensors(base, spec, rows) for rows in (weights.to(base.dtype), weights))
    handles = []
    try:
        for name in target_shapes(base, spec.targets):
            layer = base.model.get_submodule(name)
            key = PREFIX + name
            a = low[f"{key}.lora_A.weight"] if spec.train_a else frozen_a(base, spec)[name]
            b, magnitude = low[f"{key}.lora_B.weight"], full.get(f"{key}.lora_magnitude_vector")
            gain = None if magnitude is None else _dora_gain(layer, a, b, magnitude, spec.scale)
            handles.append(layer.register_forward_hook(partial(_add_branch, a=a, b=b, gain=gain, scale=spec.scale)))
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
    scale: float,
) -> Float[Tensor, "*batch out"]:
    grouped = arguments[0].reshape(len(b), -1, a.shape[-1])
    plain = output.reshape(len(b), -1, b.shape[1])
    adapted = torch.baddbmm(plain, grouped @ a.mT, b.mT, alpha=scale)
    if gain is not None:
        bias = 0 if layer.bias is None else layer.bias
        adapted = gain * (adapted - bias) + bias
    return adapted.view_as(output)


def _dora_gain(
    layer: nn.Linear, a: Tensor, b: Tensor, magnitude: Float[Tensor, "P out"], scale: float
) -> Float[Tensor, "P 1 out"]:
    """magnitude / |row of W + scale B A|, the norm taken as a constant (Liu et al. 2024, section 4.3).

    The squared norm is |W|^2 + 2 scale (W A^T).B + scale^2 B (A A^T).B row by row, so that no P copies of W are made.
    """
    with torch.no_grad():
        w, a, b = layer.weight.detach(), a.detach(), b.detach()
        if w.dtype.itemsize < 4:
            w, a, b = w.float(), a.float(), b.float()
        squares = w.square().sum(1) + 2 * scale * ((w @ a.mT) * b).sum(-1) + scale**2 * ((b @ (a @ a.mT)) * b).sum(-1)
    return (magnitude / squares.sqrt()).to(layer.weight.dtype)[:, None]
