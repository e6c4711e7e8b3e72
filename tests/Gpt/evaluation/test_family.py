"""Families in closed form: with one-hot images, the network of a mask is the mask itself, so every row is known."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from Gpt.adapters.conditions import HashedWords
from Gpt.data.zoo import Zoo
from Gpt.descriptions import Descriptions
from Gpt.diffusion.objectives import FlowMatching
from Gpt.evaluation import family
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.family import Line, MaskJudge, Wish
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.evaluation.population import correct_population
from Gpt.evaluation.population import test_population as measure
from Gpt.evaluation.statistics import bootstrap_interval
from Gpt.generator import Generator
from Gpt.masks import MaskSplit, hamming
from Gpt.recipes import SupervisedRecipe
from Gpt.report.figures import save_figures
from Gpt.report.html import write_report
from Gpt.report.text import print_table, summarise
from Gpt.scoring import mask_correct, mask_error
from Gpt.tasks import Task, check_entry

FAMILY = MaskSplit(held_out=6, validation=4, runs_per_mask=2)
CONFIG = EvaluationConfig(label="ours", samples_per_prompt=3, max_batch=7)


def one_hot(copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(10).repeat(copies, 1), torch.arange(10).repeat(copies)


def network_of(masks: torch.Tensor) -> torch.Tensor:
    """Weights [-s, s] and no bias, where s is +1 for classes of the mask and -1 for others."""
    signs = 2.0 * masks.float() - 1
    return torch.cat([-signs, signs, torch.zeros(len(masks), 2)], 1)


@pytest.fixture(scope="module")
def task() -> Task:
    entry = {
        "task_test_fn": mask_error,
        "constructor": lambda: nn.Linear(10, 2),
        "data_fn": lambda: one_hot(2),
        "validation_data_fn": lambda: one_hot(1),
        "train_data_fn": lambda: one_hot(3),
        "correct_fn": mask_correct,
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "metric": "error",
        "batched": True,
        "recipe": SupervisedRecipe(epochs=1, batch_size=10, shared_init=True),
        "family": FAMILY,
    }
    return check_entry("one_hot_masks", entry).verify()


@pytest.fixture(scope="module")
def zoo(task) -> Zoo:
    """Every training mask once; run 1, of the second held-out mask, was dropped. Snapshot 0 is numbered by the run."""
    ids = torch.tensor([i for i in range(20 + len(FAMILY.train_masks)) if i != 1])
    masks = FAMILY.mask_of_runs(ids)
    final = network_of(masks)
    weights = torch.stack([ids[:, None].expand_as(final).float(), final], 1)
    error = measure(task, final, "validation", masks)["validation_error"]
    metrics = {"validation_error": torch.stack([torch.full_like(error, 50), error], 1)}
    bounds = {"test_runs": FAMILY.test_runs, "validation_runs": FAMILY.validation_runs}
    return Zoo.from_tensors(weights, metrics, ids, [0, 3], task.structure, **bounds)


class Writing(Generator):
    """Writes the right network, except for the masks and guidances that `fails` picks."""

    noise_shape = (0,)

    def __init__(self, task: Task, fails=lambda mask, guidance: False, needs_start: bool = False):
        super().__init__(task.structure, FlowMatching(), "euler", 2)
        self.fails, self.needs_start = fails, needs_start
        self.conditions = nn.Linear(2, 2)
        self.conditions.dropout = 0.1
        self.asked: list[tuple[torch.Tensor, float]] = []
        self.starts: list[torch.Tensor] = []

    def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
        masks = prompt["class_mask"] > 0.5
        assert not self.training and (start is not None) == self.needs_start and count == len(masks) <= 7
        self.asked += [(mask, guidance) for mask in masks]
        self.starts += [] if start is None else list(start)
        wrong = torch.tensor([self.fails(mask, guidance) for mask in masks])[:, None]
        return network_of(masks ^ wrong)


def judge(generator, task, zoo, config=CONFIG, conditions=("class_mask",), descriptions=None) -> MaskJudge:
    return MaskJudge(generator, task, zoo, config, "cpu", conditions, descriptions)


def rows_of(generator, task, zoo, **config) -> dict:
    results = judge(generator, task, zoo, replace(CONFIG, **config)).evaluate(Spent(zoo_seconds=1.0))
    return {row.name: row for row in results.table}


def test_fewer_masks_may_be_left_for_training_than_are_held_out(task, zoo):
    few = replace(task, family=MaskSplit(held_out=400, validation=60))
    assert len(few.family.train_masks) == 102
    lines, _ = judge(Writing(task), few, zoo).written(Wish(1.0))
    counts = {line.name: len(line.scores["test_error"]) for line in lines}
    assert counts == {"ours, unseen masks": 400, "ours, seen masks": 102, "ours, shuffled masks": 400}
    assert all((line.scores["test_error"] == 0).all() for line in lines[:2])


def test_every_row_is_what_it_must_be(task, zoo):
    rows = rows_of(Writing(task), task, zoo)
    error = {name: row.metrics["test_error"].mean for name, row in rows.items()}
    worst = {name: row.metrics["worst_mask_error"].mean for name, row in rows.items()}
    held_out, seen = FAMILY.test_masks, FAMILY.train_masks
    distance = hamming(held_out, seen).min(1).values.float()
    assert error["ours, unseen masks"] == error["ours, seen masks"] == error["ordinary training"] == 0
    assert error["retrieval: nearest seen mask"] == pytest.approx(10 * distance.mean().item())
    assert worst["retrieval: nearest seen mask"] == 10 * distance.max().item()
    assert error["retrieval: nearest mask or complement"] == pytest.approx(10 * distance.mean().item())
    assert error["ridge from mask to weights"] == error["ridge, with products of classes"] == 0  # weights are linear
    assert error["kernel ridge from mask to weights"] == 0
    other = hamming(held_out, held_out.roll(-1, 0)).diag().float()
    assert error["ours, shuffled masks"] == pytest.approx(10 * other.mean().item())
    fewer = torch.minimum(held_out.sum(1), (~held_out).sum(1)).float()
    assert error["majority class"] == pytest.approx(10 * fewer.mean().item())
    assert worst["majority class"] == 10 * fewer.max().item()
    assert error["mean network"] > 20
    counts = {row.metrics["test_error"].count for row in rows.values()}
    assert counts == {FAMILY.held_out}  # intervals are over masks, and a mask with a dropped run counts like the others


def test_the_worst_mask_and_the_share_of_failures(task, zoo):
    failing = FAMILY.test_masks[2]
    rows = rows_of(Writing(task, lambda mask, guidance: bool((mask == failing).all())), task, zoo)
    row = rows["ours, unseen masks"]
    assert row.metrics["test_error"].mean == pytest.approx(100 / FAMILY.held_out)
    assert row.metrics["worst_mask_error"].mean == 100
    assert row.metrics["worst_mask_error"].count == CONFIG.samples_per_prompt
    assert rows["ours, seen masks"].metrics["test_error"].mean == 0


def test_the_lead_is_the_difference_mask_by_mask(task, zoo):
    """Failures cost 100 points on two masks; what a row's own masks differ in does not widen the interval."""
    failing = FAMILY.test_masks[[2, 4]]
    rows = rows_of(Writing(task, lambda mask, guidance: bool((mask == failing).all(1).any())), task, zoo)
    own = torch.zeros(FAMILY.held_out)
    own[[2, 4]] = 100
    distance = hamming(FAMILY.test_masks, FAMILY.train_masks).min(1).values.float()
    expected = bootstrap_interval(10 * distance - own, CONFIG.seed)
    assert vars(rows["retrieval: nearest seen mask"].metrics["lead"]) == pytest.approx(vars(expected))
    assert rows["ordinary training"].metrics["lead"].mean == pytest.approx(-200 / FAMILY.held_out)
    unpaired = {name for name, row in rows.items() if "lead" not in row.metrics}
    assert unpaired == {"ours, unseen masks", "ours, seen masks"}  # itself, and other masks

    upwards = Line("other", "baseline", {"test_accuracy": torch.tensor([70.0])}, torch.ones(1), torch.tensor([1]))
    ours = replace(upwards, scores={"test_accuracy": torch.tensor([50.0, 95.0])}, held_out=torch.arange(2))
    assert upwards.row(ours, replace(task, minimize=False), 0).metrics["lead"].mean == 25


