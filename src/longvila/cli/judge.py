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

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longvila.cli._measuring import quieten_loading
from longvila.cli._options import parse
from longvila.cli.ask import find_device
from longvila.errors import LongVILAError
from longvila.evaluation.answers import Answers, write_json, write_lines
from longvila.evaluation.columns import aligned
from longvila.evaluation.judge import AxisScore, axis_scores, grade_all, read_items
from longvila.evaluation.judge_models import CallerJudge, Judge, Recording
from longvila.evaluation.runs import refresh
from longvila.inference.caller import EndpointCaller, LocalCaller


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
    device: str = "auto"
    """Where a local judge runs; auto is the GPU, or the CPU."""
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
    if options.limit is not None and options.limit < 1:
        raise LongVILAError(f"--limit must be at least 1, got {options.limit}")
    if options.prompts is not None and not options.prompts.is_dir():
        raise LongVILAError(f"--prompts: there is no folder {options.prompts}")
    axes = tuple(axis.strip() for axis in options.axes.split(",") if axis.strip())
    if not axes:
        raise LongVILAError("--axes names none; leave it out, or name some")
    items = read_items(options.answers)[: options.limit]
    out = options.out
    if out is None:
        if not options.answers.is_dir():
            raise LongVILAError("--out is needed: the folder of the grades")
        out = options.answers / "judged"
    judge = judge_of(options)
    kept = Answers(out / "answers", "grades")
    records = grade_all(
        items,
        axes,
        judge,
        kept,
        prompts=options.prompts,
        attempts=options.attempts,
        parallel=options.parallel,
        progress=_tell if options.replay is None else None,
    )
    kept.close()
    write_lines(out / "judged.jsonl", records)
    scores = axis_scores(records)
    content = {axis: asdict(score) for axis, score in scores.items()}
    write_json(out / "scores.json", content)
    print(table(scores, judge.name))
    failed = sum("error" in record for record in records)
    if failed:
        print(f"{failed} could not be asked about; the same command again tries them again")
    if options.out is None:
        refresh(options.answers)
        print(f"\nwrote {options.answers / 'report.html'}")
    return 0


def _tell(done: int, total: int) -> None:
    """Say on standard error how far things are, now and then."""
    if done == total or done % 20 == 0:
        print(f"[{done}/{total}] graded", file=sys.stderr)


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
        device = find_device(options.device)
        quieten_loading()
        return CallerJudge(LocalCaller.load(options.local, device=device))
    assert options.endpoint is not None
    if options.judge_model is None:
        raise LongVILAError("--endpoint needs --judge-model, the model's name there")
    return CallerJudge(
        EndpointCaller(options.endpoint, options.judge_model, key_variable=options.key_env)
    )


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
    return f"{aligned(rows)}\njudge: {judge}"
