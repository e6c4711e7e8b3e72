"""The synthetic task suite: a rule that turns four words or numbers into a result, times a format for the result.

Every task is stated in sentences that only the generator of adapters reads: a wording of its rule, of which each part
(training, validation, test) has its own, and one of its format, which all parts share; they are in wordings.tsv. The
language model sees the bare input, "Input: …", and has nothing but its adapter to tell it what to do. Inputs of the
three parts are disjoint, whatever the seeds.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Protocol, runtime_checkable

from Gpt.adapters.words import WORDS
from Gpt.errors import ConfigError
from Gpt.seeds import derive_seed

ITEMS = 4
SPLITS = ("train", "validation", "test")

Example = tuple[str, str]
"""What the language model reads, and what it should write."""


@dataclass(frozen=True)
class Member:
    """One task of a suite."""

    rule: str
    format: str

    @property
    def name(self) -> str:
        return f"{self.rule}/{self.format}"


@dataclass(frozen=True)
class Judgement:
    """A reply against the expected one: equal; in the wanted format; with the right content in any known format."""

    exact: bool
    format_valid: bool
    content_correct: bool


@runtime_checkable
class Suite(Protocol):
    """Tasks with unlabelled prompts that state them and labelled examples that train and test adapters for them."""

    @property
    def members(self) -> tuple[Member, ...]: ...

    @property
    def answered(self) -> bool: ...  # whether there are examples

    def examples(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]: ...

    def instructed(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]: ...

    def condition_prompts(self, member: Member, split: str, count: int, seed: int = 0) -> list[str]: ...

    def judge(self, member: Member, reply: str, expected: str) -> Judgement: ...


# --- rules and formats ------------------------------------------------------------------------------------------------


def _listed(items: list[str]) -> str:
    return ", ".join(items)


WORD_RULES: dict[str, Callable[[list[str]], str]] = {
    "first": lambda words: words[0],
    "last": lambda words: words[-1],
    "second": lambda words: words[1],
    "third": lambda words: words[2],
    "longest": lambda words: max(words, key=len),
    "shortest": lambda words: min(words, key=len),
    "alphabetical_first": min,
    "alphabetical_last": max,
    "reverse": lambda words: _listed(words[::-1]),
    "sort": lambda words: _listed(sorted(words)),
    "drop_first": lambda words: _listed(words[1:]),
    "drop_last": lambda words: _listed(words[:-1]),
    "initials": lambda words: _listed([word[0] for word in words]),
    "final_letters": lambda words: _listed([word[-1] for word in words]),
}
NUMBER_RULES: dict[str, Callable[[list[str]], str]] = {
    "maximum": lambda numbers: max(numbers, key=int),
    "minimum": lambda numbers: min(numbers, key=int),
    "ascending": lambda numbers: _listed(sorted(numbers, key=int)),
    "descending": lambda numbers: _listed(sorted(numbers, key=int, reverse=True)),
    "parity": lambda numbers: "odd" if int(numbers[0]) % 2 else "even",
    "comparison": lambda numbers: "yes" if int(numbers[0]) > int(numbers[-1]) else "no",
}
RULES = WORD_RULES | NUMBER_RULES
EASY = ("first", "last", "second", "third", "reverse", "drop_first", "drop_last")  # copy items by their place
FORMATS = {
    "plain": "{}",
    "square": "[{}]",
    "angle": "<{}>",
    "round": "({}).",
    "labelled": "Answer: {}",
    "twice": "{} {}",
    "heading": "## {}",
    "json": '{{"a": "{}"}}',
}
RENDERERS: dict[str, Callable[[list[str]], str]] = {
    "commas": _listed,
    "numbered": lambda items: " ".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
}


def formatted(content: str, format: str) -> str:
    return FORMATS[format].format(*[content] * FORMATS[format].count("{}"))


@lru_cache(maxsize=2**16)
def reading(reply: str) -> tuple[str | None, str | None]:
    """(format, content) of a reply, the content a word or a list of words; no reply has two formats, some have none."""
    for format in FORMATS:
        if found := _pattern(format).fullmatch(reply):
            return format, found["content"]
    return None, None


@lru_cache
def _pattern(format: str) -> re.Pattern:
    mark = "@"  # in no format
    text = re.escape(formatted(mark, format))
    return re.compile(text.replace(mark, r"(?P<content>\w+(?:, \w+)*)", 1).replace(mark, "(?P=content)"))


@lru_cache
def wordings(kind: str, name: str, split: str) -> tuple[str, ...]:
    """The sentences that state a "rule" or a "format" of that name in that part."""
    return tuple(sentence for *key, part, sentence in _wordings() if key == [kind, name] and part in (split, "all"))


@lru_cache
def _wordings() -> list[list[str]]:
    """(kind, name, part, sentence) of each line; the part "all" is every part."""
    text = files("Gpt.adapters").joinpath("wordings.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


# --- the suite --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleSuite:
    """Tasks of all these rules times all these formats."""

    rules: tuple[str, ...] = tuple(RULES)
    formats: tuple[str, ...] = tuple(FORMATS)
    renderers: tuple[str, ...] = tuple(RENDERERS)

    @property
    def answered(self) -> bool:
        return True

    @cached_property
    def members(self) -> tuple[Member, ...]:
        return tuple(Member(rule, format) for rule in self.rules for format in self.formats)

    def examples(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]:
        """Bare inputs and answers; an answer begins with a space and ends with a newline."""
        draw = _stream(seed, "examples", member, split)
        return [self._example(member, split, draw) for _ in range(count)]

    def instructed(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]:
        """The same examples with the task stated before the input."""
        draw = _stream(seed, "instructions", member, split)
        return [
            (f"{self._statement(member, split, draw)}\n{prompt}", answer)
            for prompt, answer in self.examples(member, split, count, seed)
        ]

    def condition_prompts(self, member: Member, split: str, count: int, seed: int = 0) -> list[str]:
        """Unlabelled prompts: a wording of the rule, one of the format, and an input."""
        draw = _stream(seed, "conditions", member, split)
        return [
            f"{self._statement(member, split, draw)}\n{self._example(member, split, draw)[0]}" for _ in range(count)
        ]

    def judge(self, member: Member, reply: str, expected: str) -> Judgement:
        said, wanted = _line(reply), _line(expected)
        (format, content), (_, right) = reading(said), reading(wanted)
        return Judgement(said == wanted, format == member.format, content == right)

    def recognise(self, prompt: str, reply: str) -> tuple[list[str], str | None]:
        """The rules that lead from the input of a bare prompt to what a reply says, and the reply's format."""
        items = items_of(prompt)
        format, content = reading(_line(reply))
        known = [rule for rule in self.rules if rule in WORD_RULES or items[0].isdigit()]
        return [rule for rule in known if RULES[rule](items) == content], format

    def descriptions(self, member: Member, split: str, count: int, seed: int = 0) -> list[str]:
        """The task in a wording of the rule and one of the format, without an input."""
        draw = _stream(seed, "descriptions", member, split)
        return [self._statement(member, split, draw) for _ in range(count)]

    def _statement(self, member: Member, split: str, draw: random.Random) -> str:
        rule, format = wordings("rule", member.rule, split), wordings("format", member.format, split)
        return f"{draw.choice(rule)} {draw.choice(format)}"

    def _example(self, member: Member, split: str, draw: random.Random) -> Example:
        items = _items(member.rule, split, draw)
        shown = RENDERERS[draw.choice(self.renderers)](items)
        return f"Input: {shown}\nOutput:", f" {formatted(RULES[member.rule](items), member.format)}\n"


