"""The page stands alone, shows every number, and treats every name as text."""

import dataclasses
import html
import json
import re

import pytest

from Gpt.report.figures import table
from Gpt.report.html import flatten_config, write_report
from Gpt.report.style import save
from Gpt.report.text import format_interval

CONFIG = {"seed": 3, "zoo": {"runs": 1024, "transform": {}}, "task": "<b>digits</b>"}


@pytest.fixture
def metrics_path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 5, "time": 0.0, "train/loss": 0.625}, {"step": 9, "time": 1.0, "validation/alignment": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write(results, metrics_path, figures=None):
    path = write_report(metrics_path.parent, results, CONFIG, metrics_path, figures or {})
    assert path == metrics_path.parent / "report.html"
    return path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(synthetic_results, saved_figures, metrics_path):
    page = write(synthetic_results, metrics_path, saved_figures)
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', page)) == len(saved_figures) == 8
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?://", page)
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []


def test_every_number_of_the_table_appears(synthetic_results, metrics_path):
    page = html.unescape(write(synthetic_results, metrics_path))
    for row in synthetic_results.table:
        assert row.name in page and row.note in page
        for interval in row.metrics.values():
            for number in format_interval(interval):
                assert number in page
    assert "1,120" in page and "12.3 ms" in page and "3.40 GFLOP" in page and "81.0 TFLOP" in page
    for row in synthetic_results.novelty:
        assert row.name in page and f"{row.novel_and_good:.0%}" in page
    assert "from 740 networks on" in page
    assert "All numbers of this page are synthetic." in page


def test_hostile_names_stay_text(synthetic_results, metrics_path, tmp_path):
    attack = '"><script>alert(1)</script>'
    row = dataclasses.replace(synthetic_results.table[0], name=attack, note=attack)
    results = dataclasses.replace(synthetic_results, task=attack, table=[row], notes=[attack])
    page = write(results, metrics_path, {attack: save(table(results), tmp_path / "table.png")})
    assert "<script" not in page
    assert page.count(html.escape("<script>alert(1)</script>")) >= 5
    assert "<b>digits</b>" not in page


def test_the_page_opens_with_the_verdict_and_ends_with_config_and_versions(synthetic_results, metrics_path):
    page = html.unescape(write(synthetic_results, metrics_path))
    assert page.index("is worse than returning a stored network") < page.index("<table>")
    assert "zoo.runs" in page and "1024" in page
    assert "torch" in page and "logical cores" in page
    assert "train/loss (step 5)" in page and "0.6250" in page


def test_an_evaluation_with_a_table_only_still_has_a_page(synthetic_results, metrics_path):
    bare = dataclasses.replace(
        synthetic_results, curves=[], recursive=[], optimisers=[], novelty=[], costs=None, notes=[]
    )
    page = write(bare, metrics_path)
    assert "<h2>Novelty" not in page and "<h2>Costs" not in page and "<h2>Figures" not in page


def test_configuration_is_flattened_to_dotted_keys():
    assert flatten_config({"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [1, 2]}) == [
        ("a.b", "1"),
        ("a.c.d", "None"),
        ("e", "{}"),
        ("f", "[1, 2]"),
    ]
