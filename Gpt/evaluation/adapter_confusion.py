"""Which rule and which format adapters carry out, when they should carry out which.

Unlike the scores, this is judged on free greedy decoding: an adapter that follows another rule goes its own way.
"""

from collections import Counter
from collections.abc import Sequence

from Gpt.adapters.suite import Member, RuleSuite
from Gpt.evaluation.results import Confusion

OTHER = "none"


def confusions(
    suite: RuleSuite,
    members: Sequence[Member],
    prompts: Sequence[Sequence[str]],
    replies: Sequence[Sequence[str]],
    title: str,
) -> list[Confusion]:
    """Rules against rules and formats against formats, a count of tasks each.

    Args:
        prompts, replies: bare inputs of every task, and what its adapter wrote after each.
        title: what the tables are called, before "rule" and "format".
    """
    found = [carried_out(suite, *of_task) for of_task in zip(members, prompts, replies, strict=True)]
    rules = [(member.rule, other.rule) for member, other in zip(members, found, strict=True)]
    formats = [(member.format, other.format) for member, other in zip(members, found, strict=True)]
    return [_table(f"{title}: rule", suite.rules, rules), _table(f"{title}: format", suite.formats, formats)]


def carried_out(suite: RuleSuite, wanted: Member, prompts: Sequence[str], replies: Sequence[str]) -> Member:
    """The rule and the format that more than half of an adapter's replies follow; "none" where there is none.

    Several rules may agree on an input. The rule of most replies counts, the wanted one where another has as many.
    """
    rules: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    for prompt, reply in zip(prompts, replies, strict=True):
        followed, form = suite.recognise(prompt, reply)
        rules.update(followed)
        formats.update([form] if form else [])
    return Member(_majority(rules, wanted.rule, len(replies)), _majority(formats, wanted.format, len(replies)))


def _majority(counts: Counter[str], wanted: str, total: int) -> str:
    most = max(counts, key=lambda name: (counts[name], name == wanted), default=OTHER)
    return most if 2 * counts[most] > total else OTHER


def _table(title: str, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Confusion:
    wanted, found = ({pair[i] for pair in pairs} for i in (0, 1))
    rows = [name for name in names if name in wanted]
    columns = [*(name for name in names if name in wanted | found), OTHER]
    counts = Counter(pairs)
    return Confusion(title, rows, columns, [[counts[row, column] for column in columns] for row in rows])
