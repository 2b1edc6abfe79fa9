"""What the answers of a run, or of several runs, say: tables, files and one page.

1. `summarise` counts a benchmark: right over all questions asked. Answers that choose nothing and
   questions whose video could not be read are wrong, and counted apart.
2. Errors are standard errors with questions clustered by video (`longvila.evaluation.metrics`);
   each part of a table (a length, a kind of question) has its own. A part of one video has none;
   where all are right, or none, stands Wilson's interval over the videos instead.
3. Benchmarks that count several questions as one (four rotations) have that score beside.
4. `compare` takes the questions that two runs both answered: the difference of their scores has an
   error of its own, far smaller than the two runs' errors suggest.
5. `page` writes one HTML file without scripts or links.

Free text is graded elsewhere (`longvila.evaluation.judge`); what a judge gave is shown.

Cost: passes over the records.
"""

from __future__ import annotations

import csv
import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from longvila.evaluation.columns import aligned
from longvila.evaluation.judge import AxisScore
from longvila.evaluation.metrics import clustered_mean, wilson_interval
from longvila.evaluation.presets import PRESETS, duration_group, find_preset

Record = Mapping[str, Any]
#: Unreadable answers that the page shows of each benchmark.
_SHOWN = 8


@dataclass(frozen=True)
class Score:
    """Questions counted.

    Attributes:
        questions: How many.
        videos: How many videos they are about.
        right: How many are right.
        accuracy: The share.
        error: Its standard error, clustered by video; None where one video is all there is.
        unparsable: Answers that choose nothing.
        failed: Questions whose video could not be read.
    """

    questions: int
    videos: int
    right: int
    accuracy: float
    error: float | None
    unparsable: int
    failed: int


@dataclass(frozen=True)
class Summary:
    """One benchmark of one run.

    Attributes:
        benchmark: Its name.
        score: All questions; None where answers are not for this program to judge.
        answered: Questions asked.
        videos: Videos they are about.
        failed: Questions whose video could not be read.
        frames: Frames the model saw of a video, smallest and largest.
        by_duration: By length of the video.
        by_category: By kind of question.
        mean_of_categories: Mean over kinds, each counting alike.
        groups: Questions that count as one: how many, and the share of which all are right.
        official: lmms-eval's own numbers, if it computed some.
        judged: What a judge gave, by axis, if one was asked.
        unparsable: Answers that choose nothing, also where the right ones are not known.
    """

    benchmark: str
    score: Score | None
    answered: int
    videos: int
    failed: int
    frames: tuple[int, int]
    by_duration: Mapping[str, Score] = field(default_factory=dict)
    by_category: Mapping[str, Score] = field(default_factory=dict)
    mean_of_categories: float | None = None
    groups: tuple[int, float] | None = None
    official: Mapping[str, float] = field(default_factory=dict)
    judged: Mapping[str, AxisScore] = field(default_factory=dict)
    unparsable: int = 0


@dataclass(frozen=True)
class Run:
    """One run, for tables of several.

    Attributes:
        name: What the tables call it.
        summaries: Its benchmarks, by name.
        records: Its answers.
        settings: What it ran with.
    """

    name: str
    summaries: Mapping[str, Summary]
    records: Sequence[Record]
    settings: Mapping[str, Any] = field(default_factory=dict)


def score(records: Sequence[Record]) -> Score:
    """Count questions.

    Args:
        records: Answers with ``correct`` set; at least one.
    """
    values = [float(record["correct"]) for record in records]
    mean, error = clustered_mean(values, [record["video"] for record in records])
    failed = sum(bool(record["error"]) for record in records)
    return Score(
        questions=len(values),
        videos=len({record["video"] for record in records}),
        right=int(sum(values)),
        accuracy=mean,
        error=None if math.isnan(error) else error,
        unparsable=_chose_nothing(records),
        failed=failed,
    )


def _chose_nothing(records: Sequence[Record]) -> int:
    return sum(record["parsed"] is None and not record["error"] for record in records)


