"""Training steps of the peers on the text model of our shape, with the same optimiser states.

- ``torch_cp``: transformers' Qwen2, torch's context parallelism over SDPA (what accelerate's
  ``parallelism_config`` switches on), with all-gather or all-to-all.
- ``deepspeed_ulysses``: the same model with ``UlyssesSPAttentionHF`` registered over SDPA.
- ``deepspeed_alst``: that with its memory options: ``TiledMLP`` and the offload of checkpoints.

All run transformers' non-reentrant checkpointing and, on a GPU, Liger's kernels (norms, rotary
embedding, SwiGLU, fused head and loss), as their recipes do. The engine beneath is one for all:
FSDP2 with float32 shards, bf16 compute, float32 reduction and torch's fused AdamW, so that states
and their traffic are ours. ZeRO, which DeepSpeed would bring, shards the same things.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks._cluster import Cluster
from benchmarks._model import draw, text_config
from benchmarks._results import Kind
from benchmarks.peers._method import Layout, layout_tokens

if TYPE_CHECKING:
    from benchmarks.train_step import Engine, Stepped

#: Full learning rate, as of ours.
RATE = 1e-5


class TextEngine:
    """Transformers' causal language model under FSDP2; subclasses say who holds which tokens."""

    kind: Kind = "peer"
    name = ""
    layout: Layout = "contiguous"
    package = ""

    def __init__(self, options: argparse.Namespace, cluster: Cluster) -> None:
        self.options, self.cluster = options, cluster
        self.about: dict[str, Any] = {"package": self.package, "shipped": True}
        self.model: Any = None
        self.optimizer: Any = None

    def build(self) -> Any:
        from transformers import Qwen2ForCausalLM

        config = text_config(self.options)
        config._attn_implementation = "sdpa"
        self.model = draw(
            lambda: Qwen2ForCausalLM(config), self.cluster.device, self.options.dtype
        ).train()
        return self.model

    def shard(self, tokens: int) -> None:
        model, dtype = self.model, getattr(torch, self.options.dtype)
        if has_liger(self.cluster):
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2

            apply_liger_kernel_to_qwen2(model=model)
            self.about["kernels"] = "liger"
        self.adapt(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = flat_mesh(self.cluster.device.type, self.cluster.world_size)
        for module in (*model.model.layers, model):
            for parameter in module.parameters():
                if not isinstance(parameter, torch.distributed.tensor.DTensor):
                    parameter.data = parameter.data.float()
            fully_shard(
                module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model
            )
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, weight_decay=0.0, fused=self.cluster.is_cuda
        )

    def adapt(self, model: nn.Module) -> None:
        """What the method changes on the model before it is sharded."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Whatever process-wide state the method needs during forward and backward."""
        yield

    def step(self, ids: Tensor, rate: float) -> Stepped:
        from benchmarks.train_step import Stepped
        from longvila.train.step import gradient_norm

        world, tokens = self.cluster.world_size, ids.shape[1]
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(tokens, device=ids.device)
        mine = layout_tokens(self.layout, tokens, self.cluster.rank, world).to(ids.device)
        with self.active():
            # A mask made by transformers from local positions would be quadratic, and wrong.
            mask = {"full_attention": None, "sliding_attention": None}
            loss = self.model(
                input_ids=ids[:, mine],
                position_ids=positions[mine][None],
                attention_mask=mask,
                labels=targets[:, mine],
                shift_labels=targets[:, mine].contiguous(),
                num_items_in_batch=(tokens - 1) / world,
                use_cache=False,
            ).loss
            loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(gradient_norm([p.grad for p in parameters]))
        scale = min(1.0, 1.0 / (norm + 1e-6))
        torch._foreach_mul_([p.grad.to_local() for p in parameters], scale)
        # At a rate of nothing too, as ours: the states are there before a step is timed.
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().double() / world
        dist.all_reduce(mean)
        return Stepped(float(mean), norm)

    def close(self) -> None:
        self.model = self.optimizer = None


