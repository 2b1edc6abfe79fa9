"""Have free answers graded by a judge: an endpoint, a local model, or a recording.

Examples:
    longvila judge runs/mine --endpoint http://localhost:8000/v1 --judge-model qwen3
    longvila judge answers.jsonl --endpoint https://api.openai.com/v1 --judge-model gpt-4o-mini \\
        --key-env OPENAI_API_KEY --axes correctness,detail,context --out graded
    longvila judge runs/mine --local CHECKPOINT
    longvila judge answers.jsonl --replay graded/judged.jsonl --out again

Answers are the folder of a run of longvila eval, whose benchmarks say by what they are graded, or a
file of objects with question, answer and prediction. Axes: correctness, detail, context, temporal,
consistency (0 to 5 each), and match (right or wrong). The same command again goes on where it was.
Without --out the grades go into the run's folder, and its page shows them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.evaluation.answers import Answers, write_lines
from longvila.evaluation.judge import AxisScore, axis_scores, grade_all, read_items
from longvila.evaluation.judge_models import EndpointJudge, Judge, LocalJudge, Recording
from longvila.evaluation.runs import refresh


@dataclass(frozen=True)
class Options:
    """Have free answers graded by a judge."""

    answers: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or a .jsonl or .json file of answers."""
    out: Path | None = None
    """Folder of the grades; begun again, the command goes on there. A run's own, if absent."""
    axes: str = "correctness,detail,context,temporal"
    """What to grade by, separated by commas, where the answers do not say."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint, up to and with the version."""
    judge_model: str | None = None
    """Name of the model at the endpoint."""
    key_env: str | None = None
    """Environment variable that holds the endpoint's key."""
    local: str | None = None
    """Checkpoint of a model to judge with here."""
    replay: Path | None = None
    """Grades of an earlier run whose replies are used again."""
    prompts: Path | None = None
    """Folder of prompts that replace the packaged ones (AXIS.txt)."""
    attempts: int = 3
    """Replies to ask for, at most, until one has the form."""
    parallel: int = 1
    """Requests at once."""
    device: str = "cpu"
    """Where a local judge runs."""
    limit: int | None = None
    """Answers to grade, for a trial; all if absent."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status: 0 also if some answers stay ungraded, which the table says.
    """
    options = parse(Options, argv, "judge", __doc__)
    if options.attempts < 1 or options.parallel < 1:
        raise LongVILAError("--attempts and --parallel must be at least 1")
    axes = tuple(axis.strip() for axis in options.axes.split(",") if axis.strip())
    items = read_items(options.answers)[: options.limit]
    judge = judge_of(options)
    out = options.out
    if out is None:
        if not options.answers.is_dir():
            raise LongVILAError("--out is needed: the folder of the grades")
        out = options.answers / "judged"
    kept = Answers(out / "answers", "grades")
    records = grade_all(
        items,
        axes,
        judge,
        kept,
        prompts=options.prompts,
        attempts=options.attempts,
        parallel=options.parallel,
    )
    write_lines(out / "judged.jsonl", records)
    scores = axis_scores(records)
    content = {axis: asdict(score) for axis, score in scores.items()}
    (out / "scores.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(scores, judge.name))
    if options.out is None:
        refresh(options.answers)
        print(f"\nwrote {options.answers / 'report.html'}")
    return 0


def judge_of(options: Options) -> Judge:
    """Return the judge that was asked for.

    Args:
        options: The command line.

    Raises:
        LongVILAError: If none was, or more than one.
    """
    given = [name for name in ("endpoint", "local", "replay") if getattr(options, name)]
    if len(given) != 1:
        raise LongVILAError("give one of --endpoint, --local and --replay")
    if options.replay is not None:
        return Recording(options.replay)
    if options.local is not None:
        if options.parallel > 1:
            raise LongVILAError("a local judge is asked one thing at a time; leave --parallel out")
        return LocalJudge.load(options.local, device=options.device)
    assert options.endpoint is not None
    if options.judge_model is None:
        raise LongVILAError("--endpoint needs --judge-model, the model's name there")
    key = None
    if options.key_env is not None:
        key = os.environ.get(options.key_env)
        if not key:
            raise LongVILAError(f"the environment variable {options.key_env} is not set")
    return EndpointJudge(options.endpoint, options.judge_model, key=key)


def table(scores: dict[str, AxisScore], judge: str) -> str:
    """Return the table of a judged run.

    Args:
        scores: Score of each axis.
        judge: Who graded.
    """
    rows = [("axis", "mean of 0 to 5", "graded", "ungraded", "mean could be", "right")]
    for axis, score in scores.items():
        error = "" if score.error is None else f" ± {score.error:.2f}"
        rows.append(
            (
                axis,
                "-" if score.mean is None else f"{score.mean:.2f}{error}",
                str(score.graded),
                str(score.ungraded),
                f"{score.low:.2f} to {score.high:.2f}" if score.ungraded else "",
                "" if score.accuracy is None else f"{100 * score.accuracy:.1f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"judge: {judge}"])