def summarise(
    records: Iterable[Record],
    official: Mapping[str, Mapping[str, float]] | None = None,
    judged: Mapping[str, Mapping[str, AxisScore]] | None = None,
) -> dict[str, Summary]:
    """Count the benchmarks of a run.

    Args:
        records: Its answers; those of tasks without a preset are left out.
        official: lmms-eval's numbers, by benchmark.
        judged: What a judge gave, by benchmark and axis.

    Returns:
        A summary a benchmark, in the order of the presets.
    """
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["benchmark"] is not None:
            parts[record["benchmark"]].append(record)
    order = [preset.name for preset in PRESETS if preset.name in parts]
    return {
        name: _summary(
            name, parts[name], (official or {}).get(name, {}), (judged or {}).get(name, {})
        )
        for name in order
    }


def _summary(
    name: str,
    records: Sequence[Record],
    official: Mapping[str, float],
    judged_by: Mapping[str, AxisScore],
) -> Summary:
    seen = [len(medium["frames"]) for r in records for medium in r["media"] if "frames" in medium]
    judged = [record for record in records if record["correct"] is not None]
    groups: dict[str, list[bool]] = defaultdict(list)
    for record in judged:
        if record["group"] is not None:
            groups[record["group"]].append(record["correct"])
    categories = _parts(judged, lambda record: _categories(name, record))
    return Summary(
        benchmark=name,
        score=score(judged) if judged else None,
        answered=len(records),
        videos=len({record["video"] for record in records}),
        failed=sum(bool(record["error"]) for record in records),
        frames=(min(seen), max(seen)) if seen else (0, 0),
        by_duration=_parts(judged, _durations),
        by_category=categories,
        mean_of_categories=(
            sum(part.accuracy for part in categories.values()) / len(categories)
            if categories
            else None
        ),
        groups=(len(groups), sum(map(all, groups.values())) / len(groups)) if groups else None,
        official=dict(official),
        judged=dict(judged_by),
        unparsable=_chose_nothing(records),
    )


def _categories(name: str, record: Record) -> Sequence[str]:
    """The kinds of a question; of a benchmark made of several tasks, the task."""
    category: str | Sequence[str] | None = record["category"]
    if category is None and record["task"].startswith(f"{name}_"):
        category = record["task"].removeprefix(f"{name}_")
    return () if category is None else (category,) if isinstance(category, str) else category


def _durations(record: Record) -> Sequence[str]:
    """The group of lengths of a question's video: the benchmark's, or by what was decoded."""
    named: str | None = record["duration"]
    if named is None and record["media"] and "length_s" in record["media"][0]:
        return (duration_group(record["media"][0]["length_s"]),)
    return () if named is None else (named,)


def _parts(
    records: Sequence[Record], names_of: Callable[[Record], Sequence[str]]
) -> dict[str, Score]:
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        for name in names_of(record):
            parts[name].append(record)
    return {name: score(parts[name]) for name in sorted(parts, key=_by_length)}


def _by_length(name: str) -> tuple[Any, ...]:
    """Order lengths by their numbers, the three words by what they mean, the rest by name."""
    words = {"short": 0, "medium": 1, "long": 2}
    if name in words:
        return (0, words[name], name)
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return (1, int(digits[0]), name) if digits else (2, 0, name)


def compare(first: Sequence[Record], second: Sequence[Record]) -> tuple[float, float | None, int]:
    """Compare two runs over the questions that both were asked.

    Args:
        first: Answers of one run.
        second: Answers of the other.

    Returns:
        How much better the second is, the standard error of that (clustered by video; None where
        one video is all there is), and over how many questions.

    Raises:
        ValueError: If they have no judged question in common.
    """
    before = {_identity(r): r for r in first if r["correct"] is not None}
    after = {_identity(r): r for r in second if r["correct"] is not None}
    both = [key for key in before if key in after]
    if not both:
        raise ValueError("the runs have no judged question in common")
    values = [float(after[key]["correct"]) - float(before[key]["correct"]) for key in both]
    mean, error = clustered_mean(values, [before[key]["video"] for key in both])
    return mean, None if math.isnan(error) else error, len(both)


def _identity(record: Record) -> tuple[Any, ...]:
    return record["task"], record["split"], record["doc_id"], record["repeat"]


# ---- files


def write_submission(file: Path, records: Iterable[Record]) -> int:
    """Write EgoSchema's file to hand in: an index for every question.

    Args:
        file: Where to.
        records: Answers.

    Returns:
        How many answers chose nothing; their index is 0, as the benchmark wants one.
    """
    nothing = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["q_uid", "answer"])
        for record in records:
            nothing += record["parsed"] is None
            letter = record["parsed"] or "A"
            writer.writerow([record["video"], ascii_uppercase.index(letter)])
    return nothing


