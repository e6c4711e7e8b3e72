import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from data_gen import vision
from Gpt.errors import ConfigError, DataError, TaskError
from Gpt.evaluation.population import test_population as measure
from Gpt.masks import MaskSplit, label_map
from Gpt.networks import MLP, ConvNet
from Gpt.recipes import SupervisedRecipe
from Gpt.scoring import classification_loss, mask_error

RECIPE = SupervisedRecipe(epochs=3, batch_size=8, learning_rate=0.05)


@pytest.fixture
def task_of(noise_task):
    return partial(noise_task, recipe=RECIPE)


def mlp():
    return MLP(6, 5, 3)


class Normalized(nn.Module):
    """Batch normalisation: running statistics, a counter, and parameters."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class Tied(nn.Module):
    """Two names for one matrix."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.fc2.weight = self.fc1.weight

    def forward(self, x):
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


def small_conv():
    return ConvNet(3)


def train(task, run_ids=(0, 1, 2), snapshots=(0, 10, 30), recipe=RECIPE, **options):
    return vision.train_supervised_population(task, recipe, list(run_ids), 0, list(snapshots), "cpu", **options)


def train_one_by_torch_optim(task, recipe, run_id, steps, label_map=None):
    """The same run by an ordinary training loop: nn.Module, autograd, torch.optim, LambdaLR."""
    step = vision.TrainingStep(task, recipe, torch.device("cpu"))
    state = step.initial_state([run_id], 0, label_map)
    net = task.constructor()
    net.load_state_dict(task.structure.state_dict(state["weights"][0]))
    net.train()
    options = dict(lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, momentum=recipe.momentum, nesterov=recipe.nesterov, **options),
        "adam": lambda p: torch.optim.Adam(p, **options),
        "adamw": lambda p: torch.optim.AdamW(p, **options),
    }[recipe.optimizer](net.parameters())
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=step.iterations)
    schedule = cosine if recipe.schedule == "cosine" else constant
    for _ in range(steps):
        inputs, labels = step.mini_batches(state, *step.draw(state))
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[0]), labels[0]).backward()
        optimizer.step()
        schedule.step()
        state["iteration"] += 1
    return task.structure.flatten(net.state_dict()).detach()


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(nesterov=False, schedule="constant"),
        dict(momentum=0.0, nesterov=False, weight_decay=0.0),
        dict(optimizer="adam", learning_rate=0.01, weight_decay=0.1),
        dict(optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
    ],
)
def test_a_run_is_what_torch_optim_gives(task_of, changes):
    task, recipe = task_of(mlp), dataclasses.replace(RECIPE, **changes)
    weights, _ = train(task, [4, 9], [0, 30], recipe)
    for row, run_id in enumerate([4, 9]):
        expected = train_one_by_torch_optim(task, recipe, run_id, 30)
        torch.testing.assert_close(weights[row, 1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("constructor, shape", [(Normalized, (6,)), (Tied, (6,)), (small_conv, (3, 8, 8))])
def test_any_constructor_trains_as_by_an_ordinary_loop(task_of, constructor, shape):
    task = task_of(constructor, shape)
    weights, _ = train(task, [1, 2], [0, 20])
    torch.testing.assert_close(weights[1, 1], train_one_by_torch_optim(task, RECIPE, 2, 20), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("constructor", [mlp, Tied])
def test_training_in_bfloat16_keeps_float32_weights_and_stays_near(task_of, monkeypatch, constructor):
    task = task_of(constructor)
    exact, exact_metrics = train(task, [1, 2], [0, 20])
    monkeypatch.setattr(vision, "training_precision", lambda template, device: torch.bfloat16)
    vision._training_step.cache_clear()
    weights, metrics = train(task, [1, 2], [0, 20])
    vision._training_step.cache_clear()
    assert weights.dtype == torch.float32 and torch.equal(weights[:, 0], exact[:, 0])
    moved, apart = (exact[:, 1] - exact[:, 0]).norm(), (weights[:, 1] - exact[:, 1]).norm()
    assert 0 < apart < 0.05 * moved
    torch.testing.assert_close(metrics["test_loss"], exact_metrics["test_loss"], rtol=0.02, atol=0)


def test_a_run_does_not_depend_on_its_company(task_of):
    task = task_of(small_conv, (3, 8, 8))
    recipe = dataclasses.replace(RECIPE, augmentation="flip_crop")
    together, metrics = train(task, range(6), recipe=recipe)
    alone, alone_metrics = train(task, [4], recipe=recipe)
    torch.testing.assert_close(alone[0], together[4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone_metrics["test_loss"][0], metrics["test_loss"][4], atol=1e-4, rtol=1e-4)


def test_runs_and_seeds_differ(task_of):
    task = task_of(mlp)
    weights, _ = train(task)
    assert (weights[0] - weights[1]).abs().amax(-1).min() > 0.01
    other = vision.train_supervised_population(task, RECIPE, [0], 1, [0, 1], "cpu")[0]
    assert (other[0, 0] - weights[0, 0]).abs().max() > 0.01


def test_an_epoch_shows_every_example_at_most_once_and_drops_the_remainder(task_of):
    task = task_of(mlp, train=99)
    step = vision.TrainingStep(task, RECIPE, torch.device("cpu"))
    state = step.initial_state([0, 1], 0)
    data = task.data("train")[0]
    seen = []
    for _ in range(99 // 8):
        inputs, _ = step.mini_batches(state, *step.draw(state))
        seen.append((inputs[:, :, None] == data).all(-1).float().argmax(-1))
        state["iteration"] += 1
    seen = torch.cat(seen, dim=1)
    assert step.iterations == 3 * 12
    assert all(len(torch.unique(row)) == 96 for row in seen)


def test_metrics_are_those_of_the_test_function(task_of):
    task = task_of(mlp, train=2100)
    weights, metrics = train(task)
    assert metrics["test_loss"].shape == (3, 3)
    net = task.constructor().eval()
    for split in ("validation", "test", "train"):
        inputs, labels = (part[:2000] for part in task.data(split))
        net.load_state_dict(task.structure.state_dict(weights[2, 1]))
        loss, error = classification_loss(inputs, labels, net)
        torch.testing.assert_close(metrics[f"{split}_loss"][2, 1], loss.detach())
        torch.testing.assert_close(metrics[f"{split}_error"][2, 1], error)


def test_measuring_in_pieces_changes_nothing(task_of, monkeypatch):
    task = task_of(mlp)
    weights = task.structure.flatten(mlp().state_dict()).detach() + 0.3 * torch.randn(
        7, task.structure.size, generator=torch.Generator().manual_seed(0)
    )
    whole = vision.measure(task, weights)
    monkeypatch.setattr(vision.Population, "piece", lambda *_: (3, 13))
    for name, values in vision.measure(task, weights).items():
        torch.testing.assert_close(values, whole[name])


def test_a_task_with_its_own_test_function_gets_its_own_columns(task_of):
    def margin(x, y, net):
        return net(x).gather(1, y[:, None]).mean()

    task = task_of(mlp, task_test_fn=margin, metric="metric", batched=False, minimize=False)
    weights, metrics = train(task)
    assert set(metrics) == {"train_loss", "train_error", "validation_metric", "test_metric"}
    logits = functional_call(mlp(), task.structure.unflatten(weights[1, 2]), task.data("test")[0])
    torch.testing.assert_close(metrics["test_metric"][1, 2], logits.gather(1, task.data("test")[1][:, None]).mean())


def test_label_maps_train_and_measure_each_run_on_its_own_labels(task_of):
    task = task_of(mlp, train=400)
    label_map = torch.tensor([[0, 1, 2], [2, 0, 1]])
    recipe = dataclasses.replace(RECIPE, epochs=6)
    weights, metrics = train(task, [0, 1], [0, 300], recipe, label_map=label_map)
    assert (metrics["test_error"][:, 1] < 25).all()
    expected = train_one_by_torch_optim(task, recipe, 1, 300, label_map[1:])
    torch.testing.assert_close(weights[1, 1], expected, atol=1e-4, rtol=1e-3)
    exchanged = vision.measure(task, weights[:, 1], label_map.flip(0))
    assert (exchanged["test_error"] > 75).all()


@pytest.mark.parametrize("network", [mlp, small_conv])
def test_metrics_in_half_precision_are_those_of_full_precision(task_of, network):
    """Up to its rounding, and for networks whose logits are beyond its range."""
    task = task_of(network, *([(3, 8, 8)] if network is small_conv else []))
    weights = vision.stack_initial(task.constructor, task.structure, [0, 1, 2])
    weights[1] *= 1000
    inputs, labels = task.data("test", "cpu")
    exact, half = [vision.cross_entropy_and_error(task, weights, inputs, labels, half=half) for half in (False, True)]
    torch.testing.assert_close(half[0], exact[0], rtol=2e-3, atol=0)
    assert exact[0][1] > 100 and half[0][1] == exact[0][1]
    assert (half[1] - exact[1]).abs().max() <= 200 / len(labels)  # percent of two examples


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_colour_images_without_augmentation_are_the_examples_drawn(task_of, monkeypatch, precision):
    monkeypatch.setattr(vision, "training_precision", lambda template, device: precision)
    task = task_of(small_conv, (3, 8, 8))
    step = vision.TrainingStep(task, RECIPE, torch.device("cpu"))
    state = step.initial_state([0, 3], 0)
    examples, windows = step.draw(state)
    inputs, labels = step.mini_batches(state, examples, windows)
    images, classes = task.data("train")
    assert torch.equal(inputs, images.to(precision)[examples]) and torch.equal(labels, classes[examples])
    assert inputs.stride(2) == 1  # channels last


def test_progress_counts_snapshots_before_they_are_made(task_of):
    counts = []
    train(task_of(mlp), progress=counts.append)
    assert sum(counts) == 3 * 3 and len(counts) > 3


def test_global_random_state_is_untouched(task_of):
    before = torch.get_rng_state()
    train(task_of(mlp))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("field", ["optimizer", "schedule", "augmentation"])
def test_unknown_recipe_values_are_named(task_of, field):
    with pytest.raises(ConfigError, match=f"{field} is 'lion'"):
        train(task_of(mlp), recipe=dataclasses.replace(RECIPE, **{field: "lion"}))


def test_unusable_data_and_networks_are_named(task_of):
    with pytest.raises(DataError, match="5 examples, fewer than one mini-batch of 8"):
        train(task_of(mlp, train=5))
    with pytest.raises(TaskError, match="train_data_fn to return"):
        train(task_of(mlp, train_data_fn=lambda: (torch.zeros(3),)))
    inputs, labels = torch.zeros(40, 6), torch.arange(40) % 3
    for unusable, message in [
        ((inputs, labels[1:]), r"40 inputs and labels of shape \(39,\).*one whole number for each"),
        ((inputs, labels.float()), r"labels of shape \(40,\), torch.float32.*one whole number"),
        ((inputs, labels + 1), "labels from 1 to 3, the network has 3 outputs; expected labels from 0 to 2"),
        ((inputs[:, 1:], labels), r"'toy': key 'train_data_fn' failed .*1x5 and 6x.*suits the network"),
    ]:
        with pytest.raises(TaskError, match=f"(?s){message}"):
            train(task_of(mlp, train_data_fn=lambda data=unusable: data))
    with pytest.raises(TaskError, match="needs images"):
        train(task_of(mlp), recipe=dataclasses.replace(RECIPE, augmentation="flip_crop"))
    with pytest.raises(TaskError, match="dropout 0"):
        train(task_of(lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))))


def test_a_shared_initialisation_is_that_of_run_0_and_leaves_the_mini_batches_alone(task_of):
    task, shared = task_of(mlp), dataclasses.replace(RECIPE, shared_init=True)
    own, _ = train(task)
    one, _ = train(task, recipe=shared)
    assert torch.equal(one[:, 0], own[:1, 0].expand(3, -1))
    assert torch.equal(one[0], own[0])
    assert not torch.allclose(one[1, 1], one[0, 1])  # other mini-batches
    alone, _ = train(task, run_ids=(2,), recipe=shared)
    torch.testing.assert_close(alone[0], one[2], atol=1e-5, rtol=1e-4)


def own_error(x, y, mask, net):
    return mask_error(x, y, mask, net)


@pytest.mark.parametrize("own_test", [False, True])
def test_runs_of_a_family_are_measured_on_their_own_masks(task_of, own_test):
    """Three of the ten classes occur; the masks of other classes are constant tasks."""
    family, masks = MaskSplit(held_out=2, validation=1), torch.eye(10, dtype=torch.bool)[:3]
    task = task_of(lambda: MLP(6, 5, 2), task_test_fn=mask_error, metric="error", family=family)
    variant = dataclasses.replace(task, task_test_fn=own_error) if own_test else task
    weights, metrics = train(variant, label_map=label_map(masks))
    for column in ("validation_error", "validation_loss", "test_error", "test_loss"):
        split = column.partition("_")[0]
        expected = [measure(task, weights[:, s], split, masks)[column] for s in range(3)]
        torch.testing.assert_close(metrics[column], torch.stack(expected, 1), atol=1e-4, rtol=1e-4)
    assert metrics["train_error"][[0, 2], -1].max() < 30  # class 1 lies between the others


@dataclasses.dataclass
class OwnTest:
    """A test function with settings, which no dict can hold as a key."""

    unit: float

    def __call__(self, x, y, net):
        return classification_loss(x, y, net)[0] / self.unit


def test_a_test_function_may_be_any_callable(task_of):
    task = task_of(mlp, task_test_fn=OwnTest(2.0))
    weights, metrics = train(task, snapshots=(0, 5))
    expected = measure(task, weights[:, -1], "validation")["validation_loss"]
    torch.testing.assert_close(metrics["validation_loss"][:, -1], expected)
