"""Class masks in words, as conditions: sentences for every mask, in wordings that training and evaluation do not share.

A generator that is prompted with sentences meets every mask of a family in several of them; what the held-out masks are
called in the evaluation is put in wordings that no training sentence has.
"""

import random

from jaxtyping import Bool, Float
from torch import Tensor

from Gpt.seeds import derive_seed
from Gpt.text import Encoder
from Gpt.vocabulary import WORDINGS, load_vocabulary

SENTENCES = 4  # for each mask
HELD_OUT_WORDINGS = 4  # for validation, and as many for test


def wordings(split: str) -> tuple[str, ...]:
    """Templates of the "train", "validation" or "test" sentences; no two splits share one."""
    order = random.Random(derive_seed(0, "wordings")).sample(WORDINGS, len(WORDINGS))
    ends = {"test": (0, 1), "validation": (1, 2), "train": (2, len(order))}
    return tuple(order[slice(*(HELD_OUT_WORDINGS * end for end in ends[split]))])


class Descriptions:
    """Embeddings of sentences that describe class masks.

    Args:
        vocabulary: names the classes, see `Gpt.vocabulary`.
        embed: sentences -> embeddings, such as a `Gpt.text.SentenceEncoder`, which keeps what it has read.
    """

    def __init__(self, vocabulary: str, embed: Encoder):
        self.vocabulary, self.embed = load_vocabulary(vocabulary), embed

    def sentences(self, mask: Bool[Tensor, " classes"], split: str) -> list[str]:
        """`SENTENCES` sentences for one mask, a function of both."""
        seeds = (derive_seed(0, "descriptions", split, i) for i in range(SENTENCES))
        return [self.vocabulary.describe(mask, seed, wordings(split)) for seed in seeds]

    def __call__(self, masks: Bool[Tensor, "n classes"], split: str) -> Float[Tensor, "n sentences features"]:
        """Embeddings of every mask's sentences, on the CPU."""
        masks = masks.cpu()
        unique, places = masks.unique(dim=0, return_inverse=True)
        rows = self.embed([sentence for mask in unique for sentence in self.sentences(mask, split)])
        return rows.unflatten(0, (len(unique), SENTENCES))[places]
