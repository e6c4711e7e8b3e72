"""What adapters carry out, read off replies whose origin is known."""

import pytest

from Gpt.adapters.suite import RULES, SUITES, WORD_RULES, Member, formatted, items_of
from Gpt.evaluation.adapter_confusion import carried_out, confusions

SUITE = SUITES["full"]


def replies_of(done: Member, prompts):
    return [f" {formatted(RULES[done.rule](items_of(prompt)), done.format)}\n" for prompt in prompts]


def prompts_for(member, count=32):
    return [prompt for prompt, _ in SUITE.examples(member, "test", count)]


@pytest.mark.parametrize(("asked", "rules"), [("first", WORD_RULES), ("maximum", RULES)])
def test_every_rule_and_format_is_recognised_in_place_of_another(asked, rules):
    """What is asked for one thing and does another; the rules of words can be carried out on numbers too."""
    wanted = Member(asked, "plain")
    prompts = prompts_for(wanted)
    for done in SUITE.members:
        if done.rule in rules:
            assert carried_out(SUITE, wanted, prompts, replies_of(done, prompts)) == done


def test_most_replies_decide_and_no_half_decides_nothing():
    wanted = Member("last", "square")
    prompts = prompts_for(wanted, 8)
    right, other = (replies_of(Member(rule, form), prompts) for rule, form in (("last", "square"), ("reverse", "json")))
    assert carried_out(SUITE, wanted, prompts, right[:5] + other[5:]) == wanted
    assert carried_out(SUITE, wanted, prompts, right[:3] + other[3:]) == Member("reverse", "json")
    assert carried_out(SUITE, wanted, prompts, right[:4] + [" ?"] * 4) == Member("none", "none")
    assert carried_out(SUITE, wanted, prompts, [""] * 8) == Member("none", "none")


def test_tables_count_tasks():
    wanted = [Member("first", "plain"), Member("first", "json"), Member("last", "plain")]
    done = [Member("first", "json"), Member("sort", "json"), Member("last", "plain")]
    prompts = [prompts_for(member, 8) for member in wanted]
    written = [replies_of(member, row) for member, row in zip(done, prompts, strict=True)]
    written[2] = ["no idea"] * 8
    rules, formats = confusions(SUITE, wanted, prompts, written, "mine, s2")
    assert (rules.name, formats.name) == ("mine, s2: rule", "mine, s2: format")
    assert rules.wanted == ["first", "last"] and rules.found == ["first", "last", "sort", "none"]
    assert rules.counts == [[1, 0, 1, 0], [0, 0, 0, 1]]
    assert formats.wanted == ["plain", "json"] and formats.found == ["plain", "json", "none"]
    assert formats.counts == [[0, 1, 1], [0, 1, 0]]
