"""Labelled examples as tensors, and what adapters make of them: loss and greedy exact match in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.adapters.base import BaseModel, Tokenizer
from Gpt.adapters.forward import adapted_answer_logits
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import Example

TOKENS = 2**15  # of one pass without gradients
LOGITS = 2**28  # of one pass without gradients: 1 GB in float32


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
        """Without the columns that are padding in every row."""
        length, width = int(self.positions.max()) + 1, int(self.valid.sum(-1).max())
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
        predicted: the most likely token at each position of the answer; K is that of the longest answer.
    """

    loss: Float[Tensor, "P N"]
    exact: Bool[Tensor, "P N"]
    predicted: Int[Tensor, "P N K"]


def encode_answers(tokenizer: Tokenizer, examples: Sequence[Sequence[Example]]) -> Answers:
    """`[M, N]` examples as tensors on the CPU; prompt and answer are tokenised one by one."""
    flat = [example for row in examples for example in row]
    prompts = tokenizer.encode_all([prompt for prompt, _ in flat])
    answers = tokenizer.encode_all([answer for _, answer in flat])
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    width = max(map(len, answers))
    tokens = torch.full((len(flat), length), tokenizer.pad_id)
    positions = torch.empty(len(flat), width, dtype=torch.long)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        positions[i] = len(prompt) + torch.arange(width).clamp(max=len(answer) - 1)
    valid = torch.arange(width) < torch.tensor([len(answer) for answer in answers])[:, None]
    shape = (len(examples), -1)
    return Answers(*(part.unflatten(0, shape) for part in (tokens, positions, valid)))


def answer_loss(
    base: BaseModel,
    spec: AdapterSpec,
    weights: Float[Tensor, "P D"],
    answers: Answers,
    *,
    chunk: int | None = None,
) -> Float[Tensor, " P"]:
    """Cross-entropy of each adapter on its own examples, nats a token, averaged over all its answers' tokens.

    Differentiable in `weights`; `chunk` as in `forward.adapted_answer_logits`.
    """
    logits = adapted_answer_logits(base, spec, weights, answers.tokens, answers.positions, chunk=chunk)
    nll = _nll(logits, answers.targets) * answers.valid
    return nll.sum((1, 2)) / answers.valid.sum((1, 2))


@torch.no_grad()
def answer_scores(base: BaseModel, spec: AdapterSpec, weights: Float[Tensor, "P D"], answers: Answers) -> Scores:
    """Adapter p on the examples `answers[p]`, in passes of bounded memory."""
    answers = answers.trimmed()
    examples, length = answers.tokens.shape[1:]
    rows = min(TOKENS // length, LOGITS // (answers.valid.shape[-1] * base.model.config.vocab_size))  # of one pass
    networks, width = max(1, rows // examples), max(1, min(examples, rows))
    parts = []
    for first in range(0, len(weights), networks):
        some, theirs = weights[first : first + networks], answers[first : first + networks]
        pieces = [_scores(base, spec, some, theirs[:, i : i + width]) for i in range(0, examples, width)]
        parts.append([torch.cat(piece, 1) for piece in zip(*pieces, strict=True)])
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _scores(base: BaseModel, spec: AdapterSpec, weights: Tensor, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    logits = adapted_answer_logits(base, spec, weights, answers.tokens, answers.positions)
    predicted, valid = logits.argmax(-1), answers.valid
    loss = (_nll(logits, answers.targets) * valid).sum(-1) / valid.sum(-1)
    return loss, ((predicted == answers.targets) | ~valid).all(-1), predicted


def _nll(logits: Float[Tensor, "P N K V"], targets: Int[Tensor, "P N K"]) -> Float[Tensor, "P N K"]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)
