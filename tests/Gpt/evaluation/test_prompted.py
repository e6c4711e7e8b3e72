import json
from dataclasses import replace

import pytest
import torch

from Gpt.evaluation import baselines
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.evaluation.population import test_population as measure
from Gpt.evaluation.prompted import PromptJudge
from Gpt.recipes import PpoRecipe

SMALL = EvaluationConfig(
    networks=8,
    prompts=6,
    recursive_steps=3,
    optimiser_steps=20,
    learning_rates=5,
    tuning_networks=4,
    soup=4,
    noise_scales=(0.1,),
    novelty_networks=8,
    max_batch=16,
)


@pytest.fixture(scope="module")
def results(copying, task, zoo):
    phrases = []
    spent = Spent(training_seconds=60.0, zoo_seconds=12.0, training_examples=10)
    found = PromptJudge(copying, task, zoo, SMALL, "cpu").evaluate(spent, phrases.append)
    assert phrases[0] == "choosing the prompt" and phrases[-1] == "costs"
    assert max(copying.batches) <= 16
    return found


def test_a_copying_generator_is_aligned_as_good_as_retrieval_and_found_out(results, zoo):
    table = {row.name: row for row in results.table}
    update = table["G.pt, one update"]
    assert update.kind == "generator" and update.updates == 1 and update.flops == 8
    assert update.metrics.keys() == {"test_loss", "test_error"}
    best = zoo.metrics["validation_loss"][40:].argmin()
    assert update.metrics["test_loss"].mean == pytest.approx(
        zoo.metrics["test_loss"][40:].flatten()[best].item(), rel=1e-4
    )
    reference = table["ordinary training"]
    assert reference.kind == "reference" and reference.seconds == pytest.approx(12 / 120)
    assert reference.metrics["test_loss"].mean == pytest.approx(
        zoo.metrics["test_loss"][:8, -1].mean().item(), rel=1e-4
    )
    assert table["mean network"].metrics["test_loss"].count == 1
    for name in ("retrieval", "noise 0.1", "soup", "interpolation", "per-weight Gaussian"):
        assert table[name].kind == "baseline"
    curves = {curve.name: curve for curve in results.curves}
    assert curves["held-out starts, attainable"].alignment.mean > 0.9
    assert curves["retrieval"].alignment.mean > 0.9
    assert curves["3 updates, attainable"].alignment.mean > 0.9
    assert curves["shuffled prompts"].alignment.mean < 0.2
    assert {name for name, curve in curves.items() if curve.kind == "baseline"} == {"shuffled prompts", "retrieval"}
    assert len(curves["held-out starts"].prompted) == 8 and len(curves["held-out starts"].prompted[0]) == 6
    kinds = {row.name: row.kind for row in results.novelty}
    written = [row for row in results.novelty if row.kind == "generator"]
    assert [row.name for row in written] == ["G.pt", "G.pt, 3 updates"] and kinds["held-out training"] == "reference"
    assert list(kinds.values()).count("baseline") == len(kinds) - 3
    for copied in written:
        assert copied.distance_ratio < 1e-5 and copied.copying_z < -2 and copied.novel_and_good == 0


def test_without_recursive_steps_nothing_is_updated_twice(copying, task, zoo):
    found = PromptJudge(copying, task, zoo, replace(SMALL, recursive_steps=0, optimiser_steps=2), "cpu").evaluate()
    assert found.recursive == [] and {row.updates for row in found.table if row.kind == "generator"} == {1}
    names = [item.name for item in (*found.table, *found.curves, *found.novelty)]
    assert not [name for name in names if "updates" in name]


def test_traces_and_optimisers_start_where_the_generator_does(results, zoo):
    start = zoo.metrics["test_loss"][:8, 0].mean().item()
    held_out = [trace for trace in results.recursive if "starts" not in trace.name]
    assert [len(trace.x) for trace in results.recursive] == [4] * 6
    for trace in [*held_out, *results.optimisers]:
        assert trace.mean[0] == pytest.approx(start, rel=1e-4)
        assert trace.mean[-1] < trace.mean[0]
    assert [trace.name for trace in results.optimisers] == ["SGD, momentum 0.9", "Adam", "AdamW"]
    steps = {row.updates for row in results.table if row.kind == "optimiser"}
    assert {1, 20} <= steps and max(steps) == 20
    notes = " ".join(row.note for row in results.table if row.kind == "optimiser")
    assert all(word in notes for word in ("equal updates", "equal wall-clock", "equal FLOPs", "longest run"))


