"""The longest video that transformers' own Trainer takes, without sequence parallelism.

``Trainer`` with FSDP2 through accelerate, bf16 compute over float32 shards, gradient checkpointing
and fused AdamW; every rank has a video of its own. One ``train()`` goes through samples that grow,
a length a step, until one does not fit: the last step that ended is what it reaches, and the first
update has made the optimiser's states by then. Each step's figures are given to the caller as it
ends, since a rank that runs out of memory alone leaves the others waiting.

On the CPU, where accelerate does not shard, the same runs replicated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks._cluster import Cluster
from benchmarks.family_shapes import Shape

#: Share of the device that torch may take, the same on every rank, so that all run out together.
DEVICE_SHARE = 0.97


class Lengths(Dataset[int]):
    """A length each, as often as there are ranks: one a rank and step."""

    def __init__(self, lengths: list[int], ranks: int) -> None:
        self.lengths, self.ranks = lengths, ranks

    def __len__(self) -> int:
        return len(self.lengths) * self.ranks

    def __getitem__(self, index: int) -> int:
        return self.lengths[index // self.ranks]


class Steps(TrainerCallback):
    """Times each step, tells of it, and stops where no time is left for the next.

    Args:
        cluster: The ranks.
        lengths: Tokens of each step.
        told: Called with tokens, seconds, peak bytes and the loss of the step.
        stop_at: When to begin no further step, on ``time.perf_counter``.
    """

    def __init__(
        self,
        cluster: Cluster,
        lengths: list[int],
        told: Callable[[int, float, int], None],
        stop_at: float,
    ) -> None:
        self.cluster, self.lengths, self.told, self.stop_at = cluster, lengths, told, stop_at
        self.done: list[int] = []
        self.out_of_time = False
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cluster.synchronize()
        self.cluster.reset_peak()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cluster.synchronize()
        took = time.perf_counter() - self.began
        took, peak, now = self.cluster.everywhere(
            [took, float(self.cluster.peak_bytes()), time.perf_counter() - self.stop_at]
        )
        tokens = self.lengths[len(self.done)]
        self.done.append(tokens)
        self.told(tokens, took, int(peak))
        following = self.lengths[len(self.done) :][:1]
        # Attention grows with the square.
        if following and now + took * (following[0] / tokens) ** 2 > 0:
            self.out_of_time = True
            control.should_training_stop = True


class StockRun:
    """Transformers' Trainer over growing samples of one family.

    Args:
        shape: The family.
        options: Of `family_step`.
        cluster: The ranks.
        make: Makes the model on the device.
    """

    def __init__(
        self,
        shape: Shape,
        options: argparse.Namespace,
        cluster: Cluster,
        make: Callable[[], Any],
    ) -> None:
        self.shape, self.options, self.cluster, self.make = shape, options, cluster, make
        self.steps: Steps | None = None

    def run(self, told: Callable[[int, float, int], None], stop_at: float) -> None:
        """Train until the lengths, the time or the memory end.

        Raises:
            torch.OutOfMemoryError: Where a length does not fit.
        """
        options, cluster = self.options, self.cluster
        if cluster.is_cuda:
            torch.cuda.set_per_process_memory_fraction(DEVICE_SHARE, cluster.device)
        os.environ.setdefault("LOCAL_RANK", str(cluster.rank))
        model = self.make()
        config = model.config
        lengths = list(options.stock_tokens)
        self.steps = Steps(cluster, lengths, told, stop_at)

        def collate(items: list[int]) -> dict[str, torch.Tensor]:
            return self.shape.batch(config, items[0], options).inputs

        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=model,
                args=self.arguments(folder, len(lengths)),
                train_dataset=Lengths(lengths, cluster.world_size),
                data_collator=collate,
                callbacks=[self.steps],
            )
            try:
                trainer.train()
            finally:
                trainer.accelerator.free_memory()
                trainer.model = trainer.model_wrapped = trainer.optimizer = None

    def arguments(self, folder: str, steps: int) -> TrainingArguments:
        """What a user would give to train as long as can be."""
        where: dict[str, Any] = {"use_cpu": True}
        if self.cluster.is_cuda:
            where = {
                "bf16": self.options.dtype == "bfloat16",
                "fsdp": True,
                "fsdp_config": {
                    "version": 2,
                    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "transformer_layer_cls_to_wrap": list(self.shape.layers),
                    "reshard_after_forward": True,
                },
            }
        return TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch_fused" if self.cluster.is_cuda else "adamw_torch",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **where,
        )
