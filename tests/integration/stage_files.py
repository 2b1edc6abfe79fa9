"""A tiny model and files of every kind that stages train on, and the stages made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_model, tiny_processor

#: Everything that a stage does is kept but its size.
SMALL = (
    "parallel.compute=float32",
    "saving.dtype=float32",
    "saving.keep=1",
    "max_tokens=320",
    "window=4",
    "optimizer.max_steps=2",
    "optimizer.eps=1e-4",
    "clip_norm=1.0",
)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def write_files(folder: Path) -> Path:
    """Write the model to begin from, and the data."""
    tiny_model(seed=5).save_pretrained(folder / "base")
    tiny_processor(num_frames=2).save_pretrained(folder / "base")
    write_data(folder)
    return folder


def write_data(folder: Path) -> None:
    """Write clips, conversations about them, texts, rows of ids, and the file that lists them."""
    for number in range(3):
        clip(folder / f"clip{number}.mp4", 14, first_number=20 * number)
    clips, texts = [], []
    for n in range(9):
        answer = "It counts.\nThen it ends." + " More." * n
        said = [
            {"from": "human", "value": "<video>\nWhat is shown?"},
            {"from": "gpt", "value": answer},
        ]
        clips.append({"id": f"v{n}", "video": f"clip{n % 3}.mp4", "conversations": said})
    for n in range(6):
        said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because. " * (n + 1)}]
        texts.append({"id": f"t{n}", "conversations": said})
    write_lines(folder / "clips.jsonl", clips)
    write_lines(folder / "texts.jsonl", texts)
    write_lines(
        folder / "rows.jsonl", [{"text": [(7 * n + i) % 250 for i in range(320)]} for n in range(6)]
    )
    (folder / "data.yaml").write_text(
        "datasets:\n"
        "  clips: {adapter: llava, path: clips.jsonl, media_dir: .}\n"
        "  texts: {adapter: llava, path: texts.jsonl}\n"
        "  rows: {adapter: tokens, path: rows.jsonl}\n"
        "mixtures:\n"
        "  align: clips\n"
        "  pretrain: clips\n"
        "  sft: clips + texts*0.5\n"
        "  extend-64k: rows\n"
        "  long-sft-256: clips\n"
    )
