"""Comparisons as text: the table of configurations, the ranking, and two runs head to head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dppo.command_line import aligned
from dppo.evaluation.comparison import METRICS, PAIR_METRICS, Line, Standings, shown_interval, shown_p
from dppo.evaluation.head_to_head import HeadToHead, Measured, MetricLine, Sample
from dppo.evaluation.ranking import ELO
from dppo.evaluation.runs import Run
from dppo.evaluation.win_rates import Interval
from dppo.terminal import cut, harmless, paragraph, shown_width

_WHISKERS = 25
_SIGNIFICANT = 0.05
_PROMPT_SHOWN, _ANSWER_SHOWN = 400, 800  # characters
_ABSENT = "-"


def table(lines: Sequence[Line], metric: str, sft: float | None) -> list[str]:
    """The comparison as text; the whiskers span the lowest to the highest bound, ``sft`` is the SFT model's value."""
    low = min(line.value.low for line in lines)
    high = max(line.value.high for line in lines)
    comparisons = sum(line.difference is not None for line in lines)
    rows = [
        [
            "configuration",
            "seeds",
            metric,
            f"{low:.3f} {'':^{_WHISKERS - 14}} {high:.3f}",
            "t over seeds",
            "difference",
            "p",
            "KL",
            "tokens",
        ]
    ]
    for line in lines:
        seeds = str(len(line.seeds)) + (f" ({len(line.diverged)} diverged)" if line.diverged else "")
        rows.append(
            [
                harmless(line.label),
                seeds,
                shown_interval(line.value),
                _whiskers(line.value, low, high),
                "" if math.isnan(line.over_seeds.low) else f"[{line.over_seeds.low:.3f}, {line.over_seeds.high:.3f}]",
                "baseline" if line.difference is None else shown_interval(line.difference, sign="+"),
                shown_p(line.p),
                f"{line.means['kl_nats_per_answer']:.2f}" if line.means else "",
                f"{line.means['tokens']:.1f}" if line.means else "",
            ]
        )
    text = aligned(rows)
    notes = [
        f"{metric}: {METRICS[metric]}; n = {lines[0].n}; 95 % intervals, bootstrap over seeds and "
        f"{'pairs' if metric in PAIR_METRICS else 'prompts'}."
    ]
    if any(len(line.seeds) > 1 for line in lines):
        notes[0] += " t over seeds: Student's interval over the seeds' means alone."
    if sft is not None:
        notes[0] += f" The SFT model: {sft:.3f}."
    if comparisons:
        several = f"{comparisons} comparison{'s' if comparisons > 1 else ''}"
        notes.append(
            f"Differences are paired, over common seeds; {several}: simultaneous 95 % intervals, Holm's p. "
            "KL to SFT in nats an answer."
        )
    if all(len(line.seeds) == 1 for line in lines):
        notes.append(
            "One seed each: the intervals hold for these trained models, not for the methods; add seed=0,1,2,3,4."
        )
    return [text[0], "-" * max(map(len, text)), *text[1:], "", *notes]


def _whiskers(found: Interval, low: float, high: float) -> str:
    """An interval as ``|--o--|`` on a scale from ``low`` to ``high``."""
    scale = (_WHISKERS - 1) / (high - low) if high > low else 0.0
    left, middle, right = (round((value - low) * scale) for value in (found.low, found.value, found.high))
    cells = [" "] * _WHISKERS
    cells[left : right + 1] = "-" * (right + 1 - left)
    cells[left] = cells[right] = "|"
    cells[middle] = "o"
    return "".join(cells)