def test_guidance_is_chosen_on_validation_masks_and_test_masks_are_met_once(task, zoo):
    validation = FAMILY.validation_masks
    generator = Writing(task, lambda mask, guidance: guidance != 1.5 and bool((validation == mask).all(1).any()))
    rows = rows_of(generator, task, zoo)
    assert "guidance 1.5" in rows["ours, unseen masks"].note
    for guidance, counted in ((1.0, 1), (2.0, 0)):  # one more is written to count operations, and not measured
        asked = torch.stack([mask for mask, g in generator.asked if g == guidance])
        assert (hamming(asked, validation).min(1).values > 0).sum() == counted
    unguided = Writing(task)
    unguided.conditions.dropout = 0.0  # without a null condition there is nothing to choose
    rows_of(unguided, task, zoo)
    assert {guidance for _, guidance in unguided.asked} == {1.0}


def test_shuffled_masks_do_not_bother_a_generator_that_ignores_its_prompt(task, zoo):
    class Deaf(Writing):
        def sample(self, prompt, *args, **kwargs):
            return network_of(FAMILY.test_masks[:1]).expand(len(prompt["class_mask"]), -1)

    rows = rows_of(Deaf(task), task, zoo)
    own, other = (rows[f"ours, {name} masks"].metrics["test_error"].mean for name in ("unseen", "shuffled"))
    assert own == pytest.approx(other)


