"""One optimiser step over any mesh, from any number of micro-batches, exact.

    for each micro-batch     forward and backward of  sum of losses / C      C a constant
    once                     all-reduce of the counts over data parallelism
                             norm of the gradients over all shards           one all-reduce
                             one multiplication: C / targets, and clipping
                             AdamW

The mean over all targets of a step needs their number, which is known only when its last
micro-batch is. Gradients are linear, so they are summed for a constant denominator and divided
once at the end: micro-batches may be drawn one after the other, and a step's videos need not be in
memory together. The constant is a power of two and costs no accuracy.

Every rank ends with the same numbers for any layout of ranks and any way of cutting a step into
micro-batches, up to the rounding of sums.

Parameters, gradients and AdamW's states are float32 shards (16 bytes a parameter over all ranks),
layers compute in what `parallelize` was told. FSDP reduces after every micro-batch, into shards:
more traffic than reducing once, no unsharded gradient in memory.

It reads no data, and neither logs nor saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from longvila.errors import LongVILAError
from longvila.parallel.apply import reduce_gradients
from longvila.sp.loss import IGNORE_INDEX
from longvila.sp.mesh import SPMesh
from longvila.sp.tokens import pack_documents, shift_labels
from longvila.train.host_adamw import HostAdamW
from longvila.train.parts import PARTS, named_parts
from longvila.train.stages import Optimizer, Rates, StageError

#: What sums of losses are divided by until the number of targets is known.
_NOMINAL = 2**16


class NotFinite(LongVILAError, ArithmeticError):
    """The loss or the gradient of a step is not finite; nothing was updated."""


@dataclass(frozen=True)
class Counts:
    """What a step saw, over all ranks.

    Attributes:
        documents: Packed documents.
        tokens: Tokens, padding left out.
        pairs: Pairs of a token and one it sees, itself included: what causal attention costs.
        frames: Frames and image tiles.
        targets: Tokens with a loss.
        rows: Micro-batches, one for each data-parallel rank.
    """

    documents: int = 0
    tokens: int = 0
    pairs: int = 0
    frames: int = 0
    targets: int = 0
    rows: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def values(self) -> list[int]:
        """Return the numbers in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class StepResult:
    """What a step gave, the same on every rank.

    Attributes:
        loss: Mean over all targets of the step.
        gradient_norm: Norm over all tuned parameters, before clipping.
        counts: What it saw.
    """

    loss: float
    gradient_norm: float
    counts: Counts


