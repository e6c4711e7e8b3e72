"""Populations of cart-pole agents trained by proximal policy optimisation, all of them in one batch.

R agents are one tensor of parameters `[R, 2499]`: log_std, actor, critic. A gradient step of all of them is one
backward pass of the sum of their losses, for no loss depends on another agent's parameters, and one step of one Adam,
for Adam acts on every number alone; only the clipping of gradients has to be done row by row.

Noise is counter-based (`data_gen.randomness`): a hash of run and iteration, one program for all agents. A run is thus
the same whichever others share its batch, to floating-point tolerance, and an iteration is a deterministic tensor
program without host synchronisation. On CUDA devices its four parts are compiled, for their kernels are tiny: one step
of a cart-pole is more than a hundred operations on R x E numbers.

Source: Schulman et al. 2017 (arXiv 1707.06347), with generalised advantages (Schulman et al. 2016, arXiv 1506.02438);
widths and hyper-parameters are those of G.pt's cart-pole zoo (Peebles et al. 2022, arXiv 2209.12892).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data_gen.progress import Progress, iterations
from data_gen.randomness import random_words, run_keys
from Gpt.environments import EPISODE_STEPS, CartPole
from Gpt.errors import ConfigError
from Gpt.population.functional import Population
from Gpt.recipes import PpoRecipe
from Gpt.seeds import rng
from Gpt.tasks import Task

LAYERS = ((32, 4), (32, 32), (1, 32))
GAINS = (2**0.5, 2**0.5, 0.01)
NETWORK_SIZE = sum(outputs * inputs + outputs for outputs, inputs in LAYERS)
ACTOR_SIZE = 1 + NETWORK_SIZE
POLICIES_PER_CALL = 2**14  # tested at once


def train_ppo_population(
    task: Task,
    recipe: PpoRecipe,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    """Train R agents and keep their actors at S iterations (0 is the initialisation).

    Training ends with the last snapshot; the learning rate still follows the recipe's full length.

    Args:
        progress: told of new snapshots as training goes on, see `data_gen.progress`.

    Returns:
        The actors as rows of 1,250 numbers in the order of `CartPoleActor.state_dict()`, on `device`, and the metrics
        "validation_return" and "test_return" of each, by the task's test function on its own episodes.

    Raises:
        ConfigError: the recipe or the snapshots cannot be carried out; the message names the value.
    """
    check(recipe, snapshot_iterations)
    population = PpoPopulation(recipe, run_ids, seed, device)
    snapshots = []
    for iteration in iterations(snapshot_iterations, len(run_ids), progress):
        if iteration in snapshot_iterations:
            snapshots.append(population.actors())
        if iteration < snapshot_iterations[-1]:
            population.iterate()
    weights = torch.stack(snapshots, dim=1)
    returns = {split: evaluate_actors(task, weights.flatten(0, 1), split) for split in ("validation", "test")}
    return weights, {f"{split}_return": found.view(weights.shape[:2]) for split, found in returns.items()}


def check(recipe: PpoRecipe, snapshot_iterations: list[int]) -> None:
    """Refuse what cannot be trained.

    Raises:
        ConfigError: mini-batches do not divide the environments, or snapshots are not increasing iterations of the run.
    """
    if recipe.environments % recipe.minibatches:
        raise ConfigError(
            f"PPO recipe: environments={recipe.environments} cannot be split into minibatches={recipe.minibatches}; "
            "choose a multiple"
        )
    increasing = all(a < b for a, b in zip(snapshot_iterations, snapshot_iterations[1:], strict=False))
    if not snapshot_iterations or not increasing or snapshot_iterations[0] < 0:
        raise ConfigError(f"snapshot iterations must be increasing and start at 0 or later, got {snapshot_iterations}")
    if snapshot_iterations[-1] > recipe.iterations:
        raise ConfigError(
            f"snapshot iteration {snapshot_iterations[-1]} lies beyond the PPO recipe's iterations={recipe.iterations}"
        )


def evaluate_actors(task: Task, actors: Float[Tensor, "P D"], split: str) -> Float[Tensor, " P"]:
    """Mean return of each mean-action policy on the task's episodes of a split, many policies at a time."""
    populations = [Population(task.template, task.structure, chunk) for chunk in actors.split(POLICIES_PER_CALL)]
    return torch.cat([task.score(population, split, actors.device) for population in populations])


