"""Arguments of `longvila.train.trainer.LongVILATrainer`: `TrainingArguments`, and the mesh.

`MeshArguments` is the part beside `TrainingArguments`, to be put before any arguments class that
goes back to it (TRL's ``SFTConfig``, say)::

    @dataclass
    class Arguments(MeshArguments, SFTConfig): ...

What it changes in the arguments it stands before:

* Gradient checkpointing of transformers recomputes attention and would be put over ours. Its flags
  are taken back, and ``recompute_layers`` decides.
* Where parameters are sharded, accelerate's FSDP2 is turned on, so that saving, resuming and
  clipping go its way; *what* is one group is decided by `longvila.parallel.apply.parallelize`.
* The batch dispatcher of accelerate, which cuts one rank's batch into pieces for all, is off.

It builds nothing; the world's size is not known here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from longvila.memory.offload import Offload
from longvila.parallel.apply import ParallelPlan
from longvila.train.host_adamw import HostAdamW
from longvila.train.parts import PARTS
from longvila.train.stages import Adapter

_TAKEN_BACK = ("activation_checkpointing", "gradient_checkpointing")


def _world_size() -> int:
    """Ranks of the job, as the launcher says, before any process group is there."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class MeshArguments:
    """Sequence parallelism, rates of parts, adapters and memory.

    Attributes:
        seq_parallel_size: Ranks that share a sample; -1 or 1 for none. A group of them is one
            device to all that counts batches and tokens.
        seq_parallel_ring_size: Ring degree; -1 to choose.
        seq_parallel_ring_type: Layout of the ring.
        sharding: ``fsdp`` shards parameters over all ranks, ``hsdp`` within a sequence-parallel
            group, ``replicated`` keeps them whole on every rank; ``auto`` shards on several GPUs.
        vision_tower_lr: Learning rate of the vision encoder; None for ``learning_rate``.
        mm_projector_lr: That of what joins the two.
        language_model_lr: That of the language model with embeddings, head and adapters.
        tune_vision_tower: Whether the vision encoder is trained.
        tune_mm_projector: Whether what joins the two is trained.
        tune_language_model: Whether the language model is trained.
        lora_enable: Whether the language model is trained by low-rank adapters.
        lora_r: Their rank.
        lora_alpha: Their scale times their rank.
        lora_dropout: Dropout before them.
        lora_targets: Names of the linear layers of the language model that get one.
        lora_also_tune: What is trained in full beside them: embeddings, norms, head.
        recompute_layers: Whether layers are recomputed in backward, their attention kept.
        plain_layers: Text layers, the last ones, that are not recomputed.
        offload_gib: Host memory a rank in which checkpoints (and what plain layers save) wait; zero
            for none.
        offload_keep_last: Layers, the last ones, whose tensors stay on the device.
        offload_optimizer: Whether AdamW's moments wait on the host.
        mlp_tile_rows: Tokens whose MLP is computed at once; None for all.
        compile_modules: Whether norms and MLPs of the language model are compiled.
        check_memory: Whether a run on GPUs is refused, with advice, when its first step is planned
            not to fit.
        head_chunks: Parts in which attention exchanges heads.
        loss_tile_rows: Rows of head and loss computed at once.
        remove_unused_columns: Whether columns that no argument of the model is called are dropped
            before the collator sees them.
    """

    seq_parallel_size: int = -1
    seq_parallel_ring_size: int = -1
    seq_parallel_ring_type: Literal["ring_varlen", "zigzag_ring_varlen", "gather"] = (
        "zigzag_ring_varlen"
    )
    sharding: Literal["auto", "fsdp", "hsdp", "replicated"] = "auto"
    vision_tower_lr: float | None = None
    mm_projector_lr: float | None = None
    language_model_lr: float | None = None
    tune_vision_tower: bool = True
    tune_mm_projector: bool = True
    tune_language_model: bool = True
    lora_enable: bool = False
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    lora_also_tune: list[str] = field(default_factory=lambda: ["embeddings", "norms"])
    recompute_layers: bool = True
    plain_layers: int = 0
    offload_gib: float = 0.0
    offload_keep_last: int = 1
    offload_optimizer: bool = False
    mlp_tile_rows: int | None = None
    compile_modules: bool = False
    check_memory: bool = True
    head_chunks: int = 1
    loss_tile_rows: int = 4096
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        own: Any = self
        if not torch.accelerator.is_available():
            # Without being told, accelerate joins no ranks on a machine that has CPUs alone.
            own.use_cpu = True
        self._check()
        for name in _TAKEN_BACK:
            if hasattr(self, name):
                setattr(self, name, False)
        self._deal_batches()
        shards = self.shards_parameters
        if shards and not own.fsdp:
            own.fsdp = True
        if shards:
            # Groups are made before accelerate sees the model, by ranks that all have the weights.
            fixed = {
                "version": 2,
                "auto_wrap_policy": "NO_WRAP",
                "cpu_ram_efficient_loading": False,
            }
            own.fsdp_config = {**_read(own.fsdp_config), **fixed}
        super().__post_init__()  # type: ignore[misc]

    def _check(self) -> None:
        own: Any = self
        if self.sharding not in ("auto", "fsdp", "hsdp", "replicated"):
            raise ValueError(
                f"sharding must be auto, fsdp, hsdp or replicated, got {self.sharding!r}"
            )
        if own.fsdp and not self.shards_parameters:
            raise ValueError(
                "fsdp is given, but parameters are not sharded (sharding="
                f"{self.sharding!r}, {_world_size()} ranks, CPU: {own.use_cpu}): drop fsdp, or "
                "run several GPU ranks with sharding='fsdp'"
            )
        if own.deepspeed:
            raise ValueError("deepspeed shards and counts in its own way; leave it out")
        if own.parallelism_config is not None:
            raise ValueError(
                "parallelism_config lets accelerate deal tokens, and its hooks stay on the "
                "model's attention; seq_parallel_size makes the mesh here"
            )
        if own.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor {own.label_smoothing_factor} needs whole logits, which no "
                "rank has"
            )
        if getattr(own, "loss_type", "nll") not in ("nll", "chunked_nll"):
            raise ValueError(
                f"loss_type {own.loss_type!r} weighs targets by the model's own logits, which no "
                "rank has whole; use 'nll'"
            )
        if own.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha adds noise to embeddings of padded batches; here they are "
                "packed and hold frames, too"
            )
        if own.fp16:
            raise ValueError("fp16 overflows at these lengths; use bf16, or neither")
        if own.torch_compile:
            raise ValueError(
                "torch_compile would compile the exchanges between ranks; compile_modules compiles "
                "what gains by it"
            )
        if self.offload_optimizer and "adamw_torch" not in str(own.optim):
            raise ValueError(f"offload_optimizer holds AdamW's moments; optim is {own.optim}")
        if getattr(own, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy 'batch_rebalance' deals batches to single ranks, not to "
                "sequence-parallel groups; use random, sequential or group_by_length"
            )

    def _deal_batches(self) -> None:
        own: Any = self
        config = own.accelerator_config
        if config is None or isinstance(config, str | dict):
            config = _read(config)
            if config.get("dispatch_batches") or config.get("split_batches"):
                raise ValueError(
                    "accelerator_config: dispatch_batches and split_batches cut a batch between "
                    "ranks; over a mesh each sequence-parallel group draws its own"
                )
            # Reduced after every micro-batch: no unsharded gradient stays in memory.
            accumulation = {
                "sync_each_batch": True,
                **(config.get("gradient_accumulation_kwargs") or {}),
            }
            own.accelerator_config = {
                **config,
                "dispatch_batches": False,
                "gradient_accumulation_kwargs": accumulation,
            }

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are sharded: on several GPUs, unless told otherwise."""
        own: Any = self
        several = _world_size() > 1 and torch.cuda.is_available() and not own.use_cpu
        if self.sharding in ("fsdp", "hsdp") and not several:
            raise ValueError(
                f"sharding {self.sharding!r} goes through accelerate, which shards over several "
                f"GPUs only ({_world_size()} ranks, CPU: {own.use_cpu}); use 'auto', or "
                "`longvila train`, which shards on CPU too"
            )
        return several and self.sharding != "replicated"

    def parallel_plan(self) -> ParallelPlan:
        """Return how the model is put on the mesh."""
        own: Any = self
        offload = None
        if self.offload_gib > 0:
            offload = Offload(
                budget_bytes=int(self.offload_gib * 2**30), keep_last=self.offload_keep_last
            )
        return ParallelPlan(
            fsdp=self.shards_parameters,
            fsdp_replicate=self.sharding == "hsdp",
            compute_dtype=torch.bfloat16 if own.bf16 else None,
            activation_checkpointing=self.recompute_layers,
            plain_layers=self.plain_layers,
            offload=offload,
            mlp_tile_rows=self.mlp_tile_rows,
            compile_modules=self.compile_modules,
            head_chunks=self.head_chunks,
            loss_tile_rows=self.loss_tile_rows,
            two_stage=True,
        )

    def host_optimizer(self) -> tuple[type[HostAdamW], dict[str, Any]] | None:
        """Return the optimizer with its moments on the host, if there shall be one."""
        own: Any = self
        if not self.offload_optimizer:
            return None
        betas = (own.adam_beta1, own.adam_beta2)
        return HostAdamW, {"lr": own.learning_rate, "betas": betas, "eps": own.adam_epsilon}

    def part_rates(self) -> dict[str, float | None]:
        """Return the learning rate of each part; None for that of all."""
        rates = (self.vision_tower_lr, self.mm_projector_lr, self.language_model_lr)
        return dict(zip(PARTS, rates, strict=True))

    def tuned_parts(self) -> dict[str, bool]:
        """Return whether each part is trained."""
        tuned = (self.tune_vision_tower, self.tune_mm_projector, self.tune_language_model)
        return dict(zip(PARTS, tuned, strict=True))

    def adapter(self) -> Adapter | None:
        """Return the adapters, if there shall be any."""
        if not self.lora_enable:
            return None
        return Adapter(
            rank=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=tuple(self.lora_targets),
            also_tune=tuple(self.lora_also_tune),  # type: ignore[arg-type]
        )


def _read(config: Any) -> dict[str, Any]:
    """A setting that is a dict, JSON, or the path of a JSON file."""
    if isinstance(config, str):
        if not config.lstrip().startswith("{"):
            with open(config, encoding="utf-8") as file:
                config = file.read()
        config = json.loads(config)
    return dict(config or {})


@dataclass
class LongVILATrainingArguments(MeshArguments, TrainingArguments):
    """`TrainingArguments` with a mesh."""
