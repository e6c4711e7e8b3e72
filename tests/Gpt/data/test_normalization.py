"""Normalised weights have mean 0 and standard deviation 1 in every tensor, and come back unchanged."""

import pytest
import torch
from torch import nn

from Gpt.data.normalization import Normalizer
from Gpt.networks import MLP
from Gpt.seeds import rng
from Gpt.structure import Structure

STRUCTURE = Structure.of(MLP(6, 5, 3))


def networks(count: int = 200) -> torch.Tensor:
    """Every tensor has a mean and a spread of its own."""
    weights = torch.randn(count, STRUCTURE.size, generator=rng("cpu", 0))
    for i, t in enumerate(STRUCTURE.tensors):
        weights[:, t.slice] = 10.0**-i * weights[:, t.slice] + i
    return weights


def test_it_starts_as_the_identity():
    weights = networks()
    assert torch.equal(Normalizer(STRUCTURE).encode(weights), weights)


def test_every_tensor_is_standardised_and_comes_back():
    weights, normalizer = networks(), Normalizer(STRUCTURE)
    normalizer.fit(weights)
    encoded = normalizer.encode(weights)
    for t in STRUCTURE.tensors:
        assert encoded[:, t.slice].mean().item() == pytest.approx(0, abs=1e-2)
        assert encoded[:, t.slice].std().item() == pytest.approx(1, abs=1e-2)
    torch.testing.assert_close(normalizer.decode(encoded), weights, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_never_varies_keeps_its_scale():
    weights, normalizer = networks(), Normalizer(STRUCTURE)
    bias = STRUCTURE.tensors[1].slice
    weights[:, bias] = 0.25
    normalizer.fit(weights)
    assert (normalizer.scale[bias] == 1).all()
    assert normalizer.encode(weights).isfinite().all()
    assert (normalizer.encode(weights)[:, bias] == 0).all()


def normed_networks() -> tuple[Structure, torch.Tensor, slice]:
    """Networks with batch norm, whose running variances lie between zero and hundreds; and the place of these."""
    structure = Structure.of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    weights = torch.randn(50, structure.size, generator=rng("cpu", 1))
    where = next(t.slice for t in structure.tensors if t.kind == "running_var")
    weights[:, where] = (3 * weights[:, where]).exp()
    weights[0, where.start] = 0
    return structure, weights, where


def test_running_variances_come_back_and_are_never_negative():
    structure, weights, where = normed_networks()
    normalizer = Normalizer(structure)
    normalizer.fit(weights)
    torch.testing.assert_close(normalizer.decode(normalizer.encode(weights)), weights, rtol=1e-4, atol=1e-4)
    drawn = normalizer.decode(5 * torch.randn(1000, structure.size, generator=rng("cpu", 2)))
    assert drawn[:, where].min() == 0 and (drawn[:, : where.start] < 0).any()


def test_running_variances_are_standardised_as_logarithms():
    structure, weights, where = normed_networks()
    normalizer = Normalizer(structure)
    normalizer.fit(weights)
    variance = weights[:, where].double()
    logs = (variance / (0.95 * variance.mean()) + 0.05).log()
    expected = (logs - logs.mean()) / logs.std()
    torch.testing.assert_close(normalizer.encode(weights)[:, where].double(), expected, rtol=1e-4, atol=1e-4)
