"""Reading sentences: a deterministic stand-in for the encoder, injected faults, and the real model where installed."""

import importlib.util
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from Gpt import text
from Gpt.errors import CheckpointError, ConfigError, DataError, UserError
from Gpt.seeds import rng
from Gpt.vocabulary import CLASSES, WORDINGS, Sentence, Vocabulary, compose, load_vocabulary, masks_of


def bag_of_words(sentences):
    """Unit sums of one random direction per word: order and grammar are lost, as in a mean-pooled encoder."""

    def direction(word):
        return torch.randn(128, generator=rng("cpu", 0, word))

    return torch.stack(
        [F.normalize(sum((direction(w) for w in s.lower().split()), torch.zeros(128)) + 1e-3, dim=0) for s in sentences]
    )


@pytest.fixture(scope="module")
def sentences():
    words = load_vocabulary("cifar10")
    common = ("animals", "mammals", "vehicles", "road vehicles", "musical instruments", "fruit")
    attributes = [*words.names, *(a for a in words.attributes if set(common) & set(a.phrases))]
    return compose(words.names, attributes, WORDINGS, 0, repeats=4, combinations=0)


@pytest.fixture(scope="module")
def reader(sentences):
    head = text.train_text_head(bag_of_words, sentences, CLASSES["cifar10"], steps=250)
    return text.SentenceReader(bag_of_words, head, load_vocabulary("cifar10"))


def test_the_head_learns_its_sentences(reader, sentences):
    accuracy = text.reading_accuracy(reader, sentences)
    assert accuracy.decisions > 95 and accuracy.rejections > 95


@pytest.mark.parametrize(
    "sentence, names",
    [
        ("cats", ["cat"]),
        ("find all cats", ["cat"]),
        ("cats, dogs and trucks", ["cat", "dog", "truck"]),
        ("everything except cats", [c for c in CLASSES["cifar10"] if c != "cat"]),
        ("vehicles but not airplanes", ["automobile", "ship", "truck"]),
        ("mammals other than horses", ["cat", "deer", "dog"]),
    ],
)
def test_sentences_are_read_clause_by_clause(reader, sentence, names):
    reading = reader.read(sentence)
    assert reading.fits and reading.names == names
    assert torch.equal(reading.require(), reading.mask)


def test_lists_of_names_are_read_without_the_head(reader):
    def embed(sentences):
        raise AssertionError(f"{sentences} were embedded")

    blind = text.SentenceReader(embed, reader.head, reader.words)
    first, second = blind.read_all(["dog cat bird", "Ships, trucks and ships"])
    assert first.names == ["bird", "cat", "dog"] and second.names == ["ship", "truck"]
    assert first.fits and first.unsure == [] and torch.equal(first.probabilities, first.mask.float())
    with pytest.raises(AssertionError, match="'mammals'"):
        blind.read_all(["dog cat bird", "mammals"])


def test_other_sentences_are_read_as_if_no_name_were_known(reader, monkeypatch):
    sentences = ["find all cats", "everything except cats", "vehicles but not airplanes", "mammals", "cats or dogs", ""]
    found = reader.read_all(sentences)
    monkeypatch.setattr(Vocabulary, "listed", lambda *_: None)
    for reading, before in zip(found, reader.read_all(sentences), strict=True):
        assert torch.equal(reading.probabilities, before.probabilities) and reading.fits == before.fits


@pytest.mark.parametrize("sentence", ["musical instruments", "find all guitars", "cats except cats", "", "?!"])
def test_a_sentence_that_fits_no_class_says_so(reader, sentence):
    reading = reader.read(sentence)
    assert not reading.fits and not reading.mask.any() and reading.names == []
    with pytest.raises(UserError, match="fits none of the classes airplane, .*describe"):
        reading.require()


def test_readings_do_not_depend_on_what_is_read_beside_them(reader):
    texts = ["cats", "everything", "vehicles that are not airplanes", "guitars"]
    for text_, together in zip(texts, reader.read_all(texts), strict=True):
        alone = reader.read(text_)
        assert torch.equal(alone.mask, together.mask) and alone.fits == together.fits
        torch.testing.assert_close(alone.probabilities, together.probabilities)


