"""From scenes to a folder of results: read, ask, keep, summarise, draw.

1. Scenes come in parts, one a layout of prompts; each part has an answerer that writes that layout
   and a reader that shares what its scenes have in common.
2. Answers go to ``records.jsonl`` one by one (`longvila.evaluation.runner`), so the same call goes
   on where a run stopped.
3. At the end the first rank writes ``result.json``, ``page.html`` and a heat map for each group of
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
from typing import Any, Literal

import torch.distributed as dist

from longvila.evaluation.answerer import Answerer
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.needle_read import SceneReader
from longvila.evaluation.page import write_page
from longvila.evaluation.runner import Record, Records, run, settings_key
from longvila.evaluation.summary import Group, grid_rows, result_rows, summarise
from longvila.evaluation.task import Scene
from longvila.inference.store import model_key

LayoutName = Literal["needle", "model"]
Progress = Callable[[int, int, Scene], None]


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


def make_answerer(engine: Any, processor: Any, layout: LayoutName) -> Answerer:
    """Return an answerer that writes prompts in a layout.

    Args:
        engine: The engine.
        processor: The model's processor.
        layout: As in `Part`.
    """
    if layout == "model":
        return Answerer(engine, processor)
    return Answerer(engine, processor, frame_separator="", timestamps=False)


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
        config.max_position_embeddings = 2**31 - 1
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


def measure(
    engine: Any,
    processor: Any,
    parts: Sequence[Part],
    settings: dict[str, Any],
    rows: FrameRows,
    *,
    about: About,
    out: Path,
    mesh: Any = None,
    progress: Progress | None = None,
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
        progress: As for `longvila.evaluation.runner.run`.

    Returns:
        The summary, the same on every rank that sees the folder.

    Raises:
        RecordsError: If ``out`` holds answers of other settings.
        ContextLengthError: If the longest scene does not fit the model's context.

    Comm: Over several ranks, beside the engine's, one broadcast a part and a barrier.
    """
    began = time.perf_counter()
    dp_rank, dp_size = (0, 1) if mesh is None else (mesh.dp_rank, mesh.dp_size)
    leads = mesh is None or mesh.sp_rank == 0
    with Records(out, settings, part=dp_rank, writes=leads) as records:
        for part in parts:
            answerer = make_answerer(engine, processor, part.layout)
            reader = SceneReader(answerer, rows, part.scenes)
            run(
                answerer, part.scenes, reader.watch, records,
                part=dp_rank, parts=dp_size, progress=progress,
            )  # fmt: skip
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    # Groups of ranks wrote files of their own; all of them count.
    with Records(out, settings, writes=False) as every:
        found = sorted(every.rows.values(), key=lambda row: str(row["id"]))
    groups = summarise(found)
    if leads and dp_rank == 0:
        _write(out, settings, found, groups, about, elapsed_s=time.perf_counter() - began)
    return groups


def _write(
    out: Path,
    settings: dict[str, Any],
    records: Sequence[Record],
    groups: Sequence[Group],
    about: About,
    *,
    elapsed_s: float,
) -> None:
    result = {
        "benchmark": about.benchmark,
        "question": about.question,
        "command": " ".join(sys.argv),
        "settings": settings,
        "elapsed_s": round(elapsed_s, 1),
        "rows": result_rows(settings["model"], groups),
        "grids": grid_rows(records, groups),
    }
    partial = out / "result.json.new"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / "result.json")
    write_page(
        out / "page.html", title=about.title, settings=settings, records=records, groups=groups,
        notes=about.notes,
    )  # fmt: skip