def initial_parameters(seed: int, run_id: int) -> Float[Tensor, " D"]:
    """One agent: log_std 0, then actor and critic with orthogonal weights (gain sqrt 2, last layer 0.01), biases 0."""
    generator = rng("cpu", seed, "ppo", "initialisation", run_id)
    parts = [torch.zeros(1)]
    for _ in ("actor", "critic"):
        for shape, gain in zip(LAYERS, GAINS, strict=True):
            parts.append(nn.init.orthogonal_(torch.empty(shape), gain, generator=generator).flatten())
            parts.append(torch.zeros(shape[0]))
    return torch.cat(parts)


def network(parameters: Float[Tensor, "B D"], inputs: Float[Tensor, "B N 4"]) -> Float[Tensor, "B N"]:
    """B networks 4-32-32-1 with SELU, each on its own inputs; a row of parameters is every layer's weight and bias."""
    sizes = [size for outputs, width in LAYERS for size in (outputs * width, outputs)]
    w1, b1, w2, b2, w3, b3 = parameters.split(sizes, dim=1)
    hidden = F.selu(_linear(inputs, w1, b1))
    hidden = F.selu(_linear(hidden, w2, b2))
    return _linear(hidden, w3, b3).squeeze(-1)


def _linear(
    x: Float[Tensor, "B N I"], weight: Float[Tensor, "B OI"], bias: Float[Tensor, "B O"]
) -> Float[Tensor, "B N O"]:
    weight = weight.view(*bias.shape, x.shape[-1])
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def log_probability(
    action: Float[Tensor, "R N"], mean: Float[Tensor, "R N"], log_std: Float[Tensor, "R 1"]
) -> Float[Tensor, "R N"]:
    """Gaussian log-density less its constant, which cancels in the probability ratios."""
    return -0.5 * ((action - mean) * torch.exp(-log_std)).square() - log_std


def generalized_advantages(
    delta: Float[Tensor, "*batch H"], done: Bool[Tensor, "*batch H"], decay: float
) -> Float[Tensor, "*batch H"]:
    """Decayed sums of temporal differences to the end of each episode or of the rollout; decay is gamma * lambda."""
    continues = decay * (~done).to(delta.dtype)
    advantages = [torch.zeros_like(delta[..., 0])]
    for t in reversed(range(delta.shape[-1])):
        advantages.append(delta[..., t] + continues[..., t] * advantages[-1])
    return torch.stack(advantages[:0:-1], dim=-1)


@dataclass(frozen=True)
class Rollout:
    """What R agents with E environments each experienced in H steps: states, actions and rewards, and how they went on.

    Attributes:
        next_observation: the state reached, before a finished episode was replaced by a new one.
        terminated: the pole fell or the cart left the rail, so that nothing follows.
        done: terminated, or stopped by the time limit, in which case the critic stands for what would have followed.
    """

    observation: Float[Tensor, "R E H 4"]
    action: Float[Tensor, "R E H"]
    log_probability: Float[Tensor, "R E H"]
    reward: Float[Tensor, "R E H"]
    next_observation: Float[Tensor, "R E H 4"]
    terminated: Bool[Tensor, "R E H"]
    done: Bool[Tensor, "R E H"]