def test_training_is_a_function_of_its_seed(sentences):
    few = sentences[:80]
    before = torch.get_rng_state()
    a, b, other = (text.train_text_head(bag_of_words, few, CLASSES["cifar10"], seed=s, steps=3) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    x = bag_of_words(["cats", "ships"])
    assert torch.equal(a(x), b(x))
    assert not torch.equal(a(x), other(x))


def test_training_needs_a_sentence_of_one_clause():
    with pytest.raises(DataError, match="single clause"):
        text.train_text_head(bag_of_words, [Sentence("not cats", (True, False))], ("ship", "cat"))


def test_the_head_averages_probabilities_of_its_members():
    head = text.TextHead(("a", "b"), features=128, hidden=8, members=3).eval()
    x = bag_of_words(["one", "two"])
    members = [torch.sigmoid(member(x * 128**0.5)) for member in head.members]
    torch.testing.assert_close(head(x), sum(members) / 3)
    assert head(x).shape == (2, 3)


def test_a_clause_like_nothing_that_was_learned_fits_no_class(reader, monkeypatch):
    """Whatever the ensemble says of it, which was never told about most of what can be said."""
    x = bag_of_words(["cats", "zygomorphic quaternions"])
    monkeypatch.setattr(reader.head, "logits", lambda embedding: torch.full((1, len(embedding), 11), 9.0))
    assert (reader.head.known @ x[1]).max() < text.ALIKE
    fits = reader.head(x)[:, -1]
    assert fits[0] > 0.99 and fits[1] == 0
    assert (reader.head(x)[:, :-1] > 0.99).all()  # of the classes it says what it said


def test_a_head_survives_saving(tmp_path, reader):
    file = tmp_path / "head.safetensors"
    reader.head.save(file, "encoder-1")
    loaded = text.TextHead.load(file, "encoder-1")
    x = bag_of_words(["cats and dogs", "zygomorphic quaternions"])
    assert loaded.classes == CLASSES["cifar10"] and not loaded.training
    assert torch.equal(loaded(x), reader.head(x))


def test_a_head_of_another_encoder_is_refused(tmp_path, reader):
    file = tmp_path / "head.safetensors"
    reader.head.save(file, "encoder-1")
    with pytest.raises(CheckpointError, match="another sentence encoder"):
        text.TextHead.load(file, "encoder-2")


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "other tensors"])
def test_a_damaged_head_is_refused(tmp_path, reader, damage):
    file = tmp_path / "head.safetensors"
    reader.head.save(file)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("not a head")
    else:
        text.save_tensors({"weight": torch.zeros(3)}, file, {"head": json.dumps({"classes": ["a"]}), "encoder": ""})
    with pytest.raises(CheckpointError, match="readable text head"):
        text.TextHead.load(file)


def test_accuracy_counts_decisions_masks_and_rejections():
    class Fixed:
        def read_all(self, texts):
            mask = torch.tensor([[True, False], [True, True]])
            return [text.Reading(t, ("a", "b"), m, m.float(), True) for t, m in zip(texts, mask, strict=True)]

    class FixedReader(text.SentenceReader):
        read_all = Fixed.read_all

    reader = FixedReader(bag_of_words, text.TextHead(("a", "b"), 128), load_vocabulary("cifar10"))
    accuracy = text.reading_accuracy(reader, [Sentence("x", (True, False)), Sentence("y", (False, False))])
    assert (accuracy.decisions, accuracy.masks, accuracy.rejections) == (50, 50, 50)


def test_masks_of_sentences_are_one_tensor():
    assert masks_of([Sentence("x", (True, False)), Sentence("y", (False, False))]).tolist() == [
        [True, False],
        [False] * 2,
    ]


