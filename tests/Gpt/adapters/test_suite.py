"""The suite's answers against rules written another way; formats are read back; parts are disjoint."""

import re
from collections import Counter
from hashlib import sha256

import pytest

from Gpt.adapters import suite as module
from Gpt.adapters.conditions import BETWEEN_SENTENCES
from Gpt.adapters.suite import (
    FORMATS,
    MINI,
    NUMBER_RULES,
    RULES,
    SPLITS,
    WORD_RULES,
    Member,
    RuleSuite,
    formatted,
    reading,
    split_of_input,
    wordings,
)
from Gpt.adapters.words import WORDS
from Gpt.errors import ConfigError

SUITE = RuleSuite()


def oracle(rule: str, items: list[str]) -> str:
    """Every rule by loops and comparisons instead of Python's own functions."""
    a, b, c, d = items
    numbers = [int(item) for item in items] if rule in NUMBER_RULES else []

    def ordered(before):
        done: list[str] = []
        for item in items:
            place = sum(1 for other in done if before(other, item))
            done.insert(place, item)
        return done

    lists = {
        "reverse": [d, c, b, a],
        "drop_first": [b, c, d],
        "drop_last": [a, b, c],
        "initials": [item[:1] for item in items],
        "final_letters": [item[len(item) - 1 :] for item in items],
    }
    if rule in lists:
        return ", ".join(lists[rule])
    if rule in ("sort", "alphabetical_first", "alphabetical_last"):
        line = ordered(lambda x, y: x < y)
        return {"sort": ", ".join(line), "alphabetical_first": line[0], "alphabetical_last": line[3]}[rule]
    if rule in ("ascending", "minimum", "maximum", "descending"):
        line = ordered(lambda x, y: int(x) < int(y))
        backwards = ", ".join(line[i] for i in (3, 2, 1, 0))
        return {"ascending": ", ".join(line), "minimum": line[0], "maximum": line[3], "descending": backwards}[rule]
    if rule in ("longest", "shortest"):
        line = ordered(lambda x, y: len(x) < len(y))
        return line[3] if rule == "longest" else line[0]
    if rule == "parity":
        return ["even", "odd"][numbers[0] & 1]
    if rule == "comparison":
        return "yes" if numbers[0] - numbers[3] > 0 else "no"
    return {"first": a, "second": b, "third": c, "last": d}[rule]


def items_of(prompt: str) -> list[str]:
    shown = re.fullmatch(r"Input: (.*)\nOutput:", prompt)[1]
    return shown.split(", ") if "," in shown else re.sub(r"\b\d\. ", "", shown).split(" ")


def test_there_are_twenty_rules_eight_formats_and_four_hundred_words():
    assert (len(WORD_RULES), len(NUMBER_RULES), len(FORMATS), len(SUITE.members)) == (14, 6, 8, 160)
    assert len(set(WORDS)) == 400 and all(word.isascii() and word.islower() for word in WORDS)
    assert len(MINI.members) == 6


@pytest.mark.parametrize("rule", RULES)
def test_answers_are_what_an_independent_oracle_says(rule):
    for format in FORMATS:
        for split in SPLITS:
            for prompt, answer in SUITE.examples(Member(rule, format), split, 12, seed=3):
                items = items_of(prompt)
                assert len(set(items)) == 4
                wanted = FORMATS[format].replace("{{", "{").replace("}}", "}").replace("{}", oracle(rule, items))
                if format == "json":
                    wanted = f'{{"a": "{oracle(rule, items)}"}}'
                assert answer == f" {wanted}\n"


def test_both_renderers_and_both_outcomes_of_a_yes_or_no_rule_occur():
    examples = SUITE.examples(Member("comparison", "plain"), "test", 200)
    numbered = sum("1. " in prompt for prompt, _ in examples)
    assert 60 < numbered < 140
    assert min(Counter(answer for _, answer in examples).values()) > 60


@pytest.mark.parametrize("content", ["tree", "17", "yes", "a, b, c", "tree, tree"])
def test_formats_are_told_apart_and_read_back(content):
    for written in FORMATS:
        text = formatted(content, written)
        assert [name for name in FORMATS if module._pattern(name).fullmatch(text)] == [written]
        assert reading(text) == (written, content)
    for broken in ("[tree", "tree fox", "", "((tree))."):
        assert reading(broken) == (None, None)


def test_replies_are_judged_by_format_and_content_apart():
    member = Member("last", "square")

    def verdict(reply):
        judgement = SUITE.judge(member, reply, " [fox]\n")
        return judgement.exact, judgement.format_valid, judgement.content_correct

    assert verdict(" [fox]\nInput: more") == (True, True, True)
    assert verdict(" [dog]\n") == (False, True, False)
    assert verdict(" <fox>\n") == (False, False, True)
    assert verdict("fox") == (False, False, True)
    assert verdict(" the fox") == (False, False, False)