def test_costs_add_up_and_everything_is_plain_json(results):
    costs = results.costs
    saved = costs.train_seconds - costs.sample_seconds
    assert costs.break_even == pytest.approx(72 / saved)
    assert costs.generator_flops == 10 * 3 * 8
    assert costs.zoo_flops == 120 * costs.train_flops
    assert json.loads(json.dumps(results.to_json()))["metric"] == "test_loss"


def test_the_best_of_several_samples_gets_a_row(copying, task, zoo, check_settings):
    found = check_settings(PromptJudge(copying, task, zoo, replace(SMALL, samples_per_prompt=2), "cpu"))
    rows = {row.name: row for row in found.table}
    assert rows["G.pt, best of 2"].flops == 2 * rows["G.pt, one update"].flops


def test_the_prompt_is_chosen_on_validation_runs_and_images(copying, task, zoo, misleading):
    sample, starts = copying.sample, []

    def watched(prompt, start, **settings):
        starts.append(start)
        return sample(prompt, start, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "sample", watched)
        chosen = [PromptJudge(copying, judged, zoo, SMALL, "cpu").choose_prompt() for judged in (task, misleading)]
    validation = torch.arange(20, 28)
    expected = zoo.read(validation, torch.zeros_like(validation))
    assert torch.equal(torch.cat(starts).unique(dim=0), expected.unique(dim=0))
    assert chosen[0] == chosen[1]


def test_the_best_of_several_samples_is_picked_on_validation_images(idle, zoo, misleading):
    """One sample of two is a trained network, which wrong test labels make look worse than the start that it is of."""
    trained = baselines.best_stored(zoo, misleading, 1).read(zoo, "cpu")

    def sample(prompt, start, **settings):
        return torch.where(torch.arange(len(start))[:, None] % 2 == 0, trained, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "sample", sample)
        judge = PromptJudge(idle, misleading, zoo, replace(SMALL, samples_per_prompt=2), "cpu")
        *_, best = judge.one_update(0).rows
    losses = [measure(misleading, w, "test")["test_loss"].mean() for w in (trained, judge.held_out.weights)]
    assert losses[0] > losses[1] and best.name == "G.pt, best of 2"
    assert best.metrics["test_loss"].mean == pytest.approx(losses[0].item(), rel=1e-5)


def test_an_idle_generator_gains_nothing(idle, task, zoo):
    found = PromptJudge(idle, task, zoo, SMALL, "cpu").evaluate()
    update = found.table[0].metrics["test_loss"].mean
    assert update == pytest.approx(zoo.metrics["test_loss"][:8, 0].mean().item(), rel=1e-4)
    assert found.curves[1].alignment.mean < 0
    assert not found.novelty[0].novel_and_good


def test_a_generator_without_start_and_a_task_without_gradients_leave_parts_out(copying_from_noise, task, zoo):
    task = replace(task, train_data_fn=None, validation_data_fn=None, recipe=PpoRecipe())
    found = PromptJudge(copying_from_noise, task, zoo, replace(SMALL, label="RPG"), "cpu").evaluate()
    assert (found.table[0].name, found.table[0].updates) == ("RPG, written from noise", None)
    assert found.recursive == [] and found.optimisers == []
    notes = " ".join(found.notes)
    assert all(word in notes for word in ("validation_data_fn", "optimisers", "recursive"))


def test_is_reproducible(copying, task, zoo):
    def measured():
        found = PromptJudge(copying, task, zoo, SMALL, "cpu").evaluate()
        return [row.metrics for row in found.table if row.kind != "optimiser"], found.curves, found.novelty

    assert measured() == measured()


def test_validation_score_reads_validation_runs_only(copying, idle, task, zoo):
    copying.train()
    found = PromptJudge(copying, task, zoo, SMALL, "cpu").score()
    assert copying.training
    assert found["validation_loss"] == pytest.approx(zoo.metrics["validation_loss"][40:].min().item(), rel=1e-4)
    assert found["validation_alignment"] > 0.9
    stuck = PromptJudge(idle, task, zoo, SMALL, "cpu").score()
    starts = torch.arange(20, 28)
    assert stuck["validation_loss"] == pytest.approx(zoo.metrics["validation_loss"][starts, 0].mean().item(), rel=1e-4)
    assert stuck["validation_alignment"] < 0
