"""Results in words and plain text: numbers with their intervals, verdicts, the terminal table."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.evaluation.results import Interval, Novelty, Results, Row

PERCENTAGES = ("error", "exact", "format", "content", "closed", "recognised")


def metric_label(metric: str) -> str:
    """`test_error` -> `test error (%)`; a metric's split and name as words, with its unit."""
    words = metric.replace("_", " ")
    return f"{words} (%)" if _in_percent(metric) else f"{words} (points)" if metric.endswith("lead") else words


def column_label(metric: str, results: Results) -> str:
    """The same of a column of a table: a lead has points where the main metric is in percent."""
    label = metric_label(metric)
    return label if _in_percent(results.metric) else label.removesuffix(" (points)")


def _in_percent(metric: str) -> bool:
    return metric.rpartition("_")[2] in PERCENTAGES


def format_number(value: float, digits: int = 4) -> str:
    """`digits` significant digits, without an exponent from 1e-4 to 1e6."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def format_interval(interval: Interval) -> tuple[str, str]:
    """Mean and `low … high`, both with the decimals that give the half width two significant digits, within reason."""
    half_width = (interval.high - interval.low) / 2
    if not (math.isfinite(half_width) and half_width > 0) or abs(interval.mean) >= 1e6:
        return format_number(interval.mean), f"{format_number(interval.low)} … {format_number(interval.high)}"
    most = 4 if abs(interval.mean) >= 0.1 else 8
    decimals = min(most, max(0, 1 - math.floor(math.log10(half_width))))
    return f"{interval.mean:.{decimals}f}", f"{interval.low:.{decimals}f} … {interval.high:.{decimals}f}"


def format_seconds(seconds: float | None) -> str:
    """A duration with a unit that keeps it between 1 and 1,000 where possible."""
    if seconds is None:
        return ""
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36_000.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{format_number(seconds * scale, 3)} {unit}"
    return f"{format_number(seconds / 3600, 3)} h"


def format_flops(flops: float | None) -> str:
    """A number of floating-point operations with an SI prefix."""
    if flops is None:
        return ""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= scale:
            return f"{format_number(flops / scale, 3)} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def metric_columns(results: Results) -> list[str]:
    """Every metric that some row of the table carries, the one the evaluation is about first, leads in it next."""
    carried = dict.fromkeys(name for row in results.table for name in row.metrics)
    first = [results.metric, *(name for name in lead_names(results) if name in carried)]
    return list(dict.fromkeys([*first, *carried]))


def lead_names(results: Results) -> tuple[str, str]:
    """What the generator's lead in the main metric is called: of one set of items, or of the first of several splits,
    such as `s2_lead` beside `s2_exact`."""
    return "lead", f"{results.metric.partition('_')[0]}_lead"


def find_row(results: Results, kind: str, name: str = "") -> Row | None:
    """The first row of `kind` whose name contains `name` (any case) and that carries the main metric."""
    for row in results.table:
        if row.kind == kind and name in row.name.lower() and results.metric in row.metrics:
            return row
    return None


def best_row(results: Results, kind: str) -> Row | None:
    """The row of `kind` with the best mean of the main metric, among those whose mean is finite."""
    means = [(row.metrics[results.metric].mean, row) for row in results.table if results.metric in row.metrics]
    finite = [(mean, row) for mean, row in means if row.kind == kind and math.isfinite(mean)]
    best = (min if results.minimize else max)(finite, key=lambda scored: scored[0], default=None)
    return best[1] if best else None


def comparison_rows(results: Results) -> list[Row]:
    """What optimisers are drawn beside: the generator's first row, the references, the baselines; finite means only."""
    generator = find_row(results, "generator")
    rows = [row for row in results.table if row is generator or row.kind in ("reference", "baseline")]
    return [r for r in rows if results.metric in r.metrics and math.isfinite(r.metrics[results.metric].mean)]


