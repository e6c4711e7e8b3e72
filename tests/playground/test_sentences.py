"""Networks for class masks in words: who reads a sentence, and who is handed it."""

from pathlib import Path

import pytest
import torch
from small_runs import EVEN, MASKED, SHORT, experiment, masked_experiment, store_rpg

import playground
from Gpt import text
from Gpt.errors import CheckpointError, ConfigError
from Gpt.evaluation import reading
from Gpt.run.folder import create_folder
from Gpt.run.trained import TrainedRun, bits
from Gpt.text import SentenceReader, TextHead
from Gpt.vocabulary import CLASSES, load_vocabulary
from playground import PlaygroundConfig, play


class Keywords(text.SentenceEncoder):
    """Stands in for the sentence encoder: one number for each class that a text names, and 374 zeros."""

    identity, label, features = "keywords", "keywords-0123", 384

    def __init__(self, model="", device="cpu"):
        pass

    def keep(self, file):
        self.cache_file = file

    def __call__(self, sentences):
        named = torch.tensor([[float(name in text) for name in CLASSES["digits"]] for text in sentences])
        return torch.nn.functional.pad(named, (0, 374))


def keyword_reader(embed, vocabulary):
    """Reads the classes off the embedding itself: a network of identities."""
    head = TextHead(CLASSES[vocabulary], features=384, hidden=10, members=1).eval()
    with torch.no_grad():
        for layer in (head.members[0][0], head.members[0][3]):
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            layer.bias.zero_()
        head.members[0][6].weight.copy_(10 * torch.cat([torch.eye(10), torch.ones(1, 10)]))
        head.members[0][6].bias.fill_(-5)
    return SentenceReader(embed, head, load_vocabulary(vocabulary))


def test_a_sentence_is_read_once_trained_and_written_for(masked, monkeypatch, capsys):
    monkeypatch.setattr("Gpt.run.experiment.SentenceEncoder", Keywords)
    monkeypatch.setattr(reading, "train_reader", keyword_reader)
    config = PlaygroundConfig(**SHORT, prompt="find one, two and nine")
    folder = play(masked_experiment(), config)
    output = capsys.readouterr().out
    assert "learning to read sentences about digits" in output
    assert "“find one, two and nine” was read as: zero 0.0" in output
    assert "networks that pick out one, two, nine (mask 0110000001" in output
    written = (folder / "network-000.safetensors").read_bytes()
    monkeypatch.setattr(reading, "train_reader", lambda *_: pytest.fail("the reader was kept"))
    assert (play(masked_experiment(), config) / "network-000.safetensors").read_bytes() == written
    by_mask = play(masked_experiment(), PlaygroundConfig(**SHORT, mask="0110000001", out="by_mask"))
    assert (by_mask / "network-000.safetensors").read_bytes() == written
    with pytest.raises(ConfigError, match="'wooden furniture' fits none of the classes zero, one"):
        play(masked_experiment(), PlaygroundConfig(prompt="wooden furniture"))


@pytest.mark.parametrize("names", ["text", "class_mask,text"])
def test_a_generator_that_knows_sentences_is_handed_the_sentence(masked, monkeypatch, names):
    monkeypatch.setattr("Gpt.run.experiment.SentenceEncoder", Keywords)
    monkeypatch.setattr(reading, "train_reader", keyword_reader)
    monkeypatch.setattr("Gpt.run.experiment.find_model", lambda model: None)
    settings = (f"condition.names=[{names}]", "run.name=spoken")
    store_rpg(masked_experiment(*settings), {})
    request = TrainedRun(masked_experiment(*settings)).wish(prompt="zero and three")
    assert set(request.told) == set(names.split(","))
    assert torch.equal(request.told["text"], Keywords()(["zero and three"])[0])
    assert bits(request.mask) == "1001000000"
    one = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="zero and three", out="one"))
    same = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="three, zero", out="same"))
    other = play(masked_experiment(*settings), PlaygroundConfig(**SHORT, prompt="zero and two", out="other"))
    for name in ("network-000.safetensors", "walk.gif"):
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()
    by_mask = PlaygroundConfig(**SHORT, mask="1001000000", out="by_mask")
    if names == "text":
        with pytest.raises(ConfigError, match='by prompt="all even digits"$'):
            play(masked_experiment(*settings), by_mask)
    else:
        assert (play(masked_experiment(*settings), by_mask) / "networks.json").is_file()


def untrained_reader(embed, vocabulary):
    """Reads by chance."""
    head = TextHead(CLASSES[vocabulary], features=embed.features, hidden=4).eval()
    return SentenceReader(embed, head, load_vocabulary(vocabulary))


@pytest.mark.filterwarnings("default")  # warnings of transformers are not this project's
def test_a_sentence_is_embedded_by_the_encoder_that_the_run_was_trained_with(
    tmp_path, monkeypatch, capsys, encoder_folder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "train_reader", untrained_reader)
    encoder_folder("small", 24)
    encoder_folder("other", 24)
    spoken = experiment(*MASKED, "condition.encoder=small", name="digits_text_rpg")
    create_folder(spoken.config, spoken.folder)
    store_rpg(spoken, {"class_mask": torch.ones(8, 10), "text": torch.randn(8, 24)})
    plain = experiment("run.name=masked", name="digits_text_rpg")
    found = playground.run_of(plain.config, "digits_text_rpg", [])
    asked_for = TrainedRun(found).wish(prompt="not 7").told["text"]
    assert torch.equal(asked_for, text.SentenceEncoder("small")(["not 7"])[0])
    play(found, PlaygroundConfig(count=1, keyframes=0, mask=EVEN))
    other = experiment(*MASKED, "condition.encoder=other", name="digits_text_rpg")
    with pytest.raises(CheckpointError, match="has condition.encoder 'small-.*', this run has 'other-"):
        play(other, PlaygroundConfig(mask=EVEN))


@pytest.mark.filterwarnings("default")
def test_encoders_that_take_turns_in_one_run_keep_what_they_have_each(masked, monkeypatch, encoder_folder):
    trained = []

    def train(embed, vocabulary):
        trained.append(embed.label)
        return untrained_reader(embed, vocabulary)

    monkeypatch.setattr(reading, "train_reader", train)
    encoders = [encoder_folder(*shape) for shape in (("small", 24), ("wide", 32), ("small", 24))]
    for folder in encoders * 2:
        found = masked_experiment(f"condition.encoder={folder}")
        asked_for = reading.kept_reader("digits", found.encoder)
        assert asked_for.embed(["sevens"]).shape == (1, asked_for.head.features)
    assert [label.partition("-")[0] for label in trained] == ["small", "wide"]
    kept = {str(file.relative_to("runs/masked/text")) for file in Path("runs/masked/text").rglob("*.safetensors")}
    assert kept == {f"{label}/{name}.safetensors" for label in trained for name in ("digits", "embeddings")}


def test_without_the_optional_packages_only_sentences_are_refused(masked, monkeypatch):
    monkeypatch.setattr(text, "BUNDLED", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; .*gpt-weights\[text\]"):
        play(masked_experiment(), PlaygroundConfig(prompt="all even digits"))
    assert play(masked_experiment(), PlaygroundConfig(mask=EVEN, count=1, keyframes=0)).is_dir()
