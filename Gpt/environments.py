"""Continuous-action cart-pole as a batched tensor program, its gymnasium registration, and returns of populations.

A state is `[..., 4] = (x [m], x_dot [m/s], theta [rad], theta_dot [rad/s])`; theta is 0 upright, and a positive theta
leans towards positive x. Any leading shape goes: P networks times E environments are one call, on the tensors' device.

Once this module is imported, `gymnasium.make("GptCartPole-v0")` and `gymnasium.make_vec("GptCartPole-v0", num_envs=8)`
work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt.population.functional import Population
from Gpt.seeds import rng as named_rng

ENVIRONMENT_ID = "GptCartPole-v0"
EPISODE_STEPS = 500
# How often a rollout asks whether any episode still runs; asking waits for the device.
STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class CartPole:
    """A frictionless cart on a rail with a uniform pole hinged to it; SI units throughout.

    With `M` the two masses together, `m` the pole's mass, `l` the distance from the hinge to the pole's centre of mass
    and `J = m (length² / 12 + l²)` its moment of inertia about the hinge (the pole is a thin box: a uniform rod),
    Lagrange's equations are

        M x'' + m l (theta'' cos theta - theta'² sin theta) = F
        J theta'' + m l x'' cos theta                       = m g l sin theta

    The force is held during a step, which is integrated by the classical Runge-Kutta method (RK4) in equal substeps.
    Masses, sizes, limits, force and step are those of G.pt's cart-pole (Peebles et al. 2022, arXiv 2209.12892).
    """

    gravity: float = 9.81
    cart_mass: float = 1.0
    pole_mass: float = 1.0
    pole_length: float = 1.0
    centre_of_mass: float = 0.47
    max_force: float = 400.0
    time_step: float = 0.0166
    substeps: int = 2
    max_position: float = 3.0
    max_angle: float = math.pi / 2
    reset_position: float = 0.1
    reset_velocity: float = 0.25

    def start(self, uniform: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
        """Start states from numbers uniform in [0, 1): by default x, theta within +-0.1, velocities within +-0.25."""
        x, x_dot, theta, theta_dot = (2 * uniform - 1).unbind(-1)
        position, velocity = self.reset_position, self.reset_velocity
        return torch.stack([position * x, velocity * x_dot, position * theta, velocity * theta_dot], dim=-1)

    def reset(self, shape: tuple[int, ...], rng: torch.Generator) -> Float[Tensor, "*batch 4"]:
        """Start states `[*shape, 4]` drawn from `rng`, on its device."""
        return self.start(torch.rand((*shape, 4), generator=rng, device=rng.device))

    def step(
        self, state: Float[Tensor, "*batch 4"], action: Float[Tensor, "*batch 1"]
    ) -> tuple[Float[Tensor, "*batch 4"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
        """Push for one time step: the next state, its reward, and whether the pole fell or the cart left the rail.

        The force is `max_force * clamp(action, -1, 1)`. The reward is 1 - theta² - 0.01 |x_dot| - 0.005 |theta_dot| of
        the next state, or -2 where it terminates. A state that is not a number (a broken network's) terminates too.
        """
        force = self.max_force * action.squeeze(-1).clamp(-1, 1)
        x, x_dot, theta, theta_dot = state.unbind(-1)
        for _ in range(self.substeps):
            x, x_dot, theta, theta_dot = self._runge_kutta(x, x_dot, theta, theta_dot, force)
        terminated = ~((x.abs() <= self.max_position) & (theta.abs() <= self.max_angle))
        reward = 1 - theta.square() - 0.01 * x_dot.abs() - 0.005 * theta_dot.abs()
        return torch.stack([x, x_dot, theta, theta_dot], dim=-1), reward.masked_fill(terminated, -2.0), terminated

    def accelerations(
        self, theta: Float[Tensor, "*batch"], theta_dot: Float[Tensor, "*batch"], force: Float[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """(x'', theta''): Lagrange's two linear equations above, solved by Cramer's rule."""
        total_mass = self.cart_mass + self.pole_mass
        lever = self.pole_mass * self.centre_of_mass
        inertia = self.pole_mass * (self.pole_length**2 / 12 + self.centre_of_mass**2)
        sine, coupling = torch.sin(theta), lever * torch.cos(theta)
        push = force + lever * theta_dot.square() * sine
        torque = lever * self.gravity * sine
        determinant = total_mass * inertia - coupling.square()
        return (inertia * push - coupling * torque) / determinant, (total_mass * torque - coupling * push) / determinant

    def _runge_kutta(
        self,
        x: Float[Tensor, "*batch"],
        x_dot: Float[Tensor, "*batch"],
        theta: Float[Tensor, "*batch"],
        theta_dot: Float[Tensor, "*batch"],
        force: Float[Tensor, "*batch"],
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """One RK4 substep; the accelerations depend on neither x nor x_dot, so the stages follow the pole alone."""
        h = self.time_step / self.substeps
        x1, theta1 = self.accelerations(theta, theta_dot, force)
        x2, theta2 = self.accelerations(theta + h / 2 * theta_dot, theta_dot + h / 2 * theta1, force)
        x3, theta3 = self.accelerations(theta + h / 2 * (theta_dot + h / 2 * theta1), theta_dot + h / 2 * theta2, force)
        x4, theta4 = self.accelerations(theta + h * (theta_dot + h / 2 * theta2), theta_dot + h * theta3, force)
        return (
            x + h * (x_dot + h / 6 * (x1 + x2 + x3)),
            x_dot + h / 6 * (x1 + 2 * (x2 + x3) + x4),
            theta + h * (theta_dot + h / 6 * (theta1 + theta2 + theta3)),
            theta_dot + h / 6 * (theta1 + 2 * (theta2 + theta3) + theta4),
        )


Policy = Callable[[Tensor], Tensor]
"""Observations [P, E, 4] -> mean actions [P, E, 1] of P networks in E environments each."""


@torch.no_grad()
def episode_returns(policy: Policy, start: Float[Tensor, "P E 4"]) -> Float[Tensor, "P E"]:
    """Undiscounted return of exactly one episode from every start state, to termination or the limit of 500 steps.

    All P*E environments are stepped together. One episode each, because a mean over the first episodes to finish would
    favour short ones.
    """
    environment, state = CartPole(), start
    returns = torch.zeros_like(start[..., 0])
    running = torch.ones_like(returns, dtype=torch.bool)
    for step in range(EPISODE_STEPS):
        if step % STEPS_BETWEEN_CHECKS == 0 and not running.any():
            break
        state, reward, terminated = environment.step(state, policy(state))
        returns = torch.where(running, returns + reward, returns)
        running = running & ~terminated
    return returns


def rollout_returns(
    policy: Policy, num_envs: int, rng: torch.Generator, *, networks: int = 1, device: torch.device | str | None = None
) -> Float[Tensor, "P E"]:
    """Returns of full episodes of `networks` mean-action policies, all of them from the same `num_envs` start states.

    The start states are drawn on the generator's device and moved to `device` (default: the generator's), so that a CPU
    generator gives the same ones everywhere; common start states make the returns of different networks comparable.
    """
    start = CartPole().reset((num_envs,), rng).to(device if device is not None else rng.device)
    return episode_returns(policy, start.expand(networks, num_envs, 4))


def scattered_states(count: int, rng: torch.Generator) -> Float[Tensor, "count 4"]:
    """States to compare policies in: uniform in a box, which is as large as what policies see that throw the cart to
    and fro, or up to a hundred times smaller, where those stay that balance quietly."""
    box = (CartPole.max_position, 5.0, 0.3, 7.0)
    scale = 10 ** (-2 * torch.rand(count, 1, generator=rng, device=rng.device))
    inside = 2 * torch.rand(count, 4, generator=rng, device=rng.device) - 1
    # No tensor from the host: training steps are recorded as CUDA graphs.
    return scale * torch.stack([half * x for half, x in zip(box, inside.unbind(1), strict=True)], dim=1)


@dataclass(frozen=True)
class Evaluation:
    """Which start states judge a network: `episodes` of them, the same ones on every device, a function of `seed`."""

    episodes: int
    seed: int


def evaluate_policy(evaluation: Evaluation, net: nn.Module | Population) -> Float[Tensor, "*P"]:
    """Mean return of the mean-action policy over full episodes, one number per network; at most 500.

    Zoo labels and scores of generated networks are both this quantity.
    """
    start_rng = named_rng("cpu", evaluation.seed, "cartpole", "start")
    if isinstance(net, Population):
        device = net.weights.device
        return rollout_returns(net.each, evaluation.episodes, start_rng, networks=len(net), device=device).mean(-1)
    device = next(net.parameters()).device
    return rollout_returns(lambda obs: net(obs[0])[None], evaluation.episodes, start_rng, device=device).mean()


class CartPoleEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One `CartPole` behind gymnasium's interface; the time limit is the registration's TimeLimit wrapper."""

    metadata = {"render_modes": []}
    # Unbounded in truth; gymnasium's checker takes infinite bounds for a mistake.
    observation_space = gymnasium.spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    render_mode = None

    def __init__(self) -> None:
        self._cart_pole = CartPole()
        self._state = torch.full((4,), math.nan)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self._cart_pole.start(torch.from_numpy(self.np_random.random(4, dtype=np.float32)))
        return self._state.numpy().copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._state, reward, terminated = self._cart_pole.step(self._state, torch.tensor(action, dtype=torch.float32))
        return self._state.numpy().copy(), reward.item(), bool(terminated), False, {}


class CartPoleVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` cart-poles stepped as one tensor; the step after an episode's end resets it (NEXT_STEP autoreset)."""

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, num_envs: int, max_episode_steps: int = EPISODE_STEPS) -> None:
        self.num_envs = num_envs
        self.single_observation_space = CartPoleEnv.observation_space
        self.single_action_space = CartPoleEnv.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._cart_pole = CartPole()
        self._max_episode_steps = max_episode_steps
        self._state = torch.full((num_envs, 4), math.nan)
        self._age = torch.zeros(num_envs, dtype=torch.int64)
        self._done = torch.zeros(num_envs, dtype=torch.bool)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = self._starts(self.num_envs)
        self._age.zero_()
        self._done.zero_()
        return self._state.numpy().copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        resetting = self._done
        action = torch.tensor(actions, dtype=torch.float32)
        state, reward, terminated = self._cart_pole.step(self._state, action)
        state[resetting] = self._starts(int(resetting.sum()))
        self._state = state
        self._age = torch.where(resetting, 0, self._age + 1)
        terminated &= ~resetting
        truncated = self._age >= self._max_episode_steps
        self._done = terminated | truncated
        reward = reward.masked_fill(resetting, 0.0)
        return state.numpy().copy(), reward.numpy(), terminated.numpy(), truncated.numpy(), {}

    def _starts(self, count: int) -> Float[Tensor, "count 4"]:
        return self._cart_pole.start(torch.from_numpy(self.np_random.random((count, 4), dtype=np.float32)))


if ENVIRONMENT_ID not in gymnasium.registry:
    gymnasium.register(
        ENVIRONMENT_ID,
        entry_point="Gpt.environments:CartPoleEnv",
        vector_entry_point="Gpt.environments:CartPoleVectorEnv",
        max_episode_steps=EPISODE_STEPS,
    )