class PpoPopulation:
    """R agents in training, each with its own initialisation, environments, mini-batches and noise.

    Args:
        compile: whether to `torch.compile` the parts of an iteration; by default on CUDA devices only.

    Attributes:
        parameters: `[R, 2499]`, log_std, actor and critic of every agent.
        state: `[R, E, 4]`, of every environment; `age` `[R, E]` counts the steps of its episode.
    """

    def __init__(
        self,
        recipe: PpoRecipe,
        run_ids: list[int],
        seed: int,
        device: torch.device | str,
        compile: bool | None = None,
    ):
        self.recipe, device = recipe, torch.device(device)
        runs, environments = len(run_ids), recipe.environments
        self.parameters = torch.stack([initial_parameters(seed, run) for run in run_ids]).to(device).requires_grad_()
        self._optimizer = torch.optim.Adam([self.parameters], lr=recipe.learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, T_max=recipe.iterations)
        self._keys = run_keys(seed, "ppo", run_ids, device)
        self._iteration = torch.zeros((), dtype=torch.long, device=device)
        compile = device.type == "cuda" if compile is None else compile
        parts: tuple[Callable, ...] = (draw, act, examples, clipped_gradient)
        if compile:
            parts = tuple(torch.compile(part, dynamic=False) for part in parts)
        self._random, self._act, self._examples, self._gradient = parts
        self._draw()
        self.state = CartPole().start(self._uniform[:, : 4 * environments].view(runs, environments, 4))
        self.age = torch.zeros(runs, environments, dtype=torch.int32, device=device)

    def actors(self) -> Float[Tensor, "R D"]:
        """A copy of the actors in the order of `CartPoleActor.state_dict()`."""
        return self.parameters.detach()[:, :ACTOR_SIZE].clone()

    @torch.no_grad()
    def iterate(self) -> None:
        """One iteration of every agent: collect, estimate advantages, and several epochs of mini-batch steps."""
        self._draw()
        batch = self.estimate(self.collect())
        runs = torch.arange(len(batch), device=batch.device)[:, None]
        for environments in self.minibatches():
            self.update(batch[runs, environments].flatten(1, 2))
        self._schedule.step()

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Act for H steps in every environment; a finished episode is followed by a new one."""
        shape = (len(self.parameters), self.recipe.horizon, self.recipe.environments)
        normal = self._normal.view(shape)
        fresh = self._uniform[:, : 4 * normal[0].numel()].view(*shape, 4)
        steps = []
        for t in range(self.recipe.horizon):
            self.state, self.age, step = self._act(self.parameters, self.state, self.age, normal[:, t], fresh[:, t])
            steps.append(step)
        return Rollout(*(torch.stack(column, dim=2) for column in zip(*steps, strict=True)))

    @torch.no_grad()
    def estimate(self, rollout: Rollout) -> Float[Tensor, "R E H 8"]:
        """What the loss needs of every transition: observation (4), action, log-probability, advantage, target value.

        Advantages are standardised over each agent's transitions of the iteration.
        """
        return self._examples(self.recipe, self.parameters, rollout)

    @torch.no_grad()
    def update(self, batch: Float[Tensor, "R N 8"]) -> None:
        """One Adam step of every agent, the gradient of each clipped to the recipe's norm."""
        self.parameters.grad = self._gradient(self.recipe, self.parameters, batch)
        self._optimizer.step()

    def minibatches(self) -> list[Int[Tensor, "R n"]]:
        """For every epoch, each agent's environments in an order of its own, cut into mini-batches."""
        recipe = self.recipe
        keys = self._uniform[:, -recipe.epochs * recipe.environments :].view(-1, recipe.epochs, recipe.environments)
        order = keys.argsort(dim=-1)
        return [part for epoch in order.unbind(1) for part in epoch.chunk(recipe.minibatches, dim=1)]

    def _draw(self) -> None:
        """All random numbers of an iteration."""
        environments, horizon = self.recipe.environments, self.recipe.horizon
        normals, uniforms = horizon * environments, (4 * horizon + self.recipe.epochs) * environments
        self._normal, self._uniform = self._random(self._keys, self._iteration, normals, uniforms)
        self._iteration += 1


# --- the parts of an iteration: pure functions, which torch.compile turns into few kernels ----------------------------