def side_by_side_rows(results: Results) -> list[Row]:
    """Generation, one update, ordinary training and the best stored network: the first row of each run's generator,
    the references, retrieval; finite means only. Nothing where neither another run nor a training curve is there."""
    if not results.training_curves and not any(row.run for row in results.table):
        return []
    rows = [find_row(results, "baseline", "retrieval"), *(row for row in results.table if row.kind == "reference")]
    first: dict[str, Row] = {}
    for row in results.table:
        if row.kind == "generator":
            first.setdefault(row.run, row)
    found = [row for row in (*first.values(), *rows) if row is not None and results.metric in row.metrics]
    return [row for row in found if math.isfinite(row.metrics[results.metric].mean)]


def summarise(results: Results) -> str:
    """One paragraph that says what the numbers say: against retrieval and training, alignment, novelty, cost."""
    generator = find_row(results, "generator")
    if generator is None:
        return f"This evaluation of {results.task} holds no generated network, so it says nothing about a generator."
    scored = generator.metrics[results.metric]
    reached = f"On {results.task}, “{generator.name}” reaches a {metric_label(results.metric)} of"
    if scored.count == 1:
        return f"{reached} {format_number(scored.mean)}, measured once: too little to compare with anything."
    sentences = [f"{reached} {_with_interval(scored)}, the mean and its 95 % bootstrap interval (n = {scored.count})."]
    retrieval = find_row(results, "baseline", "retrieval")
    rival, training = best_row(results, "baseline"), find_row(results, "reference")
    sentences.append(
        _verdict("returning a stored network (retrieval)", scored, retrieval, results)
        if retrieval
        else "Retrieval was not measured, so whether the generator beats a stored network is open."
    )
    if rival is not None and rival is not retrieval:
        sentences.append(_verdict(f"the best way without a generator, “{rival.name}”", scored, rival, results))
    sentences.append(
        _verdict(f"“{training.name}”", scored, training, results) if training else "Ordinary training was not measured."
    )
    sentences += _alignment_sentences(results) + _novelty_sentences(results) + _cost_sentences(results)
    return " ".join(sentences)


def print_table(results: Results) -> str:
    """The table as plain text, at most 120 columns wide; what does not fit is left out: notes, metrics from the fourth
    on, compute, the other side metrics."""
    metrics, costs = metric_columns(results), ["updates", "time", "compute"]
    while True:
        header = ["name", "kind", *metrics, *costs]
        lines = [header, *(_cells(row, metrics)[: len(header)] for row in results.table)]
        widths = [min(42, max(len(line[i]) for line in lines)) for i in range(len(header))]
        free = 120 - sum(widths) - 2 * len(widths)
        if free >= 0 or len(metrics) == 1:
            break
        (metrics if len(metrics) > 3 or "compute" not in costs else costs).pop()
    notes = ["note", *(row.note for row in results.table)] if free >= 16 else [""] * len(lines)
    rendered = []
    for line, note in zip(lines, notes, strict=True):
        cells = [_clip(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)]
        rendered.append("  ".join([*cells, _clip(note, free)]).rstrip())
    rule = "─" * max(len(line) for line in rendered)
    return "\n".join([f"{results.task}: {metric_label(results.metric)}", rule, rendered[0], rule, *rendered[1:], rule])


