"""Whole-network generators whose worth is known in advance get the verdict that they deserve."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from data_gen.collect import collect
from Gpt.data.views import split_by_snapshot
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import ConfigError, ZooError
from Gpt.evaluation import baselines
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.evaluation.whole import HELD_OUT, ORIGINALS, WholeJudge, pca_gaussian
from Gpt.generator import Generator
from Gpt.networks import MLP
from Gpt.recipes import SingleRecipe
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tasks import Task

CONFIG = EvaluationConfig(
    label="toy", networks=12, quick_networks=5, soup=4, noise_scales=(0.02, 0.5), novelty_networks=20, max_batch=5
)


class Replaying(Generator):
    """Writes training networks again, moved by noise of a fixed scale; `scale` 0 copies them."""

    noise_shape, needs_start = (0,), False

    def __init__(self, zoo: Zoo, task: Task, scale: float = 0.0):
        super().__init__(task.structure, FlowMatching(), "euler", 1)
        self.layer = nn.Linear(2, 2, bias=False)
        self.task, self.scale = task, scale
        self.stored = baselines.final_stored(zoo, task, "train").read(zoo, "cpu")
        self.counts = []

    def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
        assert prompt == {} and start is None and not self.training
        self.counts.append(count)
        self.layer(torch.zeros(count, 2))  # eight FLOPs a network
        rows = torch.randint(len(self.stored), (count,), generator=rng("cpu", seed))
        return baselines.noisy(self.stored[rows], self.task.structure, self.scale, seed)


@pytest.fixture(scope="module")
def copied(zoo, task):
    generator = Replaying(zoo, task)
    spent = Spent(zoo_seconds=24.0, training_seconds=10.0, training_examples=100)
    results = WholeJudge(generator, task, zoo, CONFIG, "cpu").evaluate(spent)
    assert max(generator.counts) <= CONFIG.max_batch
    return results


def rows(results):
    return {row.name: row for row in results.table}


def sets(results):
    return {row.name: row for row in results.novelty}


def test_copies_are_called_copies(copied):
    found = sets(copied)["toy, written from noise"]
    assert found.distance < 1e-5 and found.distance_ratio < 1e-5
    assert found.error_overlap == 1.0
    assert found.copying_z < -3
    assert found.novel_and_good == 0


def test_originals_are_compared_with_the_others(copied):
    found = sets(copied)[ORIGINALS]
    assert found.distance_ratio == pytest.approx(1.0)
    assert 0 < found.error_overlap < 1
    assert sets(copied)["nearest original"].distance < 1e-5


def test_every_row_has_its_best_and_worst_network(copied):
    table = rows(copied)
    assert table["toy, written from noise"].metrics["test_loss"].count == CONFIG.networks
    for row in copied.table:
        if row.metrics["test_loss"].count == 1:
            assert "best_loss" not in row.metrics
        else:
            best, mean, worst = (row.metrics[name].mean for name in ("best_loss", "test_loss", "worst_loss"))
            assert best <= mean <= worst
    made = [name for name in table if table[name].kind == "baseline"]
    expected = {"mean network", "soup", "noise 0.02", "noise, matched", "per-weight Gaussian", "PCA Gaussian"}
    assert expected <= set(made)
    assert table["mean network"].metrics["test_loss"].count == 1


def test_costs_and_shared_names(copied):
    assert copied.costs.sample_flops == 8 and copied.costs.generator_flops == 100 * 3 * 8
    assert copied.costs.train_seconds == 24.0 / 120
    assert [row.name for row in copied.novelty] == [row.name for row in copied.table]


def test_matched_noise_goes_as_far_as_what_was_written(zoo, task, check_settings):
    results = check_settings(WholeJudge(Replaying(zoo, task, scale=0.05), task, zoo, CONFIG, "cpu"))
    found = sets(results)
    written, matched = found["toy, written from noise"].distance, found["noise, matched"].distance
    assert matched == pytest.approx(written, rel=0.2)
    assert found["noise 0.02"].distance < 0.6 * written < 5 * written < found["noise 0.5"].distance


def test_the_nearest_original_may_have_given_way_to_others(zoo, task):
    changed, generator = copy(zoo), Replaying(zoo, task)
    changed.former = generator.stored = zoo.read(torch.arange(20), torch.full((20,), 5))
    results = WholeJudge(generator, task, changed, CONFIG, "cpu").evaluate()
    for name in ("toy, written from noise", "nearest original"):
        assert sets(results)[name].distance < 1e-5
    assert sets(results)["retrieval"].distance < 1e-5  # the zoo's own best one


def test_without_held_out_networks_the_report_says_so(zoo, task):
    everything = Zoo.from_tensors(
        zoo.read(torch.arange(30), torch.full((30,), 5))[:, None],
        {name: values[:30, -1:] for name, values in zoo.metrics.items()},
        list(range(30)), [150], task.structure, validation_runs=5,
    )  # fmt: skip
    results = WholeJudge(Replaying(everything, task), task, everything, CONFIG, "cpu").evaluate()
    assert HELD_OUT not in rows(results)
    assert any("no network is held out" in note for note in results.notes)
    alone = Zoo.from_tensors(
        torch.zeros(1, 1, task.structure.size), {"validation_loss": torch.zeros(1, 1)}, [0], [1], task.structure
    )
    with pytest.raises(ZooError, match="one training network"):
        WholeJudge(Replaying(everything, task), task, alone, CONFIG, "cpu").originals  # noqa: B018


def test_a_task_with_nothing_but_a_test_function_is_enough(zoo, task):
    bare = replace(task, correct_fn=None, recipe=None, train_data_fn=None, symmetry=None, batched=False)
    results = WholeJudge(Replaying(zoo, bare), bare, zoo, CONFIG, "cpu").evaluate()
    assert all(row.error_overlap is None for row in results.novelty)
    assert rows(results)[HELD_OUT].metrics["test_loss"].count == 20


def test_the_score_of_training_is_measured_on_validation_data(zoo, task, misleading):
    generator = Replaying(zoo, task)
    generator.train()
    score = WholeJudge(generator, task, zoo, CONFIG, "cpu").score()
    assert generator.training
    assert score.keys() == {"validation_loss", "validation_worst_loss"}
    stored = zoo.metrics["validation_loss"][zoo.split("train"), -1]
    assert stored.min() <= score["validation_loss"] <= score["validation_worst_loss"] <= stored.max() + 1e-6
    assert WholeJudge(generator, misleading, zoo, CONFIG, "cpu").score() == score


def test_snapshots_of_one_training_are_called_that(task, tmp_path):
    single = replace(task, recipe=SingleRecipe(epochs=4, batch_size=50, learning_rate=0.1, augmentation="none"))
    collect(single, tmp_path, runs=1, snapshots=15, spacing="tail", progress=False)
    zoo = split_by_snapshot(Zoo.open(tmp_path, task.structure), 3, 3)
    results = WholeJudge(Replaying(zoo, single), single, zoo, CONFIG, "cpu").evaluate(Spent(zoo_seconds=7.0))
    assert "the originals are snapshots of: 1; " in " ".join(results.notes)
    assert results.costs.train_seconds == 7.0
    assert rows(results)[HELD_OUT].metrics["test_loss"].count == 3


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_trainings_that_were_dropped_are_told(zoo, task, by_snapshot):
    short = copy(zoo)
    short.dropped = {1: "a weight is not finite", 7: "a weight reaches 12"}
    seen = split_by_snapshot(short, 8, 8) if by_snapshot else short
    results = WholeJudge(Replaying(zoo, task), task, seen, CONFIG, "cpu").evaluate()
    assert f"dropped: 2 of {zoo.runs + 2}, such as run 1: a weight is not finite" in " ".join(results.notes)


def test_the_pca_gaussian_has_the_mean_and_covariance_of_the_networks_and_stays_in_their_span():
    structure = Structure.of(MLP(3, 2, 2))
    weights = torch.randn(6, structure.size, generator=rng("cpu", 0)) * torch.linspace(0.1, 2, structure.size)
    drawn = pca_gaussian(weights, structure, 40_000, seed=1)
    torch.testing.assert_close(drawn.double().mean(0), weights.double().mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.double().T.cov(), weights.double().T.cov(), atol=0.1, rtol=0.05)
    centred = (weights - weights.mean(0)).double()
    inside = (drawn[:9] - weights.mean(0)).double()
    projected = inside @ torch.linalg.pinv(centred) @ centred
    torch.testing.assert_close(projected, inside, atol=1e-5, rtol=0)


def test_running_variances_of_a_gaussian_stay_non_negative():
    structure = Structure.of(nn.BatchNorm1d(50))
    weights = torch.rand(4, structure.size, generator=rng("cpu", 0))
    drawn = pca_gaussian(weights, structure, 200, seed=0)
    variances = next(spec for spec in structure.tensors if spec.kind == "running_var")
    assert drawn[:, variances.slice].min() == 0
    assert drawn.min() < 0


def test_the_best_stored_network_is_the_one_that_validation_data_choose(copied, zoo):
    best = 40 + zoo.metrics["validation_loss"][40:, -1].argmin()
    expected = zoo.metrics["test_loss"][best, -1].item()
    assert rows(copied)["retrieval"].metrics["test_loss"].mean == pytest.approx(expected, rel=1e-4)


def test_there_must_be_statistics_to_recalibrate(zoo, task):
    with pytest.raises(ConfigError, match="no batch-norm statistics"):
        WholeJudge(Replaying(zoo, task), task, zoo, replace(CONFIG, recalibrate=True), "cpu").evaluate()
