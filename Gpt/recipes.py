"""Recipes: how one network of a task is trained. `data_gen` turns a recipe into a population run.

The values are G.pt's unless a task says otherwise (Peebles et al. 2022, released training code).
"""

from dataclasses import dataclass, field

from pydantic import NonNegativeInt, PositiveInt

from Gpt.adapters.spec import AdapterSpec
from Gpt.errors import ConfigError


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

    epochs: PositiveInt = 25
    batch_size: PositiveInt = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    augmentation: str = "none"
    shared_init: bool = False


@dataclass(frozen=True)
class SingleRecipe(SupervisedRecipe):
    """The same for networks too large for a batched population, which are trained one after the other.

    The learning rate rises linearly, falls along a cosine (with schedule "cosine"), and can stay constant for a while
    at the end: along such a tail RPG's checkpoints were saved (Wang et al. 2025, arXiv 2501.11587, section 3.1).

    Attributes:
        warmup: share of the iterations, without the tail, in which the learning rate rises.
        label_smoothing: of the training loss alone.
        cutout: side of the square that is blanked in every training image (DeVries & Taylor 2017, arXiv 1708.04552).
        tail_iterations, tail_learning_rate: iterations after the epochs, and the constant learning rate in them, which
            is also where the cosine ends.
    """

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 512
    learning_rate: float = 0.4
    augmentation: str = "flip_crop"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    cutout: NonNegativeInt = 0
    tail_iterations: NonNegativeInt = 0
    tail_learning_rate: float = 0.0


@dataclass(frozen=True)
class PpoRecipe:
    """Proximal policy optimisation of a Gaussian policy (Schulman et al. 2017) with Adam and a cosine schedule.

    Attributes:
        iterations: rounds of rollout and update; the unit in which snapshots are counted.
        environments, horizon: each round collects `environments * horizon` transitions.
    """

    iterations: PositiveInt = 500
    environments: PositiveInt = 512
    horizon: PositiveInt = 16
    epochs: PositiveInt = 8
    minibatches: PositiveInt = 2
    learning_rate: float = 3e-4
    max_grad_norm: float = 2.0
    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    entropy_coefficient: float = 0.0
    value_coefficient: float = 2.0


@dataclass(frozen=True)
class AdapterRecipe:
    """Low-rank adapters of a frozen language model, with AdamW; the learning rate falls linearly to a tenth.

    Attributes:
        base: name of the base model, see `Gpt.adapters.base`.
        spec: form of an adapter.
        iterations, examples: mini-batches of a run, and labelled examples of each; the loss is that of the answers.
        own_a: every run draws its A from a seed of its own (only with `spec.train_a`), so that the zoo shares no gauge.
        adapters_per_forward: runs that are trained in one pass through the base model.

    Raises:
        ConfigError: own_a without an A that is trained.
    """

    base: str = "smollm2"
    spec: AdapterSpec = field(default_factory=AdapterSpec)
    iterations: PositiveInt = 80
    examples: PositiveInt = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    own_a: bool = False
    adapters_per_forward: PositiveInt = 20

    def __post_init__(self) -> None:
        if self.own_a and not self.spec.train_a:
            raise ConfigError("own_a=true: a frozen A is shared by all adapters; set spec.train_a=true with it")


Recipe = SupervisedRecipe | PpoRecipe | AdapterRecipe
