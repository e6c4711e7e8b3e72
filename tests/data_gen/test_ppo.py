"""Batched PPO: against one agent trained with torch's own modules, and each run independent of its companions."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from data_gen.ppo import (
    ACTOR_SIZE,
    PpoPopulation,
    Rollout,
    draw,
    evaluate_actors,
    generalized_advantages,
    initial_parameters,
    network,
    train_ppo_population,
)
from data_gen.randomness import run_keys
from Gpt.catalogue.cartpole import TASKS
from Gpt.environments import EPISODE_STEPS, CartPole, Evaluation, evaluate_policy
from Gpt.errors import ConfigError
from Gpt.networks import CartPoleActor
from Gpt.recipes import PpoRecipe
from Gpt.tasks import Task

SMALL = PpoRecipe(iterations=3, environments=8, horizon=4, epochs=2)


@pytest.fixture(scope="module")
def task():
    """Cart-pole with four episodes behind a label."""
    episodes = {f"{split}data_fn": partial(few, seed) for split, seed in (("validation_", 0), ("", 1))}
    return Task(name="cartpole", **TASKS["cartpole"] | episodes)


def few(seed):
    return (Evaluation(4, seed),)


def load(module, flat):
    nn.utils.vector_to_parameters(flat.detach().clone(), module.parameters())
    return module


def critic_module():
    return nn.Sequential(nn.Linear(4, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 1))


def agent_modules(parameters):
    """One row of a population's parameters as torch modules."""
    return load(CartPoleActor(), parameters[:ACTOR_SIZE]), load(critic_module(), parameters[ACTOR_SIZE:])


