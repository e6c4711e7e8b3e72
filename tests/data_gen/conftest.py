"""Tasks to collect zoos for, small enough to train in a moment."""

from collections.abc import Callable

import pytest
import torch

from Gpt.scoring import classification_loss
from Gpt.tasks import Task


def labelled_noise(count: int, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian noise around the label, one of three."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.randn(count, *shape, generator=generator) + labels.view(-1, *[1] * len(shape)), labels


@pytest.fixture(scope="session")
def noise_task() -> Callable[..., Task]:
    """Makes a task of a constructor, the shape of its inputs, the sizes of its three splits, and any fields."""

    def make(constructor, shape=(6,), *, train=100, validation=40, test=50, **fields) -> Task:
        sets = [labelled_noise(size, shape, seed) for seed, size in enumerate((train, validation, test))]
        defaults = dict(
            name="toy",
            task_test_fn=classification_loss,
            constructor=constructor,
            data_fn=lambda: sets[2],
            validation_data_fn=lambda: sets[1],
            train_data_fn=lambda: sets[0],
            minimize=True,
            best_prompt=0.0,
            recursive_prompt=0.0,
            metric="loss",
            batched=True,
        )
        return Task(**defaults | fields)

    return make
