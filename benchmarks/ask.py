"""How long does a 7B model take to answer a question about a real clip on one device?

A checkpoint of LongVILA-7B-1M's shape (SigLIP-so400m at 384 pixels, 2 x 2 downsampling, Qwen2-7B,
a context of 2**20 tokens) is written with random weights; ``longvila ask --json`` then runs on it
as its own process, as a user would start it, with warnings as errors. What it printed on standard
error is part of the row, so that a warning there would show.

The answer itself is noise: weights are random, and the tokenizer is the tests' own.

    python -m benchmarks.ask film.mp4 --frames 256 [--gpus 2]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import _cluster
from benchmarks._model import TEXT, TOWER, draw, model_config, text_config
from benchmarks._results import Report, Row, hardware
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing.tiny import tiny_config, tiny_tokenizer

QUESTION = "How long does a question about a clip take, from the file to the last token?"


def config_7b() -> LongVILAConfig:
    """LongVILA-7B-1M's shape, and the media tokens of the tests' tokenizer."""
    shape = argparse.Namespace(**TOWER, **TEXT)
    text = text_config(shape, max_position_embeddings=2**20, rope_theta=28676738.0)
    ids = tiny_config()
    return model_config(
        shape, text=text, image_token_id=ids.image_token_id, video_token_id=ids.video_token_id
    )


def write_checkpoint(config: LongVILAConfig, folder: Path, device: torch.device) -> int:
    """Write random weights and a processor; return the number of parameters."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = draw(lambda: LongVILAForConditionalGeneration(config), device, dtype)
    model.generation_config.eos_token_id = tiny_tokenizer().eos_token_id
    model.save_pretrained(folder)
    LongVILAProcessor.from_config(config, tiny_tokenizer()).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("video")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the question")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cluster = _cluster.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        config = tiny_config() if options.tiny else config_7b()
        parameters = write_checkpoint(config, folder, cluster.device)
        gc.collect()
        if cluster.is_cuda:
            torch.cuda.empty_cache()
        print(f"{parameters / 1e9:.2f} B parameters in {time.perf_counter() - started:.0f} s")
        report = Report("ask", QUESTION, hardware(cluster) | {"count": options.gpus})
        samples, said = [], ""
        for _ in range(options.repeats):
            started = time.perf_counter()
            done = subprocess.run(
                [
                    sys.executable, "-W", "error", "-m", "longvila", "ask", options.video,
                    "What happens in this film?", "--model", name, "--frames", str(options.frames),
                    "--max-new-tokens", str(options.new_tokens), "--json",
                    *(("--gpus", str(options.gpus)) if options.gpus > 1 else ()),
                ],
                capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            print(done.stderr, file=sys.stderr)
            if done.returncode:
                return done.returncode
            said += done.stderr
            samples.append(
                {
                    "wall_s": time.perf_counter() - started,
                    **json.loads(done.stdout.splitlines()[-1]),
                }
            )
            print(json.dumps({k: v for k, v in samples[-1].items() if k != "media"}))
        last = samples[-1]
        metrics = {
            key: last[key]
            for key in ("wall_s", "decode_s", "vision_s", "prefill_s", "generate_s", "tokens_per_s")
        }
        for sample in samples:
            for medium in sample["media"]:
                medium["name"] = Path(medium["name"]).name
                del medium["timestamps_s"]
        report.rows.append(
            Row(
                "longvila ask", "ours", last["prompt_tokens"],
                {"frames": options.frames, "new_tokens": last["new_tokens"],
                 "parameters": parameters},
                metrics, samples, {"stderr": said},
            )
        )  # fmt: skip
        print(report.write(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
