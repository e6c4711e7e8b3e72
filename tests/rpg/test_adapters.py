"""Generators of adapters on the tiny base model: losses, step 0, one way through training."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call

from Gpt.adapters.answers import answer_loss
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.forward import adapted_logits
from Gpt.adapters.spec import AdapterModule, AdapterSpec, adapter_structure
from Gpt.catalogue.adapters import TASKS, adapter_entry
from Gpt.checkpoint import CheckpointFolder
from Gpt.conditions import Conditions
from Gpt.data.adapter_batches import AdapterBatchSampler, fresh_adapter
from Gpt.data.batches import BatchConfig
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.recipes import AdapterRecipe
from Gpt.report.logger import Loggers
from Gpt.seeds import rng
from Gpt.sharding import blocks
from Gpt.tasks import Task
from Gpt.training import TrainerConfig, train
from rpg.adapters import HyperConvConfig, HyperConvGenerator, LossConfig, QueryConfig, QueryGenerator, movement
from rpg.generator import Rpg, RpgConfig
from rpg.hyperconv import HyperConvLayer, PlainBlock

FEATURES = 384
SMALL = {"width": 32, "depth": 1, "heads": 2, "latents": 4}
KINDS = {
    "query": (QueryGenerator, QueryConfig(**SMALL)),
    "published": (HyperConvGenerator, HyperConvConfig(prompts=4, grids=((8, 4, 64),))),
    "plain": (HyperConvGenerator, HyperConvConfig(blocks="plain", prompts=4)),
}
TOKENS = 6  # states of a prompt


@pytest.fixture(scope="module")
def task():
    return Task(name="lora_tiny", **TASKS["lora_tiny"])


@pytest.fixture(scope="module")
def zoo(task):
    """Adapters that are a random direction for each member, and a little noise for each snapshot."""
    runs, snapshots = 20, 3
    draw = rng("cpu", 0, "zoo")
    directions = 0.05 * torch.randn(len(task.family.members), task.structure.size, generator=draw)
    members = task.family.member_of_runs(torch.arange(runs))
    noise = 0.01 * torch.randn(runs, snapshots, task.structure.size, generator=draw)
    return Zoo.from_tensors(
        directions[members][:, None] + noise, {}, list(range(runs)), list(range(snapshots)), task.structure,
        test_runs=task.family.test_runs, validation_runs=task.family.validation_runs,
    )  # fmt: skip


def build(task, kind, dropout=0.0, **changes):
    generator, config = KINDS[kind]
    conditions = Conditions({"text": FEATURES}, 8, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return generator(task.structure, conditions, FlowMatching(), dataclasses.replace(config, **changes))


def sampler(zoo, task, **options):
    return AdapterBatchSampler(zoo, task, "train", BatchConfig(), prompts=4, examples=4, **options)


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@pytest.mark.parametrize("tokens", [0, TOKENS])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_a_function_of_the_prompts(zoo, task, kind, tokens):
    """Of pooled sentences, or of token states as an image whose rows are a prompt's tokens."""
    task = dataclasses.replace(task, family=dataclasses.replace(task.family, tokens=tokens))
    generator = build(task, kind, **({"length": TOKENS} if kind == "published" and tokens else {}))
    batch = sampler(zoo, task)(3, rng("cpu", 0))
    generator.fit(batch)
    for head in getattr(generator.decoder, "heads", []):
        torch.nn.init.normal_(head.weight, std=0.1)
    written = generator.sample(batch.prompt, seed=0)
    assert written.shape == (3, task.structure.size)
    assert torch.equal(written, generator.sample(batch.prompt, seed=1))
    single = generator.sample({name: value[1:2] for name, value in batch.prompt.items()})
    torch.testing.assert_close(single, written[1:2], rtol=1e-4, atol=1e-5)
    assert (written[0] - written[1]).abs().max() > 1e-6
    generator.loss(batch, rng("cpu", 0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.decoder.parameters())
    assert generator.sample({}, count=2).shape == (2, task.structure.size)


@pytest.mark.parametrize(("kind", "outside"), [("published", ()), ("plain", ("project", "scale", "shift"))])
def test_convolutions_are_sharded_block_by_block(task, kind, outside):
    """Of their weights, none but those before the first block are kept together."""
    generator = build(task, kind)
    found = blocks(generator)
    assert {type(block) for block in found} == {HyperConvLayer if kind == "published" else PlainBlock}
    inside = {id(p) for block in found for p in block.parameters()}
    left = {name.split(".")[1] for name, p in generator.named_parameters() if id(p) not in inside}
    assert left == set(outside)


def test_step_zero_of_the_query_generator_is_the_base_model(zoo, task):
    generator = build(task, "query")
    batch = sampler(zoo, task)(16, rng("cpu", 0))
    generator.fit(batch)
    written = generator.sample(batch.prompt)
    assert torch.equal(written, fresh_adapter(task).expand(16, -1))
    base, answers = batch.loss_of.base, batch.answers
    plain = base.model(input_ids=answers.tokens[0]).logits
    adapted = answer_loss(base, batch.loss_of.spec, written[:1], answers[:1])
    predicted = plain.log_softmax(-1).gather(-1, answers.tokens[0].roll(-1, 1)[..., None]).squeeze(-1)
    nll = -predicted.gather(1, answers.positions[0] - 1)
    torch.testing.assert_close(adapted[0], (nll * answers.valid[0]).sum() / answers.valid[0].sum())


def test_step_zero_is_the_base_model_for_every_form_of_adapter():
    """Where A is trained it starts as drawn, and magnitudes start as the base model's."""
    spec = AdapterSpec(rank=2, targets=("q_proj", "down_proj"), dora=True, train_a=True)
    family = dataclasses.replace(TASKS["lora_tiny"]["family"], train_examples=8, examples=4)
    task = Task(name="dora", **adapter_entry(family, AdapterRecipe("tiny", spec)))
    fresh = fresh_adapter(task)
    assert (fresh != 0).any()
    runs = family.test_runs + family.validation_runs + 3
    weights = fresh + 0.1 * torch.randn(runs, 1, task.structure.size, generator=rng("cpu", 0))
    zoo = Zoo.from_tensors(
        weights, {}, list(range(runs)), [1], task.structure,
        test_runs=family.test_runs, validation_runs=family.validation_runs,
    )  # fmt: skip
    generator, batch = build(task, "query"), sampler(zoo, task)(2, rng("cpu", 0))
    generator.fit(batch)
    written = generator.sample(batch.prompt)
    assert torch.equal(written, fresh.expand(2, -1))
    base = batch.loss_of.base
    adapted = adapted_logits(base, spec, written, batch.answers.tokens)
    plain = base.model(input_ids=batch.answers.tokens.flatten(0, 1)).logits
    torch.testing.assert_close(adapted.flatten(0, 1), plain, rtol=1e-4, atol=1e-4)
    generator.loss(batch, rng("cpu", 0)).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in generator.decoder.heads)


