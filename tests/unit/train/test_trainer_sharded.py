"""Parameters sharded, and accelerate's FSDP2 clipping, saving and resuming them.

accelerate shards on GPUs only. Here its state is told that it does, on CPU; everything that follows
(`parallelize`, FSDP2 over gloo, accelerate's clipping and checkpoints) is what runs on GPUs.
tests/gpu/test_trainer.py runs it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_trainer_saves import both, evaluated
from torch.distributed.fsdp import FSDPModule
from train_cases import assert_same
from trainer_cases import make, trained
from transformers import AutoModelForImageTextToText

from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.arguments import MeshArguments
from longvila.train.trainer import LongVILATrainer


class ShardedOnCPU(LongVILATrainer):
    """A trainer whose accelerate believes that it shards."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True
        assert self.accelerator.is_fsdp2


def sharded(rank: Rank, what: Any, *args: Any, **options: Any) -> Any:
    """Run something with the arguments that a machine with GPUs would give."""
    several = property(lambda self: self.sharding != "replicated")
    with mock.patch.object(MeshArguments, "shards_parameters", several):
        return what(rank, *args, cls=ShardedOnCPU, **options)


def each_layout(rank: Rank, folder: str) -> list[dict[str, Any]]:
    layouts: list[dict[str, Any]] = [
        {},
        {"seq_parallel_size": 2},
        {"sharding": "hsdp", "seq_parallel_size": 2},
    ]
    return [sharded(rank, trained, folder, **layout) for layout in layouts]


def test_sharded_steps_equal_those_of_one_process(tmp_path: Path) -> None:
    one = trained(None, str(tmp_path))
    for results in run_ranks(each_layout, 2, str(tmp_path)):
        for result in results:
            torch.testing.assert_close(result["losses"], one["losses"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(result["norms"], one["norms"], rtol=1e-4, atol=1e-6)
            assert_same(result["weights"], one["weights"], tolerance=1e-4)


def saved_and_resumed(rank: Rank, folder: str) -> None:
    sharded(rank, both, f"{folder}/samples", loader=False, seq_parallel_size=2)
    lora = {"lora_enable": True, "lora_r": 2, "seq_parallel_size": 2}
    sharded(rank, both, f"{folder}/lora", loader=False, **lora)


def test_sharded_checkpoints_are_whole(tmp_path: Path) -> None:
    run_ranks(saved_and_resumed, 2, str(tmp_path))
    folder = tmp_path / "samples" / "checkpoint-4"
    AutoModelForImageTextToText.from_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def evaluations(rank: Rank, folder: str) -> tuple[float, bool]:
    trainer = sharded(rank, make, folder, steps=1, seq_parallel_size=2)
    wrapped = isinstance(trainer.model, FSDPModule)
    return sharded(rank, evaluated, folder)["eval_loss"], wrapped


def test_sharded_evaluation(tmp_path: Path) -> None:
    expected = evaluated(None, str(tmp_path))["eval_loss"]
    for loss, wrapped in run_ranks(evaluations, 2, str(tmp_path)):
        assert wrapped and loss == pytest.approx(expected, rel=1e-5)
