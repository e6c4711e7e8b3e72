"""Cart-pole: against the equations of motion, against itself one by one, and behind gymnasium's interface."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy.integrate import solve_ivp

from Gpt.environments import (
    ENVIRONMENT_ID,
    EPISODE_STEPS,
    CartPole,
    Evaluation,
    episode_returns,
    evaluate_policy,
    rollout_returns,
)
from Gpt.networks import CartPoleActor
from Gpt.population.functional import Population
from Gpt.structure import Structure

BALANCING_GAIN = torch.tensor([0.02, 0.04, 0.5, 0.1])


def balance(observation):
    return (observation @ BALANCING_GAIN.to(observation))[..., None]


def fall(observation):
    return torch.ones_like(observation[..., :1])


def still(observation):
    return torch.zeros_like(observation[..., :1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_states(count, seed=0):
    scale = torch.tensor([2.0, 5.0, 1.5, 8.0], dtype=torch.float64)
    return scale * (2 * torch.rand(count, 4, generator=generator(seed), dtype=torch.float64) - 1)


def equations_of_motion(_, state, force):
    """Lagrange's equations with the mass matrix written out: 1 kg each, pole 1 m, centre of mass at 0.47 m."""
    _, x_dot, theta, theta_dot = state
    coupling = 0.47 * math.cos(theta)
    mass_matrix = np.array([[2.0, coupling], [coupling, 1 / 12 + 0.47**2]])
    forces = np.array([force + 0.47 * theta_dot**2 * math.sin(theta), 9.81 * 0.47 * math.sin(theta)])
    x_acceleration, theta_acceleration = np.linalg.solve(mass_matrix, forces)
    return [x_dot, x_acceleration, theta_dot, theta_acceleration]


def energy(state):
    """Kinetic plus potential energy in J: of the cart, and of the pole's points integrated along its length."""
    _, x_dot, theta, theta_dot = state.unbind(-1)
    along, weight = np.polynomial.legendre.leggauss(4)
    total = 0.5 * x_dot**2
    for s, w in zip(0.47 + along / 2, weight / 2, strict=True):
        horizontal = x_dot + s * theta_dot * theta.cos()
        vertical = -s * theta_dot * theta.sin()
        total = total + w * (0.5 * (horizontal**2 + vertical**2) + 9.81 * s * theta.cos())
    return total


