"""The published sentences are read as they were published, and their networks are judged by what was meant."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import text_conditions
from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import CheckpointError
from Gpt.evaluation.judge import EvaluationConfig
from Gpt.generator import Generator
from Gpt.tasks import get_task
from Gpt.vocabulary import CLASSES


class Constant(Generator):
    """Writes networks that say "yes" to every image where class 0 was asked for, and "no" elsewhere."""

    needs_start = False

    def __init__(self, structure):
        super().__init__(structure, FlowMatching(), "euler", 1)
        self.conditions = Conditions({}, 1, 0.0)
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def write(self, prompt, start, noise, solve, guidance, rng):
        weights = torch.zeros_like(noise)
        bias = self.structure.unflatten(weights)["fc2.bias"]
        bias[:, 1] = 2 * prompt["class_mask"][:, 0] - 1
        return weights


def test_the_demo_has_21_sentences_with_210_decisions():
    sentences, masks = text_conditions.demo_sentences()
    assert len(set(sentences)) == 21 and masks.shape == (21, 10)
    animals = {"bird", "cat", "deer", "dog", "frog", "horse"}
    living = masks[sentences.index("Give me a model to select all living things")]
    assert living.tolist() == [name in animals for name in CLASSES["cifar10"]]


def test_a_network_is_told_what_was_read_and_judged_by_what_was_meant():
    task = get_task("digits_mask")
    experiment = SimpleNamespace(
        task=task, device="cpu", config=SimpleNamespace(evaluation=EvaluationConfig()),
        trained=lambda: Constant(task.structure),
    )  # fmt: skip
    meant = torch.arange(10).expand(2, 10) < 4
    read = meant.clone()
    read[1, 0] = False  # a mistake, after which the network says "no" to everything
    found = text_conditions.network_accuracy(experiment, read, meant)
    inside = 100 * (task.data("test")[1] < 4).float().mean()
    torch.testing.assert_close(found, torch.stack([inside, 100 - inside]))


def test_the_table_counts_decisions_and_averages_over_sentences():
    wanted = torch.zeros(2, 10, dtype=torch.bool)
    read = wanted.clone()
    read[1, :3] = True
    known = torch.tensor([True, False])
    rows = text_conditions.demo_table(["a", "b"], wanted, read, known, {"accuracy": torch.tensor([90.0, 80.0])})
    assert rows[2] == "| a | 10 of 10 | 90.0 |" and rows[3] == "| b | 7 of 10 | 80.0 |"
    assert rows[-3] == "| in the vocabulary's words: 1 | 10 of 10 (100.0 %) | 90.00 |"
    assert rows[-2] == "| in others: 1 | 7 of 10 (70.0 %) | 80.00 |"
    assert rows[-1] == "| all: 2 | 17 of 20 (85.0 %) | 85.00 |"


def test_published_sentences_in_the_vocabularys_own_words_are_told_from_the_others():
    found = text_conditions.in_vocabulary(["Classify all mammals", "Find all things with jet engines"])
    assert found.tolist() == [True, False]


def test_sentences_are_embedded_by_the_encoder_that_is_named(monkeypatch, capsys):
    monkeypatch.setattr(text_conditions, "SentenceEncoder", lambda model, cache: (model, cache))
    monkeypatch.setattr(text_conditions, "splits_table", lambda vocabulary, encoder, seed: [str(encoder)])
    for arguments, model in (([], "all-MiniLM-L6-v2"), (["--encoder", "models/small"], "models/small")):
        monkeypatch.setattr("sys.argv", ["text_conditions", *arguments])
        text_conditions.main()
        assert capsys.readouterr().out.endswith(f"('{model}', None)\n")


def test_a_folder_without_a_run_names_the_command_that_trains_one(tmp_path):
    with pytest.raises(CheckpointError, match="--config-name cifar10_mask_rpg"):
        text_conditions.trained_run(tmp_path / "none", "cpu", None)
