"""Distillation measures how far one network's predictions are from another's."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call

from Gpt import environments
from Gpt.conditions import Conditions, prompt_features
from Gpt.diffusion.objectives import FlowMatching
from Gpt.distillation import DistillationConfig, distillation
from Gpt.errors import ConfigError
from Gpt.generator import Batch
from Gpt.models.gpt import Gpt, GptConfig
from Gpt.population.functional import Population, stack_initial
from Gpt.population.statistics import with_differentiable_statistics
from Gpt.scoring import classification_error, classification_loss
from Gpt.seeds import rng
from Gpt.tasks import get_task
from rpg.generator import Rpg, RpgConfig

EVERY = DistillationConfig(weight=2.0, examples=50, groups=1)


@pytest.fixture(scope="module")
def task():
    return get_task("digits_loss")


@pytest.fixture(scope="module")
def networks(task):
    """Four rows, large enough that predictions differ."""
    return 3 * stack_initial(task.constructor, task.structure, [1, 2, 3, 4])


def test_is_the_divergence_on_the_drawn_examples(task, networks):
    estimate, target = networks[:2].clone().requires_grad_(), networks[2:]
    found = distillation(task, EVERY)(Batch(target), estimate, rng("cpu", 5))
    inputs = task.data("train")[0]
    chosen = inputs[torch.randint(len(inputs), (50,), generator=rng("cpu", 5))].double()
    divergences = []
    for rows in zip(estimate.detach(), target, strict=True):
        logs = []
        for row in rows:
            net = task.constructor().double()
            net.load_state_dict(task.structure.state_dict(row))
            logs.append(net(chosen).log_softmax(-1))
        divergences.append((logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean())
    torch.testing.assert_close(found.detach().double(), 2 * torch.stack(divergences).mean(), rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(found, estimate)
    assert gradient.count_nonzero() > 0.9 * gradient.numel()


@pytest.mark.parametrize(("groups", "sizes"), [(2, [2, 2]), (3, [2, 2]), (9, [1, 1, 1, 1])])
def test_every_group_of_networks_has_examples_of_its_own(groups, sizes):
    """Of masks too: each network keeps its own."""
    task = get_task("digits_mask")
    estimate, target = (
        3 * stack_initial(task.constructor, task.structure, seeds) for seeds in ([1, 2, 3, 4], [5, 6, 7, 8])
    )
    masks = torch.eye(10)[:4]
    config = dataclasses.replace(EVERY, loss_weight=0.5, groups=groups)
    found = distillation(task, config)(Batch(target, masks=masks), estimate, rng("cpu", 5))

    stream, alone = rng("cpu", 5), distillation(task, dataclasses.replace(config, groups=1))
    parts = zip(estimate.split(sizes), target.split(sizes), masks.split(sizes), strict=True)
    terms = [len(e) * alone(Batch(t, masks=m), e, stream) for e, t, m in parts]
    torch.testing.assert_close(found, sum(terms) / 4)
    assert not torch.isclose(found, alone(Batch(target, masks=masks), estimate, rng("cpu", 5)), rtol=1e-3)


def test_only_what_a_network_does_counts(task, networks):
    """Hidden units under other names, and a constant on all logits, are no difference."""
    flipped = task.structure.unflatten(networks)
    flipped = {
        "fc1.weight": flipped["fc1.weight"].flip(1),
        "fc1.bias": flipped["fc1.bias"].flip(1),
        "fc2.weight": flipped["fc2.weight"].flip(2),
        "fc2.bias": flipped["fc2.bias"] + 1,
    }
    renamed = task.structure.flatten({name: flipped[name] for name in task.structure.unflatten(networks)})
    term = distillation(task, EVERY)
    assert abs(term(Batch(networks), renamed, rng("cpu", 0))) < 1e-6
    assert term(Batch(networks), networks.roll(1, 0), rng("cpu", 0)) > 0.1


def network_of(task, row):
    net = task.constructor()
    net.load_state_dict(task.structure.state_dict(row))
    return net


def generators(task):
    structure = task.structure
    features = prompt_features(("target_metric",))
    yield Gpt(structure, Conditions(features, 16), FlowMatching(), GptConfig(width=16, depth=1, heads=2))
    yield Rpg(structure, Conditions(features, 16), FlowMatching(), RpgConfig(width=16, depth=1, heads=2))


def test_joins_the_loss_of_both_generators(task, networks):
    """At its weight, for the estimate in plain weights: an untrained generator's is its start, or the mean network."""
    for generator in generators(task):
        prompt = {"target_metric": torch.rand(2, 2, generator=rng("cpu", 0))}
        batch = Batch(networks[:2], networks[2:] if generator.needs_start else None, prompt)
        generator.fit(batch)
        plain = generator.loss(batch, rng("cpu", 1))
        seen = []
        generator.distillation = lambda batch, estimate, draws, seen=seen: seen.append((estimate, batch.target)) or 0.25
        torch.testing.assert_close(generator.loss(batch, rng("cpu", 1)), plain + 0.25)
        generator.distils_after, batch.progress = 0.5, 0.49  # its time has not come
        torch.testing.assert_close(generator.loss(batch, rng("cpu", 1)), plain)
        ((estimate, target),) = seen
        assert torch.equal(target, batch.target)
        assert estimate.shape == target.shape
        assert estimate.requires_grad


