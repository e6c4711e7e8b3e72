"""Vocabularies: tables against arithmetic, sentences against set algebra, and splits that keep what they hold out."""

import itertools
import random

import pytest
import torch

from Gpt import vocabulary
from Gpt.errors import ConfigError
from Gpt.vocabulary import grammar
from Gpt.vocabulary.grammar import Clause, Difference, Everything, Union

TINY = "classes\tphrases\ncat\tcats | kittens\ndog\tdogs\nship\tships\ncat dog\tanimals | ~that breathe\nnone\tforks"


@pytest.fixture
def tiny() -> vocabulary.Vocabulary:
    return vocabulary.parse_vocabulary(TINY, ("cat", "dog", "ship"), "tiny.tsv")


def classes_of(name: str, phrase: str) -> set[str]:
    words = vocabulary.load_vocabulary(name)
    found = [a.mask for a in words.attributes if phrase in a.phrases]
    assert len(found) == 1
    return {c for c, inside in zip(words.classes, found[0], strict=True) if inside}


@pytest.mark.parametrize("name", vocabulary.CLASSES)
def test_no_phrase_has_two_meanings(name):
    words = vocabulary.load_vocabulary(name)
    meanings: dict[str, set] = {}
    for attribute in words.attributes:
        for phrase in attribute.phrases:
            meanings.setdefault(phrase.lstrip("~").lower(), set()).add(attribute.mask)
    assert [phrase for phrase, masks in meanings.items() if len(masks) > 1] == []


@pytest.mark.parametrize("name", vocabulary.CLASSES)
def test_every_class_has_names_and_some_phrases_fit_nothing(name):
    words = vocabulary.load_vocabulary(name)
    for k, names in enumerate(words.names):
        assert [i for i, inside in enumerate(names.mask) if inside] == [k]
    assert any(not any(a.mask) for a in words.attributes)
    assert len(words.attributes) > 100


@pytest.mark.parametrize(
    "phrase, holds",
    [
        ("even numbers", lambda n: n % 2 == 0),
        ("odd numbers", lambda n: n % 2 == 1),
        ("prime numbers", lambda n: n in (2, 3, 5, 7)),
        ("composite numbers", lambda n: n in (4, 6, 8, 9)),
        ("multiples of three", lambda n: n % 3 == 0),
        ("square numbers", lambda n: n in (0, 1, 4, 9)),
        ("powers of two", lambda n: n in (1, 2, 4, 8)),
        ("~greater than five", lambda n: n > 5),
        ("~less than five", lambda n: n < 5),
        ("~at least three", lambda n: n >= 3),
        ("~between four and seven inclusive", lambda n: 4 <= n <= 7),
        ("~with a closed loop", lambda n: n in (0, 6, 8, 9)),
        (
            "~spelled with four letters",
            lambda n: len("zero one two three four five six seven eight nine".split()[n]) == 4,
        ),
    ],
)
def test_digits_agree_with_arithmetic(phrase, holds):
    names = vocabulary.CLASSES["digits"]
    assert classes_of("digits", phrase) == {names[n] for n in range(10) if holds(n)}


def test_cifar10_attributes_form_the_expected_hierarchy():
    animals, mammals = classes_of("cifar10", "animals"), classes_of("cifar10", "mammals")
    vehicles, road = classes_of("cifar10", "vehicles"), classes_of("cifar10", "road vehicles")
    assert animals | vehicles == set(vocabulary.CLASSES["cifar10"]) and not animals & vehicles
    assert mammals < animals and road < vehicles
    assert classes_of("cifar10", "~that fly") == {"airplane", "bird"}


@pytest.mark.parametrize("row", ["lion\tlions", "cat", "cat\t ", "\tcats"])
def test_a_wrong_row_is_an_error_that_names_its_line(row):
    with pytest.raises(ConfigError, match="own.tsv, line 3"):
        vocabulary.parse_vocabulary(f"classes\tphrases\ncat\tcats\n{row}", ("cat", "dog"), "own.tsv")


def test_an_unknown_vocabulary_is_an_error():
    with pytest.raises(ConfigError, match="cifar10"):
        vocabulary.load_vocabulary("cifar100")


def test_composed_sentences_mean_what_set_algebra_says(tiny):
    """Checked against the grammar: with perfectly read clauses, parsing a list or an exception gives the mask back."""
    sentences = vocabulary.compose(tiny.names, tiny.attributes[:3], ("find {}", "all {}"), 0, combinations=300)
    exact = {p: torch.tensor([*map(float, a.mask), 1.0]) for a in tiny.attributes for p in a.phrases}
    assert len({s.mask for s in sentences}) >= 6
    for sentence in sentences:
        expression = grammar.parse(sentence.text)
        # "things that are cats" are what "cats" are.
        known = {c: next(v for p, v in exact.items() if c.endswith(p)) for c in grammar.clauses(expression)}
        value = grammar.evaluate(expression, known, 4)
        assert tuple(bool(x) for x in value[:-1] > 0.5) == sentence.mask, sentence.text