def test_step_follows_an_independent_integration():
    states = random_states(20)
    actions = 4 * torch.rand(20, 1, generator=generator(1), dtype=torch.float64) - 2
    stepped = CartPole().step(states, actions)[0]
    for state, action, result in zip(states, actions, stepped, strict=True):
        force = 400 * float(action.clamp(-1, 1))
        exact = solve_ivp(equations_of_motion, (0, 0.0166), state.numpy(), args=(force,), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(result.numpy(), exact.y[:, -1], rtol=1e-4, atol=1e-4)


def test_integration_error_is_of_fourth_order():
    states, actions = random_states(20), torch.full((20, 1), 0.3, dtype=torch.float64)
    exact = CartPole(substeps=64).step(states, actions)[0]
    error = [(CartPole(substeps=n).step(states, actions)[0] - exact).norm() for n in (2, 4, 8)]
    assert error[0] / error[1] > 12
    assert error[1] / error[2] > 12


def test_energy_is_conserved_without_force():
    state, action = random_states(50), torch.zeros(50, 1, dtype=torch.float64)
    before = energy(state)
    for _ in range(200):
        state = CartPole().step(state, action)[0]
    torch.testing.assert_close(energy(state), before, rtol=1e-5, atol=1e-5)


def test_mirror_image_has_the_mirrored_trajectory_and_the_same_reward():
    states, actions = random_states(50), torch.full((50, 1), 0.2, dtype=torch.float64)
    state, reward, terminated = CartPole().step(states, actions)
    mirrored, mirrored_reward, mirrored_terminated = CartPole().step(-states, -actions)
    torch.testing.assert_close(mirrored, -state)
    torch.testing.assert_close(mirrored_reward, reward)
    assert torch.equal(mirrored_terminated, terminated)


def test_any_batch_shape_equals_one_by_one():
    states = random_states(24).float().view(2, 3, 4, 4)
    actions = torch.linspace(-1, 1, 24).view(2, 3, 4, 1)
    state, reward, terminated = CartPole().step(states, actions)
    for index in np.ndindex(2, 3, 4):
        single, single_reward, single_terminated = CartPole().step(states[index], actions[index])
        torch.testing.assert_close(single, state[index])
        torch.testing.assert_close(single_reward, reward[index])
        assert single_terminated == terminated[index]


def test_reward_and_termination():
    no_push = torch.zeros(1)
    inside = torch.tensor([2.9, 0.0, 0.5, 0.0])
    state, reward, terminated = CartPole().step(inside, no_push)
    expected = 1 - state[2] ** 2 - 0.01 * state[1].abs() - 0.005 * state[3].abs()
    torch.testing.assert_close(reward, expected)
    assert not terminated
    for outside in ([3.1, 0, 0, 0], [-3.1, 0, 0, 0], [0, 0, 1.6, 0], [0, 0, -1.6, 0], [0, 0, math.nan, 0]):
        _, reward, terminated = CartPole().step(torch.tensor(outside), no_push)
        assert terminated
        assert reward == -2


def test_reset_fills_its_box_and_depends_on_the_generator_alone():
    state = CartPole().reset((5, 2000), generator(3))
    bound = torch.tensor([0.1, 0.25, 0.1, 0.25])
    assert (state.abs() <= bound).all()
    torch.testing.assert_close(state.amax((0, 1)), bound, rtol=0.01, atol=0)
    torch.testing.assert_close(state.std((0, 1)), bound / math.sqrt(3), rtol=0.03, atol=0)
    assert torch.equal(state, CartPole().reset((5, 2000), generator(3)))
    assert not torch.equal(state, CartPole().reset((5, 2000), generator(4)))


def test_balancing_beats_falling_and_returns_are_bounded():
    balanced = rollout_returns(balance, 32, generator())
    fallen = rollout_returns(fall, 32, generator())
    assert balanced.shape == fallen.shape == (1, 32)
    assert (balanced <= EPISODE_STEPS).all()
    assert (balanced > 490).all()
    assert (fallen < 20).all()


def test_every_environment_runs_exactly_one_episode():
    start = CartPole().reset((3,), generator())
    start[0, 2] = 1.5  # falls at once, and must not be given a second episode
    for policy in (balance, still):
        batched = episode_returns(policy, start[None])[0]
        for state, result in zip(start, batched, strict=True):
            total, terminated, steps = torch.zeros(()), torch.tensor(False), 0
            while not terminated and steps < EPISODE_STEPS:
                state, reward, terminated = CartPole().step(state, policy(state))
                total, steps = total + reward, steps + 1
            torch.testing.assert_close(result, total, rtol=1e-4, atol=1e-3)


def test_an_episode_stays_over_when_the_cart_comes_back():
    start = torch.tensor([3.2, -5.0, 0.0, 0.0])
    state = start
    for _ in range(5):
        state, _, terminated = CartPole().step(state, torch.zeros(1))
    assert not terminated
    assert episode_returns(still, start[None, None]).item() == -2


def test_networks_share_their_start_states():
    returns = rollout_returns(still, 16, generator(), networks=3, device="cpu")
    assert returns.shape == (3, 16)
    assert torch.equal(returns[0], returns[2])
    assert returns[0].std() > 0


def test_a_broken_network_fails_at_once_and_spoils_no_other():
    def policy(observation):
        action = balance(observation)
        action[1] = math.nan
        return action

    returns = rollout_returns(policy, 8, generator(), networks=3)
    torch.testing.assert_close(returns[1], torch.full((8,), -2.0))
    torch.testing.assert_close(returns[[0, 2]], rollout_returns(balance, 8, generator(), networks=2))


def test_population_scores_are_those_of_its_networks():
    actor = CartPoleActor()
    structure = Structure.of(actor)
    weights = 0.3 * torch.randn(3, structure.size, generator=generator())
    evaluation = Evaluation(episodes=8, seed=5)
    together = evaluate_policy(evaluation, Population(actor, structure, weights))
    assert together.shape == (3,)
    for row, score in zip(weights, together, strict=True):
        actor.load_state_dict(structure.unflatten(row))
        torch.testing.assert_close(evaluate_policy(evaluation, actor), score, rtol=1e-3, atol=1e-2)
    assert not torch.equal(together, evaluate_policy(Evaluation(8, 6), Population(actor, structure, weights)))


def test_gymnasium_finds_no_fault():
    check_env(gymnasium.make(ENVIRONMENT_ID).unwrapped)


def test_gymnasium_environment_ends_by_falling_or_by_the_time_limit():
    environment = gymnasium.make(ENVIRONMENT_ID)
    observation, _ = environment.reset(seed=0)
    steps, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        observation, _, terminated, truncated, _ = environment.step(balance(torch.tensor(observation)).numpy())
        steps += 1
    assert (steps, terminated, truncated) == (EPISODE_STEPS, False, True)
    environment.reset(seed=0)
    for _ in range(EPISODE_STEPS):
        _, reward, terminated, truncated, _ = environment.step(np.ones(1, np.float32))
        if terminated:
            break
    assert (terminated, truncated, reward) == (True, False, -2.0)


def test_vector_environment_equals_single_ones():
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=1)
    single = gymnasium.make(ENVIRONMENT_ID)
    from_vector, from_single = vector.reset(seed=7)[0], single.reset(seed=7)[0]
    np.testing.assert_array_equal(from_vector[0], from_single)
    rng = np.random.default_rng(0)
    episodes = 0
    for _ in range(300):
        action = rng.uniform(-0.2, 0.2, (1, 1)).astype(np.float32)
        result = vector.step(action)
        expected = single.step(action[0])
        for ours, theirs in zip(result[:4], expected[:4], strict=True):
            np.testing.assert_allclose(ours[0], theirs, rtol=1e-5, atol=1e-6)
        if expected[2] or expected[3]:
            episodes += 1
            observation, reward, terminated, truncated, _ = vector.step(action)
            np.testing.assert_array_equal(observation[0], single.reset()[0])
            assert (reward[0], terminated[0], truncated[0]) == (0, False, False)
    assert episodes > 2