def test_learning_from_behaviour_finds_the_behaviour(task, networks):
    term = distillation(task, dataclasses.replace(EVERY, examples=200))
    weights = networks[:1].clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.03)
    first = term(Batch(networks[1:2]), weights, rng("cpu", 0)).item()
    for step in range(60):
        optimizer.zero_grad()
        term(Batch(networks[1:2]), weights, rng("cpu", step)).backward()
        optimizer.step()
    assert term(Batch(networks[1:2]), weights, rng("cpu", 0)).item() < 0.2 * first


def test_policies_are_compared_by_their_actions():
    """The log of the spread is a weight that changes no mean action."""
    task = get_task("cartpole")
    policies = 2 * stack_initial(task.constructor, task.structure, [1, 2])
    term = distillation(task, EVERY)
    louder = task.structure.unflatten(policies)
    louder = task.structure.flatten(louder | {"log_std": louder["log_std"] + 1})
    assert not torch.equal(louder, policies) and term(Batch(policies), louder, rng("cpu", 0)) == 0
    states = environments.scattered_states(50, rng("cpu", 0))
    actions = Population(task.template, task.structure, policies)(states).tanh()
    expected = 2 * 0.5 * ((actions[0] - actions[1]) / 0.1).square().mean()
    torch.testing.assert_close(term(Batch(policies[1:]), policies[:1], rng("cpu", 0)), expected)


def test_the_second_term_is_the_difference_of_the_losses(task, networks):
    estimate, target = networks[:2], networks[2:]
    batch, config = Batch(target), dataclasses.replace(EVERY, loss_weight=0.5)
    plain = distillation(task, EVERY)(batch, estimate, rng("cpu", 5))
    found = distillation(task, config)(batch, estimate, rng("cpu", 5)) - plain
    data = task.data("train")
    chosen = torch.randint(len(data[1]), (50,), generator=rng("cpu", 5))
    with torch.no_grad():
        losses = [classification_loss(*(part[chosen] for part in data), network_of(task, row))[0] for row in networks]
    gaps = torch.tensor(losses).view(2, 2).diff(dim=0).abs()
    torch.testing.assert_close(found, 2 * 0.5 * gaps.mean())


def test_networks_of_class_masks_have_the_losses_of_their_own_labels():
    """Networks whose outputs are exchanged are right where the others are wrong: masks decide which."""
    task = get_task("digits_mask")
    networks = 3 * stack_initial(task.constructor, task.structure, [1, 2])
    mask = torch.tensor([[1.0, 0, 1, 0, 1, 0, 1, 0, 1, 0]] * 2)
    term = distillation(task, DistillationConfig(weight=1.0, loss_weight=1.0, examples=50))
    loss = term(Batch(networks[:1], masks=mask[:1]), networks[1:], rng("cpu", 0))
    parts = task.structure.unflatten(networks)
    exchanged = {name: part.flip(1) if name.startswith("fc2") else part for name, part in parts.items()}
    exchanged = task.structure.flatten({name: exchanged[name] for name in parts})
    assert not torch.equal(exchanged, networks)
    complement = term(Batch(exchanged[:1], masks=1 - mask[:1]), exchanged[1:], rng("cpu", 0))
    torch.testing.assert_close(complement, loss)
    other = term(Batch(exchanged[:1], masks=mask[:1]), exchanged[1:], rng("cpu", 0))
    assert abs(other - loss) > 1e-3


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_have_gradients(affine):
    """Of networks with batch norm: those of central differences, in float64; the answers are PyTorch's."""
    generator = rng("cpu", 0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, affine=affine), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4))
    net = net.double().eval()
    net[1].running_var.uniform_(0.5, 2, generator=generator)
    net[1].running_mean.normal_(generator=generator)
    x = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    changed = with_differentiable_statistics(net)
    assert net.state_dict().keys() == changed.state_dict().keys()
    torch.testing.assert_close(changed(x), net(x))

    def answers(mean, var):
        return functional_call(changed, {"1.running_mean": mean, "1.running_var": var}, (x,))

    statistics = [value.clone().requires_grad_() for value in (net[1].running_mean, net[1].running_var)]
    assert torch.autograd.gradcheck(answers, statistics)


def test_networks_with_batch_norm_are_compared_by_what_they_do(task):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10))

    normed = dataclasses.replace(task, constructor=network, symmetry=None)
    target = stack_initial(network, normed.structure, [1, 2])
    estimate = (1.1 * target + 0.1).requires_grad_()
    term = distillation(normed, EVERY)(Batch(target), estimate, rng("cpu", 0))
    (gradient,) = torch.autograd.grad(term, estimate)
    for name, part in normed.structure.unflatten(gradient).items():
        assert part.count_nonzero() > 0, name


def test_checkpoints_of_classifiers_say_what_they_do(task, networks):
    imported = dataclasses.replace(task, recipe=None, task_test_fn=classification_error)
    terms = [distillation(t, EVERY)(Batch(networks[2:]), networks[:2], rng("cpu", 5)) for t in (task, imported)]
    assert terms[0] == terms[1] > 0
    untrained = dataclasses.replace(imported, train_data_fn=None)
    with pytest.raises(ConfigError, match="'train_data_fn' is enough"):
        distillation(untrained, EVERY)


def test_losses_that_nobody_knows_are_refused():
    with pytest.raises(ConfigError, match=r"distillation.loss_weight=1 .*'cartpole'.*distillation.loss_weight=0"):
        distillation(get_task("cartpole"), dataclasses.replace(EVERY, loss_weight=1.0))


def test_tasks_that_do_not_say_what_networks_do_are_refused():
    task = dataclasses.replace(get_task("cartpole"), behaviour=None)
    with pytest.raises(ConfigError, match=r"distillation.weight=2 .*'cartpole'.*distillation.weight=0"):
        distillation(task, EVERY)
