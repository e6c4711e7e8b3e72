"""Reinforcement learning: policies of cart-pole."""

from typing import Any

from Gpt import environments
from Gpt.behaviour import Behaviour, action_divergence
from Gpt.networks import CartPoleActor
from Gpt.recipes import PpoRecipe

TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {
        "task_test_fn": environments.evaluate_policy,
        "constructor": CartPoleActor,
        "data_fn": lambda: (environments.Evaluation(episodes=64, seed=1),),
        "validation_data_fn": lambda: (environments.Evaluation(episodes=64, seed=0),),
        "minimize": False,
        "best_prompt": 500.0,
        "recursive_prompt": 500.0,
        "symmetry": CartPoleActor.symmetry,
        "metric": "return",
        "batched": True,
        "recipe": PpoRecipe(),
        "behaviour": Behaviour(lambda count, rng: (environments.scattered_states(count, rng),), action_divergence),
    },
}
