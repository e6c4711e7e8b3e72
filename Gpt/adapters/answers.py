"""Labelled examples as tensors, and what adapters make of them: loss and greedy exact match in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from Gpt.adapters.base import BaseModel, Tokenizer
from Gpt.adapters.forward import adapted_answer_logits
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import Example

TOKENS = 2**15  # of one pass without gradients
LOGITS = 2**28  # of one pass without gradients: 1 GB in float32
GPU_ROOM = 4  # times as much of both on a GPU, whose time small passes waste


@dataclass(frozen=True)
class Answers:
    """Examples: prompt and answer in one row, padded at the end.

    Attributes:
        tokens: token numbers.
        positions: where in its row each token of the answer stands; padding repeats the last position.
        valid: which positions are no padding.
    """

    tokens: Int[Tensor, "*batch L"]
    positions: Int[Tensor, "*batch K"]
    valid: Bool[Tensor, "*batch K"]

    def __getitem__(self, index) -> "Answers":
        return Answers(self.tokens[index], self.positions[index], self.valid[index])

    def to(self, device: torch.device | str) -> "Answers":
        return Answers(self.tokens.to(device), self.positions.to(device), self.valid.to(device))

    def trimmed(self) -> "Answers":
        """Without the columns that are padding in every row; waits for the device once."""
        length, width = torch.stack([self.positions.max() + 1, self.valid.sum(-1).max()]).tolist()
        return Answers(self.tokens[..., :length], self.positions[..., :width], self.valid[..., :width])

    @property
    def targets(self) -> Int[Tensor, "*batch K"]:
        return self.tokens.gather(-1, self.positions)


@dataclass(frozen=True)
class Scores:
    """What P adapters make of N examples each.

    Attributes:
        loss: mean negative log-likelihood of an answer's tokens, nats.
        exact: whether greedy decoding writes exactly the answer: every token of it, its newline included, is the most
            likely one after the right ones before it.
        predicted: the most likely token at each position of the answer; K is that of the longest answer, padding 0.
    """

    loss: Float[Tensor, "P N"]
    exact: Bool[Tensor, "P N"]
    predicted: Int[Tensor, "P N K"]


def encode_answers(tokenizer: Tokenizer, examples: Sequence[Sequence[Example]]) -> Answers:
    """`[M, N]` examples as tensors on the CPU; prompt and answer are tokenised one by one."""
    flat = [example for row in examples for example in row]
    prompts, answers = (_encoded(tokenizer, texts) for texts in zip(*flat, strict=True))
    before, written = (torch.tensor([len(ids) for ids in rows]) for rows in (prompts, answers))
    length, width = before + written, torch.arange(int(written.max()))
    tokens = torch.full((len(flat), int(length.max())), tokenizer.pad_id)
    filled = torch.arange(tokens.shape[1]) < length[:, None]
    tokens[filled] = torch.tensor([i for p, a in zip(prompts, answers, strict=True) for i in (*p, *a)])
    positions = before[:, None] + torch.minimum(width, written[:, None] - 1)
    shape = (len(examples), -1)
    return Answers(*(part.unflatten(0, shape) for part in (tokens, positions, width < written[:, None])))


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of every text; texts that come again, as answers do, are encoded once."""
    different = list(dict.fromkeys(texts))
    known = dict(zip(different, tokenizer.encode(different), strict=True))
    return [known[text] for text in texts]


def answer_loss(
    base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"], answers: Answers
) -> Float[Tensor, " P"]:
    """Cross-entropy of each adapter on its own examples, nats a token, averaged over all its answers' tokens.

    Differentiable in `weights`.
    """
    logits = adapted_answer_logits(base, spec, weights, answers.tokens, answers.positions)
    nll = _nll(logits, answers.targets) * answers.valid
    return nll.sum((1, 2)) / answers.valid.sum((1, 2))


@torch.no_grad()
def answer_scores(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"], answers: Answers) -> Scores:
    """Adapter p on the examples `answers[p]`, in passes of bounded memory."""
    width = answers.positions.shape[-1]
    groups = passes(answers, base.model.config.vocab_size)
    parts = [_scores(base, spec, weights[group], answers[group], width) for group in groups]
    place = torch.tensor([i for group in groups for i in group], device=weights.device).argsort()
    return Scores(*(torch.cat(part)[place] for part in zip(*parts, strict=True)))


def passes(answers: Answers, vocabulary: int) -> list[list[int]]:
    """Which adapters share a pass: those with examples of similar length, so that little is padding.

    By themselves, the adapters of a pass are one pass again.
    """
    lengths = (answers.positions.amax((1, 2)) + 1).tolist()
    widths = answers.valid.sum(-1).amax(1).tolist()
    examples = answers.tokens.shape[1]
    room = _room(answers.tokens)
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        group = [*groups[-1], i]
        rows, width = len(group) * examples, max(widths[j] for j in group)
        fits = rows * lengths[i] <= room * TOKENS and rows * width * vocabulary <= room * LOGITS
        if fits or len(group) == 1:
            groups[-1] = group
        else:
            groups.append([i])
    return groups


def _scores(
    base: BaseModel, spec: AdapterSpec, weights: Tensor, answers: Answers, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, exact, predicted) of one pass, in pieces where even a single adapter's examples are too many."""
    answers = answers.trimmed()
    _, examples, length = answers.tokens.shape
    own, room = answers.valid.shape[-1], _room(answers.tokens)
    rows = room * min(TOKENS // length, LOGITS // (own * base.model.config.vocab_size))
    piece = max(1, rows // len(weights))
    parts = []
    for some in (answers[:, i : i + piece] for i in range(0, examples, piece)):
        logits = adapted_answer_logits(base, spec, weights, some.tokens, some.positions)
        predicted, valid = logits.argmax(-1), some.valid
        loss = (_nll(logits, some.targets) * valid).sum(-1) / valid.sum(-1)
        exact = ((predicted == some.targets) | ~valid).all(-1)
        parts.append((loss, exact, F.pad(predicted * valid, (0, width - own))))
    loss, exact, predicted = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return loss, exact, predicted


def _room(x: Tensor) -> int:
    return GPU_ROOM if x.is_cuda else 1


def _nll(logits: Float[Tensor, "P N K V"], targets: Int[Tensor, "P N K"]) -> Float[Tensor, "P N K"]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)
