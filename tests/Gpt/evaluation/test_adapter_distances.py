"""The judge of adapters for prompts without answers, against generators whose worth is known; no language model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from Gpt.adapters.changes import apart, delta_cosine
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.measure import library_columns
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import adapter_entry
from Gpt.data.adapter_batches import fresh_adapter, task_prompts
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.evaluation.adapter_distances import AdapterDistanceJudge
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.generator import Generator
from Gpt.recipes import AdapterRecipe
from Gpt.report.html import write_report
from Gpt.report.text import print_table, summarise
from Gpt.seeds import rng
from Gpt.tasks import check_entry

SPEC = AdapterSpec(rank=2, targets=("q_proj",))
NAMES = ("red apple", "red pear", "green apple", "green pear", "blue fig", "blue plum")
SPLITS = ("s1", "s3")


@pytest.fixture(scope="module", autouse=True)
def no_language_model():
    def load(name):
        raise AssertionError(f"{name} was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("Gpt.adapters.base._original", load)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    sets = {part: [PromptSet(name, (f"{part} {name}",)) for name in NAMES] for part in ("train", "test")}
    write_prompts(folder, sets)
    family = AdapterFamily(
        str(folder), unseen_rules=2, unseen_combinations=0, validation=2, prompts=2, encoder="hash", seed=1
    )
    return check_entry("mine", adapter_entry(family, AdapterRecipe("tiny", SPEC)) | {"checkpoints": "adapters"})


@pytest.fixture(scope="module")
def zoo(task):
    """A run for each held-out task, then for each validation task, then for each training task."""
    family, size = task.family, task.structure.size
    own = torch.randn(len(NAMES), size, generator=rng("cpu", 0, "adapters"))
    runs = list(range(family.test_runs + family.validation_runs + len(family.splits["train"])))
    members = family.member_of_runs(torch.tensor(runs))
    columns = library_columns(task, own[members], members, "cpu")
    return Zoo.from_tensors(
        own[members][:, None], {name: values[:, None] for name, values in columns.items()}, runs, [0], task.structure,
        test_runs=family.test_runs, validation_runs=family.validation_runs,
    )  # fmt: skip


class Oracle(Generator):
    """Knows every task by its prompts, and writes that task's adapter, `times` as long; of other prompts nothing."""

    needs_start, reads_prompt_sets = False, True

    def __init__(self, task, zoo, times=1.0):
        super().__init__(task.structure, FlowMatching(), "euler", 1)
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.times, self.fresh = times, fresh_adapter(task)
        row_of = {member: row for row, member in enumerate(task.family.member_of_runs(zoo.run_ids).tolist())}
        self.adapters = zoo.read(torch.tensor([row_of[i] for i in range(len(NAMES))]), torch.zeros(6).long())
        known = [task_prompts(task.family, part, torch.device("cpu")).states for part in ("train", "test")]
        self.known = torch.cat(known, 1)

    def loss(self, batch, rng):
        return (batch.target - self.fresh).square().mean() + 0 * self.anchor.sum()

    def write(self, prompt, start, noise, solve, guidance, rng):
        same = (prompt["text"][:, :1, None] == self.known[None]).all((-2, -1)).any(-1)
        found = self.times * self.adapters[same.int().argmax(1)]
        return torch.where(same.any(1)[:, None], found, self.fresh)


def judged(task, zoo, **options):
    judge = AdapterDistanceJudge(
        Oracle(task, zoo, **options), task, zoo, EvaluationConfig(label="test", max_batch=4), "cpu"
    )
    return judge, judge.evaluate(Spent(12.0, 1.0, 10))


@pytest.fixture(scope="module")
def results(task, zoo, check_settings):
    config = EvaluationConfig(label="test", max_batch=4)
    return check_settings(AdapterDistanceJudge(Oracle(task, zoo), task, zoo, config, "cpu"), Spent(12.0, 1.0, 10))


def rows(results):
    return {row.name: row.metrics for row in results.table}


def test_every_row_is_there(results):
    assert list(rows(results)) == [
        "test", "test, 16 prompts", "test, 4 prompts", "test, 1 prompt",
        "test, shuffled prompts", "test, random strings", "test, empty prompts",
        "base model", "own adapter", "nearest of the library",
        "mean adapter", "retrieval: most similar task", "mix by similarity",
    ]  # fmt: skip
    assert results.metric == "s3_distance" and results.minimize, "of unseen tasks the library has no adapter"


def test_without_unseen_tasks_the_report_is_about_the_seen_ones(task):
    family = AdapterFamily(task.family.suite, unseen_rules=0, unseen_combinations=0, validation=2, encoder="hash")
    entry = adapter_entry(family, AdapterRecipe("tiny", SPEC)) | {"checkpoints": "adapters"}
    assert AdapterDistanceJudge.column(check_entry("mine", entry)) == "s1_distance"


def test_a_perfect_generator_is_at_no_distance_and_is_recognised(results):
    for name in ("test", "own adapter"):
        for split in SPLITS:
            for measure in ("distance", "relative_error"):
                assert rows(results)[name][f"{split}_{measure}"].mean == pytest.approx(0, abs=1e-4)
        assert rows(results)[name]["s1_recognised"].mean == 100
        assert rows(results)[name]["s1_nearest"].mean == pytest.approx(0, abs=1e-6)
        assert rows(results)[name]["s3_nearest"].mean > 0.5, "the library has no adapter of that task"
    assert not any("s3_recognised" in metrics for metrics in rows(results).values())


