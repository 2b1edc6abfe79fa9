"""The folder of a run: its settings, its answers in order, its scores and its page.

    run.json                what ran: model, frames, seed, versions
    samples.jsonl           every answer, in order, with frames, prompt, parse and grade
    results.json            scores, and lmms-eval's own
    report.html, report.txt the page, and its tables as text
    NAME_submission.csv     for benchmarks that keep their answers to themselves
    judged/                 grades of free answers, where a judge was asked (`longvila judge`)

Everything but the versions in ``run.json`` follows from model, data, settings and seed: two runs
leave equal files. Needs no lmms-eval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longvila.errors import LongVILAError
from longvila.evaluation.answers import Record, read_lines, write_json, write_lines
from longvila.evaluation.judge import AxisScore, axis_scores
from longvila.evaluation.presets import preset_of_task
from longvila.evaluation.report import Run, Summary, page, summarise, table, write_submission


def begin(out: Path, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write what a run depends on, before it begins.

    Args:
        out: Its folder.
        settings: What answers depend on.
        versions: Of the libraries.
    """
    write_json(out / "run.json", {**settings, "versions": dict(versions)})


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder whose answers another run gave.

    Args:
        out: The folder.
        settings: What answers depend on.

    Raises:
        LongVILAError: If it holds a run with other settings.
    """
    file = out / "run.json"
    # A run that ended before its first answer leaves nothing to mix with.
    if not file.exists() or not any(f.stat().st_size for f in (out / "answers").glob("*.jsonl")):
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), dict(settings)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = "; ".join(f"{n} was {before.get(n)!r}, is {now[n]!r}" for n in changed)
        raise LongVILAError(f"{out} holds a run with other settings ({told}): give another folder")


def write_results(
    out: Path, records: Sequence[Mapping[str, Any]], official: Mapping[str, Mapping[str, float]]
) -> dict[str, Summary]:
    """Write what a run comes to.

    Args:
        out: Its folder.
        records: Its answers.
        official: lmms-eval's numbers by benchmark.

    Returns:
        A summary a benchmark.
    """
    ordered = sorted(records, key=lambda r: (r["task"], r["split"], r["doc_id"], r["repeat"]))
    write_lines(out / "samples.jsonl", ordered)
    summaries = summarise(ordered, official, judged_scores(out))
    write_json(out / "results.json", {name: asdict(one) for name, one in summaries.items()})
    for preset_name in summaries:
        mine = [record for record in ordered if record["benchmark"] == preset_name]
        if any(record["gold"] is None for record in mine):
            write_submission(out / f"{preset_name}_submission.csv", mine)
    (out / "report.html").write_text(page([read_run(out)], title=out.name), encoding="utf-8")
    (out / "report.txt").write_text(table(summaries) + "\n", encoding="utf-8")
    return summaries


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Args:
        folder: Its folder.

    Raises:
        LongVILAError: If no run was finished there.
    """
    file = folder / "samples.jsonl"
    if not file.exists():
        raise LongVILAError(f"{folder} holds no finished run: there is no samples.jsonl")
    records = read_lines(file)
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    settings.update(settings.pop("versions", {}))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    official = {name: one["official"] for name, one in results.items()}
    summaries = summarise(records, official, judged_scores(folder))
    return Run(folder.name, summaries, records, settings)


def judged_scores(folder: Path) -> dict[str, dict[str, AxisScore]]:
    """Return what a judge gave to a run, by benchmark and axis.

    Args:
        folder: The run's.
    """
    parts: dict[str, list[Record]] = {}
    for record in read_lines(folder / "judged" / "judged.jsonl"):
        preset = preset_of_task(record["doc_id"].partition("/")[0])
        if preset is not None:
            parts.setdefault(preset.name, []).append(record)
    return {name: axis_scores(records) for name, records in parts.items()}


def refresh(folder: Path) -> dict[str, Summary]:
    """Write the scores and the page of a finished run again, with what a judge gave since.

    Args:
        folder: The run's.

    Returns:
        A summary a benchmark.
    """
    run = read_run(folder)
    official = {name: one.official for name, one in run.summaries.items()}
    return write_results(folder, run.records, official)
