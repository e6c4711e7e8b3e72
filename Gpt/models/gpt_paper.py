"""The transformer of G.pt as published (Peebles et al. 2022, arXiv 2209.12892), weight for weight.

Every token position has its own bias-free linear encoder, and every position of the noised weights its own decoder;
in between stands a pre-LN transformer without mask. Weights are read in normalised units (`PUBLISHED_MODELS` holds
the factors). Submodules carry the names of the published checkpoints, so that these load as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from Gpt.errors import ConfigError
from Gpt.models.attention import attend
from Gpt.seeds import rng
from Gpt.tokens import split_sizes


class FrequencyEmbedder(nn.Module):
    """Scalar to `[sin(f x), cos(f x), x]` with f = 2^linspace(0, max_log2, count); the frequencies stay fixed."""

    frequencies: Float[Tensor, " count"]

    def __init__(self, count: int = 128, max_log2: float = 14.0):
        super().__init__()
        self.register_buffer("frequencies", 2 ** torch.linspace(0, max_log2, count))

    @property
    def width(self) -> int:
        return 2 * len(self.frequencies) + 1

    def forward(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B width"]:
        x = x.to(self.frequencies.dtype)[:, None]
        angle = x * self.frequencies
        return torch.cat([angle.sin(), angle.cos(), x], dim=1)


class SelfAttention(nn.Module):
    """Multi-head attention to every token: of every token, or of the first `outputs` alone."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T width"], outputs: int | None = None) -> Float[Tensor, "B outputs width"]:
        layers = self.query, self.key, self.value
        projections = side_by_side(layers, x) if x.is_cuda else [layer(x) for layer in layers]
        q, k, v = (projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in projections)
        return self.proj(attend(q, k, v).transpose(1, 2)[:, :outputs].flatten(2))


def side_by_side(layers: Sequence[nn.Linear], x: Float[Tensor, "*batch I"]) -> tuple[Float[Tensor, "*batch O"], ...]:
    """Every layer's output, from one product.

    It fills a GPU better than one product for each, and its gradient by x is one product instead of a sum of several.
    Joining the weights costs nothing where they are read anyway, to be cast.
    """
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).chunk(len(layers), dim=-1)


