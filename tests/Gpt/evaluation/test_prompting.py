from dataclasses import replace

import pytest
import torch
from torch import nn

from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import ZooError
from Gpt.evaluation import prompting
from Gpt.evaluation.prompting import Starts
from Gpt.evaluation.writing import Writer
from Gpt.generator import Generator
from Gpt.structure import Structure


class Toy(Generator):
    """Answers as a subclass says, without a network."""

    noise_shape, needs_start = (0,), True

    def __init__(self):
        super().__init__(Structure.of(nn.Linear(2, 2)), FlowMatching(), "euler", 1)
        self.layer = nn.Linear(2, 2)


def test_prompt_range_runs_from_the_best_to_a_share_of_the_start():
    wanted = prompting.prompt_range(0.5, torch.tensor([2.0, 4.0]), 3, 0.9)
    torch.testing.assert_close(wanted, torch.tensor([[0.5, 1.15, 1.8], [0.5, 2.05, 3.6]]))
    returns = prompting.prompt_range(500.0, torch.tensor([20.0]), 5, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[500.0, 380.0, 260.0, 140.0, 20.0]]))


class Echo(Toy):
    """Writes (start metric, wanted metric) into the first weights."""

    def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
        start = start.clone()
        start[:, :2] = prompt["target_metric"]
        return start


@pytest.mark.parametrize("max_batch", [1, 4, 100])
def test_starts_prompts_and_answers_stay_together(max_batch):
    starts = Starts("s", torch.arange(15.0).view(3, 5), torch.tensor([10.0, 20.0, 30.0]))
    wanted = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
    written = prompting.write_updates(Writer(Echo(), max_batch=max_batch), starts, wanted, "noise")
    assert written.shape == (3, 1, 2, 5)
    assert torch.equal(written[..., 0], starts.metric[:, None, None].expand(3, 1, 2))
    assert torch.equal(written[..., 1], wanted)
    assert torch.equal(written[..., 3], starts.weights[:, None, None, 3].expand(3, 1, 2))


def test_a_copying_generator_is_aligned_and_shuffled_prompts_are_not(copying, task, zoo):
    starts = prompting.initial_networks(zoo, task, "test", 10, "cpu")
    wanted = prompting.prompt_range(prompting.best_attained(zoo, task), starts.metric, 20, 0.9)
    achieved = prompting.achieved_metric(Writer(copying), task, starts, wanted, 1, "a")
    handed = prompting.shuffled(wanted, seed=0)
    confused = prompting.achieved_metric(Writer(copying), task, starts, handed, 1, "a")
    assert prompting.prompt_curve("a", "generator", wanted, achieved, 0).alignment.mean > 0.99
    assert prompting.prompt_curve("b", "baseline", wanted, confused, 0).alignment.mean < 0
    assert torch.equal(handed.flatten().sort().values, wanted.flatten().sort().values)
    assert prompting.select_prompt(achieved, minimize=True) == 0
    assert prompting.select_prompt(achieved, minimize=False) == 19


def test_several_samples_of_a_prompt_are_averaged(task, zoo):
    starts = prompting.initial_networks(zoo, task, "test", 2, "cpu")

    class Alternating(Toy):
        def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
            trained = zoo.read(torch.tensor([50]), torch.tensor([5]))
            return torch.where(torch.arange(count)[:, None] % 2 == 0, trained, zoo.read(*torch.tensor([[60], [0]])))

    achieved = prompting.achieved_metric(Writer(Alternating()), task, starts, torch.zeros(2, 3), 4, "a")
    expected = (zoo.metrics["validation_loss"][50, 5] + zoo.metrics["validation_loss"][60, 0]) / 2
    torch.testing.assert_close(achieved, expected.expand(2, 3))


def test_recursion_asks_for_the_target_or_steps_towards_it(task, zoo):
    starts = prompting.initial_networks(zoo, task, "test", 3, "cpu")
    asked = []

    class Listening(Toy):
        def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
            asked.append(prompt["target_metric"])
            return zoo.read(torch.arange(3) + 50, torch.full((3,), len(asked)))

    generations = prompting.recursive_updates(Writer(Listening()), task, starts, 0.2, 4, "stepped", "r")
    assert len(generations) == 5 and torch.equal(generations[0].weights, starts.weights)
    for update, prompt in enumerate(asked):
        torch.testing.assert_close(prompt[:, 0], generations[update].metric)
        torch.testing.assert_close(prompt[:, 1], starts.metric + (update + 1) / 4 * (0.2 - starts.metric))
    asked.clear()
    prompting.recursive_updates(Writer(Listening()), task, starts, 0.2, 2, "fixed", "r")
    assert all((prompt[:, 1] == 0.2).all() for prompt in asked)