class TorchContextParallel(TextEngine):
    """torch's context parallelism, head-tail balanced."""

    layout: Layout = "zigzag"
    package = "torch"

    def __init__(self, options: argparse.Namespace, cluster: Cluster, rotate: str) -> None:
        super().__init__(options, cluster)
        self.rotate = rotate
        self.name = f"torch_cp_{rotate}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(self.rotate)
        world, device = self.cluster.world_size, self.cluster.device
        # A buffer is asked for; what the model gets is sharded already, the same way.
        buffer = torch.arange(2 * world, device=device)
        mesh = flat_mesh(device.type, world)
        with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
            yield


class DeepSpeedUlysses(TextEngine):
    """DeepSpeed's Ulysses for transformers' models, with or without its memory options."""

    package = "deepspeed"

    def __init__(self, options: argparse.Namespace, cluster: Cluster, *, memory: bool) -> None:
        super().__init__(options, cluster)
        self.memory = memory
        self.name = "deepspeed_alst" if memory else "deepspeed_ulysses"
        self.undo: list[Callable[[], None]] = []

    def adapt(self, model: nn.Module) -> None:
        import deepspeed
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, UlyssesSPAttentionHF
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                dist_backend="nccl" if self.cluster.is_cuda else "gloo", auto_mpi_discovery=False
            )
        before = ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.undo += [
            lambda: ALL_ATTENTION_FUNCTIONS.__setitem__("sdpa", before),
            parallel_state_sp._release_sequence_parallel_groups,
        ]
        UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation="sdpa",
            sequence_parallel_size=self.cluster.world_size,
            micro_batch_size=1,
            seq_length_is_variable=True,
        )
        if not self.memory:
            return

        def tiled(forward: Callable[[Tensor], Tensor], mlp: Any, x: Tensor) -> Tensor:
            weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
            shards = math.ceil(x.shape[1] / x.shape[2])
            return TiledMLP.apply(lambda _, part: forward(part), mlp, x, shards, weights)

        for layer in model.model.layers:  # type: ignore[union-attr]
            # Liger's where it is there, else transformers'.
            layer.mlp.forward = functools.partial(tiled, layer.mlp.forward, layer.mlp)
        self.about["memory"] = "TiledMLP, CheckpointHiddenStatesOffload"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if not self.memory or not self.cluster.is_cuda:
            yield
            return
        from deepspeed.runtime.activation_checkpointing.offload_activations import (
            CheckpointHiddenStatesOffload,
        )

        with CheckpointHiddenStatesOffload():
            yield

    def close(self) -> None:
        super().close()
        while self.undo:
            self.undo.pop()()


@functools.cache
def flat_mesh(device_type: str, ranks: int) -> DeviceMesh:
    return init_device_mesh(device_type, (ranks,), mesh_dim_names=("cp",))


def has_liger(cluster: Cluster) -> bool:
    return cluster.is_cuda and importlib.util.find_spec("liger_kernel") is not None


def peer_engines(
    options: argparse.Namespace, cluster: Cluster
) -> list[tuple[str, str | None, Callable[[], Engine]]]:
    """Peers by name, why one cannot run here, and how to make it."""
    no_cp = None if cluster.is_cuda else "torch's context parallelism has no CPU kernel"
    found = importlib.util.find_spec("deepspeed") is not None
    no_deepspeed = None if found else "deepspeed is not installed"
    peers: list[tuple[str, str | None, Callable[[], Engine]]] = [
        (
            f"torch_cp_{rotate}",
            no_cp,
            functools.partial(TorchContextParallel, options, cluster, rotate),
        )
        for rotate in ("allgather", "alltoall")
    ]
    for name, memory in (("deepspeed_ulysses", False), ("deepspeed_alst", True)):
        make = functools.partial(DeepSpeedUlysses, options, cluster, memory=memory)
        peers.append((name, no_deepspeed, make))
    alone = "needs two ranks" if cluster.world_size < 2 else None
    return [
        (name, alone or reason, make)
        for name, reason, make in peers
        if re.search(options.methods, name)
    ]