def percent(part: Score | None) -> str:
    """Return a score in percent with its error; with an interval where all are right, or none.

    Args:
        part: The score, or None.
    """
    if part is None:
        return "not judged"
    if part.accuracy in (0.0, 1.0):
        # No spread, no standard error: what so many videos that agree still allow.
        agree = part.videos if part.accuracy else 0
        low, high = wilson_interval(agree, part.videos, confidence=0.95)
        return f"{100 * part.accuracy:.1f} ({100 * low:.0f} to {100 * high:.0f})"
    error = "" if part.error is None else f" ± {100 * part.error:.1f}"
    return f"{100 * part.accuracy:.1f}{error}"


def graded(given: AxisScore) -> str:
    """Return what a judge gave: the share that is right, or the mean of 0 to 5.

    Args:
        given: The score of an axis.
    """
    if given.accuracy is not None:
        return f"{100 * given.accuracy:.1f} right"
    if given.mean is None:
        return "not graded"
    return f"{given.mean:.2f} of 5" + ("" if given.error is None else f" ± {given.error:.2f}")


def table(summaries: Mapping[str, Summary]) -> str:
    """Return the text that a run ends with."""
    rows = [("benchmark", "score", "questions", "videos", "unparsable", "failed", "frames")]
    for name, one in summaries.items():
        low, high = one.frames
        rows.append(
            (
                name,
                percent(one.score),
                str(one.answered),
                str(one.videos),
                str(one.unparsable),
                str(one.failed),
                str(high) if low == high else f"{low}-{high}",
            )
        )
        for part, s in one.by_duration.items():
            counts = (str(s.questions), "", str(s.unparsable), str(s.failed), "")
            rows.append((f"  {part}", percent(s), *counts))
        for axis, given in one.judged.items():
            counted = (f"  {axis}", graded(given), str(given.graded + given.ungraded))
            rows.append((*counted, "", str(given.ungraded), "", ""))
        if one.groups is not None:
            share = f"{100 * one.groups[1]:.1f}"
            rows.append(("  all rotations right", share, str(one.groups[0]), "", "", "", ""))
    return aligned(rows)