def items_of(prompt: str) -> list[str]:
    """The words or numbers that a bare prompt shows."""
    shown = prompt.removeprefix("Input: ").partition("\n")[0]
    return re.findall(r"\d+\. (\w+)", shown) or shown.split(", ")


def _line(text: str) -> str:
    """Replies count up to their first newline, without the white space around them."""
    return text.strip().split("\n")[0].strip()


MINI = RuleSuite(("first", "third", "last"), ("plain", "square"), ("commas",))
SUITES = {"full": RuleSuite(), "mini": MINI}


def _stream(seed: int, what: str, member: Member, split: str) -> random.Random:
    if split not in SPLITS:
        raise ConfigError(f"there is no part {split!r} of a task's examples, expected one of {', '.join(SPLITS)}")
    return random.Random(derive_seed(seed, what, member.name, split))


def _items(rule: str, split: str, draw: random.Random) -> list[str]:
    """Four different words or numbers that belong to the split; the longest and the shortest word are the only ones."""
    population = WORDS if rule in WORD_RULES else [str(number) for number in range(1, 100)]
    while True:
        items = draw.sample(population, ITEMS)
        if rule in ("longest", "shortest"):
            lengths = sorted(map(len, items))
            if lengths[0] == lengths[1] or lengths[-2] == lengths[-1]:
                continue
        if split_of_input(items) == split:
            return items


def split_of_input(items: list[str]) -> str:
    """Which part an input belongs to: eight tenths of all are for training, one for validation, one for testing."""
    share = derive_seed(0, "input", *items) % 10
    return "train" if share < 8 else SPLITS[share - 7]
