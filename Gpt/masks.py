"""Class masks: the family of all 1,022 non-trivial two-way splits of ten classes, and the trivial ways to serve an
unseen one.

A mask marks the classes that count as positive; the task is to tell them from the others. Row i of `all_masks` is the
mask whose bits, the first class most significant, spell i + 1: the numbering of RPG (arXiv 2501.11587).

A network for a mask solves the complement too, once its two outputs are swapped, and a neighbour's network errs on
one class only. A fair split therefore holds masks out together with their complements, and, on request, with all
neighbours.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.errors import ConfigError, StructureError
from Gpt.seeds import rng
from Gpt.structure import Structure, TensorSpec

CLASSES = 10


def all_masks() -> Bool[Tensor, "1022 10"]:
    """Every mask but the empty and the full one, in the order of their binary numbers."""
    numbers = torch.arange(1, 2**CLASSES - 1)
    return (numbers[:, None] >> torch.arange(CLASSES - 1, -1, -1)) % 2 == 1


def label_map(mask: Bool[Tensor, "*batch classes"]) -> Int[Tensor, "*batch classes"]:
    """The binary label of every class: 1 for those of the mask. What `data_gen.vision` trains on."""
    return mask.long()


def hamming(a: Bool[Tensor, "n classes"], b: Bool[Tensor, "m classes"]) -> Int[Tensor, "n m"]:
    """Number of classes on which each mask of `a` and each of `b` disagree."""
    return (a[:, None] ^ b[None]).sum(-1)


@dataclass(frozen=True)
class MaskSplit:
    """Which masks are for training, validation and test, and which run is trained on which mask.

    No held-out mask is the complement of another. Training keeps the masks that differ in more than `radius` classes
    from every held-out mask and, unless `complements`, from its complement; what lies within is used by nobody.

    Attributes:
        held_out: number of test masks.
        validation: number of validation masks.
        radius: 0 removes the complements from training, 1 the neighbours at Hamming distance 1 as well.
        seed: of the draw.
        runs_per_mask: runs for each test and each validation mask.
        complements: leave the complements of held-out masks in training. Not a fair split: swapping two outputs is then
            as good as training, which is what it is there to show.

    Raises:
        ConfigError: a number is out of range, or no mask is left to train on.
    """

    held_out: int = 64
    validation: int = 32
    radius: int = 0
    seed: int = 0
    runs_per_mask: int = 1
    complements: bool = False

    def __post_init__(self) -> None:
        pairs = 2 ** (CLASSES - 1) - 1
        if min(self.held_out, self.validation, self.radius) < 0 or self.runs_per_mask < 1:
            raise ConfigError(f"{self}: held_out, validation and radius must not be negative, runs_per_mask at least 1")
        if self.held_out + self.validation > pairs:
            raise ConfigError(f"{self}: there are {pairs} pairs of a mask and its complement; hold fewer masks out")
        if len(self.train_masks) == 0:
            raise ConfigError(f"{self} leaves no mask to train on; hold fewer masks out or lower the radius")

    @cached_property
    def _drawn(self) -> Bool[Tensor, "n 10"]:
        """The held-out masks, at most one of each pair of complements: test masks first."""
        generator = rng("cpu", self.seed, "mask split")
        masks = all_masks()[: 2 ** (CLASSES - 1) - 1]  # those without the first class: one of each pair
        chosen = masks[torch.randperm(len(masks), generator=generator)[: self.held_out + self.validation]]
        flip = torch.rand(len(chosen), 1, generator=generator) < 0.5
        return chosen ^ flip

    @property
    def test_masks(self) -> Bool[Tensor, "held_out 10"]:
        return self._drawn[: self.held_out]

    @property
    def validation_masks(self) -> Bool[Tensor, "validation 10"]:
        return self._drawn[self.held_out :]

    @cached_property
    def train_masks(self) -> Bool[Tensor, "n 10"]:
        """In a random order, so that any stretch of training runs covers the family evenly."""
        masks = all_masks()
        avoided = self._drawn if self.complements else torch.cat([self._drawn, ~self._drawn])
        distance = hamming(masks, avoided)
        kept = masks[(distance > self.radius).all(1)]
        return kept[torch.randperm(len(kept), generator=rng("cpu", self.seed, "mask order"))]

    @property
    def test_runs(self) -> int:
        """Runs of the test split; hand it to `Zoo` as its `test_runs`."""
        return self.held_out * self.runs_per_mask

    @property
    def validation_runs(self) -> int:
        """Runs of the validation split; hand it to `Zoo` as its `validation_runs`."""
        return self.validation * self.runs_per_mask

    def mask_of_runs(self, run_ids: Int[Tensor, " n"]) -> Bool[Tensor, "n 10"]:
        """The mask of every run: ids from 0 cycle through the test masks `runs_per_mask` times, the next ones through
        the validation masks, and all later ones through the training masks without end.

        Raises:
            ConfigError: a run id is negative.
        """
        ids = run_ids.cpu()
        if len(ids) and int(ids.min()) < 0:
            raise ConfigError(f"run ids count from 0, got {int(ids.min())}")
        test, validation = self.test_runs, self.validation_runs
        table = torch.cat([self._drawn, self.train_masks])
        index = torch.where(
            ids < test,
            ids % max(self.held_out, 1),
            torch.where(
                ids < test + validation,
                self.held_out + (ids - test) % max(self.validation, 1),
                len(self._drawn) + (ids - test - validation) % len(self.train_masks),
            ),
        )
        return table[index].to(run_ids.device)


# --- the trivial ways to serve an unseen mask -------------------------------------------------------------------------


def nearest_network(
    wanted: Bool[Tensor, "B classes"], seen: Bool[Tensor, "n classes"], weights: Float[Tensor, "n D"]
) -> Float[Tensor, "B D"]:
    """For every wanted mask, the network of the seen mask at the smallest Hamming distance (the first of equals)."""
    return weights[hamming(wanted, seen.to(wanted.device)).argmin(1).to(weights.device)]


def nearest_or_complement(
    wanted: Bool[Tensor, "B classes"],
    seen: Bool[Tensor, "n classes"],
    weights: Float[Tensor, "n D"],
    structure: Structure,
) -> Float[Tensor, "B D"]:
    """As `nearest_network`, where every seen network also serves its complement with its outputs swapped.

    Solves an unseen mask whose complement was seen as well as training does; the reason to hold complements out.

    Raises:
        StructureError: the network does not end in a layer with two outputs.
    """
    both = torch.cat([seen, ~seen])
    return nearest_network(wanted, both, torch.cat([weights, swap_outputs(weights, structure)]))


def swap_outputs(weights: Float[Tensor, "*batch D"], structure: Structure) -> Float[Tensor, "*batch D"]:
    """The same networks with their two outputs exchanged: the rows of the last layer's weight, and of its bias.

    Raises:
        StructureError: the network does not end in a layer with two outputs.
    """
    swapped = weights.clone()
    for tensor in _last_layer(structure):
        rows = weights[..., tensor.slice].unflatten(-1, (2, -1))
        swapped[..., tensor.slice] = rows.flip(-2).flatten(-2)
    return swapped


def _last_layer(structure: Structure) -> list[TensorSpec]:
    """The last matrix and, where there is one, the bias of the same module."""
    matrices = [tensor for tensor in structure.tensors if len(tensor.shape) == 2]
    if not matrices or matrices[-1].shape[0] != 2:
        found = f"{matrices[-1].name} {matrices[-1].shape}" if matrices else "no matrix"
        raise StructureError(
            f"only a network that ends in two outputs can have them swapped; its last layer is {found}"
        )
    bias = matrices[-1].name.removesuffix("weight") + "bias"
    return [tensor for tensor in structure.tensors if tensor is matrices[-1] or tensor.name == bias]


def ridge_networks(
    wanted: Bool[Tensor, "B classes"],
    seen: Bool[Tensor, "n classes"],
    weights: Float[Tensor, "n D"],
    *,
    penalty: float = 1.0,
    products: bool = False,
) -> Float[Tensor, "B D"]:
    """Networks by ridge regression from mask to weights, with an intercept that is not penalised.

    Sensible only for weights in one basin (one initialisation, or aligned).

    Args:
        penalty: added to the diagonal of the features' scatter matrix; features are -1 and +1.
        products: whether the products of all pairs of classes are features too.

    Raises:
        ConfigError: the penalty is not positive.
    """
    if penalty <= 0:
        raise ConfigError(f"the ridge penalty is {penalty}, expected a positive number")
    x, queries = (_features(masks.to(weights.device), products) for masks in (seen, wanted))
    center, mean = x.mean(0), weights.double().mean(0)
    x, y = x - center, weights.double() - mean
    scatter = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    coefficients = torch.linalg.solve(scatter, x.T @ y)
    return ((queries - center) @ coefficients + mean).to(weights.dtype)


def _features(masks: Bool[Tensor, "n classes"], products: bool) -> Float[Tensor, "n features"]:
    signs = 2.0 * masks.double() - 1
    if not products:
        return signs
    i, j = torch.triu_indices(signs.shape[1], signs.shape[1], offset=1, device=signs.device)
    return torch.cat([signs, signs[:, i] * signs[:, j]], dim=1)


def mean_network(wanted: Bool[Tensor, "B classes"], weights: Float[Tensor, "n D"]) -> Float[Tensor, "B D"]:
    """The mean of all seen networks, whatever is wanted: what ignoring the condition gives."""
    return weights.mean(0).expand(len(wanted), -1)