def test_sentences_follow_from_the_seed_alone(tiny):
    composed = [vocabulary.compose(tiny.names, tiny.attributes, ("find {}",), seed) for seed in (1, 1, 2)]
    assert composed[0] == composed[1] != composed[2]
    assert len(set(composed[0])) == len(composed[0])


def test_modifiers_get_a_noun_and_no_tilde(tiny):
    texts = [s.text for s in vocabulary.compose(tiny.names, tiny.attributes, ("find {}",), 0)]
    assert not any("~" in text for text in texts)
    assert any(text.startswith("find") and text.endswith("that breathe") for text in texts)


@pytest.mark.parametrize("name", vocabulary.CLASSES)
def test_held_out_sentences_are_not_trained_on(name):
    words = vocabulary.load_vocabulary(name)
    splits = vocabulary.split_sentences(words, seed=0)
    train = {s.text.lower() for s in splits["train"]}
    kinds = {"attributes", "phrases", "wordings", "sentences"}
    assert set(splits) == {"train"} | {f"{p}_{k}" for p, k in itertools.product(("validation", "test"), kinds)}
    for key, sentences in splits.items():
        assert len(sentences) > 30
        if key != "train":
            assert not train & {s.text.lower() for s in sentences}, key


def test_held_out_phrases_and_attributes_appear_nowhere_in_training():
    words = vocabulary.load_vocabulary("cifar10")
    splits = vocabulary.split_sentences(words, seed=0)
    train = " | ".join(s.text for s in splits["train"])
    phrases = [p.lstrip("~") for a in words.attributes for p in a.phrases]
    for key in ("validation_attributes", "test_attributes", "validation_phrases", "test_phrases"):
        # A bare phrase of a long wording cannot be part of another phrase by chance.
        bare = {s.text for s in splits[key]} & {
            p for p in phrases if len(p) > 20 and not {"not", "but"} & set(p.split())
        }
        unique = [p for p in bare if sum(p in other for other in phrases) == 1]
        assert len(unique) > 20
        assert [p for p in unique if p in train] == []


def test_validation_and_test_hold_out_different_attributes():
    splits = vocabulary.split_sentences(vocabulary.load_vocabulary("cifar10"), seed=0)
    for kind in ("attributes", "phrases"):
        validation, test = ({s.text for s in splits[f"{part}_{kind}"]} for part in ("validation", "test"))
        assert not validation & test


def test_the_split_depends_on_its_seed_alone():
    words = vocabulary.load_vocabulary("digits")
    a, b, other = (vocabulary.split_sentences(words, seed) for seed in (5, 5, 6))
    assert a == b
    assert a["test_attributes"] != other["test_attributes"]


def test_descriptions_name_exactly_the_mask(tiny):
    exact = {p: torch.tensor([*map(float, a.mask), 1.0]) for a in tiny.attributes for p in a.phrases}
    for bits in itertools.product([False, True], repeat=3):
        if not any(bits) or bits == (True, True, False):  # the pair has an attribute, which comes in other wordings
            continue
        for seed in range(20):
            text = tiny.describe(torch.tensor(bits), seed)
            expression = grammar.parse(text)
            if set(grammar.clauses(expression)) <= set(exact):
                value = grammar.evaluate(expression, exact, 4)[:-1] > 0.5
                assert tuple(value.tolist()) == bits, text


def test_descriptions_use_attributes_and_names(tiny):
    texts = [tiny.describe(torch.tensor([True, True, False]), seed) for seed in range(40)]
    assert any("animals" in text for text in texts) and any("dogs" in text for text in texts)
    assert tiny.describe(torch.tensor([True, True, False]), 3) == texts[3]
    with pytest.raises(ConfigError, match="at least one class"):
        tiny.describe(torch.tensor([False, False, False]), 0)


@pytest.mark.parametrize("name", vocabulary.CLASSES)
def test_a_list_of_names_is_exactly_these_classes_however_they_are_parted(name):
    words, draw = vocabulary.load_vocabulary(name), random.Random(0)
    called = [(c, *(p for p in a.phrases if p)) for c, a in zip(words.classes, words.names, strict=True)]
    separators = (" ", ", ", ",", " , ", " and ", ", and ", "  ", "\n")
    for _ in range(300):
        chosen = draw.sample(range(10), draw.randint(1, 10))
        parts = [draw.choice(called[k]) + draw.choice(separators) for k in chosen]
        text = (
            draw.choice(("", " ")) + "".join(parts[:-1]) + draw.choice(called[chosen[-1]]) + draw.choice(("", ".", " "))
        )
        found = words.listed(draw.choice((text, text.upper(), text.title())))
        assert found is not None and found.nonzero().flatten().tolist() == sorted(chosen), text


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("digits", "0 2 4", ["zero", "two", "four"]),
        ("digits", "4, 4, zero and 2", ["zero", "two", "four"]),
        ("digits", "the digit 3 the digit 5", ["three", "five"]),
        ("cifar10", "cat dog bird", ["bird", "cat", "dog"]),
        ("cifar10", "Car, plane and fire engine.", ["airplane", "automobile", "truck"]),
        ("cifar10", "elk and moose", ["deer"]),
        ("cifar10", "house cats tree frogs", ["cat", "frog"]),
    ],
)
def test_lists_as_people_write_them(name, text, classes):
    words = vocabulary.load_vocabulary(name)
    assert [c for c, inside in zip(words.classes, words.listed(text).tolist(), strict=True) if inside] == classes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "and", "cat and", ", cat", "cat,, dog", "cat or dog", "cat but not dog", "not cat", "no cats",
        "all cats", "find cat dog", "cat dog unicorn", "cats that purr", "catdog", "bobcat", "cat-dog",
        "cat and and dog", "everything except cats, dogs", "animals", "flying animals", "7",
    ],
)  # fmt: skip
def test_what_says_more_or_less_than_names_is_no_list(text):
    assert vocabulary.load_vocabulary("cifar10").listed(text) is None


