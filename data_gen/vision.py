"""Supervised populations: thousands of small classifiers trained at once.

Every run has its own initialisation and mini-batches. All runs are rows of one `[R, D]` tensor, and a step is a handful
of batched kernels whatever R is. The data set is resident once; a step gathers every run's mini-batch from it.

What a step of 2,048 MLPs 784-10-10 costs on an H100 (3 TB/s): mini-batches of 128 images are 822 MB in float32, written
once and read three times (to gather them, and for the products of either direction), 1.1 ms. In bfloat16, in which GPUs
store the images and multiply, that is 0.55 ms; weights, gradients, momentum and sums stay in float32, 0.1 ms. The
products are 8.4 GFLOP, which is nothing. The metrics of one snapshot are 2,048 networks on 17,000 images: 0.56 TFLOP in
one product per split, 12 ms in float32 and 1.5 ms in TensorFloat-32, and ten passes over 0.7 GB of hidden units
and logits, 2.5 ms.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_gen.images import WINDOWS, StoredImages, flip_crop, zero_padded
from data_gen.progress import Progress, iterations
from data_gen.randomness import below, permuted, random_words, run_keys
from Gpt.errors import ConfigError, DataError, TaskError
from Gpt.evaluation.population import test_population as score_population
from Gpt.population import updates
from Gpt.population.functional import Population, population_gradient, stack_initial, training_precision
from Gpt.population.shared_inputs import with_shared_inputs
from Gpt.recipes import SingleRecipe, SupervisedRecipe
from Gpt.scoring import metric_of
from Gpt.seeds import derive_seed
from Gpt.tasks import Task

TRAIN_METRIC_EXAMPLES = 2000
CHOICES = {
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("cosine", "constant"),
    "augmentation": ("none", "flip_crop"),
}


def train_supervised_population(
    task: Task,
    recipe: SupervisedRecipe,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    device: torch.device | str,
    *,
    label_map: Int[Tensor, "R classes"] | None = None,
    progress: Progress | None = None,
    compile: bool | None = None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    """Train R networks of a task at once and keep snapshots of all of them.

    A run's trajectory depends on (seed, run id) alone, up to floating-point rounding.

    Args:
        snapshot_iterations: increasing; 0 is the initialisation, i the weights after i mini-batches.
        label_map: run r is trained and measured on the labels `label_map[r, y]` instead of y.
        progress: told of new snapshots as training goes on, see `data_gen.progress`.
        compile: whether to `torch.compile` the step; by default on CUDA devices only.

    Returns:
        float32 weights on `device`, and the columns `<split>_loss` (nats) and `<split>_error` (percent) of the splits
        train (its first 2,000 examples at most), validation and test. A task with a test function of its own has the
        columns that this function gives for validation and test.

    Raises:
        TaskError: the training data are not (inputs, labels), or the network draws random numbers of its own (dropout).
        DataError: the training split is smaller than one mini-batch.
        ConfigError: the recipe names an unknown optimizer, schedule or augmentation.
    """
    device = torch.device(device)
    step = _training_step(task, recipe, device, device.type == "cuda" if compile is None else compile)
    state = step.initial_state(run_ids, seed, label_map)
    column = {iteration: s for s, iteration in enumerate(snapshot_iterations)}
    weights = torch.empty(len(run_ids), len(column), task.structure.size, device=device)
    metrics: dict[str, list[Tensor]] = {}
    for iteration in iterations(snapshot_iterations, len(run_ids), progress):
        if iteration in column:
            weights[:, column[iteration]] = state["weights"]
            for name, values in measure(task, state["weights"], label_map).items():
                metrics.setdefault(name, []).append(values.to(device))
        if iteration < snapshot_iterations[-1]:
            step(state)
    return weights, {name: torch.stack(values, 1) for name, values in metrics.items()}


def iterations_of(task: Task, recipe: SupervisedRecipe) -> int:
    """Number of mini-batches in a complete run of the recipe.

    Raises:
        TaskError: the training data are not what the network can be trained on.
        DataError: they are fewer than one mini-batch.
    """
    inputs, labels = _train_data(task, "cpu")
    _check_classes(task, inputs, labels)
    if len(inputs) < recipe.batch_size:
        raise DataError(
            f"task {task.name!r}: the training split has {len(inputs)} examples, fewer than one mini-batch of "
            f"{recipe.batch_size}; set a smaller batch_size in the task's recipe"
        )
    return recipe.epochs * (len(inputs) // recipe.batch_size)


State = dict[str, Tensor]
"""Everything that changes during training or differs between populations; the step updates it in place."""


@lru_cache(maxsize=8)
def _training_step(task: Task, recipe: SupervisedRecipe, device: torch.device, compile: bool) -> "TrainingStep":
    """One step object, hence one compilation, for all populations of a task."""
    return TrainingStep(task, recipe, device, compile)


class TrainingStep:
    """One mini-batch of every run of a population, without host synchronisation."""

    def __init__(self, task: Task, recipe: SupervisedRecipe, device: torch.device, compile: bool = False):
        check_choices(recipe)
        _check_deterministic(task)
        self.task, self.recipe, self.device = task, recipe, device
        self.iterations = iterations_of(task, recipe)
        inputs, self.labels = _train_data(task, device)
        precision = training_precision(task.template, device)
        self.augmented = recipe.augmentation == "flip_crop"
        self.inputs = _stored(task, inputs.to(precision) if inputs.is_floating_point() else inputs, self.augmented)
        self.slots = torch.arange(recipe.batch_size, device=device)
        self.gradient = population_gradient(task.template, task.structure, inputs[:1], precision)
        self.optimizer = optimizer(recipe, updates.trainable(task.template, task.structure).to(device))
        # Compiled apart: the compiler would repeat the draws of an image for each of its pixels.
        fast: Callable[[Any], Any] = partial(torch.compile, dynamic=False) if compile else lambda part: part
        self._draws, self._updates = fast(self.draw), fast(self._update)

    def initial_state(self, run_ids: list[int], seed: int, label_map: Tensor | None = None) -> State:
        """Freshly initialised runs."""
        names = [0] if self.recipe.shared_init else run_ids
        seeds = [derive_seed(seed, "init", name) for name in names]
        weights = stack_initial(self.task.constructor, self.task.structure, seeds).to(self.device)
        weights = weights.expand(len(run_ids), -1).clone()
        state = updates.initial_state(weights, square=self.recipe.optimizer != "sgd") | {
            "batch_keys": run_keys(seed, "batches", run_ids, self.device),
            "augmentation_keys": run_keys(seed, "augmentation", run_ids, self.device),
        }
        if label_map is not None:
            state["label_map"] = label_map.to(self.device)
        return state

    def __call__(self, state: State) -> None:
        self._updates(state, *self._draws(state))

    def draw(self, state: State) -> tuple[Int[Tensor, "R B"], Int[Tensor, "R B"]]:
        """Every run's examples of the current iteration, and random numbers for their augmentation.

        An epoch drops its last incomplete mini-batch.
        """
        length, batch = len(self.labels), self.recipe.batch_size
        epoch, index = state["iteration"] // (length // batch), state["iteration"] % (length // batch)
        examples = permuted(state["batch_keys"], epoch, index * batch + self.slots, length)
        return examples, below(random_words(state["augmentation_keys"], state["iteration"], self.slots), WINDOWS)

    def mini_batches(
        self, state: State, examples: Int[Tensor, "R B"], windows: Int[Tensor, "R B"]
    ) -> tuple[Float[Tensor, "R B ..."], Int[Tensor, "R B"]]:
        """Every run's inputs and labels, of what `draw` gave."""
        labels = self.labels[examples]
        if "label_map" in state:
            labels = state["label_map"].gather(1, labels)
        if self.augmented:
            assert isinstance(self.inputs, StoredImages)
            return flip_crop(self.inputs, examples, windows), labels
        return self.inputs[(examples,)], labels

    def _update(self, state: State, examples: Int[Tensor, "R B"], windows: Int[Tensor, "R B"]) -> None:
        gradient = self.gradient(state["weights"], *self.mini_batches(state, examples, windows))
        self.optimizer(state, gradient, self._learning_rate(state["iteration"]))
        state["iteration"] += 1

    def _learning_rate(self, iteration: Tensor) -> Tensor | float:
        if self.recipe.schedule == "constant":
            return self.recipe.learning_rate
        return self.recipe.learning_rate * 0.5 * (1 + torch.cos(iteration * (math.pi / self.iterations)))