def test_losses_are_what_they_are_called(zoo, task):
    """Against explicit formulas, and their sum is the mixture."""
    batch = sampler(zoo, task)(3, rng("cpu", 0))

    def loss(**terms):
        generator = build(task, "published", loss=LossConfig(**terms))
        generator.fit(batch)
        return generator, generator.loss(batch, rng("cpu", 1))

    generator, mse = loss(mse=1.0)
    target = (batch.target - generator.fresh) / generator.unit
    prompts = PromptStates(batch.prompt["text"], batch.prompt["text_mask"])
    error = generator.decode(prompts) - target
    torch.testing.assert_close(mse, error.square().mean())
    torch.testing.assert_close(loss(mse=0.0, l1=1.0)[1], error.abs().mean())
    sft = loss(mse=0.0, sft=1.0)[1]
    adapters = generator(prompts)
    base, spec = batch.loss_of.base, batch.loss_of.spec
    torch.testing.assert_close(sft, answer_loss(base, spec, adapters, batch.answers).mean())
    torch.testing.assert_close(loss(mse=2.0, l1=3.0, sft=0.5)[1], 2 * mse + 3 * error.abs().mean() + 0.5 * sft)
    torch.testing.assert_close(target.square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is about to rename
def test_gradients_through_the_language_model_are_those_of_peft(zoo, task):
    """The end-to-end loss against peft's own model, called with generated tensors in place of its parameters."""
    peft = pytest.importorskip("peft")
    batch = sampler(zoo, task)(1, rng("cpu", 0))
    base = load_base("tiny", "cpu", torch.float64)
    spec = dataclasses.replace(batch.loss_of.spec, train_a=True)  # so that flat rows hold all tensors that peft has
    structure = adapter_structure(base, spec)
    weights = structure.flatten(AdapterModule(base, spec).state_dict()).double()[None]
    weights = weights + 0.05 * torch.randn(weights.shape, generator=rng("cpu", 2), dtype=torch.float64)
    weights.requires_grad_()
    ours = answer_loss(base, spec, weights, batch.answers).sum()
    (gradient,) = torch.autograd.grad(ours, weights)

    config = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    tensors = {
        name.replace(".weight", ".default.weight"): value[0] for name, value in structure.unflatten(weights).items()
    }
    answers = batch.answers
    logits = functional_call(model, tensors, kwargs={"input_ids": answers.tokens[0]}).logits.log_softmax(-1)
    nll = -logits.gather(-1, answers.tokens[0].roll(-1, 1)[..., None]).squeeze(-1).gather(1, answers.positions[0] - 1)
    theirs = (nll * answers.valid[0]).sum() / answers.valid[0].sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, weights)[0])