@pytest.mark.parametrize("name", vocabulary.CLASSES)
def test_no_composed_sentence_is_taken_for_another_list(name):
    words = vocabulary.load_vocabulary(name)
    sentences = vocabulary.compose(words.names, words.attributes, vocabulary.WORDINGS, 0)
    found = [(words.listed(sentence.text), sentence) for sentence in sentences]
    lists = [(tuple(mask.tolist()), sentence) for mask, sentence in found if mask is not None]
    assert [sentence.text for mask, sentence in lists if mask != sentence.mask] == []
    assert 50 < len(lists) < len(sentences) / 4


ALL = Everything()


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("mammals", Clause("mammals")),
        ("  Mammals. ", Clause("mammals")),
        ("Please find all the mammals!", Clause("mammals")),
        ("I need a network that tells mammals apart from everything else", Clause("mammals")),
        ("animals that people keep", Clause("animals that people keep")),
        ("all classes", ALL),
        ("everything", ALL),
        ("everything except frogs", Difference(ALL, Clause("frogs"))),
        ("all but frogs", Difference(ALL, Clause("frogs"))),
        ("not alive", Difference(ALL, Clause("alive"))),
        ("non-living objects", Difference(ALL, Clause("objects that are living"))),
        ("animals that cannot fly", Difference(Clause("animals"), Clause("animals that can fly"))),
        ("animals that can't fly", Difference(Clause("animals"), Clause("animals that can fly"))),
        ("animals which don't eat meat", Difference(Clause("animals"), Clause("animals that eat meat"))),
        ("animals you cannot ride", Difference(Clause("animals"), Clause("animals you can ride"))),
        ("vehicles without wings", Difference(Clause("vehicles"), Clause("vehicles with wings"))),
        ("vehicles that have no wings", Difference(Clause("vehicles"), Clause("vehicles with wings"))),
        ("cats, dogs and ships", Union((Clause("cats"), Clause("dogs"), Clause("ships")))),
        ("both cats and dogs", Union((Clause("cats"), Clause("dogs")))),
        ("animals other than cats or dogs", Difference(Clause("animals"), Union((Clause("cats"), Clause("dogs"))))),
        ("no cats, no dogs and no ships", Difference(ALL, Union((Clause("cats"), Clause("dogs"), Clause("ships"))))),
        ("not cats and not dogs", Difference(Difference(ALL, Clause("cats")), Clause("dogs"))),
        (
            "vehicles without wings and without wheels",
            Difference(Clause("vehicles"), Union((Clause("vehicles with wings"), Clause("vehicles with wheels")))),
        ),
        ("things that swim and fly", Clause("things that swim and fly")),
        ("", ALL),
    ],
)
def test_sentences_are_taken_apart(sentence, expected):
    assert grammar.parse(sentence) == expected


def test_wordings_leave_the_classes_alone():
    kept = [w for w in vocabulary.WORDINGS if grammar.parse(w.format("tame animals")) == Clause("tame animals")]
    assert len(kept) >= len(vocabulary.WORDINGS) - 1


def test_evaluation_is_set_algebra_on_certain_probabilities():
    sets = {
        name: (torch.rand(11, generator=torch.Generator().manual_seed(i)) < 0.5).float() for i, name in enumerate("ab")
    }
    a, b = sets["a"].bool()[:-1], sets["b"].bool()[:-1]

    def value(expression):
        return grammar.evaluate(expression, sets, 11)[:-1].bool()

    assert torch.equal(value(Union((Clause("a"), Clause("b")))), a | b)
    assert torch.equal(value(Difference(Clause("a"), Clause("b"))), a & ~b)
    assert torch.equal(value(Difference(ALL, Clause("a"))), ~a)
    assert value(ALL).all()


def test_a_difference_fits_when_what_is_kept_fits():
    known = {"a": torch.tensor([0.9, 0.9, 1.0]), "nothing": torch.tensor([0.0, 0.0, 0.0])}
    assert grammar.evaluate(Difference(Clause("a"), Clause("nothing")), known, 3)[-1] == 1
    assert grammar.evaluate(Difference(Clause("nothing"), Clause("a")), known, 3)[-1] == 0