def test_a_generator_that_needs_starts_gets_those_of_the_held_out_runs(task, zoo):
    generator = Writing(task, needs_start=True)
    rows_of(generator, task, zoo)
    assert {float(start[0]) for start in generator.starts} == set(range(FAMILY.test_runs)) - {1}


def test_a_complement_with_swapped_outputs_is_as_good_as_the_mask_where_the_split_keeps_it(task, zoo):
    assert "complement with swapped outputs" not in rows_of(Writing(task), task, zoo)
    family = replace(FAMILY, complements=True)
    ids = torch.arange(20 + len(family.train_masks))
    masks = family.mask_of_runs(ids)
    lost = ids[(masks == ~family.test_masks[3]).all(1)]  # one complement was not trained, or dropped
    kept = ids[ids != lost]
    weights = network_of(family.mask_of_runs(kept))[:, None]
    metrics = {"validation_error": torch.zeros(len(kept), 1)}
    bounds = {"test_runs": family.test_runs, "validation_runs": family.validation_runs}
    near = Zoo.from_tensors(weights, metrics, kept, [3], task.structure, **bounds)
    row = rows_of(Writing(task), replace(task, family=family), near)["complement with swapped outputs"]
    assert row.metrics["test_error"].mean == 0 and row.metrics["test_error"].count == family.held_out - 1
    assert row.note == "5 of 6 masks have theirs in training"


class Wishing(Writing):
    """Serves one wanted error alone."""

    serves = 0.25

    def sample(self, prompt, start=None, **kwargs):
        given, wanted = prompt["target_metric"].unbind(1)
        assert given.isnan().all() if start is None else torch.allclose(given, self.given(prompt["class_mask"], start))
        self.fails = lambda mask, guidance: not torch.isclose(wanted[0], torch.tensor(self.serves))
        return super().sample({"class_mask": prompt["class_mask"]}, start, **kwargs)

    def given(self, masks, start):
        return measure(self.task, start, "validation", masks > 0.5)["validation_error"]


@pytest.mark.parametrize("needs_start", [False, True])
def test_the_metric_that_is_asked_for_is_chosen_on_the_validation_masks(task, zoo, needs_start):
    """Trained networks reach 0, 1/N, 2/N … percent; it is the lower quartile that is served."""
    finals = torch.linspace(0, 1, zoo.runs - 19)
    error = torch.cat([torch.full((19,), 7.0), finals])
    metrics = {"validation_error": torch.stack([torch.full_like(error, 50), error], 1)}
    weights = zoo.read(torch.arange(zoo.runs).repeat_interleave(2), torch.tensor([0, 1]).repeat(zoo.runs))
    bounds = {"test_runs": FAMILY.test_runs, "validation_runs": FAMILY.validation_runs}
    graded = Zoo.from_tensors(weights.unflatten(0, (-1, 2)), metrics, zoo.run_ids, [0, 3], task.structure, **bounds)
    generator = Wishing(task, needs_start=needs_start)
    generator.task = task
    both = ("class_mask", "target_metric")
    results = judge(generator, task, graded, conditions=both).evaluate()
    assert results.table[0].metrics["test_error"].mean == 0
    assert "asked for error 0.25, likewise" in results.table[0].note
    generator.serves = 0.0  # the best attained is what the training loop asks for
    assert judge(generator, task, graded, conditions=both).score()["validation_error"] == 0


def test_held_out_masks_are_asked_for_in_held_out_wordings_and_several_sentences(task, zoo, monkeypatch):
    words, asked = Descriptions("digits", HashedWords()), []

    def heard(descriptions, masks):
        """The second of four sentences is misunderstood in one class."""
        assert descriptions is words
        return masks[:, None] ^ (torch.arange(4) == 1)[:, None] & (torch.arange(10) == 9)

    monkeypatch.setattr(family, "heard", heard)

    class Reading(Writing):
        """Told the mask by a sentence alone, it writes nonsense; notes what it was told."""

        def sample(self, prompt, *args, count=None, guidance=1.0, **kwargs):
            asked.append((guidance, prompt))
            mask = prompt.get("class_mask", torch.zeros(count, 10))
            return super().sample({"class_mask": mask}, *args, count=count, guidance=guidance, **kwargs)

    options = {"conditions": ("class_mask", "text"), "descriptions": words}
    results = judge(Reading(task), task, zoo, **options).evaluate()
    rows = {row.name: row.metrics["test_error"].mean for row in results.table}
    assert rows["ours, unseen masks"] == 0 < rows["ours, unseen masks in words alone"]
    read = next(row for row in results.table if row.name == "ours, unseen masks read off words")
    assert read.metrics["test_error"].mean == pytest.approx(10 * 5 / 18)  # of 18 networks
    assert "75% of the sentences" in read.note
    told = [(mask, text) for _, p in asked if len(p) == 2 for mask, text in zip(*p.values(), strict=True)]
    for masks, split in ((FAMILY.validation_masks, "validation"), (FAMILY.test_masks, "test")):
        for mask in masks:
            known = words(mask[None], split)[0]
            used = torch.stack([text for other, text in told if torch.equal(other > 0.5, mask)])
            assert (used[:, None] == known).all(2).any(1).all()
            assert len(used.unique(dim=0)) >= min(CONFIG.samples_per_prompt, len(known.unique(dim=0))) - 1
    score = judge(Reading(task), task, zoo, **options).score()
    assert score["validation_error"] == 0