def test_importance_is_the_movement_within_runs(zoo, task):
    weights = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0], [7.0, 8.0]])
    expected = (torch.tensor([2.0, 0.0]) + torch.tensor([2.0, 3.0])) / 2 / 2**0.5
    torch.testing.assert_close(movement(weights, torch.tensor([3, 3, 1, 1])), expected)
    with pytest.raises(ConfigError, match="several snapshots"):
        movement(weights, torch.arange(4))
    with pytest.raises(ConfigError, match="there is one of each"):  # drawn twice, as the only adapter of a task is
        movement(0.1 * weights[[0, 0, 0, 2, 2, 2]], torch.tensor([3, 3, 3, 1, 1, 1]))
    generator = build(task, "query", loss=LossConfig(importance=True))
    generator.fit(sampler(zoo, task)(64, rng("cpu", 0)))
    torch.testing.assert_close(generator.tokens.mean(generator.importance).mean(), torch.tensor(1.0))
    assert generator.importance.min() >= 0


def test_schedule():
    both = LossConfig(mse=2.0, sft=1.0, regression_until=0.4, sft_from=0.25)
    assert [both.terms(p) for p in (0.0, 0.25, 0.4, 1.0)] == [(2, 0, 0), (2, 0, 1), (0, 0, 1), (0, 0, 1)]
    assert LossConfig().terms(1.0) == (1, 0, 0)
    for loss in (both, LossConfig(), LossConfig(mse=0.0, sft=1.0), LossConfig(sft=1.0, regression_until=0.1)):
        shares = [i / 20 for i in range(21)]
        changes = [share for before, share in pairwise(shares) if loss.terms(before) != loss.terms(share)]
        assert list(loss.turns) == changes
    for wrong in ({"mse": 0.0}, {"regression_until": 0.5}, {"sft": 1.0, "regression_until": 0.2, "sft_from": 0.5}):
        with pytest.raises(ConfigError, match="without any loss"):
            LossConfig(**wrong)


def test_noise_is_a_share_of_every_state_and_is_not_added_to_padding(zoo, task):
    generator = build(task, "query", loss=LossConfig(noise=0.5))
    states = torch.randn(8, 3, TOKENS, FEATURES, generator=rng("cpu", 0)) * torch.arange(TOKENS)[:, None]
    shown = generator._disturbed(PromptStates(states, states.any(-1)), rng("cpu", 1)).states
    assert torch.equal(shown[:, :, 0], states[:, :, 0])
    share = (shown - states).norm(dim=-1)[:, :, 1:] / states.norm(dim=-1)[:, :, 1:]
    torch.testing.assert_close(share, torch.full_like(share, 0.5), rtol=0.2, atol=0)
    batch = sampler(zoo, task)(3, rng("cpu", 0))
    generator.fit(batch)
    assert torch.equal(generator.sample(batch.prompt), generator.sample(batch.prompt))


def test_dropout_hides_all_prompts_of_an_example(zoo, task):
    batch = sampler(zoo, task)(4, rng("cpu", 0))
    generator = build(task, "published", dropout=1.0)
    generator.fit(batch)
    hidden = generator.loss(batch, rng("cpu", 1))
    batch.prompt["text"] = torch.zeros_like(batch.prompt["text"])
    torch.testing.assert_close(hidden, generator.loss(batch, rng("cpu", 1)))


