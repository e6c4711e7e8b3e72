"""Running statistics become those of the training images, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from Gpt.errors import ConfigError
from Gpt.evaluation.population import test_population as measure
from Gpt.evaluation.recalibration import has_statistics, recalibrated
from Gpt.scoring import classification_error
from Gpt.tasks import Task


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator) + 3 * labels[:, None], labels


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def task():
    return Task(
        "norm", classification_error, network, lambda: blobs(100, 1), True, 0.0, 0.0,
        train_data_fn=lambda: blobs(1500, 0), metric="error",
    )  # fmt: skip


@pytest.fixture
def weights(task):
    rows = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(task.structure.size, generator=generator) + 0.5)
    return torch.stack(rows)


def test_statistics_are_those_of_the_first_normalised_layers_inputs(task, weights):
    fresh = recalibrated(task, weights, "cpu")
    inputs = task.data("train")[0].double()
    for old, row in zip(weights, fresh, strict=True):
        before, after = task.structure.unflatten(old), task.structure.unflatten(row)
        hidden = inputs @ before["0.weight"].double().T + before["0.bias"].double()
        batches = hidden.split(500)
        mean = torch.stack([b.mean(0) for b in batches]).mean(0)
        variance = torch.stack([b.var(0) for b in batches]).mean(0)
        torch.testing.assert_close(after["1.running_mean"].double(), mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after["1.running_var"].double(), variance, atol=1e-3, rtol=1e-4)
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"):
            assert torch.equal(before[name], after[name])
    assert torch.equal(recalibrated(task, fresh, "cpu"), fresh)


def test_a_network_with_broken_statistics_is_mended(task):
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    inputs, labels = task.data("train")
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    trained = task.structure.flatten(net.state_dict()).detach()[None]
    broken = trained.clone()
    mean = next(t for t in task.structure.tensors if t.kind == "running_mean")
    broken[:, mean.slice] += 30
    errors = [
        measure(task, w, "test")["test_error"].item() for w in (trained, broken, recalibrated(task, broken, "cpu"))
    ]
    assert errors[1] > errors[0] + 20 and errors[2] < errors[0] + 2


def test_no_batch_is_a_single_example(task, weights):
    """Batch norm over vectors has no variance of one, and the last of 501 must not count as much as 500."""
    small = replace(task, train_data_fn=lambda: blobs(501, 0))
    inputs, structure = small.data("train")[0], task.structure
    for old, new in zip(weights, recalibrated(small, weights, "cpu"), strict=True):
        before, after = structure.unflatten(old), structure.unflatten(new)
        hidden = inputs @ before["0.weight"].T + before["0.bias"]
        torch.testing.assert_close(after["1.running_mean"], hidden.mean(0), atol=0.02, rtol=0)


def test_an_architecture_without_statistics_is_refused(task, weights):
    plain = replace(task, constructor=lambda: nn.Linear(6, 3))
    assert has_statistics(task.structure) and not has_statistics(plain.structure)
    with pytest.raises(ConfigError, match="no batch-norm statistics"):
        recalibrated(plain, torch.zeros(1, plain.structure.size), "cpu")
