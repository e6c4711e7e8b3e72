"""Renaming hidden units at random: function-preserving augmentation for generators that are not equivariant.

How is known in one of two ways. The symmetry of a network (see `Gpt.structure`) is read by every part of the project.
`aug_fn` is G.pt's walk (Peebles et al. 2022): a function `(net, generator, permute_in_fn, permute_out_fn,
permute_in_out_fn, register_fn)` that visits the tensors of `net` in state_dict order, one or a tuple at a time, and
tells for each whether its columns, its rows, both or neither are permuted. It serves augmentation alone, and takes the
symmetry's place there.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from Gpt.errors import TaskError
from Gpt.structure import Structure

AugFn = Callable[..., None]


def random_index(
    structure: Structure, aug_fn: AugFn | None, template: nn.Module, count: int, rng: torch.Generator
) -> Int[Tensor, "count D"]:
    """Gather indices of `count` random renamings, on the device of `rng`; the identity where there is no symmetry.

    Raises:
        TaskError: `aug_fn` does not visit every tensor exactly once.
    """
    if aug_fn is None:
        if structure.groups:
            return structure.permutation_index(structure.random_permutations(count, rng))
        return torch.arange(structure.size, device=rng.device).expand(count, -1)
    seeds = torch.randint(2**62, (count,), generator=rng, device=rng.device).tolist()
    walks = [walk_index(aug_fn, template, structure.size, torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(walks).to(rng.device)


def walk_index(aug_fn: AugFn, net: nn.Module, size: int, generator: torch.Generator) -> Int[Tensor, " D"]:
    """The gather index of one walk of `aug_fn` over `net`, whose flat vector has `size` entries.

    Raises:
        TaskError: the walk does not visit every tensor exactly once.
    """
    blocks: list[Tensor] = []

    def visit(tensors: Tensor | tuple | list, reorder: Callable[[Tensor], Tensor]) -> None:
        for tensor in tensors if isinstance(tensors, tuple | list) else (tensors,):
            begin = sum(block.numel() for block in blocks)
            blocks.append(reorder(torch.arange(begin, begin + tensor.numel()).view(tensor.shape)).flatten())

    aug_fn(
        net,
        generator,
        lambda tensors, columns: visit(tensors, lambda block: block[:, columns]),
        lambda tensors, rows: visit(tensors, lambda block: block[rows]),
        lambda tensor, columns, rows: visit(tensor, lambda block: block[rows][:, columns]),
        lambda tensors: visit(tensors, lambda block: block),
    )
    index = torch.cat(blocks)
    if index.numel() != size or not torch.equal(index.sort().values, torch.arange(size)):
        raise TaskError(
            f"aug_fn visited {index.numel()} weights of {size}; it must pass every tensor of the state_dict once, in "
            "order, to one of its callbacks, with permutations as index tensors"
        )
    return index