def ranking_table(found: Standings, width: int) -> list[str]:
    """Ratings from best to worst, and who beats whom how often; ``width`` in columns."""
    ranking, order = found.ranking, found.ranking.order
    low, high = float(ranking.rating_low.min()), float(ranking.rating_high.max())
    label_width = max(12, min(40, width - 62))
    labels = [cut(harmless(label), label_width) for label in found.labels]
    rows = [["", "configuration", "seeds", "rating, nats", "Elo", "beats", "loses to"]]
    if width >= 130:
        rows[0].insert(4, f"{low:+.2f} {'':^{_WHISKERS - 12}} {high:+.2f}")
    for place, one in enumerate(order, start=1):
        told_apart = ranking.p_holm[one] < _SIGNIFICANT
        rating = Interval(*(float(bound[one]) for bound in (ranking.rating, ranking.rating_low, ranking.rating_high)))
        lost = f" ({len(found.diverged[one])} diverged)" if found.diverged[one] else ""
        shared = found.sft and one == 0
        row = [
            f"{place}",
            labels[one],
            "" if shared else f"{ranking.common_seeds[one, one]}{lost}",
            "0 by definition" if one == ranking.anchor else shown_interval(rating, sign="+"),
            f"{rating.value * ELO:+.0f}",
            f"{int((told_apart & (ranking.rate[one] > 0.5)).sum())}",
            f"{int((told_apart & (ranking.rate[one] < 0.5)).sum())}",
        ]
        if width >= 130:
            row.insert(4, _whiskers(rating, low, high))
        rows.append(row)
    text = aligned(rows)
    lines = [text[0], "-" * max(map(shown_width, text)), *text[1:]]
    for place, one in enumerate(order, start=1):
        if labels[one] != harmless(found.labels[one]):
            lines += paragraph(found.labels[one], first=f"{place}: ", width=width, limit=1000)
    lines += ["", *_matrix(found, labels, width)]
    comparisons = len(order) * (len(order) - 1) // 2
    of = "" if found.n_prompts == found.most_prompts else f" that all runs answered (of up to {found.most_prompts})"
    notes = [
        f"n = {found.n_prompts} prompts{of}; {ranking.n_bootstrap} resamples of seeds and prompts; 95 % intervals. "
        f"* and beats, loses to: p < {_SIGNIFICANT} by Holm over {comparisons} comparison{'s' * (comparisons > 1)}.",
        "Rating: Bradley-Terry on all of the matrix, "
        + ("0 = SFT" if found.sft else "0 = the baseline, since the runs have different SFT models")
        + "; a lead of 1 nat wins 73 % of the points, 1 nat = 174 Elo.",
    ]
    seeds = ranking.common_seeds
    if not (seeds > 0).all():
        notes.append("Where two configurations have no seed in common all pairs of their seeds were compared.")
    if ranking.separated:
        notes.append(
            "Some never lost a point to some others: the data set no bound to how much better they are, the rating "
            "comes from one tied prompt that every pair is given."
        )
    if ranking.least_p > _SIGNIFICANT:
        notes.append(
            f"{ranking.n_bootstrap} resamples can't tell anything apart over {comparisons} comparisons: add "
            f"--n-bootstrap {math.ceil(2 * comparisons / _SIGNIFICANT / 1000) * 1000}"
        )
    if (np.diag(seeds) == 1).all():
        notes.append(_ONE_SEED)
    return [*lines, *_notes(notes, width)]


