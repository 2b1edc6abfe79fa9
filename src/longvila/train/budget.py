"""Refuse a run before its first step, with advice, when its peak would not fit.

    load = load_of_stage(stage, model, mesh)
    plan = check(model, mesh, settings, load, device, optimizer=optimizer)

Call it on every rank once the model is on its mesh and the optimiser is built; all ranks decide
alike. It predicts the peak (`longvila.memory.estimate`) of a row of the given load from the model
as it stands: its sizes, what of it is tuned, whether FSDP shards it. It compares with what the
device can still give this process, and the memory that waits on the host with what the host has:

    GPU     free memory and what torch has reserved already
    CPU     memory that the system calls available (or the control group leaves), shared by the
            ranks of this machine, and what the model holds already

A plan is a few percent off, so `MARGIN` decides: beyond it the run is refused by `OverBudget`,
between the limit and it a warning is logged. What would help is tried in order
(`longvila.train.planning`) and stands in the message with what each switch saves.

It knows the fixed sizes of a row, not the data: give it the longest row that the run will see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from longvila.errors import LongVILAError
from longvila.log import get_logger
from longvila.memory.activations import SCRATCH
from longvila.memory.estimate import Peak, training_peak
from longvila.memory.operations import Load, Tuned
from longvila.memory.rates import GIB
from longvila.memory.settings import OptimizerKind, Settings
from longvila.memory.sizes import ModelSize
from longvila.ops.attention import select_backend
from longvila.ops.backends import AttentionSpec
from longvila.parallel.sizes import size_of
from longvila.sp.mesh import SPMesh
from longvila.train.parts import named_parts
from longvila.train.planning import Plan, Planner, advice, ranks_of
from longvila.train.stages import Stage
from longvila.train.step import count_batch

_LOG = get_logger(__name__)

#: Predicted over available memory beyond which a run is refused.
MARGIN = 1.05
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OverBudget(LongVILAError, MemoryError):
    """A step would not fit; the message says by how much, where, and what would help."""


# ---- the check -----------------------------------------------------------------------------------


def check(
    model: nn.Module,
    mesh: SPMesh,
    settings: Any,
    load: Load,
    device: torch.device,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plan:
    """Predict the peak of a step and refuse it if it does not fit.

    Args:
        model: On its mesh, with what is tuned tuned.
        mesh: The mesh.
        settings: A `longvila.parallel.apply.ParallelPlan`, or a stage's
            `longvila.train.stages.Parallel`.
        load: The longest row of a data-parallel group; from `load_of_stage` or `load_of_batch`.
        device: This rank's device.
        optimizer: Says where the optimiser's states are; None for float32 on the device.

    Returns:
        The plan, without times.

    Raises:
        OverBudget: If it does not fit, on every rank.
        TypeError: If the model is of no known family.

    Comm: With more than one rank, one all-reduce of four numbers.
    """
    size, tuned = size_of(model), tuned_parts(model)
    switches = read_settings(model, settings, size, device, optimizer)
    ranks = ranks_of(mesh.plan, replicate=bool(getattr(settings, "fsdp_replicate", False)))
    peak = training_peak(size, load, ranks=ranks, settings=switches, tuned=tuned)
    steady = peak.moments["optimizer"]
    held = steady["parameters"] + (steady["optimizer states"] if optimizer is not None else 0.0)
    limit, host = _available(device, mesh, held)
    if optimizer is not None and switches.optimizer == "adamw-host":
        host += peak.host_bytes - switches.offload_bytes  # there already
    limit, host, most, most_host = _worst(limit, host, peak, mesh, device)
    planner = Planner(
        size, None, tuned=tuned, base=switches, limit_bytes=limit, host_bytes=max(host, 0.0)
    )
    plan = Plan(
        size=size, load=load, ranks=ranks, settings=switches, tuned=tuned, gpu=None, peak=peak,
        time=None, limit_bytes=limit, host_limit_bytes=host,
    )  # fmt: skip
    if most <= limit and most_host <= host:
        _LOG.info(
            "planned peak %.1f of %.1f GiB on %s (%s)",
            peak.bytes / GIB, limit / GIB, device, peak.moment,
        )  # fmt: skip
        return plan
    plan = replace(plan, attempts=tuple(planner.ladder(load, ranks, given=switches)))
    message = _explain(plan, device, most)
    if most > MARGIN * limit or most_host > MARGIN * host:
        raise OverBudget(message)
    _LOG.warning("%s", message)
    return plan


def _explain(plan: Plan, device: torch.device, most: float) -> str:
    peak, load, ranks = plan.peak, plan.load, plan.ranks
    host = plan.host_limit_bytes
    assert host is not None
    lines = [
        f"a step of {load.tokens:,} tokens and {load.frames:,} frames on {ranks.sp} ranks a row is "
        f"planned to need {peak.bytes / GIB:.1f} GiB of {device}, which has "
        f"{plan.limit_bytes / GIB:.1f} GiB for it"
    ]
    if most > peak.bytes:
        lines.append(f"and another rank's row {most / GIB:.1f} GiB")
    if peak.host_bytes > host:
        lines.append(
            f"and {peak.host_bytes / GIB:.1f} GiB of host memory a rank, of {host / GIB:.1f} GiB"
        )
    largest = list(peak.parts.items())[:4]
    told = ", ".join(f"{name} {number / GIB:.1f}" for name, number in largest)
    lines.append(f"the peak is {peak.moment} (GiB): {told}")
    if len(plan.attempts) > 1:
        lines.append("what each further switch makes of it:")
        lines += [f"  {line}" for line in advice(plan.attempts)]
    if not plan.attempts or not plan.attempts[-1].fits:
        lines.append(
            "switches alone are not enough: more ranks a row (parallel.seq_parallel_size), shorter "
            "rows (data.max_tokens) or fewer frames (data.num_frames)"
        )
    lines.append("`longvila plan` tries other numbers of GPUs")
    return "\n".join(lines)


# ---- what a run is -------------------------------------------------------------------------------


def tuned_parts(model: nn.Module) -> Tuned:
    """Return what of a model has gradients."""
    parts = named_parts(model)
    named = parts["language_model"]
    adapters = sum(p.numel() for name, p in named if p.requires_grad and ".lora_" in name)
    own = [p for name, p in named if ".lora_" not in name]
    tuned = sum(p.numel() for p in own if p.requires_grad)
    whole = tuned == sum(p.numel() for p in own)
    return Tuned(
        tower=any(p.requires_grad for _, p in parts["vision_tower"]),
        projector=any(p.requires_grad for _, p in parts["projector"]),
        text=whole,
        adapter_parameters=adapters,
        text_parameters=0 if whole else tuned,
    )


def read_settings(
    model: nn.Module,
    settings: Any,
    size: ModelSize,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None,
) -> Settings:
    """Return a run's switches as plain numbers."""
    parameter = next(model.parameters())
    compute = getattr(settings, "compute_dtype", None) or _DTYPES.get(
        getattr(settings, "compute", ""), parameter.dtype
    )
    offload = getattr(settings, "offload", None)
    budget = (
        getattr(settings, "offload_gib", 0.0) * GIB if offload is None else offload.budget_bytes
    )
    last = getattr(settings, "offload_keep_last", 1) if offload is None else offload.keep_last
    backend = select_backend(
        AttentionSpec(
            dtype=compute,
            head_dim=size.text.head_dim,
            device_type=device.type,
            causal=True,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        )
    ).name
    reduce = getattr(settings, "reduce_dtype", torch.float32) or compute
    return Settings(
        fsdp=any(isinstance(module, FSDPModule) for module in model.modules()),
        parameter_bytes=parameter.dtype.itemsize,
        compute_bytes=compute.itemsize,
        reduce_bytes=reduce.itemsize,
        optimizer=_states(optimizer),
        checkpointing=settings.activation_checkpointing,
        plain_layers=getattr(settings, "plain_layers", 0),
        offload_bytes=int(budget),
        keep_last=last,
        mlp_tile_rows=getattr(settings, "mlp_tile_rows", None),
        compiled=bool(
            getattr(settings, "compile_modules", False) or getattr(settings, "compile", False)
        ),
        loss_tile_rows=settings.loss_tile_rows,
        head_chunks=settings.head_chunks,
        # Back ends without a rule (the oracle) are planned as the CPU's.
        backend=backend if backend in SCRATCH else "cpu",
    )