def test_answers_are_recognised_as_what_their_task_asks_for():
    """Whatever the renderer; and what another rule makes of the same input is not."""
    assert module.items_of("Input: 1. 45 2. 7 3. 12 4. 99\nOutput:") == ["45", "7", "12", "99"]
    for member in SUITE.members[::3]:
        for prompt, answer in SUITE.examples(member, "test", 8):
            rules, format = SUITE.recognise(prompt, answer)
            assert member.rule in rules and format == member.format
            assert {RULES[rule](module.items_of(prompt)) for rule in rules} == {reading(answer.strip())[1]}
    prompt = "Input: pear, fig, apple, kiwi\nOutput:"
    assert SUITE.recognise(prompt, " <pear>\n") == (["first", "alphabetical_last"], "angle")
    assert SUITE.recognise(prompt, " [kiwi, apple, fig, pear]") == (["reverse"], "square")
    assert SUITE.recognise(prompt, " [lemon]") == ([], "square")
    assert SUITE.recognise(prompt, " a pear") == ([], None)


def test_a_description_states_the_task_and_shows_no_input():
    member = SUITE.members[9]
    for part in SPLITS:
        rules, formats = wordings("rule", member.rule, part), wordings("format", member.format, part)
        stated = set(SUITE.descriptions(member, part, 400))
        assert stated <= {f"{rule} {form}" for rule in rules for form in formats}
        assert part == "train" or len(stated) == len(rules) * len(formats)


def test_no_input_is_in_two_parts_and_all_have_their_share():
    inputs = {}
    for split in SPLITS:
        for member in SUITE.members[::17]:
            for seed in (0, 1):
                texts = [prompt for prompt, _ in SUITE.examples(member, split, 40, seed)]
                texts += SUITE.condition_prompts(member, split, 40, seed)
                inputs.setdefault(split, set()).update(tuple(items_of(text[text.index("Input:") :])) for text in texts)
    assert not inputs["train"] & inputs["test"] and not inputs["train"] & inputs["validation"]
    assert not inputs["test"] & inputs["validation"]
    drawn = Counter(split_of_input([str(i), "x"]) for i in range(5000))
    assert [round(10 * drawn[split] / 5000) for split in SPLITS] == [8, 1, 1]


def test_every_part_states_the_rules_in_wordings_of_its_own():
    for rule in RULES:
        parts = [wordings("rule", rule, part) for part in SPLITS]
        assert [len(part) for part in parts] == [45, 3, 3]
        assert len({normalised(sentence) for part in parts for sentence in part}) == 51
    for member in SUITE.members[::41]:
        for part in SPLITS:
            prompts = SUITE.condition_prompts(member, part, 400)
            stated = {s for other in SPLITS for s in wordings("rule", member.rule, other) if is_stated(s, prompts)}
            assert stated == set(wordings("rule", member.rule, part))


def test_no_wording_states_two_rules_and_none_is_more_than_two_sentences():
    """Two of the rule, one of the format and two lines of the input are the five states of a prompt."""
    everything = [sentence for rule in RULES for part in SPLITS for sentence in wordings("rule", rule, part)]
    assert len({normalised(sentence) for sentence in everything}) == len(everything)
    assert max(len(BETWEEN_SENTENCES.split(sentence)) for sentence in everything) == 2
    assert not [sentence for sentence in everything if len(BETWEEN_SENTENCES.split(f"{sentence} Use")) < 2]


def test_the_wordings_of_the_test_part_are_the_published_ones():
    """Results are compared with earlier ones only if these sentences stay as they are."""
    table = [wordings("rule", rule, "test") for rule in RULES], [wordings("format", form, "test") for form in FORMATS]
    assert sha256(repr(table).encode()).hexdigest()[:16] == "cf8175354ca6885e"


def normalised(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))


def is_stated(sentence: str, prompts: list[str]) -> bool:
    return any(prompt.startswith(f"{sentence} ") for prompt in prompts)


def test_bare_prompts_do_not_tell_the_task_and_instructed_ones_do():
    member = SUITE.members[0]
    plain, told = (draw(member, "test", 10) for draw in (SUITE.examples, SUITE.instructed))
    for (bare, answer), (instructed, same) in zip(plain, told, strict=True):
        assert same == answer and instructed.endswith(f"\n{bare}") and bare.startswith("Input: ")
        assert any(instructed.startswith(wording) for wording in wordings("rule", member.rule, "test"))


def test_draws_are_functions_of_the_seed(monkeypatch):
    member = SUITE.members[5]
    assert SUITE.examples(member, "test", 5, 1) == SUITE.examples(member, "test", 9, 1)[:5]
    assert SUITE.examples(member, "test", 5, 1) != SUITE.examples(member, "test", 5, 2)
    with pytest.raises(ConfigError, match="no part 'dev'.*train, validation, test"):
        SUITE.examples(member, "dev", 1)
    assert module.SUITES["full"] == SUITE
