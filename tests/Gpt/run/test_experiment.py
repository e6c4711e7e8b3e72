"""The parts of a run: every configuration has them, and what does not fit together is named early."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import main
from Gpt.adapters.spec import AdapterSpec, adapter_structure
from Gpt.catalogue.adapters import adapter_entry
from Gpt.errors import ConfigError, TaskError
from Gpt.population.functional import Population
from Gpt.run.command_line import CONFIGS, compose
from Gpt.run.experiment import Experiment
from Gpt.tasks import TASK_METADATA, check_entry

TINY = [
    "zoo.runs=96", "zoo.test_runs=16", "zoo.validation_runs=16", "generator.width=32", "generator.depth=1",
    "generator.heads=2", "logger=disabled", "device=cpu",
]  # fmt: skip
FROM_NOISE = "generator={name: rpg, width: 32, depth: 1, heads: 2, identities: 3, steps: 2}"
CONFIG_NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "base")


def experiment(*settings: str, name: str = "digits_loss") -> Experiment:
    return Experiment(compose(name, list(settings)), name)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["task=digits_los"], TaskError, ["digits_los", "'digits_loss'", "task_modules"]),
        (["task_modules=[mine.py]"], TaskError, ["mine.py", "no file"]),
        (["zoo.recipe={epoch: 2}"], ConfigError, ["'zoo.recipe.epoch'", "'epochs'"]),
        (["zoo.recipe={epochs: ten}"], ConfigError, ["zoo.recipe.epochs='ten'", "integer"]),
        (["generator.name=gtp"], ConfigError, ["generator.name=gtp", "'gpt'"]),
        (["objective.name=flows"], ConfigError, ["objective.name=flows", "'flow'"]),
        (["condition.names=[target_metrics]"], ConfigError, ["condition.names", "'target_metric'"]),
        (["generator.heads=3"], ConfigError, ["generator.heads=3", "generator.width=32"]),
        (["generator.sampler=ddpm"], ConfigError, ["sampler", "ddpm"]),
        (["zoo.snapshots=1"], ConfigError, ["snapshots"]),
        (["condition.encoder=mine"], ConfigError, ["condition.encoder=mine", "told no sentences", "leave it out"]),
        (["zoo.refresh_every=5"], ConfigError, ["zoo.refresh_every", "zoo.store=false"]),
        (
            ["zoo.refresh_every=5", "zoo.store=false", "~generator.rounds", FROM_NOISE],
            ConfigError,
            ["refresh_every", "identities"],
        ),
        (["zoo.refresh_every=5", "zoo.store=false", "zoo.align=true"], ConfigError, ["refresh_every", "aligned"]),
    ],
)
def test_wrong_parts_are_named_before_anything_is_trained(tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    wrong = experiment(*TINY, *arguments)
    with pytest.raises(error) as caught:
        _ = wrong.task, wrong.generator, wrong.zoo
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "zoo.shard_runs=0", "zoo.population=0", "zoo.refresh_every=-1", "zoo.max_weight=0.0", "zoo.recipe.batch_size=0",
        "zoo.recipe.epochs=-1", "batches.last_snapshots=-1", "batches.from_initial=2.0", "condition.dropout=-0.1",
        "generator.heads=0", "generator.depth=-1", "generator.steps=0",
    ],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused_by_their_names(setting):
    with pytest.raises(ConfigError, match=rf"configuration: {re.escape(setting)}: Input should be"):
        wrong = experiment(*TINY, setting)
        _ = wrong.task, wrong.generator


def test_base_rank_targets_and_form_of_adapters_are_settings():
    pytest.importorskip("transformers")
    plain = experiment(name="lora_tiny").task
    spec = "spec: {rank: 2, alpha: 3, targets: [q_proj, up_proj], dora: true}"
    task = experiment(f"zoo.recipe={{{spec}, iterations: 7}}", name="lora_tiny").task
    assert task.recipe.spec == AdapterSpec(2, 3, ("q_proj", "up_proj"), dora=True)
    assert (task.recipe.base, task.recipe.learning_rate) == (plain.recipe.base, plain.recipe.learning_rate)
    assert task.structure.fingerprint == adapter_structure("tiny", task.recipe.spec).fingerprint
    other = Population(task.template, task.structure, torch.zeros(1, task.structure.size))
    before = Population(plain.template, plain.structure, torch.zeros(1, plain.structure.size))
    other.weights[:] = task.structure.flatten(task.template.state_dict())
    assert float(task.score(other, "test")) == float(plain.score(before, "test")), "both are the base model"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("{spec: {rang: 2}}", "'zoo.recipe.spec.rang'; did you mean 'rank'"),
        ("{spec: {rank: 0}}", "rank and alpha must be positive"),
        ("{spec: {targets: [v]}}", "adapter targets ['v']: the base model's linear layers are"),
        ("{own_a: true}", "set spec.train_a=true"),
        ("{base: /nowhere/nothing}", "base model '/nowhere/nothing' cannot be read"),
    ],
)
def test_wrong_forms_of_adapters_are_named(recipe, words):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=re.escape(words)):
        _ = experiment(f"zoo.recipe={recipe}", name="lora_tiny").task.structure


def test_no_adapter_is_trained_without_the_model_that_reads_prompts(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("Gpt.text.BUNDLED", "no_such_package")
    assert experiment(name="lora_tiny").task.family.encoder == "hash"
    family = replace(TASK_METADATA["lora_tiny"]["family"], encoder="sentences")
    entry = adapter_entry(family, TASK_METADATA["lora_tiny"]["recipe"])
    monkeypatch.setitem(TASK_METADATA, "lora_tiny_tokens", entry)
    with pytest.raises(ConfigError, match=r"gpt-weights\[text\]"):
        _ = experiment(name="lora_tiny").task


def test_prompts_of_adapters_are_not_read_by_the_encoder_of_sentences_about_masks():
    pytest.importorskip("transformers")
    with pytest.raises(
        ConfigError, match="condition.encoder=mine: task 'lora_tiny_tokens': .* its family; leave it out"
    ):
        _ = experiment("condition.encoder=mine", name="lora_tiny").task


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("generator.sampler=ddpm", "sampler"),
        ("logger=swanlab", "swanlab"),
        ("condition=none", "add condition=target_metric"),
        ("condition=class_mask", "condition class_mask: task 'digits_loss' has no masks"),
        ("zoo.test_runs=0", "zoo.test_runs=0 leaves nothing for the test split"),
        ("zoo.validation_runs=0", "zoo.validation_runs=0 leaves nothing for the validation split"),
    ],
)
def test_no_zoo_is_collected_for_what_cannot_be_trained(tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for settings in ([], ["dry_run=true"]):
        with pytest.raises(ConfigError, match="the dry run says about" if settings else words):
            main.run(experiment(*TINY, argument, *settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [["zoo.test_runs=0"], ["zoo.validation_runs=0", "test_only=true"]])
def test_unprompted_generators_are_judged_without_held_out_networks(settings):
    experiment("device=cpu", "logger=disabled", *settings, name="digits_rpg").check_judging()


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:1", "cuda:", "cuda:-1", "cuda:01"])
def test_a_device_that_does_not_exist_or_cannot_be_used_is_named(name):
    with pytest.raises(ConfigError, match=f"device={name} is none; use auto, cpu, cuda or cuda:N"):
        _ = experiment(f"device='{name}'").device


def test_cuda_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert experiment("device=cuda:1").device == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="device=cuda:2, but torch finds 2 CUDA devices"):
        _ = experiment("device=cuda:2").device
    monkeypatch.setattr("Gpt.run.experiment.world", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match="device=cuda:3, but torch finds 2 CUDA devices"):
        _ = experiment("device=cuda").device


def test_published_weights_leave_a_changing_zoo_as_it_began():
    changing = ["zoo.store=false", "zoo.refresh_every=5", "resume_path=mnist_loss.pt", "test_only=true"]
    assert experiment(*changing).stream is None


def test_a_missing_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="device=cuda:1, but torch finds no CUDA device; use device=cpu"):
        _ = experiment("device=cuda:1").device


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_every_configuration_composes_and_builds_its_generator(name, monkeypatch):
    for initialise in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "trunc_normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, initialise, lambda tensor, *_, **__: tensor)  # memory not touched is free
    built = experiment(name=name)
    config = built.config
    assert config.task in TASK_METADATA
    if getattr(TASK_METADATA[config.task].get("recipe"), "base", None) == "smollm2":
        pytest.importorskip("gguf")  # the language model is not installed
    for group in ("zoo", "trainer", "evaluation", "logger", "objective", "condition"):
        assert getattr(config, group) is not None
    task = check_entry(config.task, TASK_METADATA[config.task])
    # Token indices have values, which the meta device has not; the paper's generators have none, and are far larger.
    device = torch.device("meta" if config.generator["name"] == "gpt_paper" else "cpu")
    built.__dict__ |= {"task": task, "device": device}
    with device:
        assert sum(p.numel() for p in built.generator.parameters()) > 1000


def test_a_generator_that_is_not_told_the_mask_is_refused_for_a_family():
    with pytest.raises(ConfigError, match="'digits_mask' is one task for each class mask.*names=\\[class_mask\\]"):
        _ = experiment("condition=none", name="digits_mask_rpg").task


def test_published_rpg_can_be_had_by_its_group():
    group = ["generator=rpg_paper_tiny", "distillation.weight=0", "device=cpu"]
    fitting = ["objective=ddpm_eps", "generator.condition=head", "condition.dropout=0"]
    assert experiment(*group, *fitting, name="digits_mask_rpg").generator.default_steps == 1000
    with pytest.raises(ConfigError, match="predicts noise"):
        _ = experiment(*group, name="digits_mask_rpg").generator


def test_shares_of_a_batch_are_checked_with_the_rest(monkeypatch):
    with pytest.raises(ConfigError, match=r"trainer\.slices=3 must divide trainer\.batch_size=256"):
        experiment("trainer.slices=3")
    monkeypatch.setattr("Gpt.run.experiment.world", lambda: 4)
    with pytest.raises(ConfigError, match=r"trainer\.slices=2 must be a multiple of the 4 processes"):
        experiment("trainer.slices=2", "device=cpu").check_trainable()


@pytest.mark.parametrize(("minimize", "score"), [(True, 0.5), (False, -0.5)])
def test_the_lowest_score_is_the_best_one_of_losses_and_of_returns(monkeypatch, minimize, score):
    run = experiment(*TINY)
    run.task = replace(run.task, minimize=minimize)
    found = {"validation_loss": 0.5, "validation_alignment": 0.9}
    monkeypatch.setattr(run, "judge", lambda generator: SimpleNamespace(score=lambda: found))
    assert run.score(run.generator) == {"generated_loss": 0.5, "generated_alignment": 0.9, "score": score}


def test_the_centre_is_the_mean_of_all_training_networks():
    small = ("zoo.store=false", "zoo.runs=40", "zoo.test_runs=4", "zoo.validation_runs=4", "zoo.snapshots=3")
    run = experiment("beside=[]", *small, "zoo.recipe={epochs: 1}", "generator.policy=within_layer", name="digits_rpg")
    rows = run.zoo.split("train")
    last = run.zoo.read(rows, torch.full_like(rows, 2))
    run.config = replace(run.config, batches=replace(run.config.batches, last_snapshots=1))
    run.fit()
    torch.testing.assert_close(run.generator.latents.center, last.mean(0), rtol=1e-5, atol=1e-6)


def test_products_have_the_precision_of_the_run_that_is_trained():
    """Another run beside it is looked at first, and its zoo is collected at full precision."""
    small = (*TINY, "zoo.store=false", "zoo.runs=40", "zoo.snapshots=3", "zoo.recipe={epochs: 1}")
    run = experiment(*small, "trainer.precision=tf32")
    run.beside(compose("digits_deep_loss", list(TINY)), "digits_deep_loss")
    try:
        assert run.zoo.runs and torch.get_float32_matmul_precision() == "highest"
        run.fit()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_scales_are_read_off_training_runs_alone():
    run = experiment(*TINY, "zoo.store=false", "zoo.runs=40", "zoo.snapshots=3", "zoo.recipe={epochs: 1}")
    for split in ("validation", "test"):
        rows = run.zoo.split(split)
        run.zoo.replace(rows, run.zoo.run_ids[rows], torch.full((len(rows), 3, run.zoo.structure.size), 100.0), {})
    run.fit()
    assert run.generator.normalizer.shift.abs().max() < 1 and run.generator.normalizer.scale.max() < 1
