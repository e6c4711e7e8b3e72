"""The figure of confusions shows every count in its place."""

from Gpt.evaluation.results import Confusion, Results
from Gpt.report.confusion import confusions

TABLES = [
    Confusion("s2: rule", ["first", "drop_last"], ["first", "drop_last", "sort", "none"], [[3, 0, 1, 0], [0, 0, 0, 2]]),
    Confusion("s2: format", ["plain"], ["plain", "none"], [[6, 0]]),
    Confusion("s3: rule", ["last"], ["none"], [[5]]),
]


def test_counts_stand_where_row_and_column_meet():
    figure = confusions(Results("task", "s2_exact", False, [], confusions=TABLES))
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title(loc="left") for axis in drawn] == [table.name for table in TABLES]
    for axis, table in zip(drawn, TABLES, strict=True):
        found = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
        expected = {(i, j): str(n) for i, row in enumerate(table.counts) for j, n in enumerate(row) if n}
        assert found == expected
        assert [label.get_text() for label in axis.get_xticklabels()] == [n.replace("_", " ") for n in table.found]
        outlined = {(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in axis.patches}
        right = {(i, table.found.index(name)) for i, name in enumerate(table.wanted) if name in table.found}
        assert outlined == right
