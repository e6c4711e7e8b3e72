"""Kernel ridge: the textbook formula however often masks repeat; it interpolates, and knows products of classes."""

import torch

from Gpt.evaluation.mask_baselines import kernel_ridge_networks
from Gpt.masks import all_masks, hamming
from Gpt.seeds import rng


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks, each several times, and weights."""
    draw = rng("cpu", 0, "kernel ridge")
    masks = all_masks()[torch.randint(1022, (count // 3,), generator=draw)]
    return masks[torch.randint(count // 3, (count,), generator=draw)], torch.randn(count, 7, generator=draw)


def test_repeated_masks_give_the_textbook_solution():
    seen, weights = drawn(60)
    wanted = all_masks()[::100]
    mean = weights.double().mean(0)
    kernel = torch.exp(-0.3 * hamming(seen, seen).double()) + 0.2 * torch.eye(60).double()
    expected = mean + torch.exp(-0.3 * hamming(wanted, seen).double()) @ kernel.inverse() @ (weights - mean)
    found = kernel_ridge_networks(wanted, seen, weights, rate=0.3, penalty=0.2)
    torch.testing.assert_close(found, expected.float())


def test_without_a_penalty_it_returns_the_mean_of_each_seen_mask_and_far_away_the_mean_network():
    seen, weights = drawn(60)
    found = kernel_ridge_networks(seen[:5], seen, weights, rate=0.5, penalty=1e-9)
    for mask, network in zip(seen[:5], found, strict=True):
        torch.testing.assert_close(network, weights[(seen == mask).all(1)].mean(0), atol=1e-5, rtol=1e-5)
    unlike = all_masks()[hamming(all_masks(), seen).min(1).values > 0][:3]
    far = kernel_ridge_networks(unlike, seen, weights, rate=50.0, penalty=0.1)
    torch.testing.assert_close(far, weights.mean(0).expand(3, -1))


def test_it_learns_what_three_classes_say_together():
    masks = all_masks()
    signs = 2.0 * masks.float() - 1
    weights = (signs[:, 0] * signs[:, 4] * signs[:, 7])[:, None]
    seen = torch.arange(len(masks)) % 5 > 0
    found = kernel_ridge_networks(masks[~seen], masks[seen], weights[seen], rate=0.5, penalty=1e-3)
    assert (found.sign() == weights[~seen]).all()