def test_several_updates_ask_for_every_wish_of_every_start_again(task, zoo):
    starts = prompting.initial_networks(zoo, task, "test", 3, "cpu")
    wanted, asked = torch.arange(6.0).view(3, 2), []

    class Listening(Toy):
        def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
            asked.append((prompt["target_metric"], start))
            return zoo.read(torch.arange(6) + 50, torch.full((6,), len(asked)))

    achieved = prompting.achieved_recursively(Writer(Listening()), task, starts, wanted, 2, "r")
    torch.testing.assert_close(achieved.flatten(), zoo.metrics["validation_loss"][50:56, 2])
    (first, started), (second, written) = asked
    assert torch.equal(started, starts.weights.repeat_interleave(2, 0))
    assert torch.equal(first[:, 1], wanted.flatten()) and torch.equal(second[:, 1], wanted.flatten())
    assert torch.equal(written, zoo.read(torch.arange(6) + 50, torch.full((6,), 1)))
    torch.testing.assert_close(second[:, 0], zoo.metrics["validation_loss"][50:56, 1])


def test_a_generator_from_noise_is_not_told_a_starts_metric():
    asked = []

    class FromNoise(Toy):
        needs_start = False

        def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
            asked.append(prompt["target_metric"])
            assert start is None
            return torch.zeros(count, 5)

    starts = Starts("s", torch.zeros(2, 5), torch.tensor([1.0, 2.0]))
    prompting.write_updates(Writer(FromNoise()), starts, torch.tensor([0.1, 0.2]), "n")
    assert asked[0][:, 0].isnan().all()  # "unknown", as in its training
    assert torch.equal(asked[0][:, 1], torch.tensor([0.1, 0.2]))


def test_recursion_survives_a_broken_network(task, zoo):
    class Breaking(Toy):
        def sample(self, prompt, start=None, *, count=None, steps=None, guidance=1.0, seed=0, noise=None):
            assert prompt["target_metric"].isfinite().all()
            return torch.full_like(start, torch.nan)

    starts = prompting.initial_networks(zoo, task, "test", 3, "cpu")
    generations = prompting.recursive_updates(Writer(Breaking()), task, starts, 0.2, 3, "fixed", "r")
    assert generations[-1].weights.isnan().all()


def test_unfamiliar_starts_are_scaled_or_normal_with_the_same_spread(task, zoo):
    starts = prompting.initial_networks(zoo, task, "train", 80, "cpu")
    halved, doubled, normal = prompting.unfamiliar_networks(starts, task, seed=0)
    assert torch.equal(halved.weights * 4, doubled.weights) and torch.equal(doubled.weights, 2 * starts.weights)
    weight = task.structure.tensors[0].slice
    assert normal.weights[:, weight].std() == pytest.approx(starts.weights[:, weight].std().item(), rel=0.05)
    assert normal.weights[:, weight].abs().max() > 1.5 * starts.weights[:, weight].abs().max()  # tails
    assert not torch.equal(halved.metric, starts.metric)


def test_initial_networks_carry_the_zoos_own_label(task, zoo):
    starts = prompting.initial_networks(zoo, task, "validation", 7, "cpu")
    rows = torch.arange(20, 27)
    assert torch.equal(starts.weights, zoo.read(rows, torch.zeros(7, dtype=torch.long)))
    assert torch.equal(starts.metric, zoo.metrics["validation_loss"][rows, 0])


def test_best_attained_reads_finite_training_runs_only(task, zoo):
    metric = zoo.metrics["validation_loss"]
    assert prompting.best_attained(zoo, task) == metric[40:].min()
    assert prompting.best_attained(zoo, replace(task, minimize=False)) == metric[40:].max()


def test_a_missing_column_is_named(task, zoo):
    with pytest.raises(ZooError, match="validation_return.*validation_loss"):
        prompting.validation_metric(zoo, replace(task, metric="return"))
