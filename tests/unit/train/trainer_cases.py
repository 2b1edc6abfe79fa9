"""Trainers over the ranks of a test, and the rows that they see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from train_cases import fresh_model, row, whole

from longvila.testing import Rank
from longvila.train.arguments import LongVILATrainingArguments
from longvila.train.trainer import LongVILATrainer

ROWS = 4  # of a step


def join(rank: Rank | None) -> None:
    """Say what a launcher would, so that accelerate joins the ranks of the test."""
    if rank is not None and rank.world_size > 1:
        values = {
            "RANK": rank.rank,
            "LOCAL_RANK": rank.rank,
            "WORLD_SIZE": rank.world_size,
            "LOCAL_WORLD_SIZE": rank.world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }
        os.environ.update({name: str(value) for name, value in values.items()})


def take(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Packed rows are batches already."""
    (item,) = items
    return item


def make(
    rank: Rank | None,
    folder: str | Path,
    *,
    model: Any = None,
    rows: list[dict[str, Any]] | None = None,
    steps: int = 5,
    cls: Any = LongVILATrainer,
    **options: Any,
) -> Any:
    """A trainer of packed rows, with constant rates and ROWS rows a step."""
    join(rank)
    world = 1 if rank is None else rank.world_size
    groups = world // max(options.get("seq_parallel_size", 1), 1)
    rows = [row(seed) for seed in range(ROWS * steps)] if rows is None else rows
    trainer = {
        name: options.pop(name)
        for name in ("callbacks", "eval_dataset", "data_collator", "processing_class")
        if name in options
    }
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "max_steps": steps,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-4,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": ROWS // groups,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    return cls(
        model=fresh_model() if model is None else model,
        args=LongVILATrainingArguments(str(folder), **settings),
        train_dataset=rows,
        **{"data_collator": take, **trainer},
    )


def losses(trainer: Any) -> list[float]:
    """The losses that were logged, one a step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def norms(trainer: Any) -> list[float]:
    """The gradient norms that were logged."""
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


def trained(rank: Rank | None, folder: str, **options: Any) -> dict[str, Any]:
    """Losses, norms and parameters after training."""
    torch.manual_seed(0)
    trainer = make(rank, folder, **options)
    trainer.train()
    return {"losses": losses(trainer), "norms": norms(trainer), "weights": whole(trainer.model)}