def count_batch(batch: Mapping[str, Any]) -> Counts:
    """Count what a batch holds, on the host."""
    ids = batch["input_ids"]
    packed = pack_documents(
        (ids.shape[0], ids.shape[1]),
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        document_lengths=batch.get("document_lengths"),
    )
    if batch.get("shift_labels") is not None:
        targets = packed.take(batch["shift_labels"], filler=IGNORE_INDEX)
    else:
        labels = packed.take(batch["labels"], filler=IGNORE_INDEX)
        targets = shift_labels(labels, packed.lengths)
    return Counts(
        documents=len(packed.lengths),
        tokens=packed.num_tokens,
        pairs=sum(n * (n + 1) // 2 for n in packed.lengths),
        frames=_count_frames(batch),
        targets=int((targets != IGNORE_INDEX).sum()),
        rows=1,
    )


def _count_frames(batch: Mapping[str, Any]) -> int:
    grids = [batch[name] for name in ("video_grid_thw", "image_grid_thw") if name in batch]
    if grids:  # steps in time, each of which holds a few frames
        return sum(int(torch.as_tensor(grid)[:, 0].sum()) for grid in grids)
    frames = len(batch["image_sizes"]) if "image_sizes" in batch else 0
    for counts, pixels in (
        ("video_num_frames", "pixel_values_videos"),
        ("image_num_tiles", "pixel_values"),
    ):
        if counts in batch:
            frames += int(torch.as_tensor(batch[counts]).sum())
        elif pixels in batch and not (pixels == "pixel_values" and "image_sizes" in batch):
            frames += batch[pixels].shape[0]
    return frames


def over_data_parallel(counts: Counts, mesh: SPMesh) -> Counts:
    """Return counts summed over data-parallel ranks.

    Comm: One all-reduce of a few int64 over the data-parallel axis.
    """
    if mesh.dp_size == 1:
        return counts
    assert mesh.device_mesh is not None
    values = torch.tensor(counts.values(), device=mesh.device_mesh.device_type)
    dist.all_reduce(values, group=mesh.dp_group)
    return Counts(*values.tolist())


# ---- optimiser -------------------------------------------------------------------------------


def build_optimizer(
    model: nn.Module, rates: Rates, settings: Optimizer, *, fused: bool = True
) -> torch.optim.AdamW:
    """Build AdamW over the tuned parameters, a rate for each part.

    Args:
        model: The model on its mesh.
        rates: Full rate of each part.
        settings: Moments and decay; only matrices decay.
        fused: Whether to use the fused kernel.

    Returns:
        The optimiser, its states there and zero, so that every save of a run has the same entries;
        its moments on the host where settings say so. Each group keeps its full rate as
        ``full_lr``.

    Raises:
        StageError: If a parameter is tuned and its part has no rate, or nothing is tuned.
    """
    groups = []
    for part, parameters in named_parts(model).items():
        tuned = [p for _, p in parameters if p.requires_grad]
        rate = getattr(rates, part)
        if tuned and rate is None:
            raise StageError(f"{len(tuned)} parameters of {part} are tuned, but it has no rate")
        for matrices in (True, False):
            chosen = [p for p in tuned if (p.ndim > 1) == matrices]
            if chosen:
                decay = settings.weight_decay if matrices else 0.0
                groups.append(
                    {"params": chosen, "lr": rate, "full_lr": rate, "weight_decay": decay}
                )
    if not groups:
        raise StageError(f"nothing is tuned: {', '.join(PARTS)} are all frozen")
    first, second = settings.betas
    if settings.offload:
        return HostAdamW(groups, betas=(first, second), eps=settings.eps, fused=fused)
    optimizer = torch.optim.AdamW(groups, betas=(first, second), eps=settings.eps, fused=fused)
    _make_states(optimizer)
    return optimizer


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser make its states; they say zero steps afterwards."""
    set_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every learning rate to a share of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share


# ---- gradients -------------------------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm over all gradients and all their shards, a float64 scalar.

    Args:
        gradients: Plain tensors, the same on every rank, or shards of FSDP.

    Comm: One all-reduce of a float64 over the ranks that shards lie on.
    """
    sums: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for gradient in gradients:
        group = None
        if isinstance(gradient, DTensor):
            dims = [i for i, place in enumerate(gradient.placements) if isinstance(place, Shard)]
            if len(dims) > 1:
                raise ValueError(
                    f"expected gradients sharded over at most one mesh axis, got {len(dims)}: "
                    "train_step serves FSDP and HSDP, not tensor parallelism beside them"
                )
            group = gradient.device_mesh.get_group(dims[0]) if dims else None
        sums.setdefault(group, []).append(_local(gradient).detach())
    total: Tensor | None = None
    for group, tensors in sums.items():
        wide = [t if t.dtype == torch.float64 else t.float() for t in tensors]
        norms = torch._foreach_norm(wide)
        square = torch.stack([norm.double() for norm in norms]).square().sum()
        if group is not None:
            dist.all_reduce(square, group=group)
        total = square if total is None else total + square
    if total is None:
        return torch.zeros((), dtype=torch.float64)
    return total.sqrt()


def train_step(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    mesh: SPMesh,
    *,
    rate: float | Callable[[], float] = 1.0,
    clip_norm: float | None = None,
) -> StepResult:
    """Run one optimiser step.

    Args:
        model: Put on the mesh by `parallelize` with ``two_stage=True``; FSDP or not.
        batches: Micro-batches of this rank, drawn one by one; every rank has equally many. Ranks of
            a sequence-parallel group have the same ones.
        optimizer: From `build_optimizer`.
        mesh: The mesh.
        rate: Share of the full learning rate, or what gives it once all micro-batches are drawn.
        clip_norm: Norm that gradients are clipped to.

    Returns:
        Loss, norm and counts. A step without any target changes nothing.

    Raises:
        ValueError: If there is no micro-batch.
        NotFinite: If loss or norm is not finite.

    Comm: That of each micro-batch, two small all-reduces.
    """
    optimizer.zero_grad(set_to_none=True)
    counts, total = Counts(), None
    for batch in batches:
        counts += count_batch(batch)
        loss = model(**batch, num_items_in_batch=_NOMINAL).loss
        total = loss.detach().double() + (0.0 if total is None else total)
        # With all of the text model frozen, rows without media depend on nothing that is tuned.
        if loss.requires_grad:
            loss.backward()
        del loss
    if total is None:
        raise ValueError("a step needs at least one micro-batch")
    share = rate() if callable(rate) else rate
    return finish_step(model, optimizer, mesh, counts, total, rate=share, clip_norm=clip_norm)


def finish_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: SPMesh,
    counts: Counts,
    total: Tensor,
    *,
    rate: float,
    clip_norm: float | None,
) -> StepResult:
    """Combine, scale and clip the gradients of all micro-batches, and update.

    Args:
        model: As for `train_step`.
        optimizer: As for `train_step`.
        mesh: The mesh.
        counts: What this rank saw.
        total: Sum of all losses over the constant, over all ranks.
        rate: Share of the full learning rate.
        clip_norm: Norm that gradients are clipped to.
    """
    counts = over_data_parallel(counts, mesh)
    if mesh.world_size > 1 and not any(isinstance(m, FSDPModule) for m in model.modules()):
        reduce_gradients(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    to_mean = _NOMINAL / max(counts.targets, 1)
    loss = float(total) * to_mean
    norm = float(gradient_norm(gradients)) * to_mean
    if not (abs(loss) < float("inf") and norm < float("inf")):
        raise NotFinite(
            f"the loss is {loss} and the gradient norm {norm} over {counts.targets} targets; "
            "nothing was updated. Look at the data of this step, or lower the rate"
        )
    if gradients and counts.targets:
        clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        torch._foreach_mul_([_local(g) for g in gradients], to_mean * clip)
        # A forward pass without a backward one leaves its parameters gathered, and the next pass
        # would take those instead of the updated shards.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        set_rate(optimizer, rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, norm, counts)