def _stored(task: Task, inputs: Tensor, augmented: bool) -> Tensor | StoredImages:
    if augmented and inputs.dim() != 4:
        raise TaskError(
            f"task {task.name!r}: augmentation 'flip_crop' needs images [N, C, H, W], train_data_fn returned inputs of "
            f"shape {tuple(inputs.shape)}"
        )
    if augmented:
        return zero_padded(inputs)
    return StoredImages(inputs) if inputs.dim() == 4 and inputs.shape[1] > 1 else inputs


def _train_data(task: Task, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The inputs and labels that networks are trained on.

    Raises:
        TaskError: they are not two tensors that belong together.
    """
    data = task.data("train", device) if task.train_data_fn else ()
    if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise TaskError(
            f"task {task.name!r}: a supervised recipe needs train_data_fn to return (inputs, labels), two tensors"
        )
    inputs, labels = data
    if labels.is_floating_point() or labels.shape != inputs.shape[:1]:
        raise TaskError(
            f"task {task.name!r}: train_data_fn returned {len(inputs):,} inputs and labels of shape "
            f"{tuple(labels.shape)}, {labels.dtype}; a supervised recipe needs one whole number for each input"
        )
    return inputs, labels


def _check_classes(task: Task, inputs: Tensor, labels: Tensor) -> None:
    """An input goes through the network, and there is an output for every label, but for those that masks map."""
    with torch.no_grad():
        classes = task.call("train_data_fn", copy.deepcopy(task.template).eval(), inputs[:1]).shape[-1]
    if len(labels) and task.family is None and not 0 <= labels.min() <= labels.max() < classes:
        raise TaskError(
            f"task {task.name!r}: train_data_fn returned labels from {labels.min()} to {labels.max()}, the network has "
            f"{classes} outputs; expected labels from 0 to {classes - 1}"
        )


def check_choices(recipe: SupervisedRecipe | SingleRecipe) -> None:
    """Raises:
    ConfigError: the recipe names an unknown optimizer, schedule or augmentation.
    """
    for field, known in CHOICES.items():
        value = getattr(recipe, field)
        if value not in known:
            raise ConfigError(f"recipe: {field} is {value!r}, expected one of {', '.join(known)}")


def _check_deterministic(task: Task) -> None:
    for name, module in task.template.named_modules():
        if getattr(module, "p", 0) and "Dropout" in type(module).__name__:
            raise TaskError(
                f"task {task.name!r}: {name} is {module}; populations are trained without random layers, so that a run "
                "is the same in any company: construct the network with dropout 0"
            )


# --- optimisers -------------------------------------------------------------------------------------------------------


def optimizer(recipe: SupervisedRecipe, trainable: Float[Tensor, " D"]) -> updates.Update:
    """The recipe's in-place update."""
    if recipe.optimizer == "sgd":
        return updates.sgd(
            trainable, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
        )
    return updates.adam(trainable, decoupled=recipe.optimizer == "adamw", weight_decay=recipe.weight_decay)


# --- metrics ----------------------------------------------------------------------------------------------------------


def measure(
    task: Task, weights: Float[Tensor, "P D"], label_map: Int[Tensor, "P classes"] | None = None
) -> dict[str, Float[Tensor, " P"]]:
    """The zoo's columns for P networks, see `train_supervised_population`."""
    columns: dict[str, Tensor] = {}
    for split in ("train", "validation", "test"):
        own_test = metric_of(task.task_test_fn) is None
        if own_test and split != "train":
            masks = None if task.family is None or label_map is None else label_map.bool()
            columns |= score_population(task, weights, split, masks=masks, device=weights.device)
            continue
        inputs, labels = task.data(split, weights.device)[:2]
        if split == "train":
            inputs, labels = inputs[:TRAIN_METRIC_EXAMPLES], labels[:TRAIN_METRIC_EXAMPLES]
        loss, error = cross_entropy_and_error(task, weights, inputs, labels, label_map)
        columns |= {f"{split}_loss": loss, f"{split}_error": error}
    return columns


@torch.no_grad()
def cross_entropy_and_error(
    task: Task,
    weights: Float[Tensor, "P D"],
    inputs: Float[Tensor, "N ..."],
    labels: Int[Tensor, " N"],
    label_map: Int[Tensor, "P classes"] | None = None,
    half: bool | None = None,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Mean cross-entropy (nats) and top-1 error (percent) of P networks, in pieces of bounded memory.

    Args:
        half: feature maps and logits in float16, which rounds as TensorFloat-32 does: labels and prompts notice
            nothing. By default on a GPU, and float32 for networks that leave float16's range. What is reported of a
            network in the end is measured by `Gpt.evaluation`, in float32.
    """
    population = Population(with_shared_inputs(task.template), task.structure, weights)
    networks, examples = population.piece(inputs)
    sums = _compiled_sums() if weights.is_cuda else loss_and_error_sums
    half = weights.is_cuda if half is None else half
    losses, errors = [], []
    for p in range(0, len(weights), networks):
        population.weights = weights[p : p + networks]
        loss, error = torch.zeros(2, len(population), device=weights.device)
        for n in range(0, len(inputs), examples):
            with _half_precision(weights.device) if half else contextlib.nullcontext():
                logits = population(inputs[n : n + examples]).float()
            wanted = labels[n : n + examples].expand(logits.shape[:-1])
            if label_map is not None:
                wanted = label_map[p : p + networks].to(wanted.device).gather(1, wanted)
            part_loss, part_error = sums(logits, wanted)
            loss += part_loss
            error += part_error
        losses.append(loss / len(inputs))
        errors.append(100 * error / len(inputs))
    loss, error = torch.cat(losses), torch.cat(errors)
    if half and (beyond := ~loss.isfinite()).any():
        own_map = None if label_map is None else label_map[beyond.to(label_map.device)]
        loss[beyond], error[beyond] = cross_entropy_and_error(task, weights[beyond], inputs, labels, own_map, False)
    return loss, error


@contextlib.contextmanager
def _half_precision(device: torch.device) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # of layers that autocast does not know
    try:
        with torch.autocast(device.type, torch.float16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def loss_and_error_sums(
    logits: Float[Tensor, "P N classes"], wanted: Int[Tensor, "P N"]
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """Cross-entropy and number of wrong answers, summed over the examples."""
    chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
    return (logits.logsumexp(-1) - chosen).sum(-1), (logits.argmax(-1) != wanted).sum(-1)


@cache
def _compiled_sums() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One pass over the logits of thousands of networks instead of six; the compiler is loaded when it is needed."""
    compiled = torch.compile(loss_and_error_sums, dynamic=True)

    def sums(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.mark_static(logits, logits.dim() - 1)  # ten classes stay in registers; any number takes a loop
        return compiled(logits, wanted)

    return sums