def _states(optimizer: torch.optim.Optimizer | None) -> OptimizerKind:
    """Where moments are, by the ones there are: the largest parameter's speak for all."""
    if optimizer is None or not optimizer.state:
        return "adamw"
    parameter = max(optimizer.state, key=lambda each: each.numel())
    found = [
        getattr(each, "_local_tensor", each)
        for each in optimizer.state[parameter].values()
        if isinstance(each, torch.Tensor) and each.numel() > 1
    ]
    if any(each.dtype == torch.uint8 for each in found):
        return "adamw-8bit"
    on = getattr(parameter, "_local_tensor", parameter).device
    return "adamw-host" if any(each.device.type != on.type for each in found) else "adamw"


def load_of_stage(stage: Stage, model: nn.Module, mesh: SPMesh) -> Load:
    """Return the longest row of a stage.

    Args:
        stage: The stage.
        model: Says how many tokens a frame has.
        mesh: The mesh.

    Returns:
        The worst of all rows in one: as many frames as may be in a row, and a loss for every token.
        A real row has not both, but they are not needed at the same moment.
    """
    data, tower = stage.data, size_of(model).tower
    frames = 0
    if tower is not None and data.num_frames:
        # A row may pack several videos, so frames fill it where a video is short.
        frames = (data.max_tokens - 1) // tower.tokens
        if data.max_documents == 1:
            frames = min(frames, data.num_frames)
    rows = (data.rows_per_step or 2 * mesh.dp_size) // mesh.dp_size
    return Load(
        tokens=data.max_tokens,
        frames=frames,
        targets=data.max_tokens,
        micro_batches=max(rows, 1),
    )


