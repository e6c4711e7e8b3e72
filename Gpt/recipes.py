"""Recipes: how one network of a task is trained. `data_gen` turns a recipe into a population run.

The values are G.pt's unless a task says otherwise (Peebles et al. 2022, released training code).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SupervisedRecipe:
    """Mini-batch classification with SGD and a cosine schedule.

    Attributes:
        epochs: passes over the training split; every epoch drops its last incomplete mini-batch.
        schedule: "cosine" decays the learning rate to zero, stepped every iteration; "constant" leaves it alone.
        augmentation: "none", or "flip_crop" (horizontal flip with probability one half, crop after zero-padding by 4).
        shared_init: all runs start from one network, that of run 0, and differ in their mini-batches and labels alone;
            hidden unit i then plays a similar part in all of them.
    """

    epochs: int = 25
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    augmentation: str = "none"
    shared_init: bool = False


@dataclass(frozen=True)
class PpoRecipe:
    """Proximal policy optimisation of a Gaussian policy (Schulman et al. 2017) with Adam and a cosine schedule.

    Attributes:
        iterations: rounds of rollout and update; the unit in which snapshots are counted.
        environments, horizon: each round collects `environments * horizon` transitions.
        evaluation_episodes: full episodes behind one `return` label.
    """

    iterations: int = 500
    environments: int = 512
    horizon: int = 16
    epochs: int = 8
    minibatches: int = 2
    learning_rate: float = 3e-4
    max_grad_norm: float = 2.0
    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    entropy_coefficient: float = 0.0
    value_coefficient: float = 2.0
    evaluation_episodes: int = 64


Recipe = SupervisedRecipe | PpoRecipe