class Block(nn.Module):
    """Pre-LN transformer block: attention, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "B T width"], outputs: int | None = None) -> Float[Tensor, "B outputs width"]:
        x = x[:, :outputs] + self.attn(self.ln1(x), outputs)
        return x + self.mlp(self.ln2(x))


class TokenTransformer(nn.Module):
    """Flat inputs, one linear encoder per token, transformer, one linear decoder per output token.

    The last block computes only the tokens that a decoder reads: 3 % of the arithmetic of the published models less.

    Args:
        input_splits: entries of each input token.
        output_splits: entries of each output token; they are read off the first positions.
    """

    def __init__(
        self, input_splits: Sequence[int], output_splits: Sequence[int], *, width: int, layers: int, heads: int
    ):
        super().__init__()
        self.input_splits = tuple(input_splits)
        self.pos_emb = nn.Parameter(torch.zeros(1, len(input_splits), width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.input_parameter_projections = nn.ModuleList(_projection(size, width) for size in input_splits)
        self.ln_in = nn.LayerNorm(width)
        self.ln_f = nn.LayerNorm(width)
        self.output_parameter_projections = nn.ModuleList(_projection(width, size) for size in output_splits)

    def encode(self, x: Float[Tensor, "B inputs"], positions: Sequence[int]) -> list[Float[Tensor, "B width"]]:
        """What the encoders of these positions make of their pieces of the input."""
        pieces = x.split(self.input_splits, dim=1)
        return [self.input_parameter_projections[i](pieces[i]) for i in positions]

    def forward(
        self, x: Float[Tensor, "B inputs"], known: Mapping[int, Float[Tensor, "B width"]] | None = None
    ) -> Float[Tensor, "B outputs"]:
        """Run the transformer; `known` are positions that were encoded before, whose inputs are not looked at."""
        encoded = dict(known or {})
        missing = [i for i in range(len(self.input_splits)) if i not in encoded]
        encoded |= zip(missing, self.encode(x, missing), strict=True)
        tokens = self.ln_in(torch.stack([encoded[i] for i in range(len(encoded))], dim=1)) + self.pos_emb
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        decoders = self.output_parameter_projections
        features = self.ln_f(last(tokens, len(decoders)))
        return torch.cat([decode(features[:, i]) for i, decode in enumerate(decoders)], dim=1)


class GptPaper(nn.Module):
    """G.pt: predicts the weights a network will have, from those it has, its metric and the metric asked for.

    The tokens are noised weights, starting weights, and one frequency code each for the diffusion time, the change of
    metric asked for, the metric asked for, and the starting metric. The network predicts what to add to the starting
    weights; its decoders begin at zero, so that a new model returns the start unchanged.

    Args:
        sizes: entries of every tensor of the generated network, in state_dict order; D is their sum.
        width, layers, heads: of the transformer.
        policy, chunk: see `Gpt.tokens.split_sizes`; they cut all that the network reads, codes (257 entries) included.
        seed: names the initial weights, N(0, 0.02²) in every linear layer. They are drawn on the CPU: build there,
        then move.

    Raises:
        ConfigError: width is not a multiple of heads, or the policy does not exist.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int = 1536,
        layers: int = 12,
        heads: int = 16,
        policy: str = "chunk_within_layer",
        chunk: int | None = 1000,
        seed: int = 0,
    ):
        super().__init__()
        if width % heads:
            raise ConfigError(f"G.pt: width {width} is not a multiple of heads {heads}; change one of them")
        self.scalar_embedder = FrequencyEmbedder()
        inputs = [sizes, sizes, *[[self.scalar_embedder.width]] * 4]
        splits = split_sizes(inputs, policy, chunk), split_sizes([sizes], policy, chunk)
        with torch.random.fork_rng(devices=[]):  # torch's initialisation, replaced below, draws from it
            self.decoder = TokenTransformer(*splits, width=width, layers=layers, heads=heads)
        self._initialise(rng("cpu", seed, "gpt_paper"))
        size = sum(sizes)
        # Whatever holds no entry of x_t, the first, or of the code of t, the first after the start.
        changing = range(size), range(2 * size, 2 * size + self.scalar_embedder.width)
        stops = list(accumulate(splits[0]))
        tokens = [range(stop - length, stop) for stop, length in zip(stops, splits[0], strict=True)]
        self._constant = [
            i
            for i, token in enumerate(tokens)
            if all(token.stop <= part.start or part.stop <= token.start for part in changing)
        ]

    def forward(
        self,
        x_t: Float[Tensor, "B D"],
        t: Float[Tensor, " B"],
        start: Float[Tensor, "B D"],
        start_metric: Float[Tensor, " B"],
        target_metric: Float[Tensor, " B"],
        constant: Float[Tensor, "B S width"] | None = None,
    ) -> Float[Tensor, "B D"]:
        """Estimate x0, in normalised weights.

        Args:
            x_t: noised future weights.
            t: diffusion time in DDPM steps, 0 … 999.
            start: weights before the update.
            start_metric, target_metric: raw values (loss, error in percent, return).
            constant: `constant_tokens` of the last three, if they are at hand.
        """
        known = {} if constant is None else dict(zip(self._constant, constant.unbind(1), strict=True))
        return start + self.decoder(self._inputs(x_t, t, start, start_metric, target_metric), known)

    def constant_tokens(
        self, start: Float[Tensor, "B D"], start_metric: Float[Tensor, " B"], target_metric: Float[Tensor, " B"]
    ) -> Float[Tensor, "B S width"]:
        """The S tokens that neither noise nor time enter, the same in each step of a sampling (published: 14)."""
        inputs = self._inputs(
            torch.zeros_like(start), torch.zeros_like(start_metric), start, start_metric, target_metric
        )
        if not self._constant:  # all in one token
            return start.new_empty(len(start), 0, self.decoder.pos_emb.shape[-1])
        return torch.stack(self.decoder.encode(inputs, self._constant), dim=1)

    def _inputs(
        self,
        x_t: Float[Tensor, "B D"],
        t: Float[Tensor, " B"],
        start: Float[Tensor, "B D"],
        start_metric: Float[Tensor, " B"],
        target_metric: Float[Tensor, " B"],
    ) -> Float[Tensor, "B inputs"]:
        scalars = torch.stack([t.to(start_metric.dtype), target_metric - start_metric, target_metric, start_metric], 1)
        codes = self.scalar_embedder(scalars.flatten()).to(x_t.dtype)
        return torch.cat([x_t, start, codes.reshape(len(x_t), -1)], dim=1)

    def compile_blocks(self) -> None:
        """Compile the transformer's blocks in place; they share one compilation, but for the last, of fewer tokens."""
        for block in self.decoder.blocks:
            block.compile()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for weight in self.decoder.output_parameter_projections.parameters():
            weight.zero_()


@dataclass(frozen=True)
class PublishedModel:
    """One of the five released models: its transformer and the factor between plain weights and those it reads."""

    width: int
    heads: int
    policy: str
    chunk: int | None
    weight_scale: float
    layers: int = 12

    def build(self, sizes: Sequence[int], seed: int = 0) -> GptPaper:
        """The model for networks with tensors of these sizes, freshly initialised."""
        transformer = {field: getattr(self, field) for field in ("width", "layers", "heads", "policy", "chunk")}
        return GptPaper(sizes, **transformer, seed=seed)


_MNIST = PublishedModel(width=1536, heads=16, policy="chunk_within_layer", chunk=1000, weight_scale=4.185)
_CIFAR10 = PublishedModel(width=2048, heads=16, policy="chunk_within_layer", chunk=576, weight_scale=1.646)
_CARTPOLE = PublishedModel(width=1536, heads=12, policy="layer_by_layer", chunk=None, weight_scale=2.06)

PUBLISHED_MODELS = {
    "mnist_loss": _MNIST,
    "mnist_error": _MNIST,
    "cifar10_loss": _CIFAR10,
    "cifar10_error": _CIFAR10,
    "cartpole": _CARTPOLE,
}


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    """A bias-free linear map; published checkpoints name it as the first layer of a stack."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False))
