"""The Trainer on two GPUs: FSDP2 through accelerate, bfloat16, NCCL.

    python tests/gpu/test_trainer.py FOLDER                        one GPU, writes what it saw
    torchrun --nproc-per-node 2 tests/gpu/test_trainer.py FOLDER   two, compares

Sequence and data parallelism take one GPU's steps; a checkpoint goes on, an adapter is exported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "train"))
from train_cases import row

from longvila.testing.tiny import tiny_model
from longvila.train.arguments import LongVILATrainingArguments
from longvila.train.trainer import LongVILATrainer

STEPS, ROWS = 3, 4
#: Of losses in bfloat16: one GPU computes norms in float32, shards gather them in bfloat16.
TOLERANCE, SAME = 3e-2, 1e-2


def take(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


def make(folder: Path, **options: Any) -> LongVILATrainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    groups = world // max(options.get("seq_parallel_size", 1), 1)
    text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    args = LongVILATrainingArguments(
        str(folder),
        bf16=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-4,
        max_grad_norm=0.5,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=ROWS // groups,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="steps",
        save_steps=STEPS - 1,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    return LongVILATrainer(
        tiny_model(seed=3, text_config=text),
        args,
        data_collator=take,
        train_dataset=[row(seed) for seed in range(ROWS * STEPS)],
        eval_dataset=[row(seed) for seed in range(50, 53)],
    )


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(folder: Path, **options: Any) -> dict[str, Any]:
    trainer = make(folder, **options)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {"losses": losses(trainer), "eval": [first, trainer.evaluate()["eval_loss"]]}


def close(actual: list[float], expected: list[float], tolerance: float, what: str) -> None:
    worst = max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))
    if dist.get_rank() == 0:
        print(f"{what}: {actual}, {expected}, apart by {worst:.1e}")
    assert worst < tolerance, (what, actual, expected)


def main(folder: Path) -> None:
    """Train on the GPUs that the launcher gave."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        (folder / "one.json").write_text(json.dumps(trained(folder / "one")))
        return
    one = json.loads((folder / "one.json").read_text())
    sp = trained(folder / "sp", seq_parallel_size=2)
    dp = trained(folder / "dp")
    for key in one:
        close(sp[key], one[key], TOLERANCE, f"sequence parallel, {key}")
        close(sp[key], dp[key], SAME, f"sequence against data parallel, {key}")

    again = make(folder / "sp", seq_parallel_size=2)
    assert isinstance(again.model, FSDPModule)
    again.train(resume_from_checkpoint=str(folder / "sp" / f"checkpoint-{STEPS - 1}"))
    close(losses(again)[-1:], sp["losses"][-1:], SAME, "resumed")
    close([again.evaluate()["eval_loss"]], sp["eval"][-1:], SAME, "resumed, eval")

    lora = make(folder / "lora", seq_parallel_size=2, lora_enable=True, lora_r=4)
    lora.train()
    after = lora.evaluate()["eval_loss"]
    assert after < sp["eval"][0]
    lora.export_model(folder / "plain", dtype=torch.float32)
    if dist.get_rank() == 0:
        AutoModelForImageTextToText.from_pretrained(folder / "plain")
    resumed = make(folder / "lora", seq_parallel_size=2, lora_enable=True, lora_r=4)
    resumed.train(resume_from_checkpoint=str(folder / "lora" / f"checkpoint-{STEPS - 1}"))
    close([resumed.evaluate()["eval_loss"]], [after], SAME, "adapter resumed, eval")

    host = trained(folder / "host", seq_parallel_size=2, sharding="hsdp", offload_optimizer=True)
    close(host["losses"], sp["losses"], SAME, "hybrid sharding, moments on the host")
    if dist.get_rank() == 0:
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        print("all as on one GPU")


@pytest.mark.gpu
def test_two_gpus_take_the_steps_of_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, found {torch.cuda.device_count()}")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    for launch, visible in (([], {"CUDA_VISIBLE_DEVICES": one}), (two, {})):
        done = subprocess.run(
            [sys.executable, *launch, __file__, str(tmp_path)],
            env={**os.environ, **visible},
            capture_output=True,
            text=True,
            timeout=280,
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "all as on one GPU" in done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