def minibatch(runs, transitions, seed=0):
    """Random transitions whose probability ratios lie on both sides of the clipping range."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(runs, transitions, 8, generator=generator)
    batch[..., 5] = -0.5 * batch[..., 4] ** 2 + 0.4 * batch[..., 5]
    return batch


def reference_loss(actor, critic, batch, recipe):
    policy = torch.distributions.Normal(actor(batch[:, :4]).squeeze(-1), actor.log_std.exp())
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    ratio = torch.exp(policy.log_prob(batch[:, 4]) + constant - batch[:, 5])
    advantage, target = batch[:, 6], batch[:, 7]
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - recipe.clip, 1 + recipe.clip) * advantage).mean()
    value_loss = nn.functional.mse_loss(critic(batch[:, :4]).squeeze(-1), target)
    entropy = policy.entropy().mean() - constant - 0.5
    return -surrogate + recipe.value_coefficient * value_loss - recipe.entropy_coefficient * entropy


@pytest.mark.parametrize("max_grad_norm", [0.05, 2.0, 1e6])
def test_updates_are_those_of_single_agents_trained_by_torch(max_grad_norm):
    recipe = replace(SMALL, max_grad_norm=max_grad_norm, entropy_coefficient=0.1, learning_rate=1e-2)
    population = PpoPopulation(recipe, [0, 5, 9], 0, "cpu")
    start = population.parameters.detach().clone()
    batches = [minibatch(3, 40, seed) for seed in range(6)]
    for batch in batches:
        population.update(batch)
    for run in range(3):
        actor, critic = agent_modules(start[run])
        parameters = [*actor.parameters(), *critic.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for batch in batches:
            optimizer.zero_grad()
            reference_loss(actor, critic, batch[run], recipe).backward()
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
        expected = nn.utils.parameters_to_vector(parameters)
        torch.testing.assert_close(population.parameters[run], expected, rtol=1e-3, atol=1e-5)


def test_learning_rate_follows_a_cosine_to_zero():
    population = PpoPopulation(SMALL, [0], 0, "cpu")
    moves = []
    for _ in range(SMALL.iterations + 1):
        before = population.actors()
        population.iterate()
        moves.append((population.actors() - before).abs().max())
    assert moves[0] > moves[1] > moves[2] > 0
    assert moves[3] == 0


def test_network_is_the_module():
    parameters = torch.stack([initial_parameters(0, run) for run in range(3)])
    parameters += 0.1 * torch.randn(parameters.shape, generator=torch.Generator().manual_seed(0))
    observation = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    mean, value = network(parameters[:, 1:ACTOR_SIZE], observation), network(parameters[:, ACTOR_SIZE:], observation)
    for run in range(3):
        actor, critic = agent_modules(parameters[run])
        torch.testing.assert_close(mean[run], actor(observation[run]).squeeze(-1))
        torch.testing.assert_close(value[run], critic(observation[run]).squeeze(-1))


def test_initialisation_is_orthogonal_and_differs_between_networks():
    actor, critic = agent_modules(initial_parameters(0, 4))
    assert actor.log_std.item() == 0
    for layer in (actor.fc1, actor.fc2, critic[0], critic[2]):
        torch.testing.assert_close(layer.weight.T @ layer.weight, 2 * torch.eye(layer.in_features), rtol=0, atol=1e-5)
        assert not layer.bias.any()
    for layer in (actor.fc3, critic[4]):
        torch.testing.assert_close(layer.weight.norm(), torch.tensor(0.01))
    assert not torch.equal(actor.fc2.weight, critic[2].weight)
    assert torch.equal(initial_parameters(0, 4), initial_parameters(0, 4))
    assert not torch.equal(initial_parameters(0, 4), initial_parameters(0, 5))
    assert not torch.equal(initial_parameters(0, 4), initial_parameters(1, 4))


def test_advantages_are_decayed_sums_within_episodes():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    done = torch.rand(2, 3, 7, generator=generator) < 0.3
    assert done.any()
    advantages = generalized_advantages(delta, done, 0.9)
    for index in [(run, environment) for run in range(2) for environment in range(3)]:
        for t in range(7):
            expected, weight = 0.0, 1.0
            for step in range(t, 7):
                expected += weight * delta[index][step]
                weight *= 0.9
                if done[index][step]:
                    break
            torch.testing.assert_close(advantages[index][t], expected)


def test_time_limit_is_bootstrapped_and_falling_is_not():
    """Both end an episode after the first of two steps: what the next episode earns belongs to neither."""
    recipe = replace(SMALL, environments=2, horizon=2, gamma=0.5)
    population = PpoPopulation(recipe, [0], 0, "cpu")
    observation = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    reached = observation + 1
    reward = torch.tensor([[[3.0, 100.0], [-2.0, 100.0]]])
    zeros, done = torch.zeros(1, 2, 2), torch.tensor([True, False]).expand(1, 2, 2)
    terminated = torch.tensor([[[False, False], [True, False]]])
    batch = population.estimate(Rollout(observation, zeros, zeros, reward, reached, terminated, done))
    _, critic = agent_modules(population.parameters[0])
    following = critic(reached[0, 0, 0]).item()
    assert abs(following) > 1e-4
    torch.testing.assert_close(batch[0, :, 0, 7], torch.tensor([3 + 0.5 * following, -2.0]))
    torch.testing.assert_close(batch[..., :4], observation)
    assert batch[..., 6].mean().abs() < 1e-6


def test_rollout_is_a_chain_of_steps_and_resets():
    population = PpoPopulation(replace(SMALL, horizon=64), [0, 1], 0, "cpu")
    population.age[0, 0] = EPISODE_STEPS - 2
    start = population.state.clone()
    rollout = population.collect()
    assert torch.equal(rollout.observation[:, :, 0], start)
    state, reward, terminated = CartPole().step(rollout.observation, rollout.action.unsqueeze(-1))
    torch.testing.assert_close(rollout.next_observation, state)
    torch.testing.assert_close(rollout.reward, reward)
    assert torch.equal(rollout.terminated, terminated)
    assert terminated.any(dim=(1, 2)).all()
    following, done = rollout.observation[:, :, 1:], rollout.done[:, :, :-1]
    assert torch.equal(following[~done], rollout.next_observation[:, :, :-1][~done])
    assert (following[done].abs() <= torch.tensor([0.1, 0.25, 0.1, 0.25])).all()
    assert torch.equal(rollout.done & ~rollout.terminated, _only(rollout.done.shape, (0, 0, 1)))


def _only(shape, index):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[index] = True
    return mask


def test_actions_are_gaussian_about_the_mean_with_std_exp_log_std():
    population = PpoPopulation(replace(SMALL, environments=512, horizon=8), [0, 1], 0, "cpu")
    with torch.no_grad():
        population.parameters[:, 0] = torch.tensor([0.5, -1.0])
    rollout = population.collect()
    for run in range(2):
        actor, _ = agent_modules(population.parameters[run])
        mean = actor(rollout.observation[run].flatten(0, 1)).view(512, 8)
        policy = torch.distributions.Normal(mean, actor.log_std.exp())
        residual = (rollout.action[run] - mean) / actor.log_std.exp()
        assert residual.mean().abs() < 0.05
        assert (residual.std() - 1).abs() < 0.05
        constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
        expected = policy.log_prob(rollout.action[run]) + constant
        torch.testing.assert_close(rollout.log_probability[run], expected, rtol=1e-4, atol=1e-4)


def test_noise_has_its_distribution_and_is_a_function_of_run_and_iteration():
    keys = run_keys(0, "ppo", [3, 4])
    iteration = torch.tensor(7)
    normal, uniform = draw(keys, iteration, 50_001, 50_000)
    assert normal.shape == (2, 50_001) and uniform.shape == (2, 50_000)
    for row in range(2):
        assert kstest(normal[row].numpy(), "norm").pvalue > 0.01
        assert kstest(uniform[row].numpy(), "uniform").pvalue > 0.01
        halves = normal[row, :50_000].view(2, -1)  # made of the same pairs of uniform numbers
        assert abs(torch.corrcoef(halves)[0, 1]) < 0.02 and abs(torch.corrcoef(halves.square())[0, 1]) < 0.02
    assert 0 <= uniform.min() and uniform.max() < 1
    alone, _ = draw(keys[1:], iteration, 50_001, 50_000)
    assert torch.equal(alone[0], normal[1])
    later, _ = draw(keys, iteration + 1, 50_001, 50_000)
    for other in (later[0], normal[1]):
        assert abs(torch.corrcoef(torch.stack([normal[0], other]))[0, 1]) < 0.02


def test_every_epoch_visits_every_environment_once_in_an_order_of_its_own():
    recipe = replace(SMALL, environments=12, epochs=3, minibatches=4)
    parts = PpoPopulation(recipe, [0, 1], 0, "cpu").minibatches()
    assert [part.shape for part in parts] == [(2, 3)] * 12
    orders = torch.stack([torch.cat(parts[4 * epoch : 4 * epoch + 4], dim=1) for epoch in range(3)], dim=1)
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(12).expand(2, 3, 12))
    assert len({tuple(order) for order in orders.flatten(0, 1).tolist()}) == 6


def test_a_run_does_not_depend_on_its_companions():
    def train(runs, seed):
        population = PpoPopulation(SMALL, runs, seed, "cpu")
        for _ in range(SMALL.iterations):
            population.iterate()
        return population.actors()

    together = train([7, 3, 11], 5)
    torch.testing.assert_close(together[1:2], train([3], 5), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together[:1], train([3], 5), atol=1e-3)
    assert not torch.allclose(train([3], 6), train([3], 5), atol=1e-3)


def test_a_run_is_the_same_whatever_its_snapshots(task):
    told = []
    every, _ = train_ppo_population(task, SMALL, [0, 1], 0, [0, 1, 2], progress=told.append)
    assert told == [2, 2, 2]
    some, _ = train_ppo_population(task, SMALL, [0, 1], 0, [0, 1])
    torch.testing.assert_close(every[:, :2], some)
    initial = torch.stack([initial_parameters(0, run)[:ACTOR_SIZE] for run in (0, 1)])
    torch.testing.assert_close(some[:, 0], initial)


def test_a_diverged_run_spoils_no_other():
    broken, sound = PpoPopulation(SMALL, [0, 1], 0, "cpu"), PpoPopulation(SMALL, [1], 0, "cpu")
    with torch.no_grad():
        broken.parameters[0] = torch.nan
    for population in (broken, sound):
        population.iterate()
        population.iterate()
    assert broken.actors()[0].isnan().all()
    torch.testing.assert_close(broken.actors()[1:], sound.actors(), rtol=1e-3, atol=1e-5)


def test_labels_are_returns_of_full_episodes_on_disjoint_start_states(task):
    weights, metrics = train_ppo_population(task, SMALL, [0, 1], 0, [0, 3])
    assert weights.shape == (2, 2, ACTOR_SIZE)
    assert weights.dtype == torch.float32
    assert sorted(metrics) == ["test_return", "validation_return"]
    for name, seed in (("validation_return", 0), ("test_return", 1)):
        assert metrics[name].shape == (2, 2)
        expected = evaluate_policy(Evaluation(4, seed), load(CartPoleActor(), weights[1, 1]))
        torch.testing.assert_close(metrics[name][1, 1], expected, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(metrics["validation_return"], metrics["test_return"])


def test_evaluation_in_chunks_keeps_order(task, monkeypatch):
    actors = torch.stack([initial_parameters(0, run)[:ACTOR_SIZE] for run in range(5)])
    together = evaluate_actors(task, actors, "validation")
    monkeypatch.setattr("data_gen.ppo.POLICIES_PER_CALL", 2)
    torch.testing.assert_close(evaluate_actors(task, actors, "validation"), together, rtol=1e-3, atol=1e-2)


def test_global_random_state_is_left_alone(task):
    before = copy.copy(torch.get_rng_state())
    train_ppo_population(task, SMALL, [0], 0, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("recipe", "snapshots", "message"),
    [
        (replace(SMALL, environments=9), [0], "environments=9 .* minibatches=2"),
        (SMALL, [], "increasing"),
        (SMALL, [2, 1], "increasing"),
        (SMALL, [-1, 1], "increasing"),
        (SMALL, [0, 4], "iteration 4 lies beyond .* iterations=3"),
    ],
)
def test_impossible_requests_are_refused(task, recipe, snapshots, message):
    with pytest.raises(ConfigError, match=message):
        train_ppo_population(task, recipe, [0], 0, snapshots)


def test_agents_learn_to_balance(task):
    recipe = PpoRecipe(iterations=40, environments=64, learning_rate=3e-3)
    _, metrics = train_ppo_population(task, recipe, [0, 1, 2], 0, [0, 40])
    initial, trained = metrics["test_return"].unbind(1)
    assert (initial < 60).all()
    assert (trained > 2 * initial).all()
    assert trained.mean() > 250
