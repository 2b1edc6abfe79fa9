"""From scenes to a folder of results: read, ask, keep, summarise, draw.

1. Scenes come in parts, one a layout of prompts; each part has an answerer that writes that layout
   and a reader that shares what its scenes have in common.
2. The longest scene must fit the model's context, or nothing is begun.
3. Answers go to ``records.jsonl`` one by one (`longvila.evaluation.runner`), so the same call goes
   on where a run stopped.
4. At the end the first rank writes ``result.json``, ``page.html`` and a heat map for each group of
   answers that lies on a grid.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longvila.errors import ContextLengthError
from longvila.evaluation.answers import write_json
from longvila.evaluation.families import (
    FamilyRows,
    LayoutName,
    WholeReader,
    open_answerer,
    open_reader,
    open_rows,
)
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.needle_read import SceneReader
from longvila.evaluation.needle_sets import Haystack
from longvila.evaluation.page import write_page
from longvila.evaluation.runner import Record, Records, answered, run, settings_key
from longvila.evaluation.summary import Group, grid_rows, result_rows, summarise
from longvila.evaluation.task import Scene
from longvila.inference.engine import Engine
from longvila.inference.store import model_key
from longvila.log import get_logger

_LOG = get_logger(__name__)
Progress = Callable[[int, int, Scene], None]
#: Context of a model that is measured beyond its own.
_ANY_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class Part:
    """Scenes that are read with one layout of prompts.

    Attributes:
        layout: ``"needle"`` for frames with nothing between them, ``"model"`` for what the model's
            processor writes.
        scenes: All of them, in reading order.
    """

    layout: LayoutName
    scenes: list[Scene]


@dataclass(frozen=True)
class About:
    """What results say of themselves.

    Attributes:
        benchmark: Kind of result file.
        title: Heading of the page.
        question: What the figures answer.
        notes: Sentences under the heading.
    """

    benchmark: str
    title: str
    question: str
    notes: tuple[str, ...] = ()


def identity(model: Any, processor: Any) -> dict[str, Any]:
    """Return what tells a model and how it sees from another, to be part of a run's settings.

    Args:
        model: The model, before an engine holds it.
        processor: Its processor.
    """
    pixels = settings_key(json.loads(processor.video_processor.to_json_string()))
    return {**model_key(model), "pixels": pixels}


@contextmanager
def beyond_context(model: Any, allowed: bool) -> Iterator[None]:
    """Let an engine read prompts that are longer than the model's configuration allows.

    Args:
        model: The model; its configuration is put back afterwards.
        allowed: Whether to do anything.
    """
    config = model.config.get_text_config()
    before = config.max_position_embeddings
    if allowed:
        config.max_position_embeddings = _ANY_LENGTH
    try:
        yield
    finally:
        config.max_position_embeddings = before


def rows_folder(out: Path, who: Mapping[str, Any], haystack_key: Any) -> Path:
    """Return where rows of a film are kept, by model and film.

    Args:
        out: Folder of the run.
        who: What `identity` returned.
        haystack_key: What tells the film from another.
    """
    return out / f"rows-{settings_key({'model': dict(who), 'film': haystack_key})}"


def measure_model(
    model: Any,
    processor: Any,
    haystack: Haystack,
    parts: Sequence[Part],
    settings: dict[str, Any],
    *,
    about: About,
    out: Path,
    mesh: Any = None,
    chunk_tokens: int = 8192,
    keep_rows: bool = False,
    past_limit: bool = False,
    progress: Progress | None = None,
) -> list[Group]:
    """Measure a model; goes on where an interrupted run stopped.

    Args:
        model: A model with its head, in evaluation mode, on its device.
        processor: Its processor.
        haystack: The film that the scenes are made of.
        parts: What is shown and asked.
        settings: What answers depend on beside the model; ``model`` is what results call it.
        about: What results say of themselves.
        out: Folder for records, result and pages.
        mesh: Ranks that share a sequence, or several groups of them; None for one process.
        chunk_tokens: Tokens that a rank reads at once.
        keep_rows: Whether the film's rows are kept in ``out``, for when the run goes on.
        past_limit: Whether lengths that the model's configuration does not allow are measured.
        progress: As for `longvila.evaluation.runner.run`.

    Returns:
        The summary, the same on every rank of a file system that all share.

    Raises:
        RecordsError: If ``out`` holds answers of other settings.
        ContextLengthError: If the longest scene does not fit the model's context.
        NeedleError: If rows are to be kept and the model's family has none.
    """
    who = identity(model, processor)
    rows = open_rows(
        model, processor, haystack.book,
        folder=rows_folder(out, who, haystack.key) if keep_rows else None,
    )  # fmt: skip
    with (
        beyond_context(model, past_limit),
        Engine(model, mesh, chunk_tokens=chunk_tokens, family=rows.family) as engine,
    ):
        return measure(
            engine, processor, parts, {**settings, "identity": who}, rows, about=about, out=out,
            mesh=mesh, progress=progress, undecoded=haystack.undecoded,
        )  # fmt: skip


def measure(
    engine: Any,
    processor: Any,
    parts: Sequence[Part],
    settings: dict[str, Any],
    rows: FrameRows | FamilyRows,
    *,
    about: About,
    out: Path,
    mesh: Any = None,
    progress: Progress | None = None,
    undecoded: Callable[[], list[str]] = list,
) -> list[Group]:
    """Ask everything that is open, and write the results.

    Args:
        engine: Reads frame numbers: its family is that of ``rows``.
        processor: The model's processor.
        parts: What is shown and asked.
        settings: What answers depend on; ``model`` is what results call it.
        rows: The frames.
        about: What results say of themselves.
        out: Folder for records, result and pages.
        mesh: Ranks that share a sequence, or several groups of them; None for one process.
        progress: Called with (scenes done, scenes open, scene) after each, over all parts.
        undecoded: Gives the frames that could not be decoded.

    Returns:
        The summary, the same on every rank that sees the folder.

    Raises:
        RecordsError: If ``out`` holds answers of other settings.
        ContextLengthError: If the longest scene does not fit the model's context.

    Comm: Over several ranks, beside the engine's, a broadcast and one a part, and one gathering of
        what could not be decoded.
    """
    began = time.perf_counter()
    dp_rank, dp_size = (0, 1) if mesh is None else (mesh.dp_rank, mesh.dp_size)
    leads = mesh is None or mesh.sp_rank == 0
    answerers = [open_answerer(engine, processor, part.layout) for part in parts]
    readers = [
        open_reader(answerer, rows, part.scenes)
        for answerer, part in zip(answerers, parts, strict=True)
    ]
    for reader, part in zip(readers, parts, strict=True):
        _check_context(engine, reader, part.scenes)
    with Records(out, settings, part=dp_rank, writes=leads) as records:
        done = answered(records.rows)
        counts = [
            len(
                [s for s in part.scenes if any(q.id not in done for q in s.questions)][
                    dp_rank::dp_size
                ]
            )
            for part in parts
        ]
        if leads and dp_rank == 0:
            _say_what_is_open(parts, done, out)
        for number, (part, answerer, reader) in enumerate(
            zip(parts, answerers, readers, strict=True)
        ):
            run(
                answerer, part.scenes, reader.watch, records, part=dp_rank, parts=dp_size,
                progress=_over_all(progress, sum(counts[:number]), sum(counts)),
            )  # fmt: skip
    bad = sorted(set(_gathered(undecoded())))
    # Groups of ranks wrote files of their own; all of them count.
    with Records(out, settings, writes=False) as every:
        found = sorted(every.rows.values(), key=lambda row: str(row["id"]))
    groups = summarise(found)
    if leads and dp_rank == 0:
        _write(out, settings, found, groups, about, bad, elapsed_s=time.perf_counter() - began)
    return groups


def _check_context(engine: Any, reader: SceneReader | WholeReader, scenes: Sequence[Scene]) -> None:
    """Refuse scenes that will not fit before hours are spent on those that do."""
    limit: int | None = getattr(engine, "context_length", None)
    if limit is None or limit >= _ANY_LENGTH or not scenes:
        return
    longest = max(scenes, key=lambda scene: len(scene.frames))
    tokens = reader.tokens_of(longest)
    if tokens >= limit:
        raise ContextLengthError(
            f"the longest scene, {len(longest.frames)} frames, has {tokens} tokens, but the model "
            f"has a context of {limit}: measure fewer frames, or all the same (--beyond-context)"
        )


def _say_what_is_open(parts: Sequence[Part], done: set[str], out: Path) -> None:
    scenes = [scene for part in parts for scene in part.scenes]
    asked = [question.id for scene in scenes for question in scene.questions]
    before = sum(each in done for each in asked)
    _LOG.info(
        "%d questions about %d videos%s; every answer goes into %s, and the same command goes on "
        "there", len(asked), len(scenes), f", {before} answered before" if before else "", out,
    )  # fmt: skip


def _over_all(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Count scenes over all parts."""
    if progress is None:
        return None

    def tell(done: int, _: int, scene: Scene) -> None:
        progress(before + done, total, scene)

    return tell


