from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from Gpt.errors import TaskError
from Gpt.evaluation import population
from Gpt.networks import MLP, ConvNet
from Gpt.population.functional import stack_initial
from Gpt.scoring import classification_error, classification_loss
from Gpt.tasks import check_entry


@pytest.fixture(scope="module")
def weights(task):
    return stack_initial(task.constructor, task.structure, list(range(7)))


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_batched_equals_one_by_one_in_any_chunks(task, weights, batch, monkeypatch):
    monkeypatch.setattr("Gpt.population.functional.CPU_NUMBERS", 1000)  # a few networks and examples at a time
    one_by_one = population.test_population(replace(task, batched=False), weights, "validation")
    batched = population.test_population(task, weights, "validation", batch=batch)
    torch.testing.assert_close(batched["validation_loss"], one_by_one["validation_loss"])
    tasks = [replace(task, batched=batched) for batched in (False, True)]
    correct = [population.correct_population(t, weights, "test", batch=batch) for t in tasks]
    assert torch.equal(*correct) and correct[0].shape == (7, 200)


def test_matches_a_double_precision_reference(task, weights):
    x, y = task.data("test")
    found = population.test_population(task, weights, "test")
    for row, loss, error in zip(weights, found["test_loss"], found["test_error"], strict=True):
        net = MLP(6, 4, 3).double()
        net.load_state_dict(task.structure.state_dict(row))
        logits = net.double()(x.double())
        assert loss.item() == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
        assert error.item() == pytest.approx(100 * (logits.argmax(1) != y).double().mean().item())


def test_error_and_loss_tasks_name_the_same_columns(task, weights):
    loss_first = population.test_population(task, weights, "test")
    error_first = population.test_population(
        replace(task, metric="error", task_test_fn=classification_error), weights, "test"
    )
    assert loss_first.keys() == error_first.keys() == {"test_loss", "test_error"}
    assert all(torch.equal(loss_first[name], error_first[name]) for name in loss_first)


def test_accuracy_and_errors_agree(task, weights):
    correct = population.correct_population(task, weights, "test")
    error = population.test_population(task, weights, "test")["test_error"]
    torch.testing.assert_close(100 * (1 - correct.float().mean(1)), error)


@pytest.mark.parametrize("batched", [True, False])
def test_broken_networks_score_the_worst_and_leave_the_others_alone(task, weights, batched):
    task = replace(task, batched=batched)
    broken = weights.clone()
    broken[2] = torch.nan
    found = population.test_population(task, broken, "test")["test_loss"]
    assert found[2] == torch.inf
    intact = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(found[intact], population.test_population(task, weights[intact], "test")["test_loss"])
    maximised = replace(task, minimize=False, metric="return", task_test_fn=lambda x, y, net: net(x).mean((-1, -2)))
    assert population.test_population(maximised, broken, "test")["test_return"][2] == -torch.inf


def test_convolutions_and_examples_in_chunks_match_the_template(monkeypatch):
    entry = {
        "task_test_fn": classification_loss,
        "constructor": ConvNet,
        "data_fn": lambda: (torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(9)),
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "metric": "loss",
        "batched": True,
    }
    task = check_entry("convolutions", entry)
    weights = stack_initial(ConvNet, task.structure, [0, 1, 2])
    monkeypatch.setattr("Gpt.population.functional.CPU_NUMBERS", 10_000)
    batched = population.test_population(task, weights, "test")["test_loss"]
    torch.testing.assert_close(
        batched, population.test_population(replace(task, batched=False), weights, "test")["test_loss"]
    )


def test_names_a_test_function_that_is_not_batched_after_all(task, weights):
    wrong = replace(task, task_test_fn=lambda x, y, net: F.cross_entropy(net(x).mean(0), y))
    with pytest.raises(TaskError, match="'blobs'.*7 networks.*batched to False"):
        population.test_population(wrong, weights, "test")
    with pytest.raises(TaskError, match="correct_fn"):
        population.correct_population(replace(task, correct_fn=None), weights, "test")


@pytest.mark.parametrize("batched", [True, False])
def test_networks_are_measured_in_float32_whatever_the_process_computes_in(task, weights, batched):
    def watched(function):
        def watching(*inputs):
            assert torch.get_float32_matmul_precision() == "highest"
            return function(*inputs)

        return watching

    def failing(*inputs):
        raise TaskError("inside")

    exact = replace(task, batched=batched, task_test_fn=watched(task.task_test_fn), correct_fn=watched(task.correct_fn))
    torch.set_float32_matmul_precision("high")
    try:
        population.test_population(exact, weights, "test")
        population.correct_population(exact, weights, "test")
        with pytest.raises(TaskError, match="inside"):
            population.test_population(replace(exact, task_test_fn=failing), weights, "test")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
