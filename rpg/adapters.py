"""Generators from a set of prompts to a LoRA adapter: a decoder, and the losses that train it.

    HyperConvGenerator    the hyper-convolutional cascade, or three plain blocks behind the prompts' mean
    QueryGenerator        the query transformer; at step 0 every adapter it writes is the base model

What a decoder gives is the deviation from the fresh adapter (which is the base model), in units of the library's own
scale. It is trained on the library (squared or absolute error, token by token), through the frozen language model
(cross-entropy of the answers, as Text-to-LoRA's "SFT"), or first on one and then on the other. All of this is
regression: one prompt set, one adapter, no noise. `rpg.generator.Rpg` writes adapters from noise.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.phrases import PhraseBook
from Gpt.adapters.tokens import AdapterTokens
from Gpt.conditions import Conditions, Features
from Gpt.data.adapter_batches import AdapterBatch
from Gpt.diffusion.objectives import Objective
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt, Solve
from Gpt.structure import Structure
from rpg.hyperconv import Grid, HyperConvDecoder, ThreeBlockDecoder
from rpg.query import QueryTransformer


@dataclass(frozen=True)
class LossConfig:
    """What the decoder is trained on; the terms that are switched on at a step are added.

    Attributes:
        mse, l1: weights of the squared and the absolute error of the scaled tokens, until a share `regression_until`
            of training has passed.
        sft: weight of the cross-entropy of the answers through the frozen language model, from a share `sft_from` on.
        importance: count each token by how much its weights move between the snapshots of one run, as
            Drag-and-Drop LLMs does, instead of all alike.
        noise: length of the Gaussian noise that is added to every state of the prompts, as a share of the state's own;
            what is learnt from one wording then holds for its neighbours.
    """

    mse: NonNegativeFloat = 1.0
    l1: NonNegativeFloat = 0.0
    sft: NonNegativeFloat = 0.0
    regression_until: float = 1.0
    sft_from: float = 0.0
    importance: bool = False
    noise: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        regression_ends = self.regression_until if self.mse or self.l1 else 0.0
        sft_begins = self.sft_from if self.sft else 1.0
        if sft_begins > regression_ends:
            raise ConfigError(
                f"generator.loss={self}: there are steps without any loss; choose weights and shares that leave none"
            )

    def terms(self, progress: float) -> tuple[float, float, float]:
        """Weights of (mse, l1, sft) once a share `progress` of the steps is done; 1 is the end of training."""
        regression = progress < self.regression_until or self.regression_until >= 1
        return self.mse * regression, self.l1 * regression, self.sft * (progress >= self.sft_from)

    @property
    def turns(self) -> tuple[float, ...]:
        """Shares of the training at which `terms` become others."""
        known = {self.regression_until if self.mse or self.l1 else 1.0, self.sft_from if self.sft else 1.0}
        return tuple(sorted(turn for turn in known if 0 < turn < 1))


@dataclass(frozen=True)
class HyperConvConfig:
    """The hyper-convolutional decoder.

    Attributes:
        blocks: "published" for the two-branch layers that begin with the set of prompts, "plain" for three simple
            blocks that begin with its mean.
        prompts: of the grid that the decoder begins with; a set of another size is cycled through, or cut.
        length: rows of that grid, the token states of a prompt (`AdapterFamily.tokens`); 1 for pooled sentences.
        grids: (tokens, rows, columns) between the first grid and the adapter's own; "plain" needs none.
        kernel: size of the convolutions, odd.
        columns: of a token, see `Gpt.adapters.tokens`.
        scale: unit of the weights: the root mean square of their "token" or of their "module".
        translated: put prompts into the library's words before they are read, see `Gpt.adapters.phrases`.
        loss: see `LossConfig`.
    """

    blocks: Literal["published", "plain"] = "published"
    prompts: PositiveInt = 32
    length: PositiveInt = 1
    grids: tuple[Grid, ...] = ()
    kernel: PositiveInt = 3
    columns: PositiveInt | None = None
    scale: Literal["token", "module"] = "module"
    translated: bool = False
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class QueryConfig:
    """The query transformer; `columns`, `scale`, `translated` and `loss` as in `HyperConvConfig`.

    Attributes:
        width, depth, heads: of the transformer.
        latents: vectors that stand for the set of prompts.
    """

    width: PositiveInt = 256
    depth: PositiveInt = 4
    heads: PositiveInt = 8
    latents: PositiveInt = 16
    columns: PositiveInt | None = None
    scale: Literal["token", "module"] = "module"
    translated: bool = False
    loss: LossConfig = field(default_factory=LossConfig)


class AdapterGenerator(Generator):
    """Base class: sets of N prompts, `prompt["text"]` `[B, N, L, features]` -> adapters `[B, D]`.

    L counts the states of a prompt, see `Gpt.adapters.conditions`; `prompt["text_mask"]` `[B, N, L]` is False where
    they are padding, and may be left out where there is none.

    Args:
        structure: of an adapter.
        conditions: text alone. Its embedding is the decoder's own affair; its dropout replaces all prompts of an
            example by zeros, which is also what a prompt without text is read as.
        objective: not used, as nothing is denoised.
        config: see `HyperConvConfig` and `QueryConfig`.

    Attributes:
        fresh: `[D]` the adapter that is the base model; `unit`: `[D]` scale of every weight.

    Raises:
        ConfigError: the conditions are others.
    """

    needs_start = False
    reads_prompt_sets = True
    length = 1  # states of the prompt that stands for none

    fresh: Float[Tensor, " D"]
    unit: Float[Tensor, " D"]
    importance: Float[Tensor, " D"]

    def __init__(
        self,
        structure: Structure,
        conditions: Conditions,
        objective: Objective,
        config: HyperConvConfig | QueryConfig,
    ):
        super().__init__(structure, objective, "euler", 1)
        if set(conditions.encoders) != {"text"}:
            raise ConfigError(
                f"adapters are written for prompts, not for {sorted(conditions.encoders)}; use condition=text"
            )
        self.config = config
        self.features = cast(Features, conditions.encoders["text"]).features
        self.dropout = conditions.dropout
        self.tokens = AdapterTokens(structure, config.columns)
        self.translates = config.translated
        self.phrases = PhraseBook()
        for name, value in {"fresh": 0.0, "unit": 1.0, "importance": 1.0}.items():
            self.register_buffer(name, torch.full((structure.size,), value))

    def decode(self, prompts: PromptStates) -> Float[Tensor, "B D"]:
        """Scaled deviations from the fresh adapter."""
        raise TypeError(f"{type(self).__name__} does not define decode")

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Nothing: these generators are functions of the prompt."""
        return (0,)

    @torch.no_grad()
    def fit(self, batch: Batch) -> None:
        """Read the library's scales, and with `translated` its prompts.

        Raises:
            ConfigError: the batch is of another kind; or prompts of one state each are to be translated.
        """
        batch = _adapter_batch(batch)
        if self.translates:
            if batch.known.mask.shape[-1] == 1:
                raise ConfigError(
                    "generator.translated=true: a prompt of one state can only be taken for a whole training task; "
                    "choose a task whose prompts have a state for each sentence (lora_rules_sentences)"
                )
            self.phrases.fit(batch.known)
        self.fresh.copy_(batch.fresh)
        self.unit.copy_(self.tokens.scale(batch.target - batch.fresh, self.config.scale))
        if self.config.loss.importance:
            weight = self.tokens.mean(movement(batch.target / self.unit, batch.members))
            self.importance.copy_((weight / weight.mean())[self.tokens.token])

    @property
    def needs_answers(self) -> bool:
        return self.config.loss.sft > 0

    def forward(self, prompts: PromptStates) -> Float[Tensor, "B D"]:
        """The adapter for every set of prompts."""
        return self.fresh + self.unit * self.decode(prompts)

    @property
    def turns(self) -> tuple[float, ...]:
        return self.config.loss.turns

    def loss(self, batch: Batch, rng: torch.Generator) -> Float[Tensor, ""]:
        """The terms of `config.loss` that are switched on at `batch.progress`.

        Raises:
            ConfigError: the batch is not one of `Gpt.data.adapter_batches`, or has no examples to answer where the loss
            goes through the language model.
        """
        batch = _adapter_batch(batch)
        scaled = self.decode(self._disturbed(self._states(batch.prompt, len(batch.target)), rng)).float()
        mse, l1, sft = self.config.loss.terms(batch.progress)
        total = scaled.new_zeros(())
        if mse or l1:
            error = scaled - (batch.target - self.fresh) / self.unit
            total = total + (self.importance * (mse * error.square() + l1 * error.abs())).mean()
        if sft:
            total = total + sft * batch.answer_loss(self.fresh + self.unit * scaled).mean()
        return total

    def _disturbed(self, prompts: PromptStates, rng: torch.Generator) -> PromptStates:
        """Prompts as training shows them: some sets are left out, and no state is quite what it is."""
        keep = torch.rand(len(prompts), 1, 1, 1, generator=rng, device=self.fresh.device) >= self.dropout
        states = prompts.states * keep
        if self.config.loss.noise:
            unit = torch.randn(states.shape, generator=rng, device=states.device) / self.features**0.5
            states = states + self.config.loss.noise * states.norm(dim=-1, keepdim=True) * unit
        return PromptStates(states, prompts.mask)

    def write(
        self,
        prompt: Prompt,
        start: Float[Tensor, "B D"] | None,
        noise: Float[Tensor, "B 0"],
        solve: Solve,
        guidance: float,
        rng: torch.Generator,
    ) -> Float[Tensor, "B D"]:
        """Adapters in one pass; there is nothing to solve and nothing to draw.

        Raises:
            ConfigError: guidance is asked for, or the prompt is something else than sets of states.
        """
        if guidance != 1:
            raise ConfigError(f"guidance={guidance}: a regressor has no noise to be guided from; use 1")
        prompts = self._states(prompt, len(noise))
        return self(self.phrases(prompts) if self.translates and "text" in prompt else prompts).float()

    def _states(self, prompt: Prompt, count: int) -> PromptStates:
        """The prompt, checked; `count` sets of zeros where there is no text."""
        text = prompt.get("text", self.fresh.new_zeros(count, 1, self.length, self.features)).to(self.fresh)
        mask = prompt.get("text_mask", torch.ones(text.shape[:-1], dtype=torch.bool, device=text.device))
        fits = (
            text.dim() == 4 and text.shape[3] == self.features and mask.shape == text.shape[:3] and 0 not in text.shape
        )
        if set(prompt) - {"text", "text_mask"} or not fits:
            raise ConfigError(
                f'this generator takes prompt["text"] [B, N, L, {self.features}] and, for padding, prompt["text_mask"] '
                f"[B, N, L], got { {name: list(value.shape) for name, value in prompt.items()} }"
            )
        return PromptStates(text, mask)