@pytest.mark.parametrize(("kind", "loss"), [("query", LossConfig()), ("query", LossConfig(mse=0.0, sft=1.0))])
def test_training_lowers_the_loss_and_a_checkpoint_restores_it(zoo, task, tmp_path, kind, loss):
    generator, draw = build(task, kind, loss=loss), sampler(zoo, task)
    generator.fit(draw(64, rng("cpu", 0, "fit")))
    batch = draw(32, rng("cpu", 0, "check"))
    before = generator.loss(batch, rng("cpu", 0)).item()
    folder = CheckpointFolder(tmp_path, {"task": task.name})
    config = TrainerConfig(
        steps=40, batch_size=8, learning_rate=3e-3, warmup=5, ema_decay=0.9, validate_every=0, validation_batches=1
    )
    train(generator, draw, draw, lambda g: {"score": 0.0}, config, folder, Loggers([]), torch.device("cpu"), 0)
    after = generator.loss(batch, rng("cpu", 0)).item()
    assert after < 0.9 * before
    again = build(task, kind, loss=loss)
    folder.load_best(again)
    assert torch.equal(again.sample(batch.prompt), generator.sample(batch.prompt))


def test_rpg_writes_adapters_from_noise(zoo, task):
    """The generator of whole networks, on tokens that are cut afresh at every tensor, told the mean of the prompts."""
    conditions = Conditions({"text": FEATURES}, 32, 0.1)
    config = RpgConfig(policy="within_layer", token_size=512, width=32, depth=1, heads=2, steps=2)
    rpg = Rpg(task.structure, conditions, FlowMatching(), config)
    draw = sampler(zoo, task, pooled=True)
    rpg.fit(draw(32, rng("cpu", 0)))
    batch = draw(4, rng("cpu", 1))
    loss = rpg.loss(batch, rng("cpu", 2))
    loss.backward()
    written = rpg.sample(batch.prompt, seed=3)
    assert written.shape == batch.target.shape and loss.isfinite()
    assert (written - rpg.sample(batch.prompt, seed=4)).abs().max() > 0


def test_what_does_not_fit_is_told(zoo, task):
    generator = build(task, "query")
    with pytest.raises(ConfigError, match="text"):
        QueryGenerator(task.structure, Conditions({"class_mask": 10}, 8, 0.0), FlowMatching(), QueryConfig(**SMALL))
    with pytest.raises(ConfigError, match=r"\[B, N, L, 384\]"):
        generator.sample({"text": torch.zeros(2, FEATURES)})
    with pytest.raises(ConfigError, match=r"'text_mask': \[1, 2\]"):
        generator.sample({"text": torch.zeros(1, 2, 3, FEATURES), "text_mask": torch.ones(1, 2).bool()})
    with pytest.raises(ConfigError, match="generator.length=1, but prompts come with 3 states each"):
        build(task, "published").sample({"text": torch.zeros(1, 2, 3, FEATURES)})
    with pytest.raises(ConfigError, match="guidance"):
        generator.sample({}, count=1, guidance=2.0)
    with pytest.raises(ConfigError, match="language tasks"):
        generator.loss(Batch(torch.zeros(1, task.structure.size)), rng("cpu", 0))


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
def test_prompts_are_put_into_known_words_before_they_are_read(zoo):
    family = dataclasses.replace(TASKS["lora_tiny"]["family"], tokens=TOKENS)
    task = Task(name="lora_tiny", **TASKS["lora_tiny"] | {"family": family})
    generator = build(task, "query", translated=True)
    batch = sampler(zoo, task)(8, rng("cpu", 0, "batch"))
    generator.fit(batch)
    with torch.no_grad():  # a decoder that is not zero
        for parameter in generator.decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng("cpu", 0, "weights")))
    prompt = {"text": batch.prompt["text"] + 0.01, "text_mask": batch.prompt["text_mask"]}
    known = generator.phrases(PromptStates(prompt["text"], prompt["text_mask"]))
    written = generator.sample(prompt)
    torch.testing.assert_close(written, generator(known))
    generator.translates = False
    assert (generator.sample(prompt) - written).abs().max() > 1e-4

    loaded = build(task, "query", translated=True)
    loaded.load_state_dict(generator.state_dict())
    torch.testing.assert_close(loaded.sample(prompt), written)
    torch.testing.assert_close(loaded.sample({}, count=1), generator.sample({}, count=1))


def test_pooled_prompts_are_not_translated(zoo, task):
    with pytest.raises(ConfigError, match="a prompt of one state can only be taken for a whole training task"):
        build(task, "query", translated=True).fit(sampler(zoo, task)(4, rng("cpu", 0, "batch")))