def networks_table(scores: dict[str, Float[Tensor, " n"]]) -> str:
    """One line for each network, then the means."""
    values = torch.stack(list(scores.values()), 1)
    widths = [max(10, len(name)) for name in scores]
    lines = [("", list(scores))]
    lines += [(f"network-{i:03d}", [f"{value:.4g}" for value in row]) for i, row in enumerate(values.tolist())]
    lines += [("mean", [f"{value:.4g}" for value in values.mean(0).tolist()])]
    return "\n".join(
        f"{label:11s}"
        + "".join(f"  {cell.replace('_', ' '):>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in lines
    )


def _cells(row: Row, metrics: list[str]) -> list[str]:
    scores = [_plus_minus(row.metrics[name]) if name in row.metrics else "" for name in metrics]
    updates = "" if row.updates is None else f"{row.updates:,}"
    return [row.name, row.kind, *scores, updates, format_seconds(row.seconds), format_flops(row.flops)]


def _plus_minus(interval: Interval) -> str:
    mean, _ = format_interval(interval)
    if interval.count == 1:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {(interval.high - interval.low) / 2:.{decimals}f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _with_interval(interval: Interval) -> str:
    mean, bounds = format_interval(interval)
    return f"{mean} ({bounds})"


def _verdict(name: str, scored: Interval, row: Row, results: Results) -> str:
    """Better or worse only where the lead, or else two intervals that do not touch, says so; a mean that is not finite
    beats nothing."""
    other = row.metrics[results.metric]
    lead = next((row.metrics[name] for name in lead_names(results) if name in row.metrics), None)
    below, above = scored.high < other.low, scored.low > other.high
    better, worse = (lead.low > 0, lead.high < 0) if lead else (below, above) if results.minimize else (above, below)
    diverged = math.isfinite(other.mean) and not math.isfinite(scored.mean)
    points = " points" if _in_percent(results.metric) else ""
    if better or worse or diverged:
        verdict = "beats" if better and not diverged else "is worse than"
        margin = f", by {_with_interval(_absolute(lead))}{points} one by one" if lead else ""
        return f"It {verdict} {name}, which reaches {_with_interval(other)}{margin}."
    reason = f"one by one it leads by {_with_interval(lead)}{points}" if lead else "the intervals overlap"
    return f"It cannot be told from {name}: {_with_interval(other)}, and {reason}."


def _absolute(lead: Interval) -> Interval:
    return lead if lead.mean >= 0 else Interval(-lead.mean, -lead.high, -lead.low, lead.count)


def _alignment_sentences(results: Results) -> list[str]:
    own = [curve for curve in results.curves if curve.kind == "generator"]
    if not own:
        return []
    followed = next((curve for curve in own if "attainable" in curve.name), own[0])  # what the controls were asked
    sentences = [f"Prompt alignment (mean R²; {followed.name}) is {_with_interval(followed.alignment)}."]
    for curve in results.curves:
        if "shuffle" in curve.name.lower():
            drops = curve.alignment.high < followed.alignment.low
            meaning = "so the generator does follow its prompt" if drops else "so it is not shown to follow its prompt"
            sentences.append(f"With shuffled prompts it is {_with_interval(curve.alignment)}, {meaning}.")
        elif "updates" in curve.name:
            sentences.append(f"After {curve.name} prompts, it is {_with_interval(curve.alignment)}.")
        elif "retrieval" in curve.name.lower():
            sentences.append(f"Retrieval's is {_with_interval(curve.alignment)}.")
    return sentences


def _novelty_sentences(results: Results) -> list[str]:
    generated = next((n for n in results.novelty if n.kind == "generator"), None)
    if generated is None:
        return []
    ratio = format_number(generated.distance_ratio, 3)
    return [
        f"The generator's networks lie {ratio} times as far from the nearest training network as training networks lie "
        f"from each other, and {generated.novel_and_good:.0%} of them are both novel and good; "
        f"data-copying score Z_U {format_number(generated.copying_z, 3)} (far below zero means copies). "
        f"{_diversity_sentence(generated)}".rstrip()
    ]


def _diversity_sentence(generated: Novelty) -> str:
    if generated.diversity is None:
        return ""
    return f"Among themselves they are {format_number(generated.diversity, 3)} times as far apart as trained networks."


def _cost_sentences(results: Results) -> list[str]:
    if results.costs is None:
        return []
    if not results.costs.train_seconds:
        return ["What training a network takes is not known here, so neither is when generation pays off."]
    if not results.costs.generator_seconds:
        return ["What training the generator took is not known here, so neither is when generation pays off."]
    if results.costs.break_even is None:
        verdict = "it never pays off in wall-clock on this machine"
    else:
        verdict = f"it pays off in wall-clock from {math.ceil(results.costs.break_even):,} networks on"
    return [f"With the zoo and the generator's training counted in, {verdict}."]