# ---- the page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem;
color:#1b1f24;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse;margin:.8rem 0}th,td{padding:.25rem .8rem;text-align:right;
border-bottom:1px solid #e3e7eb}th:first-child,td:first-child{text-align:left}
td{white-space:nowrap}.wide{overflow-x:auto}
.track{display:inline-block;width:120px;margin-right:.5rem;text-align:left;background:#e3e7eb}
.track,.bar{height:.55rem;vertical-align:middle}.bar{display:block;background:#4c8bf5}.note{color:#59636e;font-size:.9rem}
.bad{color:#b3261e}pre{white-space:pre-wrap;background:#f3f5f7;padding:.5rem .7rem;margin:.3rem 0}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}h2,th,td{border-color:#30363d}
.note{color:#9198a1}.bad{color:#ff8a80}pre,.track{background:#161b22}}
"""


def page(runs: Sequence[Run], *, title: str = "Benchmarks") -> str:
    """Return one HTML page about runs, side by side.

    Args:
        runs: The runs; differences are against the first.
        title: What stands at its top.

    Raises:
        ValueError: If there is no run, or two have one name.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"a page needs runs of different names, got {names}")
    benchmarks = [p.name for p in PRESETS if any(p.name in run.summaries for run in runs)]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        "<p class='note'>Percent right of all questions asked, with the standard error clustered "
        "by video. Answers that choose nothing are wrong; so are questions whose video could not "
        "be read.</p>",
        _overview(runs, benchmarks),
        *(_benchmark(runs, name) for name in benchmarks),
        _settings(runs),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _bar(part: Score | None) -> str:
    if part is None:
        return "not judged"
    width = round(120 * part.accuracy)
    bar = f"<span class='bar' style='width:{width}px'></span>"
    return f"<span class='track'>{bar}</span>{percent(part)}"


def _overview(runs: Sequence[Run], benchmarks: Sequence[str]) -> str:
    rows = []
    for name in benchmarks:
        cells = [html.escape(name)]
        for run in runs:
            one = run.summaries.get(name)
            cells.append("" if one is None else _bar(one.score))
        rows.append(cells)
    return _rows(["benchmark", *(html.escape(run.name) for run in runs)], rows)


def _benchmark(runs: Sequence[Run], name: str) -> str:
    preset = find_preset(name)
    note = f" <span class='note'>{html.escape(preset.note)}</span>" if preset.note else ""
    parts = [f"<h2>{html.escape(name)}</h2><p>{note}</p>" if note else f"<h2>{name}</h2>"]
    rows = []
    have = [run for run in runs if name in run.summaries]
    for run in have:
        one = run.summaries[name]
        low, high = one.frames
        judged = one.score
        cells = [
            html.escape(run.name),
            percent(judged),
            str(one.answered),
            str(one.videos),
            _warn(one.unparsable),
            _warn(one.failed),
            str(high) if low == high else f"{low}-{high}",
            "" if one.mean_of_categories is None else f"{100 * one.mean_of_categories:.1f}",
            "" if one.groups is None else f"{100 * one.groups[1]:.1f} of {one.groups[0]}",
            html.escape(", ".join(f"{k} {v:.4g}" for k, v in one.official.items())),
            "" if run is have[0] else _difference(have[0], run, name),
        ]
        rows.append(cells)
    header = [
        "run", "score", "questions", "videos", "unparsable", "failed", "frames",
        "mean of kinds", "all rotations", "lmms-eval's", "against the first",
    ]  # fmt: skip
    keep = [i for i in range(len(header)) if i < 7 or any(row[i] for row in rows)]
    parts.append(_rows([header[i] for i in keep], [[row[i] for i in keep] for row in rows]))
    axes = list(dict.fromkeys(axis for run in have for axis in run.summaries[name].judged))
    if axes:
        by_axis = [
            [
                html.escape(axis),
                *(_judged(run.summaries[name].judged.get(axis)) for run in have),
            ]
            for axis in axes
        ]
        parts.append(_rows(["judged", *(html.escape(run.name) for run in have)], by_axis))
    for label, attribute in (("length", "by_duration"), ("kind", "by_category")):
        found = {part: None for run in have for part in getattr(run.summaries[name], attribute)}
        if found:
            parts.append(
                _rows(
                    [label, *(html.escape(run.name) for run in have)],
                    [
                        [
                            html.escape(part),
                            *(
                                _of(getattr(run.summaries[name], attribute).get(part))
                                for run in have
                            ),
                        ]
                        for part in sorted(found, key=_by_length)
                    ],
                )
            )
    parts.append(_unread(have, name))
    return "\n".join(parts)


def _judged(given: AxisScore | None) -> str:
    if given is None:
        return ""
    rest = f", {given.ungraded} ungraded" if given.ungraded else ""
    return f"{graded(given)} <span class='note'>of {given.graded + given.ungraded}{rest}</span>"


def _of(part: Score | None) -> str:
    return "" if part is None else f"{percent(part)} <span class='note'>of {part.questions}</span>"


def _warn(count: int) -> str:
    return f"<span class='bad'>{count}</span>" if count else "0"


def _difference(first: Run, second: Run, name: str) -> str:
    parts = [[r for r in run.records if r["benchmark"] == name] for run in (first, second)]
    try:
        mean, error, count = compare(*parts)
    except ValueError:
        return "no question in common"
    sure = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * mean:+.1f}{sure} <span class='note'>over {count}</span>"


def _unread(runs: Sequence[Run], name: str) -> str:
    parts = []
    for run in runs:
        bad = [r for r in run.records if r["benchmark"] == name and r["parsed"] is None]
        if not bad:
            continue
        shown = "".join(
            f"<pre>{html.escape(str(r['doc_id']))}: "
            f"{html.escape(r['error'] or r['answer'] or '(nothing)')}</pre>"
            for r in bad[:_SHOWN]
        )
        many = "s" * (len(bad) > 1)
        title = f"{html.escape(run.name)}: {len(bad)} question{many} without a readable answer"
        parts.append(f"<details><summary>{title}</summary>{shown}</details>")
    return "\n".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    if not keys:
        return ""
    rows = [
        [html.escape(key), *(html.escape(str(run.settings.get(key, ""))) for run in runs)]
        for key in keys
    ]
    return "<h2>Settings</h2>" + _rows(["", *(html.escape(run.name) for run in runs)], rows)