def _matrix(found: Standings, labels: Sequence[str], width: int) -> list[str]:
    """The win matrix in percent, best first, each rate above its interval; in blocks of as many columns as fit."""
    ranking, order = found.ranking, found.ranking.order
    names = [f"{place:>2} {cut(labels[one], 28)}" for place, one in enumerate(order, start=1)]
    left, cell = max(map(shown_width, names)), 8
    per_block = max(1, (width - left) // cell)
    lines = ["points of the row against the column, % (a win 1, a tie 1/2)"]
    for start in range(0, len(order), per_block):
        block = order[start : start + per_block]
        lines.append(" " * left + "".join(f"{start + n:>{cell - 1}} " for n in range(1, len(block) + 1)).rstrip())
        for name, one in zip(names, order, strict=True):
            rates, bounds = "", ""
            for other in block:
                if one == other:
                    rates, bounds = rates + f"{'.':>{cell - 1}} ", bounds + " " * cell
                    continue
                star = "*" if ranking.p_holm[one, other] < _SIGNIFICANT else " "
                rates += f"{100 * ranking.rate[one, other]:>{cell - 1}.1f}{star}"
                bounds += f"{f'{100 * ranking.low[one, other]:.0f}-{100 * ranking.high[one, other]:.0f}':>{cell - 1}} "
            lines += [name + " " * (left - shown_width(name)) + rates.rstrip(), " " * left + bounds.rstrip()]
        lines.append("")
    return lines


_ONE_SEED = "One seed each: the intervals hold for these trained models, not for the methods; add seed=0,1,2,3,4."


def head_to_head_text(first: Run, second: Run, found: HeadToHead, width: int) -> list[str]:
    """Two runs as a page of ``width`` columns: settings, metrics, who wins, answers."""
    lines = []
    for name, run in (("A", first), ("B", second)):
        lines += paragraph(" ".join(run.words) or "defaults", first=f"{name}  ", width=width, limit=2000)
        lines += paragraph(str(run.path), first="   ", width=width, limit=2000)
        if run.status != "complete":
            what = "; counts as losing every prompt, has no answers" if run.diverged else "; has no numbers to compare"
            lines += paragraph(f"{run.ending}{what}", first="   ", width=width, limit=2000)
    lines += ["", *_settings_text(found, width)]
    if found.metrics:
        lines += ["", *_metrics_text(found.metrics, width)]
    notes = list(found.notes)
    if found.metrics:
        told = "95 % intervals, over prompts or pairs. "
        if found.n_tests:
            tests = f"{found.n_tests} test{'s' * (found.n_tests > 1)}"
            told += f"A - B is paired, its intervals are simultaneous and p is Holm's, over the {tests} of this page. "
        notes.append(f"{told}Seconds are those of the run: what the cache had took none.")
    if duel := found.duel:
        lines += [
            "",
            "A's answers against B's",
            f"  A's win rate (ties 1/2)  {shown_interval(duel.rate)}, n = {duel.n}, p {shown_p(duel.p)} (against 1/2)",
            f"  wins / ties / losses     {duel.wins} / {duel.ties} / {duel.losses}",
        ]
    if first.rewards and second.rewards:
        notes.append(_ONE_SEED.replace("seed each", "run each"))
    if notes:
        lines += ["", *_notes(notes, width)]
    for sample in found.samples:
        lines += ["", *_sample_text(sample, width)]
    return lines


def _settings_text(found: HeadToHead, width: int) -> list[str]:
    if not found.settings:
        return ["no setting differs that could change a result"]
    room = max(12, (width - 36) // 2)
    rows = [["setting", "A", "B"]]
    for one in found.settings:
        values = [_ABSENT if value is None else cut(harmless(value), room) for value in (one.first, one.second)]
        rows.append([cut(harmless(one.key), 32), *values])
    return aligned(rows)


def _metrics_text(metrics: Sequence[MetricLine], width: int) -> list[str]:
    """A row a metric; where there is no room for it, intervals in a second row below the values."""
    rows = [["metric", "A", "B", "A - B", "p", "n"]]
    for one in metrics:
        difference = "" if one.difference is None else shown_interval(one.difference, sign="+")
        rows.append([one.name, _measured(one.first), _measured(one.second), difference, shown_p(one.p), _count(one)])
    paired = any(one.difference is not None for one in metrics)
    wide = aligned(rows if paired else [[*row[:3], row[5]] for row in rows])
    if max(map(len, wide)) <= width:
        return [wide[0], "-" * max(map(len, wide)), *wide[1:]]
    split = [rows[0][:4]]
    for name, *cells, p, n in rows[1:]:
        values, bounds = zip(*(cell.split(" ", 1) if " " in cell else (cell, "") for cell in cells), strict=True)
        told = f"  p {p}" if p else ""
        split += [[name, *values[:2], values[2] + told], [f"  n {n}" if n else "", *bounds]]
    narrow = aligned([row for row in split if any(row)])
    return [narrow[0], "-" * max(map(len, narrow)), *narrow[1:]]


def _measured(one: Measured | None) -> str:
    if one is None:
        return _ABSENT
    if one.low is None or one.high is None:
        return f"{one.value:.3f}"
    return shown_interval(Interval(one.value, one.low, one.high))


def _count(one: MetricLine) -> str:
    """How many were measured: of both, else of each, and how many of them are paired."""
    counts = [side.n for side in (one.first, one.second) if side is not None and side.n is not None]
    if not counts:
        return ""
    shown = f"{counts[0]}" if len(set(counts)) == 1 else "/".join(map(str, counts))
    return shown if one.difference is None or {*counts} == {one.n_common} else f"{shown}, {one.n_common} paired"


def _sample_text(sample: Sample, width: int) -> list[str]:
    title = (
        f"A is better by {sample.gain:.3f}"
        if sample.gain > 0
        else f"B is better by {-sample.gain:.3f}"
        if sample.gain < 0
        else "equal rewards"
    )
    head = f"{title}   {harmless(sample.prompt_id)}"
    lines = [head, "-" * min(width, shown_width(head))]
    lines += paragraph(sample.prompt, first="prompt         ", width=width, limit=_PROMPT_SHOWN)
    for name, reward, answer in (
        ("A", sample.first_reward, sample.first),
        ("B", sample.second_reward, sample.second),
        ("SFT", sample.reference_reward, sample.reference),
    ):
        lines += paragraph(answer, first=f"{name:<4}{reward:>+9.3f}  ", width=width, limit=_ANSWER_SHOWN)
    return lines


def _notes(notes: Sequence[str], width: int) -> list[str]:
    return [line for note in notes for line in paragraph(note, first="", width=width, limit=10_000)]