def test_vector_environment_resets_only_what_ended_and_truncates():
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=2, max_episode_steps=5)
    vector.reset(seed=0)
    no_push = np.zeros((2, 1), np.float32)
    for step in range(1, 12):
        observation, reward, terminated, truncated, _ = vector.step(no_push)
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (step in (5, 11))
        assert (reward == 0).all() == (step == 6)
    action = np.array([[0.0], [1.0]], np.float32)
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=2)
    before, _ = vector.reset(seed=0)
    terminated = np.zeros(2, bool)
    while not terminated.any():
        before, _, terminated, _, _ = vector.step(action)
    assert terminated.tolist() == [False, True]
    after, _, _, _, _ = vector.step(action)
    assert np.abs(after[1]).max() <= 0.25
    expected = CartPole().step(torch.from_numpy(before[0]), torch.zeros(1))[0]
    np.testing.assert_allclose(after[0], expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_vector_environment_is_reproducible_from_its_seed(num_envs):
    vector = gymnasium.make_vec(ENVIRONMENT_ID, num_envs=num_envs)
    first = vector.reset(seed=3)[0]
    assert first.shape == (num_envs, 4)
    assert first in vector.observation_space
    np.testing.assert_array_equal(first, vector.reset(seed=3)[0])
    assert not np.array_equal(first, vector.reset()[0])
