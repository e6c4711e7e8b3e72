"""The judge of adapters, against generators whose worth is known.

Run as a script, this file is one of two processes that judge a generator together: `test_adapters.py FOLDER NUMBER`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_gen.adapters import initial_adapters, train_adapter_population
from Gpt.adapters import answers, decoding
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.suite import Member
from Gpt.catalogue.adapters import TASKS, adapter_entry
from Gpt.data.adapter_batches import fresh_adapter, task_prompts
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import TaskError, ZooError
from Gpt.evaluation import adapter_baselines, adapter_scores
from Gpt.evaluation.adapter_costs import adapter_costs
from Gpt.evaluation.adapter_scores import Line, exact_by_rule, ratio_interval
from Gpt.evaluation.adapter_tasks import AdapterTasks
from Gpt.evaluation.adapters import AdapterJudge
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.generator import Generator
from Gpt.recipes import AdapterRecipe
from Gpt.report.text import print_table
from Gpt.tasks import Task, get_task

CONFIG = EvaluationConfig(label="test", optimiser_steps=1, max_batch=4)


@pytest.fixture(scope="module")
def task():
    return Task(name="lora_tiny", **TASKS["lora_tiny"])


@pytest.fixture(scope="module")
def trained(task):
    """One run for each task, trained for long enough to beat the base model."""
    family = task.family
    runs = list(range(family.test_runs + family.validation_runs + len(family.splits["train"])))
    return train_adapter_population(task, task.recipe, runs, 0, [0, 60], "cpu")


@pytest.fixture(scope="module")
def zoo(task, trained):
    return zoo_of(task, *trained)


def zoo_of(task, weights, metrics):
    family, runs = task.family, list(range(len(weights)))
    return Zoo.from_tensors(
        weights, metrics, runs, [0, 60], task.structure,
        test_runs=family.test_runs, validation_runs=family.validation_runs,
    )  # fmt: skip


@pytest.mark.parametrize(("held_out", "metric"), [({}, "s2_exact"), ({"unseen_combinations": 0}, "s1_exact")])
def test_the_report_is_about_unseen_combinations_where_there_are_any(task, held_out, metric):
    assert AdapterJudge.column(replace(task, family=replace(task.family, **held_out))) == metric


class Oracle(Generator):
    """Recognises the task by its prompts and hands out the adapter that was trained for it."""

    needs_start, reads_prompt_sets = False, True

    def __init__(self, task, zoo):
        super().__init__(task.structure, FlowMatching(), "euler", 1)
        self.register_buffer("fresh", fresh_adapter(task))
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        row_of = {member: row for row, member in enumerate(task.family.member_of_runs(zoo.run_ids).tolist())}
        rows = torch.tensor([row_of[i] for i in range(len(task.family.members))])
        self.register_buffer("adapters", zoo.read(rows, torch.full_like(rows, -1)))
        known = [task_prompts(task.family, part, torch.device("cpu")) for part in ("train", "validation", "test")]
        self.register_buffer("known", torch.cat([prompts.states for prompts in known], 1))

    def loss(self, batch, rng):
        return batch.answer_loss(batch.target).mean()

    def write(self, prompt, start, noise, solve, guidance, rng):
        prompts = prompt["text"]
        same = (prompts[:, None, :, None] == self.known[None, :, None]).all((-2, -1)).any(-1).all(-1)
        found = torch.where(same.any(1), same.int().argmax(1), -1)
        return torch.where(found[:, None] < 0, self.fresh, self.adapters[found])


@pytest.fixture(scope="module")
def results(task, zoo, check_settings):
    return check_settings(AdapterJudge(Oracle(task, zoo), task, zoo, CONFIG, "cpu"), Spent(12.0, 1.0, 10))


def rows(results):
    return {row.name: row.metrics for row in results.table}


def test_every_row_is_there(results):
    assert list(rows(results)) == [
        "test", "test, 16 prompts", "test, 4 prompts", "test, 1 prompt", "test, description only",
        "test, wordings of training",
        "test, shuffled prompts", "test, random strings", "test, empty prompts",
        "base model", "base model, instruction in the prompt", "base model, 3 examples in the prompt",
        "trained adapter",
        "mean adapter", "retrieval: most similar task", "mix by similarity", "task arithmetic",
        "one adapter for all tasks", "the same, with instructions",
    ]  # fmt: skip
    assert results.metric == "s2_exact" and not results.minimize


def test_a_perfect_generator_closes_the_gap(results):
    found = rows(results)
    for split in ("s1", "s2", "s3"):
        for measure in ("exact", "format", "content", "loss"):
            name = f"{split}_{measure}"
            assert found["test"][name] == found["trained adapter"][name] == found["test, 1 prompt"][name]
        assert found["trained adapter"][f"{split}_lead"].mean == 0
    assert found["trained adapter"]["s1_loss"].mean < found["base model"]["s1_loss"].mean - 0.3


def test_controls_fall_back(results):
    """Prompts that are unknown give the base model, other tasks' prompts something worse than the task's own."""
    found = rows(results)
    for control in ("test, random strings", "test, empty prompts"):
        for name in ("s1_exact", "s2_loss", "s3_format"):
            assert found[control][name] == found["base model"][name]
    for split in ("s1", "s2", "s3"):  # s2 has a single task, so that its prompts come from another split
        assert found["test, shuffled prompts"][f"{split}_loss"].mean > found["test"][f"{split}_loss"].mean + 0.1


def test_gap_and_lead_add_up(results):
    for name, metrics in rows(results).items():
        for split in ("s1", "s2", "s3"):
            if f"{split}_gap_closed" in metrics:
                base, top = (rows(results)[n][f"{split}_exact"].mean for n in ("base model", "trained adapter"))
                closed = 100 * (metrics[f"{split}_exact"].mean - base) / (top - base)
                assert metrics[f"{split}_gap_closed"].mean == pytest.approx(closed)
            if name != "test":
                lead = rows(results)["test"][f"{split}_exact"].mean - metrics[f"{split}_exact"].mean
                assert metrics[f"{split}_lead"].mean == pytest.approx(lead)


def test_exact_is_at_most_format_and_content(results):
    for metrics in rows(results).values():
        for split in ("s1", "s2", "s3"):
            assert metrics[f"{split}_exact"].mean <= metrics[f"{split}_format"].mean + 1e-9
            assert metrics[f"{split}_exact"].mean <= metrics[f"{split}_content"].mean + 1e-9


def test_confusions_count_the_tasks_of_every_split(results, task):
    assert [table.name for table in results.confusions] == [
        f"{split}: {what}" for split in ("s2", "s1", "s3") for what in ("rule", "format")
    ]
    for table in results.confusions:
        split = table.name.partition(":")[0]
        assert sum(map(sum, table.counts)) == len(task.family.splits[split])
        assert all(len(row) == len(table.found) for row in table.counts)


def test_a_description_has_no_input(task):
    tasks = AdapterTasks(task, "cpu")
    described, prompts = tasks.descriptions(task.family.source, "s2"), tasks.prompts("s2")
    assert described.states.shape == (1, 1, 1, 384)
    assert (described.states[0, 0, 0] @ prompts.states[0, 0, 0]).abs() < 0.99


def test_what_translation_is_worth_has_a_row(task, zoo):
    """The oracle knows only prompts of the library to the last digit; of others it makes the base model."""

    class Translator(Oracle):
        translates = True

        def write(self, prompt, *rest):
            return super().write({"text": prompt["text"] + (0.0 if self.translates else 1.0)}, *rest)

    judge = AdapterJudge(generator := Translator(task, zoo), task, zoo, CONFIG, "cpu")
    lines, _ = judge.written()
    assert lines[-1].name == "test, prompts not translated" and generator.translates
    fresh = fresh_adapter(task)
    assert all(torch.equal(rows, fresh.expand_as(rows)) for rows in lines[-1].adapters.values())
    assert not torch.equal(lines[0].adapters["s2"], lines[-1].adapters["s2"])


def test_distances_and_costs(task, results):
    own, trained, mean = results.novelty[0], results.novelty[1], results.novelty[2]
    assert own.distance == trained.distance and own.copying_z == trained.copying_z
    assert 0 < mean.distance < trained.distance
    costs = results.costs
    assert costs.train_seconds == pytest.approx(12.0 / 7)
    assert costs.break_even == pytest.approx(13.0 / (12.0 / 7 - costs.sample_seconds))
    steps = task.recipe.iterations * task.recipe.examples
    assert costs.train_flops == pytest.approx(steps * 2 / 3 / 8 * costs.generator_flops / 10, rel=0.2)


def judge_of(task, weights, metrics):
    return AdapterJudge(
        Generator(task.structure, FlowMatching(), "euler", 1), task, zoo_of(task, weights, metrics), CONFIG, "cpu"
    )


def test_baselines_know_the_adapters_of_training_runs_alone(task, trained, monkeypatch):
    """Whatever was trained for held-out and for validation tasks beside them is in no mean, mix or sum."""
    weights, metrics = trained
    held_out = task.family.test_runs + task.family.validation_runs
    others = torch.cat([torch.full_like(weights[:held_out], 100.0), weights[held_out:]])
    monkeypatch.setattr(AdapterJudge, "temperature", lambda judge: 0.1)
    monkeypatch.setattr(AdapterJudge, "line", lambda judge, name, kind, adapters, **_: Line(name, kind, {}, adapters))
    expected, found = (judge_of(task, rows, metrics).from_stored() for rows in (weights, others))
    assert len(found) == 4
    for before, after in zip(expected, found, strict=True):
        assert all(torch.equal(rows, after.adapters[split]) for split, rows in before.adapters.items())
    torch.testing.assert_close(found[0].adapters["s2"][0], weights[held_out:, -1].mean(0))


def test_the_mix_is_chosen_as_if_the_validation_tasks_had_no_adapters(task, trained, monkeypatch):
    weights, metrics = trained
    own = torch.isin(
        task.family.member_of_runs(torch.arange(len(weights))), torch.tensor(task.family.splits["validation"])
    )
    mixes = []

    def scores(base, spec, mixed, answers):
        mixes.append(torch.stack([*mixed.values()]))
        return {temperature: {"loss": -torch.tensor([temperature])} for temperature in mixed}

    monkeypatch.setattr("Gpt.evaluation.adapters.score_adapters", scores)
    for rows in (weights, torch.where(own[:, None, None], 100.0, weights)):
        assert judge_of(task, rows, metrics).temperature() == 0.2, "the least loss"
    assert own.any() and torch.equal(*mixes)


def test_imported_adapters_cost_nothing_that_is_known(task, zoo):
    imported, generator = replace(task, checkpoints="library"), Oracle(task, zoo)
    found = adapter_costs(generator, imported, zoo, Price(0.01, 5.0, 5.0), Spent(12.0, 1.0, 10))
    assert found.train_seconds == found.train_flops == found.zoo_flops == 0
    assert found.break_even is None and found.generator_flops > 0


def test_exact_match_is_listed_by_rule(results):
    trained, written = (note for note in results.notes if "by rule" in note)
    assert trained.removeprefix("trained adapter") == written.removeprefix("test")
    known = [Member("longest", "plain"), Member("longest", "json"), Member("sort", "plain")]
    members = {"s1": known, "s2": [Member("last", "plain")]}
    exact = {"s1": torch.tensor([100.0, 50.0, 80.0]), "s2": torch.tensor([0.0])}
    line = Line("some", "baseline", {split: {"exact": values} for split, values in exact.items()}, {})
    assert exact_by_rule(line, members) == "others 76.7, easy 0.0, sort 80.0, longest 75.0, last 0.0"


def test_no_curve_of_another_metric_stands_beside_exact_match(results, zoo):
    """The zoo measures errors after every stored iteration, the evaluation is about exact matches of held-out tasks."""
    assert "test_error" in zoo.metrics and zoo.snapshots > 1
    assert results.training_curves == []


def test_results_are_plain_numbers(results):
    text = json.dumps(results.to_json(), allow_nan=False)
    assert "s2_exact" in text
    assert "trained adapter" in print_table(results)


def test_score_for_the_training_loop(task, zoo):
    score = AdapterJudge(Oracle(task, zoo), task, zoo, CONFIG, "cpu").score()
    (member,) = task.family.splits["validation"]
    run = task.family.member_of_runs(zoo.run_ids).tolist().index(member, int(zoo.split("train")[0]))
    assert score["validation_error"] == pytest.approx(float(zoo.metrics["validation_error"][run, -1]), abs=1e-4)
    assert score["validation_loss"] == pytest.approx(float(zoo.metrics["validation_loss"][run, -1]), rel=1e-4)


def test_three_examples_stand_before_the_question(task):
    tasks = AdapterTasks(task, "cpu")
    shown = [found.tokens[0, 0].tolist() for found in (tasks.shown_answers("s2"), tasks.answers("s2"))]
    text, bare = tasks.base.tokenizer.decode(shown)
    assert text.count("Input:") == 4 and text.count("Output:") == 4
    assert text.endswith(bare.rstrip("\0"))


@pytest.mark.parametrize("own_a", [False, True])
def test_a_library_without_a_shared_gauge_is_told(own_a):
    spec = AdapterSpec(rank=2, targets=("q_proj",), train_a=True)
    task = Task(name="both", **adapter_entry(TASKS["lora_tiny"]["family"], AdapterRecipe("tiny", spec, own_a=own_a)))
    runs = list(range(7))
    zoo = Zoo.from_tensors(
        initial_adapters(task, task.recipe, runs, 0)[:, None], {}, runs, [0], task.structure,
        test_runs=task.family.test_runs, validation_runs=task.family.validation_runs,
    )  # fmt: skip
    warning = AdapterJudge(Generator(task.structure, FlowMatching(), "euler", 1), task, zoo, CONFIG, "cpu").gauge()
    assert (warning is not None and "do not share a gauge" in warning) == own_a


def test_missing_adapters_are_told(task, zoo):
    few = Zoo.from_tensors(
        zoo.read(torch.arange(5), torch.ones(5, dtype=torch.long))[:, None], {}, [0, 1, 2, 3, 4], [60], task.structure,
        test_runs=task.family.test_runs, validation_runs=task.family.validation_runs,
    )  # fmt: skip
    with pytest.raises(ZooError, match="no trained adapter"):
        AdapterJudge(Oracle(task, zoo), task, few, CONFIG, "cpu").evaluate()
    with pytest.raises(TaskError, match="not about adapters"):
        AdapterTasks(get_task("digits_loss"), "cpu")


def test_ratio_of_means_and_its_interval():
    whole = torch.tensor([10.0, 20.0, 30.0])
    exact = ratio_interval(whole / 4, whole)
    assert (exact.mean, exact.low, exact.high, exact.count) == (0.25, 0.25, 0.25, 3)
    loose = ratio_interval(torch.tensor([0.0, 20.0, 10.0]), whole)
    assert loose.low < loose.mean == 0.5 < loose.high


def judged_in_small_pieces(task, zoo):
    """Everything that the judge finds, less the clock, and how often this process went through the language model.

    A pass holds one task and decoding two, so that three splits of 1, 3 and 2 tasks are six and three pieces.
    """
    done = Counter()

    def counted(module, name):
        work = getattr(module, name)
        patch.setattr(module, name, lambda *given, **named: done.update([name]) or work(*given, **named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "TOKENS", 1000)
        patch.setattr(decoding, "ROWS", 64)
        counted(adapter_scores, "answer_scores")
        counted(decoding, "_continued")
        counted(adapter_baselines, "multitask_adapter")
        judge = AdapterJudge(Oracle(task, zoo), task, zoo, replace(CONFIG, max_batch=2), "cpu")
        score = judge.score()
        found = judge.evaluate(Spent(12.0, 1.0, 10)).to_json()
    del found["table"][0]["seconds"], found["costs"]["sample_seconds"], found["costs"]["break_even"]
    return json.loads(json.dumps({"score": score, "found": found})), dict(done)


def test_two_processes_find_together_what_one_finds_and_each_does_a_part(tmp_path, task, zoo, trained, outputs_of):
    """To the bit; pieces are no multiple of the processes, and those of the one validation task are fewer."""
    expected, done = judged_in_small_pieces(task, zoo)
    torch.save(trained, tmp_path / "trained.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    calls = [[sys.executable, __file__, str(tmp_path), str(number)] for number in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [subprocess.Popen(call, env=environment, **pipes) for call in calls]
    outputs = outputs_of(children, 200)
    assert [child.returncode for child in children] == [0, 0], outputs
    found, parts = zip(*(json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)), strict=True)
    assert list(found) == [expected, expected]
    for kind, times in done.items():
        shares = [part[kind] for part in parts]
        assert sum(shares) == times and max(shares) <= times * 2 / 3


def _judge(folder: Path, number: str) -> None:
    torch.set_num_threads(1)
    task = Task(name="lora_tiny", **TASKS["lora_tiny"])
    zoo = zoo_of(task, *torch.load(folder / "trained.pt"))
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=int(number), world_size=2)
    (folder / f"{number}.json").write_text(json.dumps(judged_in_small_pieces(task, zoo)))
    dist.destroy_process_group()


if __name__ == "__main__":
    _judge(Path(sys.argv[1]), sys.argv[2])