def test_the_score_of_the_training_loop_reads_validation_masks_alone(task, zoo):
    failing = FAMILY.validation_masks[1]
    generator = Writing(task, lambda mask, guidance: bool((mask == failing).all()))
    generator.train()
    score = judge(generator, task, zoo).score()
    assert score == {"validation_error": 25.0, "validation_worst_mask": 100.0}
    assert torch.equal(torch.stack([mask for mask, _ in generator.asked]), FAMILY.validation_masks)
    assert generator.training


def test_selection_reads_validation_masks_and_images_alone(task, zoo, monkeypatch):
    splits = []

    def noted(task, weights, split, masks, **options):
        splits.append(split)
        assert (hamming(masks, FAMILY.validation_masks) == 0).any(1).all()
        return measure(task, weights, split, masks, **options)

    monkeypatch.setattr(family, "test_population", noted)
    selecting = judge(Writing(task), task, zoo)
    selecting.score()
    selecting.choose_wish()
    selecting.regression(family.ridge_networks, family.RIDGE_SETTINGS)
    assert len(splits) == 1 + 3 + len(family.RIDGE_SETTINGS) and set(splits) == {"validation"}


def test_results_are_drawn_and_reported(task, zoo, tmp_path, check_settings):
    results = check_settings(judge(Writing(task), task, zoo))
    json.dumps(results.to_json())
    assert "ours, unseen masks" in print_table(results)
    summary = summarise(results)
    assert "ordinary training" in summary and " one by one" in summary
    assert "lead (points)" in write_report(tmp_path, results, {}, tmp_path / "metrics.jsonl", {}).read_text()
    (tmp_path / "metrics.jsonl").write_text("")
    figures = save_figures(results, tmp_path / "metrics.jsonl", tmp_path)
    page = write_report(tmp_path, results, {}, tmp_path / "metrics.jsonl", figures)
    assert "majority class" in page.read_text()
    assert any("complements" in note for note in results.notes)
    assert any("one initialisation" in note for note in results.notes)


@pytest.mark.parametrize("batch", [1, 4, 256])
def test_networks_are_measured_on_their_own_masks_in_any_chunks(task, batch):
    masks = FAMILY.train_masks[:9]
    weights = network_of(masks.roll(1, 0)) + 0.1 * torch.randn(9, 22, generator=torch.Generator().manual_seed(0))
    wanted = 10 * hamming(masks, masks.roll(1, 0)).diag().float()
    for variant in (task, replace(task, batched=False)):
        assert torch.allclose(measure(variant, weights, "test", masks, batch=batch)["test_error"], wanted)
        correct = correct_population(variant, weights, "test", masks, batch=batch)
        assert torch.allclose(100 * (1 - correct.float().mean(1)), wanted)
    first = measure(task, network_of(FAMILY.test_masks), "test")["test_error"]  # without masks, the first held-out one
    assert torch.allclose(first, 10 * hamming(FAMILY.test_masks, FAMILY.test_masks[:1])[:, 0].float())


def test_a_family_may_be_judged_by_something_else_than_its_error(task, zoo):
    """Then nothing is said of the majority class, of which the error alone is known."""
    other = replace(task, task_test_fn=lambda x, y, mask, net: mask_error(x, y, mask, net)[1], metric="metric")
    runs, snapshots = torch.arange(zoo.runs).repeat(2, 1), torch.arange(2)[:, None].expand(-1, zoo.runs)
    weights = zoo.read(runs.flatten(), snapshots.flatten()).unflatten(0, (2, -1)).transpose(0, 1)
    metrics = {"validation_metric": zoo.metrics["validation_error"]}
    bounds = {"test_runs": FAMILY.test_runs, "validation_runs": FAMILY.validation_runs}
    renamed = Zoo.from_tensors(weights, metrics, zoo.run_ids, zoo.iterations, zoo.structure, **bounds)
    rows = rows_of(Writing(other), other, renamed)
    assert "majority class" not in rows and "lead" in rows["mean network"].metrics
