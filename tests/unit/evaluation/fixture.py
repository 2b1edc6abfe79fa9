"""A benchmark in Video-MME's format, made here: a parquet file, clips, subtitles, a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from longvila.evaluation.presets import TASKS_FOLDER
from longvila.media.synthetic import clip

DURATIONS = ("short", "medium", "long")


def videomme_rows(videos: int, questions: int) -> list[dict[str, Any]]:
    """Questions whose right letters are as often one as the other."""
    rows = []
    for video in range(videos):
        for question in range(questions):
            number = video * questions + question
            rows.append(
                {
                    "video_id": f"{video:03d}",
                    "duration": DURATIONS[video % 3],
                    "domain": "Knowledge",
                    "sub_category": "Astronomy",
                    "videoID": f"clip{video}",
                    "question_id": f"{video:03d}-{question + 1}",
                    "task_type": ("Counting Problem", "OCR Problems")[question % 2],
                    "question": f"Which number is question {number} about?",
                    "options": [f"{'ABCD'[i]}. {number * 10 + i}." for i in range(4)],
                    "answer": "ABCD"[number % 4],
                }
            )
    return rows


def write_videomme(folder: Path, *, videos: int = 2, questions: int = 4, frames: int = 4) -> Path:
    """Write data, clips, subtitles and a task file that includes the packaged task."""
    rows = videomme_rows(videos, questions)
    (folder / "data").mkdir(parents=True)
    (folder / "subtitle").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    for video in range(videos):
        clip(folder / "data" / f"clip{video}.mp4", 12, first_number=100 * video)
        (folder / "subtitle" / f"clip{video}.srt").write_text(
            "1\n00:00:00,000 --> 00:00:00,100\n<font>first</font>\n\n"
            "2\n00:00:00,400 --> 00:00:01,000\nlast\n"
        )
    for name, base in (("fixture", "longvila_videomme"), ("sub", "longvila_videomme_w_subtitle")):
        write_task(
            folder / "tasks" / f"{name}.yaml",
            base,
            task=f"{base}_fixture",
            dataset_path="parquet",
            dataset_kwargs={"data_files": {"test": str(folder / "test.parquet")}},
            lmms_eval_specific_kwargs={"default": {"media": str(folder), "frames": frames}},
        )
    return folder / "tasks"


def write_task(file: Path, base: str, **changes: Any) -> None:
    """Write a task file that is a packaged one with changes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"include": str(TASKS_FOLDER / f"{base}.yaml"), **changes}))


def write_plugin(folder: Path) -> Path:
    """Write what an installed distribution with our entry point leaves on the path."""
    info = folder / "longvila_plugin-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longvila-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\nlongvila = longvila.evaluation.lmms:manifest\n"
    )
    return folder


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_question(records: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(record["task"], record["doc_id"]): record for record in records}