def _gathered(mine: list[str]) -> list[str]:
    """What all ranks have; they are done when this returns."""
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, mine)
    return [each for part in every for each in part]


def _write(
    out: Path,
    settings: dict[str, Any],
    records: Sequence[Record],
    groups: Sequence[Group],
    about: About,
    bad: Sequence[str],
    *,
    elapsed_s: float,
) -> None:
    file = out / "result.json"
    if file.exists():
        # A run that had nothing left to ask has decoded nothing.
        bad = sorted({*bad, *json.loads(file.read_text(encoding="utf-8")).get("undecoded", ())})
    notes = list(about.notes)
    if bad:
        shown = "; ".join(bad[:20]) + ("; ..." if len(bad) > 20 else "")
        many = "s" * (len(bad) > 1)
        notes.append(f"{len(bad)} frame{many} could not be decoded, others stood in: {shown}")
    result = {
        "benchmark": about.benchmark,
        "question": about.question,
        "command": " ".join(sys.argv),
        "settings": settings,
        "elapsed_s": round(elapsed_s, 1),
        "undecoded": list(bad),
        "rows": result_rows(settings["model"], groups),
        "grids": grid_rows(records, groups),
    }
    write_json(file, result)
    write_page(
        out / "page.html", title=about.title, settings=settings, records=records, groups=groups,
        notes=notes,
    )  # fmt: skip