def load_of_batch(batch: Mapping[str, Any], *, micro_batches: int = 1) -> Load:
    """Return the load of a row as a training step takes it.

    Args:
        batch: Arguments of a step.
        micro_batches: Such rows a step.
    """
    counts = count_batch(batch)
    lengths = batch.get("document_lengths")
    documents = () if lengths is None else tuple(int(n) for n in lengths)
    return Load(
        tokens=counts.tokens,
        frames=counts.frames,
        targets=counts.targets,
        documents=documents if sum(documents) == counts.tokens else (),
        micro_batches=micro_batches,
    )


# ---- what there is -------------------------------------------------------------------------------


def _available(device: torch.device, mesh: SPMesh, held: float) -> tuple[float, float]:
    """Bytes that the device and the host can give this rank."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
    host = host_bytes() / here
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device)), host
    return host + held, host


def host_bytes() -> float:
    """Return the memory of this machine that can still be had; infinite where nobody tells."""
    found = float("inf")
    information = Path("/proc/meminfo")
    if information.is_file():
        for line in information.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                found = 1024.0 * int(rest.split()[0])
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.is_file() and used.is_file():
        text = most.read_text(encoding="ascii").strip()
        if text != "max":
            found = min(found, float(int(text) - int(used.read_text(encoding="ascii"))))
    return found


def _worst(
    limit: float, host: float, peak: Peak, mesh: SPMesh, device: torch.device
) -> tuple[float, float, float, float]:
    """The least there is and the most that is needed on any rank, so that all refuse or none."""
    if mesh.world_size == 1:
        return limit, host, peak.bytes, peak.host_bytes
    values = torch.tensor(
        [limit, host, -peak.bytes, -peak.host_bytes], dtype=torch.float64, device=device
    )
    dist.all_reduce(values, op=dist.ReduceOp.MIN, group=mesh.dp_sp_group)
    low = [float(value) for value in values.tolist()]
    return low[0], low[1], -low[2], -low[3]
