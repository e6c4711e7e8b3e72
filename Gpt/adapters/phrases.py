"""Prompts in new words, put into the words of the library before a generator reads them.

    prompts of a new task [B, N, L, features]
      -> position by position, the mean state of its N prompts
      -> which training task says this there (linear discriminant analysis of its states)
      -> that task's own prompts at that position [B, N, L, features]

Why: what a prompt says at one position (its rule, say) is clear enough by itself, but a generator reads all positions
together and has only met pairs of the library. It takes a doubtful rule for the one that it knows beside this format,
and so answers new combinations with old ones. Here no position sees another, and the combination stays new.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Gpt.adapters.conditions import PromptStates
from Gpt.errors import ConfigError

SHRINKAGE = 0.3  # of the covariance to a multiple of the identity that has its trace; chosen on validation wordings
LEAST = 1e-6  # of that multiple, as a share of the mean square state: each task may have one prompt, and no covariance
KEPT = 32  # prompts of each task


class PhraseBook(nn.Module):
    """Recognises what the prompts of a task say at each of their positions (see `Gpt.adapters.conditions`: sentences).

    Empty before `fit`; all of it is in the state_dict, whose sizes are those of the library it was fitted to.

    Attributes:
        states, mask: some prompts of every training task, `[tasks, N, L, features]` and `[tasks, N, L]`.
        readers, offsets: `[L, features, tasks]` and `[L, tasks]`, the discriminant functions: scores are half the
            negative squared Mahalanobis distances to the tasks' mean states, up to what tasks share. A task that says
            nothing at a position scores -inf there.
    """

    states: Float[Tensor, "tasks N L features"]
    mask: Bool[Tensor, "tasks N L"]
    readers: Float[Tensor, "L features tasks"]
    offsets: Float[Tensor, "L tasks"]

    def __init__(self) -> None:
        super().__init__()
        for name, dims in {"states": 4, "mask": 3, "readers": 3, "offsets": 2}.items():
            self.register_buffer(name, torch.zeros([0] * dims, dtype=torch.bool if name == "mask" else None))

    @torch.no_grad()
    def fit(self, known: PromptStates) -> None:
        """Learn the prompts `[tasks, N, L, features]` of the training tasks, in float64."""
        states, mask = known.states.double(), known.mask[..., None]
        count = mask.sum(1)
        centers = (states * mask).sum(1) / count.clamp_min(1)
        around = (states - centers[:, None]) * mask
        total = mask.sum((0, 1)).clamp_min(1)[..., None]
        covariance = torch.einsum("tnli,tnlj->lij", around, around) / total
        least = LEAST * states.square().mean().clamp_min(torch.finfo(known.states.dtype).tiny)
        unit = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(least)[:, None, None]
        readers = torch.linalg.solve(
            covariance + SHRINKAGE * unit * torch.eye(states.shape[-1]).to(states), centers.permute(1, 2, 0)
        )
        offsets = -0.5 * torch.einsum("tlf,lft->lt", centers, readers)
        self.states, self.mask = known.states[:, :KEPT].clone(), known.mask[:, :KEPT].clone()
        self.readers = readers.to(known.states)
        self.offsets = offsets.masked_fill(count[..., 0].T == 0, -torch.inf).to(known.states)

    def recognise(self, sets: PromptStates) -> Int[Tensor, "B L"]:
        """The training task that says the same at each position; -1 where a set says nothing, or no task ever does.

        Raises:
            ConfigError: prompts have another number of positions than those that were learnt.
        """
        if sets.mask.shape[-1] != len(self.offsets):
            raise ConfigError(
                f"prompts have {sets.mask.shape[-1]} states each, and those of the library had {len(self.offsets)}; "
                "embed them with the encoder and the tokens of the task's family"
            )
        counts = sets.mask.sum(1)
        mean = (sets.states * sets.mask[..., None]).sum(1) / counts.clamp_min(1)[..., None]
        best, task = (torch.einsum("blf,lft->blt", mean, self.readers) + self.offsets).max(-1)
        return task.where((counts > 0) & best.isfinite(), -1)

    def forward(self, sets: PromptStates) -> PromptStates:
        """As many prompts, each position of which is that of the training task that it was recognised as.

        Args:
            sets: `[B, N]` prompts, of any number of tasks.
        """
        task = self.recognise(sets)[:, None]
        prompt = torch.arange(sets.mask.shape[1], device=task.device)[:, None] % self.mask.shape[1]
        position = torch.arange(task.shape[-1], device=task.device)
        mask = self.mask[task, prompt, position] & (task >= 0)
        return PromptStates(self.states[task, prompt, position] * mask[..., None], mask)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, own in list(self.named_buffers()):
            if prefix + name in state_dict:
                setattr(self, name, own.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
