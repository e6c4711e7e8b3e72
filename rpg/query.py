"""A query transformer: a set of prompts in, an adapter out, the base model at step 0.

Prompts, pooled sentences or the states of their tokens, are read by a few latent vectors that attend to them
(Perceiver, Jaegle et al. 2021, arXiv 2103.03206), so their order and number do not matter; then one query for each
(layer, module) of the language model reads the latents, and heads write that module's tensors. As the heads start at
zero, training starts from the base model, without which text-to-adapter networks diverge (Text-to-LoRA, Charakorn et
al. 2025, arXiv 2506.06105, appendix).
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from Gpt.errors import ConfigError
from Gpt.structure import Structure

ADAPTER_LEAF = re.compile(r"\.lora_\w+(\.weight)?$")
LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor of an adapter sits: the layer, the module within it, and what the tensor is to the module."""

    layer: int
    module: str
    tensor: str

    @classmethod
    def of(cls, name: str) -> "Place":
        """Read a PEFT key; what is outside of all numbered layers is in layer 0, under a name of its own."""
        found = LAYER_NUMBER.search(name)
        kind = LAYER_NUMBER.sub(".*.", name, count=1)
        return cls(int(found[1]) if found else 0, ADAPTER_LEAF.sub("", kind), kind)


class PromptPool(nn.Module):
    """A set of N states -> `[B, latents, width]`, whatever their order and number; `mask` is False where none is."""

    def __init__(self, features: int, width: int, latents: int, heads: int):
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
        self.latents = nn.Parameter(0.02 * torch.randn(latents, width))
        self.query_norm, self.prompt_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(
        self, states: Float[Tensor, "B N features"], mask: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B latents width"]:
        x = self.read(states)
        latents = self.latents.repeat(len(x), 1, 1)
        keys = self.prompt_norm(x)
        read, _ = self.attention(self.query_norm(latents), keys, keys, key_padding_mask=~mask, need_weights=False)
        share = (mask / mask.sum(1, keepdim=True))[:, None]
        # The mean is what all prompts of a task share; attention adds what some of them say.
        return latents + share @ x + read


class QueryTransformer(nn.Module):
    """Prompts, each of L states -> a flat row `[B, D]` for each set of them, zeros at first.

    Args:
        structure: of the adapter; keys are PEFT's.
        features: of one state.
        width, depth, heads: of the transformer.
        latents: vectors that stand for the set of prompts.

    Raises:
        ConfigError: the width is no multiple of the heads.
    """

    layer: Int[Tensor, " queries"]
    module: Int[Tensor, " queries"]

    def __init__(self, structure: Structure, features: int, *, width: int, depth: int, heads: int, latents: int):
        super().__init__()
        if width % heads:
            raise ConfigError(f"generator.width={width} is not a multiple of generator.heads={heads}")
        self.pool = PromptPool(features, width, latents, heads)
        places = [Place.of(spec.name) for spec in structure.tensors]
        queries = sorted({(place.layer, place.module) for place in places})
        modules = sorted({module for _, module in queries})
        self.register_buffer("layer", torch.tensor([layer for layer, _ in queries]), persistent=False)
        self.register_buffer("module", torch.tensor([modules.index(m) for _, m in queries]), persistent=False)
        self.layer_table = nn.Parameter(0.02 * torch.randn(int(self.layer.max()) + 1, width))
        self.module_table = nn.Parameter(0.02 * torch.randn(len(modules), width))
        blocks = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        # One head for each kind of tensor; it serves that tensor in all layers where it has the same size.
        kinds: dict[tuple[str, int], list[int]] = {}
        for i, (place, spec) in enumerate(zip(places, structure.tensors, strict=True)):
            kinds.setdefault((place.tensor, spec.numel), []).append(i)
        self.heads = nn.ModuleList(_silent(width, numel) for _, numel in kinds)
        query_of = [queries.index((place.layer, place.module)) for place in places]
        self.queries_of_head = [[query_of[i] for i in members] for members in kinds.values()]
        written = [i for members in kinds.values() for i in members]
        self.order = sorted(range(len(written)), key=written.__getitem__)

    def forward(self, states: Float[Tensor, "B N L features"], mask: Bool[Tensor, "B N L"]) -> Float[Tensor, "B D"]:
        pooled = self.pool(states.flatten(1, 2), mask.flatten(1, 2))
        queries = F.embedding(self.layer, self.layer_table) + F.embedding(self.module, self.module_table)
        x = torch.cat([queries.expand(len(states), -1, -1), pooled], dim=1)
        x = self.blocks(x)
        written: list[Tensor] = []
        for head, own in zip(self.heads, self.queries_of_head, strict=True):
            written.extend(head(x[:, own]).unbind(1))
        return torch.cat([written[i] for i in self.order], dim=1)


def _silent(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that gives zeros until it is trained."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
