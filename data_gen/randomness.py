"""Counter-based random numbers for populations: every draw is a hash of (run key, counters), evaluated pointwise.

A run draws the same numbers whatever batch of runs, device or order of steps it is trained in, and nothing has to be
stored or synchronised. All arithmetic is on int64 tensors that hold 32-bit words and never overflow, hence
bit-identical on CPU and GPU.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from Gpt.seeds import derive_seed

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x735A2D97
_HALF_ROUNDS = 8  # six fail chi-square tests on domains of 24 and fewer


def run_keys(seed: int, name: str, run_ids: list[int], device: torch.device | str = "cpu") -> Int[Tensor, "runs 2"]:
    """Two 32-bit words per run, from the named seed `(seed, name, run id)`."""
    seeds = [derive_seed(seed, name, run_id) for run_id in run_ids]
    return torch.tensor([(s & _WORD, s >> 32) for s in seeds], device=device)


def hash32(word: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A mixing bijection of 32-bit words; multipliers below 2^31 keep products inside int64."""
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & _WORD
    word = word ^ (word >> 15)
    word = (word * _MULTIPLIER) & _WORD
    return word ^ (word >> 15)


def random_words(keys: Int[Tensor, "runs 2"], *counters: Int[Tensor, "..."] | int) -> Int[Tensor, "runs slots"]:
    """Uniform 32-bit words for every run and value of the counters (each broadcastable to `[runs, slots]`)."""
    word = keys[:, :1]
    for counter in counters:
        word = hash32(word ^ counter)
    return hash32(word ^ keys[:, 1:])


def below(word: Int[Tensor, "*shape"], bound: int) -> Int[Tensor, "*shape"]:
    """Map uniform 32-bit words to uniform integers in [0, bound), bound < 2^31 (multiply-shift, Lemire 2019)."""
    return (word * bound) >> 32


def permuted(
    keys: Int[Tensor, "runs 2"], epoch: Int[Tensor, ""] | int, positions: Int[Tensor, " slots"], length: int
) -> Int[Tensor, "runs slots"]:
    """Entries `positions` of every run's own random permutation of 0 … length - 1 for one epoch.

    A generalised Feistel network on Z_a x Z_b with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"). Only a handful of the a * b places lie outside [0, length), and a walk passes each of them at most
    once, so it has a fixed number of steps: no data-dependent loop, no sort, no table.
    """
    rows, columns = _near_square(length)
    words = random_words(keys, epoch, torch.arange(2 * _HALF_ROUNDS, device=keys.device)).split(1, dim=1)
    place = _feistel(positions[None], words, rows, columns)
    for _ in range(rows * columns - length):
        place = torch.where(place < length, place, _feistel(place, words, rows, columns))
    return place


def _near_square(length: int) -> tuple[int, int]:
    """Factors a <= b of the smallest near-square domain a * b >= length; the squarest among equals."""
    root = math.isqrt(length)
    candidates = range(max(1, root // 3), root + 1)
    rows = min(candidates, key=lambda a: (-length % a, -a))
    return rows, -(-length // rows)


def _feistel(place: Tensor, words: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """A bijection of 0 … rows * columns - 1: each half-round shifts one coordinate by a keyed hash of the other."""
    halves, sizes = [place // columns, place % columns], [rows, columns]
    for i, (factor, term) in enumerate(zip(words[::2], words[1::2], strict=True)):
        this, other = i % 2, 1 - i % 2
        # Cheaper than hash32 and not injective, which a round function need not be; an affine map alone is too regular
        # (the number of ascents of such permutations varies ten times as much as it should).
        word = (halves[other] * factor + term) & _WORD
        word = ((word ^ (word >> 15)) * _MULTIPLIER) & _WORD
        shifted = halves[this] + below(word, sizes[this]) - sizes[this]
        halves[this] = shifted + ((shifted >> 63) & sizes[this])  # modulo size; torch.where is ten times slower on CPUs
    return halves[0] * columns + halves[1]
