"""The scripts under examples/ run on a tiny model and drawn clips."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

from longvila.media.synthetic import clip
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import save_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_script(_: Rank, script: str, argv: list[str], folder: str) -> str:
    """Run a script as ``python script`` would, in a process that has its imports."""
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = [script, *argv]
    with redirect_stdout(io.StringIO()) as said:
        runpy.run_path(script, run_name="__main__")
    return said.getvalue()


def test_finetune_video(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    rows = [{"question": "What?", "answer": f"Number {n}.", "start_s": 0.5} for n in range(5)]
    for number, row in enumerate(rows):
        row["video"] = f"{number}.mp4"
        clip(tmp_path / f"{number}.mp4", 24, fps=12)
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--model", "model", "--data", "clips.jsonl", "--held_out", "1", "--num_frames", "4",
        "--output_dir", "out", "--num_train_epochs", "1", "--save_strategy", "no",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu",
    ]  # fmt: skip
    script = EXAMPLES / "finetune_video.py"
    (said,) = run_ranks(run_script, 1, str(script), argv, str(tmp_path))
    assert said.count("'loss'") == 2 and "eval_loss" in said
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    AutoProcessor.from_pretrained(tmp_path / "out" / "model")
