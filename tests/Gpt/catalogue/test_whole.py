"""The whole-network tasks keep the registry's contract, and go all the way from a recipe to a judged generator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_gen.collect import collect
from Gpt.catalogue.whole import TASKS, large_correct, large_error
from Gpt.conditions import Conditions
from Gpt.data import sources
from Gpt.data.batches import BatchConfig, BatchSampler
from Gpt.data.views import split_by_snapshot
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.evaluation.population import correct_population
from Gpt.evaluation.whole import HELD_OUT, WholeJudge
from Gpt.recipes import SingleRecipe
from Gpt.scoring import classification_correct, classification_error
from Gpt.seeds import rng
from Gpt.tasks import check_entry
from rpg.generator import Rpg, RpgConfig


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A CIFAR-10 of random pixels whose brightness tells two classes apart: 40 training images, 24 test images."""
    draws = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5040), ("test", 24)):
        labels = draws.integers(2, size=count)
        pixels = draws.integers(0, 156, (count, 32, 32, 3)) + 100 * labels[:, None, None, None]
        arrays |= {f"x_{part}": pixels.astype(np.uint8), f"y_{part}": labels}
    folder = tmp_path_factory.mktemp("cifar")
    np.savez(folder / "cifar10.npz", **arrays)
    sources.configure(str(folder), download=False)
    small = sources.load("cifar10")
    with pytest.MonkeyPatch.context() as patch:
        cut = replace(small, validation=tuple(part[:32] for part in small.validation))
        patch.setattr(sources, "load", lambda name: cut)
        yield cut
    sources.configure(None)


@pytest.mark.parametrize("name", TASKS)
def test_every_entry_is_a_task_with_images_of_its_networks_size(name, cifar):
    task = check_entry(name, TASKS[name])
    images, labels = task.data("test")
    assert images.shape[2:] == ((28, 28) if "small" in name else (32, 32)) and len(labels) == 24
    with torch.no_grad():
        error, loss = task.task_test_fn(*task.data("test"), task.template.eval())
        right = task.correct_fn(*task.data("test"), task.template)
    assert error.item() == pytest.approx(100 * (1 - right.float().mean().item()))
    assert isinstance(task.recipe, SingleRecipe) != (name in ("cifar10_cnn_small", "cifar10_cnn_medium"))
    assert loss.isfinite()


def test_large_networks_are_scored_in_parts_with_the_same_result(monkeypatch):
    monkeypatch.setattr("Gpt.catalogue.whole.EXAMPLES", 7)
    seen = []

    class Recording(torch.nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), Recording(12, 3))
    x, y = torch.randn(20, 2, 3, 3, generator=rng("cpu", 0)), torch.randint(3, (20,), generator=rng("cpu", 1))
    torch.testing.assert_close(large_error(x, y, net), classification_error(x, y, torch.nn.Sequential(net)))
    assert torch.equal(large_correct(x, y, net), classification_correct(x, y, torch.nn.Sequential(net)))
    assert max(seen) == 20 and seen[:3] == [7, 7, 6]


@pytest.fixture(scope="module")
def trajectory(cifar, tmp_path_factory):
    entry = TASKS["cifar10_cnn_small_trajectory"]
    entry = entry | {"recipe": replace(entry["recipe"], epochs=20, batch_size=20, tail_iterations=12)}
    task = check_entry("cifar10_cnn_small_trajectory", entry)
    folder = tmp_path_factory.mktemp("trajectory")
    collect(task, folder, runs=1, snapshots=12, spacing="tail", max_weight=1000.0, progress=False)
    return task, split_by_snapshot(Zoo.open(folder, task.structure), 2, 2)


def test_a_generator_learns_one_trajectory_and_is_judged(trajectory):
    task, zoo = trajectory
    torch.manual_seed(0)
    settings = RpgConfig(policy="within_layer", token_size=256, width=32, depth=2, heads=2, steps=4)
    generator = Rpg(task.structure, Conditions({}, 32), FlowMatching(times="logit_normal"), settings)
    draw = BatchSampler(zoo, task, "train", (), BatchConfig(), with_start=False, permute=False)
    generator.fit(draw(64, rng("cpu", 0)))
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        draws = rng("cpu", 1, step)
        loss = generator.loss(draw(16, draws), draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    config = EvaluationConfig(label="RPG", networks=10, noise_scales=(0.02, 0.3), soup=3, quick_networks=2)
    judge = WholeJudge(generator, task, zoo, config, "cpu")
    score, results = judge.score(), judge.evaluate()
    table = {row.name: row.metrics["test_error"] for row in results.table}
    assert score["validation_error"] <= score["validation_worst_error"]
    assert abs(table["RPG, written from noise"].mean - table[HELD_OUT].mean) < 10
    assert table["RPG, written from noise"].mean < table["noise 0.3"].mean + 1e-6
    ratio = {row.name: row.distance_ratio for row in results.novelty}
    assert ratio["RPG, written from noise"] < ratio["noise 0.3"]
    assert any("snapshots of: 1;" in note for note in results.notes)


@pytest.mark.parametrize("name", ["cifar10_cnn_small", "cifar10_cnn_medium"])
def test_populations_of_cnns_are_trained_as_one_batch_and_kept_by_their_final_networks(name, cifar, tmp_path):
    entry = TASKS[name] | {"recipe": replace(TASKS[name]["recipe"], epochs=3, batch_size=20)}
    task = check_entry(name, entry)
    collect(task, tmp_path, runs=3, snapshots=1, spacing="tail", progress=False)
    zoo = Zoo.open(tmp_path, task.structure)
    assert (zoo.runs, zoo.iterations) == (3, [6])
    final = zoo.read(torch.arange(3), torch.zeros(3, dtype=torch.long))
    assert final.isfinite().all() and (final[0] - final[1]).abs().max() > 0.01
    measured = correct_population(task, final, "test").float().mean(1)
    torch.testing.assert_close(zoo.metrics["test_error"][:, 0], 100 * (1 - measured))