# --- the encoder's folder and cache, without a model ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a model."""
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Encoders embed by bag of words; the list collects what they were asked for."""
    asked = []

    def embed(self, sentences, batch=64):
        asked.extend(sentences)
        return bag_of_words(sentences)

    monkeypatch.setattr(text.SentenceEncoder, "_embed", embed)
    return asked


def test_each_sentence_is_embedded_once_in_memory_and_on_disk(folder, tmp_path, counted):
    cache = tmp_path / "deep" / "cache.safetensors"
    encoder = text.SentenceEncoder(str(folder), cache)
    first = encoder(["cats", "dogs", "cats"])
    assert torch.equal(first, bag_of_words(["cats", "dogs", "cats"])) and counted == ["cats", "dogs"]
    encoder(["dogs"])
    again = text.SentenceEncoder(str(folder), cache)(["dogs", "cats", "ships"])
    assert counted == ["cats", "dogs", "ships"]
    assert torch.equal(again, bag_of_words(["dogs", "cats", "ships"]))
    assert [file.name for file in cache.parent.iterdir()] == ["cache.safetensors"]


def test_a_cache_of_another_model_is_refused(folder, tmp_path, counted):
    cache = tmp_path / "cache.safetensors"
    text.SentenceEncoder(str(folder), cache)(["cats"])
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(DataError, match="another encoder"):
        text.SentenceEncoder(str(folder), cache)


def test_a_damaged_cache_is_refused(folder, tmp_path, counted):
    cache = tmp_path / "cache.safetensors"
    text.SentenceEncoder(str(folder), cache)(["cats"])
    cache.write_bytes(cache.read_bytes()[:-8])
    with pytest.raises(DataError, match="delete it"):
        text.SentenceEncoder(str(folder), cache)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.safetensors"):
        text.SentenceEncoder(str(folder))


def test_a_model_that_pools_otherwise_is_refused(folder):
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ConfigError, match="mean-pooled"):
        text.SentenceEncoder(str(folder))


def test_a_model_with_layers_after_its_pooling_is_refused(folder):
    types = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    modules = folder / "modules.json"
    modules.write_text(json.dumps([{"type": name} for name in types]))
    text.SentenceEncoder(str(folder))
    modules.write_text(json.dumps([{"type": name} for name in [*types, "sentence_transformers.models.Dense"]]))
    with pytest.raises(ConfigError, match="layers after its pooling \\(Dense\\)"):
        text.SentenceEncoder(str(folder))


def test_the_length_of_embeddings_is_read_off_the_models_files(folder):
    encoder = text.SentenceEncoder(str(folder))
    with pytest.raises(ConfigError, match="does not say how long its embeddings are"):
        _ = encoder.features
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_mean_tokens": true, "word_embedding_dimension": 40}'
    )
    assert encoder.features == 40
    (folder / "config.json").write_text('{"hidden_size": 48}')
    assert encoder.features == 48
    (folder / "config.json").write_text('{"hidden_size"')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        _ = encoder.features


def test_encoders_are_told_apart_by_name_and_weights_wherever_they_are(folder, tmp_path):
    encoder = text.SentenceEncoder(str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    assert text.SentenceEncoder(f"{moved}/").label == encoder.label == f"model-{encoder.identity[:8]}"
    (moved / "model.safetensors").write_bytes(b"other weights")
    assert text.SentenceEncoder(str(moved)).label.startswith("model-")
    assert text.SentenceEncoder(str(moved)).label != encoder.label


@pytest.mark.filterwarnings("default")  # warnings of transformers are not this project's
def test_a_model_of_ones_own_embeds_in_its_own_length(encoder_folder):
    folder = encoder_folder("small", 24)
    encoder = text.SentenceEncoder(str(folder))
    cats, dogs, long = encoder(["cats", "dogs", "cats " * 100])  # the model has places for 64 tokens
    assert encoder.features == len(cats) == 24
    torch.testing.assert_close(torch.stack([cats, dogs, long]).norm(dim=1), torch.ones(3))
    assert not torch.allclose(cats, dogs, atol=1e-3)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="sentence encoder small-.*: transformers cannot load .*choose another"):
        text.SentenceEncoder(str(folder))(["cats"])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt-weights\[text\]'"):
        text.SentenceEncoder()


# --- the real model ---------------------------------------------------------------------------------------------------

INSTALLED = all(importlib.util.find_spec(name) for name in (text.BUNDLED, "transformers", "tokenizers"))


@pytest.mark.skipif(not INSTALLED, reason="needs the optional packages of gpt-weights[text]")
@pytest.mark.filterwarnings("default")  # warnings of transformers are not this project's
def test_the_real_encoder_knows_meanings():
    encoder = text.SentenceEncoder()
    kittens, cats, trucks, long = encoder(["kittens", "cats", "trucks", "a very long sentence about trucks " * 5])
    assert kittens.shape == (384,)
    torch.testing.assert_close(torch.stack([kittens, cats, trucks, long]).norm(dim=1), torch.ones(4))
    assert kittens @ cats > 0.6 > kittens @ trucks
    # Padding beside a long sentence changes nothing.
    torch.testing.assert_close(text.SentenceEncoder()(["cats"])[0], cats, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not INSTALLED, reason="needs the optional packages of gpt-weights[text]")
@pytest.mark.filterwarnings("default")
def test_the_real_encoder_needs_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the encoder opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert text.SentenceEncoder()(["frogs"]).isfinite().all()


def test_what_might_be_read_either_way_is_said():
    probabilities = torch.tensor([0.95, 0.62, 0.41, 0.1])
    reading = text.Reading("some", ("a", "b", "c", "d"), probabilities > 0.5, probabilities, True)
    assert reading.unsure == ["b", "c"] and reading.names == ["a", "b"]