def draw(
    keys: Int[Tensor, "R 2"], iteration: Int[Tensor, ""], normals: int, uniforms: int
) -> tuple[Float[Tensor, "R normals"], Float[Tensor, "R uniforms"]]:
    """Standard Gaussian and uniform [0, 1) numbers of every run, a function of its key and of the iteration.

    Gaussians come in pairs (Box & Muller 1958); with 24 random bits they end at 5.8 standard deviations.
    """
    pairs = -(-normals // 2)
    slots = torch.arange(2 * pairs + uniforms, device=keys.device)
    unit = (random_words(keys, iteration, slots) >> 8).float() * 2.0**-24
    radius, angle, uniform = unit.split((pairs, pairs, uniforms), dim=1)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :normals], uniform


def act(
    parameters: Float[Tensor, "R D"],
    state: Float[Tensor, "R E 4"],
    age: Int[Tensor, "R E"],
    noise: Float[Tensor, "R E"],
    fresh: Float[Tensor, "R E 4"],
) -> tuple[Float[Tensor, "R E 4"], Int[Tensor, "R E"], tuple[Tensor, ...]]:
    """One step in every environment: the next state and age, and this step's items of a `Rollout`."""
    cart_pole = CartPole()
    log_std = parameters[:, :1]
    mean = network(parameters[:, 1:ACTOR_SIZE], state)
    action = mean + log_std.exp() * noise
    reached, reward, terminated = cart_pole.step(state, action.unsqueeze(-1))
    age = age + 1
    done = terminated | (age >= EPISODE_STEPS)
    step = (state, action, log_probability(action, mean, log_std), reward, reached, terminated, done)
    return torch.where(done.unsqueeze(-1), cart_pole.start(fresh), reached), age.masked_fill(done, 0), step


def examples(recipe: PpoRecipe, parameters: Float[Tensor, "R D"], rollout: Rollout) -> Float[Tensor, "R E H 8"]:
    """See `PpoPopulation.estimate`."""
    critic = parameters[:, ACTOR_SIZE:]
    value = network(critic, rollout.observation.flatten(1, 2)).view_as(rollout.reward)
    next_value = network(critic, rollout.next_observation.flatten(1, 2)).view_as(rollout.reward)
    delta = rollout.reward + recipe.gamma * next_value.masked_fill(rollout.terminated, 0) - value
    advantage = generalized_advantages(delta, rollout.done, recipe.gamma * recipe.gae_lambda)
    target = advantage + value
    std, mean = torch.std_mean(advantage, dim=(1, 2), keepdim=True)
    columns = [rollout.action, rollout.log_probability, (advantage - mean) / (std + 1e-8), target]
    return torch.cat([rollout.observation, torch.stack(columns, dim=-1)], dim=-1)


def losses(recipe: PpoRecipe, parameters: Float[Tensor, "R D"], batch: Float[Tensor, "R N 8"]) -> Float[Tensor, " R"]:
    """Every agent's clipped surrogate, value error and entropy bonus (Schulman et al. 2017, equations 7 and 9)."""
    runs = len(batch)
    observation = batch[..., :4].repeat_interleave(2, dim=0)
    action, old_log_probability, advantage, target = batch[..., 4:].unbind(-1)
    # Actor and critic have the same widths, so that both are one batch of 2R networks.
    outputs = network(parameters[:, 1:].reshape(2 * runs, NETWORK_SIZE), observation)
    mean, value = outputs.view(runs, 2, -1).unbind(1)
    log_std = parameters[:, :1]
    ratio = torch.exp(log_probability(action, mean, log_std) - old_log_probability)
    clipped = ratio.clamp(1 - recipe.clip, 1 + recipe.clip)
    policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean(dim=1)
    value_loss = (value - target).square().mean(dim=1)
    # The entropy of a Gaussian is log_std and a constant.
    return policy_loss + recipe.value_coefficient * value_loss - recipe.entropy_coefficient * log_std.squeeze(1)


def clipped_gradient(
    recipe: PpoRecipe, parameters: Float[Tensor, "R D"], batch: Float[Tensor, "R N 8"]
) -> Float[Tensor, "R D"]:
    """Gradient of every agent's loss, scaled down to the recipe's norm where it is longer."""
    gradient = torch.func.grad(lambda p: losses(recipe, p, batch).sum())(parameters)
    norm = gradient.norm(dim=1, keepdim=True)
    return gradient * (recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1)