class HyperConvGenerator(AdapterGenerator):
    """Adapters by stacked convolutions, see `HyperConvConfig` and `rpg.hyperconv`."""

    config: HyperConvConfig

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: HyperConvConfig):
        super().__init__(structure, conditions, objective, config)
        target = self.tokens.shape
        if config.blocks == "plain":
            self.decoder: nn.Module = ThreeBlockDecoder(self.features, config.prompts, target, config.kernel)
        else:
            self.length = config.length
            grids = ((config.prompts, config.length, self.features), *config.grids, target)
            self.decoder = HyperConvDecoder(grids, config.kernel)

    def decode(self, prompts: PromptStates) -> Float[Tensor, "B D"]:
        """Raises:
        ConfigError: prompts have another number of states than the decoder's first grid has rows.
        """
        if self.config.blocks == "plain":
            unit = functional.normalize(prompts.pooled(), dim=-1)
            return self.tokens.decode(self.decoder(unit * self.features**0.5))  # unit variance
        _, given, length, _ = prompts.states.shape
        if length != self.config.length:
            raise ConfigError(
                f"generator.length={self.config.length}, but prompts come with {length} states each; set it to the "
                "task's AdapterFamily.tokens (1 for pooled sentences)"
            )
        cycled = torch.arange(self.config.prompts, device=prompts.mask.device) % given
        return self.tokens.decode(self.decoder(prompts.states[:, cycled]))


