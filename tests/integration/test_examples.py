"""The scripts under examples/ run on a tiny model and drawn clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from longvila.media.synthetic import clip
from longvila.testing.tiny import save_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_finetune_video(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    rows = [{"question": "What?", "answer": f"Number {n}.", "start_s": 0.5} for n in range(5)]
    for number, row in enumerate(rows):
        row["video"] = f"{number}.mp4"
        clip(tmp_path / f"{number}.mp4", 24, fps=12)
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [
            sys.executable, str(EXAMPLES / "finetune_video.py"), "--model", "model",
            "--data", "clips.jsonl", "--held_out", "1", "--num_frames", "4",
            "--output_dir", "out", "--num_train_epochs", "1", "--save_strategy", "no",
            "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
            "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu",
        ],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'loss'") == 2 and "eval_loss" in done.stdout
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "model")
    AutoProcessor.from_pretrained(tmp_path / "out" / "model")
