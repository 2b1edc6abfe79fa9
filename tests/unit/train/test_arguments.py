"""Arguments: what they turn into, what they take back, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from longvila.train.arguments import LongVILATrainingArguments, MeshArguments
from longvila.train.stages import Adapter


def arguments(folder: Path, **options: Any) -> LongVILATrainingArguments:
    return LongVILATrainingArguments(str(folder), use_cpu=True, **options)


def test_defaults_leave_the_model_whole(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    plan = args.parallel_plan()
    assert not plan.fsdp and plan.two_stage and plan.activation_checkpointing
    assert plan.compute_dtype is None and plan.offload is None
    assert args.adapter() is None and not args.fsdp
    assert args.remove_unused_columns is False
    assert args.accelerator_config.dispatch_batches is False
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}


def test_what_is_said_reaches_the_plan(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, bf16=True, recompute_layers=False, offload_gib=0.5, head_chunks=2,
        loss_tile_rows=64, sharding="replicated", lora_enable=True, lora_targets=["q_proj"],
        lora_also_tune=["norms"], mm_projector_lr=1e-3, tune_vision_tower=False,
        plain_layers=1, offload_keep_last=3, mlp_tile_rows=32, compile_modules=True,
    )  # fmt: skip
    plan = args.parallel_plan()
    assert (plan.head_chunks, plan.loss_tile_rows) == (2, 64)
    assert (plan.plain_layers, plan.mlp_tile_rows, plan.compile_modules) == (1, 32, True)
    assert not plan.activation_checkpointing and plan.compute_dtype is torch.bfloat16
    assert plan.offload is not None and plan.offload.budget_bytes == 2**29
    assert plan.offload.keep_last == 3
    assert args.adapter() == Adapter(targets=("q_proj",), also_tune=("norms",))
    rates = {"vision_tower": None, "projector": 1e-3, "language_model": None}
    assert args.part_rates() == rates
    assert args.tuned_parts() == {"vision_tower": False, "projector": True, "language_model": True}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_of_transformers_is_taken_back(name: str, tmp_path: Path) -> None:
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"{name} is an argument of other transformers releases than this one")
    args = arguments(tmp_path, **{name: True})
    assert not getattr(args, name) and args.recompute_layers


def test_settings_of_accelerate_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps({"use_seedable_sampler": False}))
    for given in (str(file), {"use_seedable_sampler": False}):
        config = arguments(tmp_path, accelerator_config=given).accelerator_config
        assert config.use_seedable_sampler is False and config.dispatch_batches is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero3"}, "must be auto, fsdp, hsdp or replicated"),
        ({"sharding": "fsdp"}, "shards over several GPUs only"),
        ({"fsdp": True}, "fsdp is given, but parameters are not sharded"),
        ({"fp16": True}, "use bf16"),
        ({"neftune_noise_alpha": 5.0}, "adds noise to embeddings"),
        ({"label_smoothing_factor": 0.1}, "needs whole logits"),
        ({"torch_compile": True}, "compile_modules compiles"),
        ({"offload_optimizer": True, "optim": "adafactor"}, "holds AdamW's moments"),
        ({"parallelism_config": object()}, "seq_parallel_size makes the mesh here"),
        ({"accelerator_config": {"dispatch_batches": True}}, "cut a batch between ranks"),
        ({"train_sampling_strategy": "batch_rebalance"}, "deals batches to single ranks"),
        ({"deepspeed": {"zero_optimization": {}}}, "leave it out"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_several_gpus_are_sharded_by_groups_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = property(lambda self: True)
    monkeypatch.setattr(MeshArguments, "shards_parameters", several)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # what it says ends with the test
    args = arguments(tmp_path, sharding="hsdp", fsdp_config={"state_dict_type": "FULL_STATE_DICT"})
    plan = args.parallel_plan()
    assert plan.fsdp and plan.fsdp_replicate and plan.parameter_dtype is torch.float32
    plugin = args.fsdp_plugin_args
    assert plugin["fsdp_version"] == 2 and plugin["auto_wrap_policy"] == "NO_WRAP"
    assert plugin["cpu_ram_efficient_loading"] is False


def test_the_command_line_knows_every_field(tmp_path: Path) -> None:
    (args,) = HfArgumentParser(LongVILATrainingArguments).parse_args_into_dataclasses(
        [
            "--output_dir", str(tmp_path), "--use_cpu", "--seq_parallel_size", "4",
            "--seq_parallel_ring_type", "gather", "--lora_enable", "--lora_targets", "q_proj",
            "k_proj", "--vision_tower_lr", "1e-5", "--tune_mm_projector", "false",
        ]
    )  # fmt: skip
    assert args.seq_parallel_size == 4 and args.seq_parallel_ring_type == "gather"
    assert args.lora_targets == ["q_proj", "k_proj"] and args.vision_tower_lr == 1e-5
    assert not args.tune_mm_projector
    assert args.to_dict()["seq_parallel_size"] == 4


@dataclass
class Other(TrainingArguments):
    extra: int = 1


@dataclass
class Both(MeshArguments, Other):
    pass


def test_it_goes_before_other_arguments(tmp_path: Path) -> None:
    args = Both(str(tmp_path), use_cpu=True, extra=3, seq_parallel_size=2)
    assert (args.extra, args.seq_parallel_size) == (3, 2)