class QueryGenerator(AdapterGenerator):
    """Adapters by a query transformer, see `QueryConfig` and `rpg.query`."""

    config: QueryConfig

    def __init__(self, structure: Structure, conditions: Conditions, objective: Objective, config: QueryConfig):
        super().__init__(structure, conditions, objective, config)
        self.decoder = QueryTransformer(
            structure, self.features, width=config.width, depth=config.depth, heads=config.heads, latents=config.latents
        )

    def decode(self, prompts: PromptStates) -> Float[Tensor, "B D"]:
        return self.decoder(prompts.states, prompts.mask)


GENERATORS = {"hyperconv": (HyperConvConfig, HyperConvGenerator), "query": (QueryConfig, QueryGenerator)}


def movement(weights: Float[Tensor, "n D"], members: Tensor) -> Float[Tensor, " D"]:
    """Standard deviation of every weight among the adapters of one member, averaged over the members.

    Raises:
        ConfigError: no member has two different adapters, so that nothing is seen to move.
    """
    repeated = [member for member, count in Counter(members.tolist()).items() if count > 1]
    adapters = [weights[members == member] for member in repeated]
    if not any((rows != rows[0]).any() for rows in adapters):
        raise ConfigError(
            "generator.loss.importance=true: token weights are read off several snapshots of a run or several adapters "
            "of a task, and there is one of each; set generator.loss.importance=false, or batches.last_snapshots above "
            "1 where the zoo has more"
        )
    return torch.stack([rows.std(0) for rows in adapters]).mean(0)


def _adapter_batch(batch: Batch) -> AdapterBatch:
    if not isinstance(batch, AdapterBatch):
        raise ConfigError("this generator writes adapters: it needs a task whose family are language tasks (lora_*)")
    return batch
