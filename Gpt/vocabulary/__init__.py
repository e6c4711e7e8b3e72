"""Sentences about classes: which of ten classes "animals that can fly, except birds" means, and how else one can say
it.

A vocabulary is a table beside this file, one attribute a row: the classes that have it and phrases for it. A phrase
is a noun phrase ("mammals") or, marked with a tilde, a modifier ("~that can fly"), which needs a noun in front. The
classes "none" mark what fits no class of the data set. Sentences combine phrases by a small grammar and carry the
mask that set algebra gives:

    negation       everything except A                  not A
    union          A and B, A as well as B              A or B
    difference     A but not B                          A and not B
    intersection   noun A + modifier B (birds that sing)    A and B
    enumeration    cats, frogs and ships                any subset of the classes
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from Gpt.errors import ConfigError
from Gpt.seeds import derive_seed

CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
"""Class names in label order; "digits" serves MNIST as well."""

NOUNS = ("things", "objects", "items", "classes", "categories", "pictures of things", "stuff")

WORDINGS = (
    "all {}", "only {}", "select {}", "select all {}", "find {}", "find all {}", "find every picture of {}",
    "pictures of {}", "images showing {}", "I want {}", "I am looking for {}", "show me {}", "show me all the {}",
    "give me a classifier for {}", "classify {}", "detect {}", "pick out {}", "recognise {}",
    "separate {} from the rest", "which of these are {}?", "is it one of the {}?",
    "a network that tells {} apart from everything else", "choose all classes that are {}", "please identify the {}",
    "the class of {}", "any kind of {}", "generate a model that picks {}", "I need to find {}",
    "photos that contain {}", "mark every image with {}", "tell me whether the image shows {}",
    "keep {} and discard the others",
)  # fmt: skip

NEGATIONS = (
    "everything except {}", "everything but {}", "all classes except {}", "all but {}", "anything but {}", "not {}",
    "no {}", "things that are not {}", "all classes that are not {}", "anything other than {}",
    "whatever is not among {}",
)  # fmt: skip

UNIONS = (
    "{} and {}", "{} or {}", "both {} and {}", "either {} or {}", "{} as well as {}", "{} together with {}",
    "{} plus {}", "{} and also {}",
)  # fmt: skip

DIFFERENCES = (
    "{} except {}", "{} but not {}", "{} excluding {}", "{} other than {}", "{} apart from {}", "{} without {}",
    "{} that are not {}",
)  # fmt: skip

Mask = tuple[bool, ...]


class Sentence(NamedTuple):
    """A sentence and the classes it means; all False when it fits none."""

    text: str
    mask: Mask


@dataclass(frozen=True)
class Attribute:
    """A row of a vocabulary: a mask and several ways to say it."""

    mask: Mask
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Attributes of the classes of one data set."""

    classes: tuple[str, ...]
    attributes: tuple[Attribute, ...]

    @property
    def names(self) -> tuple[Attribute, ...]:
        """For every class, the attribute that lists its names: the first row with that class alone."""
        singles = [tuple(i == k for i in range(len(self.classes))) for k in range(len(self.classes))]
        return tuple(next(a for a in self.attributes if a.mask == single) for single in singles)

    @cached_property
    def _singles(self) -> dict[str, int]:
        """What a class is called in a list, and its number: its own name and those of its attribute, also without the
        plural's s."""
        found: dict[str, int] = {}
        for number, (name, attribute) in enumerate(zip(self.classes, self.names, strict=True)):
            for phrase in (name, *(phrase.lower() for phrase in attribute.phrases)):
                found |= {phrase: number, phrase.removesuffix("s"): number}
        return found

    @cached_property
    def _next_listed(self) -> re.Pattern[str]:
        """A name, the longest that fits, and what parts it from the next one."""
        names = "|".join(re.escape(name) for name in sorted(self._singles, key=len, reverse=True))
        return re.compile(rf"(?P<name>{names})(?:(?: ?, ?| )(?:and )?|\Z)")

    def listed(self, sentence: str) -> Bool[Tensor, " classes"] | None:
        """The classes of a sentence that is a plain list of their names, parted by blanks, commas or "and"; None if it
        says anything else."""
        text, place = re.sub(r"[.!?\s]+$", "", " ".join(sentence.lower().split())), 0
        mask = torch.zeros(len(self.classes), dtype=torch.bool)
        while match := self._next_listed.match(text, place):
            mask[self._singles[match["name"]]] = True
            place = match.end()
            if place == len(text):
                return mask
        return None

    def describe(self, mask: Bool[Tensor, " classes"], seed: int, wordings: Sequence[str] | None = None) -> str:
        """A sentence for any mask but the empty one: an attribute of exactly these classes where there is one, else
        (and half of the time) their names, or what to leave out.

        Args:
            wordings: templates for every sentence; when None, names stand by themselves, and attributes in any wording.

        Raises:
            ConfigError: the mask is empty.
        """
        wanted = tuple(bool(x) for x in mask)
        if not any(wanted):
            raise ConfigError("a mask without a class has no description; choose at least one class")
        draw = random.Random(derive_seed(seed, "describe", *(int(x) for x in wanted)))
        known = [a for a in self.attributes if a.mask == wanted]
        if known and draw.random() < 0.5:
            return _wording(draw, wordings or WORDINGS, _noun_phrase(draw, draw.choice(draw.choice(known).phrases)))
        names = _enumeration(draw, self.names, wanted).text
        return names if wordings is None else _wording(draw, wordings, names)


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a data set: "cifar10" or "digits".

    Raises:
        ConfigError: there is no such vocabulary, or a row of its table names an unknown class.
    """
    if name not in CLASSES:
        raise ConfigError(f"there is no vocabulary {name!r}, expected one of {', '.join(CLASSES)}")
    table = files(__package__).joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    return parse_vocabulary(table, CLASSES[name], f"{name}.tsv")


def parse_vocabulary(table: str, classes: tuple[str, ...], source: str) -> Vocabulary:
    """Read a table with the columns `classes` (names separated by blanks, or "none") and `phrases` (separated by " |
    ").

    Raises:
        ConfigError: a row names an unknown class or has no phrase; names the file and the line.
    """
    attributes = []
    for number, line in enumerate(table.splitlines()[1:], start=2):
        names, _, phrases = line.partition("\t")
        listed = set(names.split()) - {"none"}
        if listed - set(classes) or not names or not phrases.strip():
            raise ConfigError(
                f"{source}, line {number}: expected class names (of {', '.join(classes)}, or none), a tab and phrases "
                f"separated by ' | ', found {line!r}"
            )
        mask = tuple(name in listed for name in classes)
        attributes.append(Attribute(mask, tuple(phrase.strip() for phrase in phrases.split("|"))))
    return Vocabulary(classes, tuple(attributes))


def compose(
    names: Sequence[Attribute],
    attributes: Sequence[Attribute],
    wordings: Sequence[str],
    seed: int,
    *,
    repeats: int = 3,
    combinations: int = 2000,
) -> list[Sentence]:
    """Sentences from attributes: every phrase bare and in `repeats` wordings, and `combinations` of two phrases or of
    class names.

    Args:
        names: names of every class, for enumerations.
        wordings: templates around a noun phrase.
    """
    draw = random.Random(derive_seed(seed, "sentences"))
    sentences = []
    for attribute in attributes:
        for phrase in attribute.phrases:
            sentences.append(Sentence(phrase.lstrip("~"), attribute.mask))
            for wording in draw.sample(wordings, min(repeats, len(wordings))):
                sentences.append(Sentence(_wording(draw, [wording], _noun_phrase(draw, phrase)), attribute.mask))
    fitting = [a for a in attributes if any(a.mask)]
    rules = [_negation, _union, _difference, _intersection, None]
    for _ in range(combinations):
        rule = draw.choice(rules)
        inner = rule(draw, fitting) if rule else _enumeration(draw, names, _random_mask(draw, len(names)))
        if inner is not None:
            text = inner.text if draw.random() < 0.5 else _wording(draw, wordings, inner.text)
            sentences.append(Sentence(text, inner.mask))
    return list(dict.fromkeys(sentences))


def _noun_phrase(draw: random.Random, phrase: str) -> str:
    return f"{draw.choice(NOUNS)} {phrase[1:]}" if phrase.startswith("~") else phrase


def _wording(draw: random.Random, wordings: Sequence[str], noun_phrase: str) -> str:
    return draw.choice(wordings).format(noun_phrase)


def _random_mask(draw: random.Random, classes: int) -> Mask:
    size = draw.randint(1, classes - 1)
    chosen = draw.sample(range(classes), size)
    return tuple(k in chosen for k in range(classes))


def _negation(draw: random.Random, attributes: Sequence[Attribute]) -> Sentence:
    attribute = draw.choice(attributes)
    inner = _noun_phrase(draw, draw.choice(attribute.phrases))
    return Sentence(draw.choice(NEGATIONS).format(inner), tuple(not x for x in attribute.mask))


def _pair(draw: random.Random, attributes: Sequence[Attribute]) -> tuple[Attribute, str, Attribute, str]:
    first, second = draw.choice(attributes), draw.choice(attributes)
    return (
        first,
        _noun_phrase(draw, draw.choice(first.phrases)),
        second,
        _noun_phrase(draw, draw.choice(second.phrases)),
    )


def _union(draw: random.Random, attributes: Sequence[Attribute]) -> Sentence:
    first, a, second, b = _pair(draw, attributes)
    mask = tuple(x or y for x, y in zip(first.mask, second.mask, strict=True))
    return Sentence(draw.choice(UNIONS).format(a, b), mask)


def _difference(draw: random.Random, attributes: Sequence[Attribute]) -> Sentence | None:
    """ "A except B", where B takes something away from A and leaves something."""
    first, a, second, b = _pair(draw, attributes)
    mask = tuple(x and not y for x, y in zip(first.mask, second.mask, strict=True))
    return Sentence(draw.choice(DIFFERENCES).format(a, b), mask) if any(mask) and mask != first.mask else None


def _intersection(draw: random.Random, attributes: Sequence[Attribute]) -> Sentence | None:
    """A one-word noun and a modifier, or two modifiers, that some class satisfies."""
    first, second = draw.choice(attributes), draw.choice(attributes)
    mask = tuple(x and y for x, y in zip(first.mask, second.mask, strict=True))
    modifiers = [phrase[1:] for phrase in second.phrases if phrase.startswith("~")]
    heads = [phrase for phrase in first.phrases if phrase.startswith("~") or " " not in phrase]
    if not any(mask) or not modifiers or not heads:
        return None
    head = draw.choice(heads)
    joint = " and" if head.startswith("~") else ""
    return Sentence(f"{_noun_phrase(draw, head)}{joint} {draw.choice(modifiers)}", mask)


def _enumeration(draw: random.Random, names: Sequence[Attribute], mask: Mask) -> Sentence:
    """The classes by name, or, half of the times that is shorter, everything but the others."""
    inside = [draw.choice(a.phrases) for a, chosen in zip(names, mask, strict=True) if chosen]
    outside = [draw.choice(a.phrases) for a, chosen in zip(names, mask, strict=True) if not chosen]
    if outside and len(outside) < len(inside) and draw.random() < 0.5:
        return Sentence(draw.choice(NEGATIONS).format(_listed(draw, outside)), mask)
    return Sentence(_listed(draw, inside), mask)


def _listed(draw: random.Random, names: list[str]) -> str:
    names = draw.sample(names, len(names))
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def split_sentences(vocabulary: Vocabulary, seed: int = 0) -> dict[str, list[Sentence]]:
    """Sentences for training, and held-out ones in four kinds, each for validation and for test.

    `attributes`: rows of which training sees no phrase. `phrases`: unseen phrases of rows that training knows.
    `wordings`: known phrases in unseen templates. `sentences`: known phrases in combinations that training does not
    contain. Class names are always known. Keys: "train", "validation_attributes", "test_attributes", …

    Everything follows from the seed and the vocabulary, before anything is trained.
    """
    draw = random.Random(derive_seed(seed, "text split"))
    names = vocabulary.names
    rows = [a for a in vocabulary.attributes if a not in names]
    draw.shuffle(rows)
    tenth = len(rows) // 10
    held_rows = {"validation": rows[:tenth], "test": rows[tenth : 2 * tenth]}
    wordings = draw.sample(WORDINGS, len(WORDINGS))
    held_wordings = {"validation": wordings[:4], "test": wordings[4:8]}
    known = list(names)
    held_phrases: dict[str, list] = {"validation": [], "test": []}
    for i, row in enumerate(rows[2 * tenth :]):
        phrases = draw.sample(row.phrases, len(row.phrases))
        if len(phrases) >= 3:
            held_phrases["validation" if i % 2 else "test"].append(Attribute(row.mask, (phrases.pop(),)))
        known.append(Attribute(row.mask, tuple(phrases)))

    splits = {"train": compose(names, known, wordings[8:], seed)}
    seen = {sentence.text for sentence in splits["train"]}

    def unseen(sentences: list[Sentence]) -> list[Sentence]:
        return [sentence for sentence in sentences if sentence.text not in seen]

    for part in ("validation", "test"):
        part_seed = derive_seed(seed, part)
        for kind, attributes in (("attributes", held_rows[part]), ("phrases", held_phrases[part])):
            splits[f"{part}_{kind}"] = unseen(
                compose(names, attributes, wordings[8:], part_seed, repeats=1, combinations=0)
            )
        few = [Attribute(a.mask, (draw.choice(a.phrases),)) for a in known]
        inside = compose(names, few, held_wordings[part], part_seed, repeats=1, combinations=0)
        splits[f"{part}_wordings"] = unseen(inside)
        combined = compose(names, known, wordings[8:], part_seed, repeats=0, combinations=400)
        splits[f"{part}_sentences"] = unseen(combined)
    return splits


def masks_of(sentences: Sequence[Sentence]) -> Bool[Tensor, "n classes"]:
    """The sentences' masks as one tensor."""
    return torch.tensor([sentence.mask for sentence in sentences], dtype=torch.bool)
