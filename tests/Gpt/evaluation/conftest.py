"""A small task with a zoo that trains in a second, and generators whose behaviour is known in advance."""

from dataclasses import asdict, replace

import pytest
import torch

from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.evaluation import baselines
from Gpt.evaluation.judge import EVERY_JUDGE, EvaluationConfig, Judge
from Gpt.evaluation.optimisers import OPTIMISERS, optimise
from Gpt.evaluation.population import test_population as measure
from Gpt.generator import Generator
from Gpt.networks import MLP
from Gpt.population.functional import stack_initial
from Gpt.recipes import SupervisedRecipe
from Gpt.scoring import classification_correct, classification_loss
from Gpt.tasks import Task, check_entry


class Watched(EvaluationConfig):
    """Notes which settings are read."""

    def __getattribute__(self, name):
        if name in EvaluationConfig.__dataclass_fields__:
            super().__getattribute__("read").add(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="session")
def check_settings():
    """Judges with the settings of a judge, and checks that it reads those that it says it reads, and no others."""

    def check(judge: Judge, *asked):
        watched = Watched.__new__(Watched)
        object.__setattr__(watched, "read", set())
        watched.__dict__.update(asdict(judge.config))
        judge.config = watched
        judge.score()
        results = judge.evaluate(*asked)
        assert watched.read - EVERY_JUDGE == judge.settings
        return results

    return check


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping Gaussian classes in six dimensions."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=rng)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return centres[y] + 0.8 * torch.randn(count, 6, generator=rng), y


@pytest.fixture(scope="session")
def task() -> Task:
    entry = {
        "task_test_fn": classification_loss,
        "constructor": lambda: MLP(6, 4, 3),
        "data_fn": lambda: blobs(200, 1),
        "validation_data_fn": lambda: blobs(200, 2),
        "train_data_fn": lambda: blobs(300, 3),
        "correct_fn": classification_correct,
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "symmetry": MLP.symmetry,
        "metric": "loss",
        "batched": True,
        "recipe": SupervisedRecipe(epochs=10, batch_size=16),
    }
    return check_entry("blobs", entry)


@pytest.fixture(scope="session")
def misleading(task) -> Task:
    """The task with test labels that all training makes worse: whoever selects by them, selects otherwise."""
    x, y = task.data("test")
    return replace(task, data_fn=lambda: (x, (y + 1) % 3))


@pytest.fixture(scope="session")
def zoo(task) -> Zoo:
    """120 runs of 6 snapshots, the first 20 of the test split and the next 20 of the validation split."""
    starts = stack_initial(task.constructor, task.structure, list(range(120)))
    iterations = [0, 2, 5, 15, 50, 150]
    weights = optimise(task, starts, OPTIMISERS[0], [0.05], iterations, seed=0)[:, 0].transpose(0, 1).contiguous()
    metrics = {}
    for split in ("validation", "test"):
        for column, values in measure(task, weights.flatten(0, 1), split).items():
            metrics[column] = values.view(weights.shape[:2])
    return Zoo.from_tensors(
        weights, metrics, list(range(120)), iterations, task.structure, test_runs=20, validation_runs=20
    )


class Copying(Generator):
    """Returns the stored training snapshot that answers the prompt best: perfectly aligned, nothing new."""

    noise_shape = (0,)

    def __init__(self, zoo: Zoo, task: Task, needs_start: bool = True):
        super().__init__(task.structure, FlowMatching(), "euler", 1)
        self.zoo, self.task, self.needs_start = zoo, task, needs_start
        self.layer = torch.nn.Linear(2, 2, bias=False)
        self.batches = []

    def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
        assert (start is not None) == self.needs_start
        assert not self.training
        self.batches.append(count)
        wanted = prompt["target_metric"]
        self.layer(wanted)  # eight FLOPs a network
        return baselines.retrieve(self.zoo, self.task, wanted[:, 1]).read(self.zoo, wanted.device)


@pytest.fixture(scope="module")
def copying(zoo, task) -> Copying:
    return Copying(zoo, task)


@pytest.fixture(scope="module")
def copying_from_noise(zoo, task) -> Copying:
    return Copying(zoo, task, needs_start=False)


class Idle(Generator):
    """Returns what it was given."""

    noise_shape, needs_start = (0,), True

    def __init__(self, task: Task):
        super().__init__(task.structure, FlowMatching(), "euler", 1)
        self.layer = torch.nn.Linear(2, 2)

    def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
        return start.clone()


@pytest.fixture(scope="module")
def idle(task) -> Idle:
    return Idle(task)