def test_the_base_model_and_prompts_that_say_nothing_are_at_one(results):
    for name in ("base model", "test, random strings", "test, empty prompts"):
        found = rows(results)[name]
        assert [found[f"{split}_distance"].mean for split in SPLITS] == [1, 1]
        assert [found[f"{split}_relative_error"].mean for split in SPLITS] == pytest.approx([100, 100])
    shuffled = rows(results)["test, shuffled prompts"]
    assert all(shuffled[f"{split}_distance"].mean > 0.5 for split in SPLITS)
    assert shuffled["s1_recognised"].mean == 0


def test_leads_are_differences_to_the_generator(results):
    written = rows(results)["test"]
    for name, metrics in rows(results).items():
        for split in SPLITS:
            if name == "test":
                assert f"{split}_lead" not in metrics
            else:
                lead = metrics[f"{split}_distance"].mean - written[f"{split}_distance"].mean
                assert metrics[f"{split}_lead"].mean == pytest.approx(lead)


def test_no_way_to_choose_a_stored_adapter_is_better_than_the_bound(results, task, zoo):
    found = rows(results)
    assert found["nearest of the library"]["s1_distance"].mean == pytest.approx(0, abs=1e-9)
    assert (
        found["nearest of the library"]["s3_distance"].mean <= found["retrieval: most similar task"]["s3_distance"].mean
    )
    own, members = Oracle(task, zoo).adapters, task.family.splits
    cosine = delta_cosine("tiny", SPEC, own[list(members["s3"])], own[list(members["train"])])
    assert found["nearest of the library"]["s3_distance"].mean == pytest.approx(float((1 - cosine.amax(1)).mean()))
    assert found["retrieval: most similar task"]["s1_recognised"].mean == 100, "prompts share the task's words"


def test_length_counts_in_relative_errors_alone(task, zoo):
    _, found = judged(task, zoo, times=0.5)
    for split in SPLITS:
        assert rows(found)["test"][f"{split}_distance"].mean == pytest.approx(0, abs=1e-6)
        assert rows(found)["test"][f"{split}_relative_error"].mean == pytest.approx(50, abs=1e-3)


def test_training_watches_the_validation_tasks(task, zoo):
    judge, _ = judged(task, zoo, times=3.0)
    assert judge.score() == pytest.approx({"validation_distance": 0, "validation_relative_error": 200}, abs=1e-3)


def test_the_library_is_that_of_training_tasks(task, zoo):
    judge, results = judged(task, zoo)
    assert torch.equal(judge.library, Oracle(task, zoo).adapters[list(task.family.splits["train"])])
    assert torch.equal(judge.own["s1"][0], judge.library) and len(judge.own["s3"][0]) == 2
    assert results.costs.train_seconds == 0 and results.costs.break_even is None, "nobody knows what imports took"


def test_of_several_adapters_of_a_task_the_nearest_counts(task, zoo):
    """A second adapter of every task, of which a generator knows the second alone."""
    family = replace(task.family, runs_per_member=2)
    twice = replace(task, family=family)
    runs = list(range(family.test_runs + family.validation_runs + 2 * len(family.splits["train"])))
    members = family.member_of_runs(torch.tensor(runs))
    own, fresh = Oracle(task, zoo).adapters, fresh_adapter(task)
    second = fresh + 3 * torch.randn(own.shape, generator=rng("cpu", 1, "second")) * (own - fresh).std()
    seen = Counter()
    weights = []
    for member in members.tolist():
        weights.append((own, second)[seen[member] % 2][member])
        seen[member] += 1
    weights = torch.stack(weights)[:, None]
    columns = library_columns(twice, weights[:, 0], members, "cpu")
    both = Zoo.from_tensors(
        weights, {name: values[:, None] for name, values in columns.items()}, runs, [0], task.structure,
        test_runs=family.test_runs, validation_runs=family.validation_runs,
    )  # fmt: skip
    knows = Oracle(task, zoo)
    knows.adapters = second
    config = EvaluationConfig(label="test", max_batch=4)
    found = rows(AdapterDistanceJudge(knows, twice, both, config, "cpu").evaluate(Spent(12.0, 1.0, 10)))
    for split in SPLITS:
        members = list(family.splits[split])
        apart_by, error = apart("tiny", SPEC, own[members], second[members])
        assert found["test"][f"{split}_distance"].mean == pytest.approx(0, abs=1e-6)
        assert found["test"][f"{split}_relative_error"].mean == pytest.approx(0, abs=1e-3)
        assert found["another training"][f"{split}_distance"].mean == pytest.approx(float(apart_by.mean()))
        assert found["another training"][f"{split}_relative_error"].mean == pytest.approx(100 * float(error.mean()))
        assert found["own adapter"][f"{split}_distance"].mean == pytest.approx(0, abs=1e-6)


def test_the_report_says_what_it_is_about(results, tmp_path):
    assert "mine: s3 distance" in print_table(results)
    text = summarise(results)
    assert "s3 distance" in text and "points" not in text and "It beats returning a stored network" in text
    (tmp_path / "metrics.jsonl").touch()
    page = write_report(tmp_path, results, {}, tmp_path / "metrics.jsonl", {}).read_text()
    assert "s1 recognised (%)" in page and "s3 lead</th>" in page and "have no answers" in page
