"""Attention of few queries over a very long cache: split over the keys, merged by log-sum-exp.

General attention kernels cut the queries, so one query over a million keys leaves most of a GPU
idle. Here the keys are cut into as many spans as fill the device, the queries of a kv head read a
span together, and the spans are merged (`longvila.ops.decode_kernels`). The cost is that of reading
keys and values once.

* `decode_attention` takes keys and values as tensors.
* `append_tokens` and `attend_tables` take a `longvila.ops.kv_table.KVTable`: the segments of a
  cache by address, with lengths that only the device knows. All their arguments stay the same from
  token to token, so they can be captured. On a CPU they do the same in plain torch.
* `merge_parts` joins partial results, such as those of several ranks.

The result does not depend on what else is in the batch; it depends, in the last bits, on the number
of spans, which follows from the device and the shape of the queries alone.

Letters: B rows, S cached tokens, T new tokens, H query heads, K kv heads, D head dim, P parts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longvila.ops.kv_table import KVTable
from longvila.ops.lse import merge_many

#: More queries than this are better served by kernels that cut queries.
MAX_NEW_TOKENS = 8
_SMALLEST_TILE = 16


@dataclass(frozen=True)
class Tuning:
    """How the split kernel is built and dealt out.

    Attributes:
        block_tokens: Cached tokens read at a time.
        warps: Of a program.
        stages: Blocks on their way.
        programs: Programs for each multiprocessor.
    """

    block_tokens: int
    warps: int
    stages: int
    programs: int


def default_tuning(head_dim: int) -> Tuning:
    """Return what is used where nothing else is asked for.

    Args:
        head_dim: D; a block of keys and values is kept near 32 KiB.
    """
    block = 64 if head_dim <= 128 else 32
    return Tuning(block, warps=4, stages=3, programs=2)


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> ModuleType | str:
    """Return the kernels, or why they cannot be had."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return importlib.import_module("longvila.ops.decode_kernels")
    except ImportError as error:
        return f"triton is installed but does not import: {error}"


def decode_refusal(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Return why the split kernel cannot be used, or None.

    Args:
        dtype: Of queries, keys and values.
        head_dim: D.
        device: Theirs.
    """
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"needs a head dim that is a multiple of 8 from 16 to 256, got {head_dim}"
    if not _interpreted():
        if device.type != "cuda":
            return f"needs a CUDA tensor, got one on {device.type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, got {dtype}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or newer"
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else None


def _loaded() -> ModuleType:
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(f"the split decode kernel was called although {kernels}")
    return kernels


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def _largest_tile(device: torch.device) -> int:
    if device.type != "cuda":
        return 64
    # A tile of 64 queries needs up to 128 KiB of shared memory, one of 32 less than 96: those of a
    # data centre have more than 160, other ones 99.
    capability = torch.cuda.get_device_capability(device)
    return 64 if capability == (8, 0) or 9 <= capability[0] < 12 else 32


def _tile(queries: int, device: torch.device) -> int:
    return min(max(_SMALLEST_TILE, _power(queries)), _largest_tile(device))


def _spans(device: torch.device, programs: int, tuning: Tuning) -> int:
    """Spans so that all programs run at once, and together fill the device."""
    return max(1, tuning.programs * _multiprocessors(device) // programs)


# ---- keys and values as tensors ----------------------------------------------------------------


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention of few queries over long keys, by the split kernel.

    Args:
        q: ``(B, T, H, D)`` bfloat16 or float16.
        k: ``(B, S, K, D)``, or ``(1, S, K, D)`` for keys that all rows share (then not causal, and
            of one length).
        v: As ``k``.
        lengths: ``(B,)`` integers on the device: how many keys of each row are valid; None for all.
            They are not read back.
        causal: Whether the valid keys end with those of the queries.
        softmax_scale: Factor on the scores; None for ``D ** -0.5``.
        tuning: How the kernel is built; None to choose.

    Returns:
        ``out (B, T, H, D)`` and ``lse (B, H, T)``, both float32; a row without keys has out 0 and
        lse -inf.

    Raises:
        ValueError: If shapes do not belong together.
        RuntimeError: If the kernel cannot be had (`decode_refusal` says why).
    """
    batch, new, heads, dim = q.shape
    shared = k.shape[0] == 1 and batch > 1
    if (
        k.shape != v.shape
        or k.shape[3] != dim
        or heads % k.shape[2]
        or k.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together"
        )
    if shared and (causal or lengths is not None):
        raise ValueError("rows that share their keys have no lengths and no tokens of their own")
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    queries = q.reshape(1, batch * new, heads, dim) if shared else q
    tuning = tuning or default_tuning(dim)
    parts = _Parts(q, [_spans_of(queries, k.shape[2], tuning)])
    _launch(
        queries, parts, 0, softmax_scale, tuning,
        kv_heads=k.shape[2], k=k, v=v, lengths=lengths, newest=new if causal else 0,
    )  # fmt: skip
    out, lse = merge_parts(parts.out, parts.lse, dtype=torch.float32)
    return out, lse.transpose(1, 2)


# ---- keys and values by address ----------------------------------------------------------------


def append_tokens(k: Tensor, v: Tensor, table: KVTable, layer: int) -> None:
    """Write new keys and values where a layer's last segment ends.

    Args:
        k: ``(B, T, K, D)``.
        v: As ``k``.
        table: Loaded, and stepped to a length that counts the new tokens; if that says that none
            of them is kept here, nothing is written.
        layer: Which layer.
    """
    if k.device.type == "cpu" and not _interpreted():
        count, newest = table.head[:2].tolist()
        if newest:
            keys, values = table.segments(layer)[count - 1]
            keys[:, keys.shape[1] - k.shape[1] :] = k
            values[:, values.shape[1] - v.shape[1] :] = v
        return
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    rows, new, kv_heads, dim = k.shape
    with _current(k.device):
        _loaded().append_kernel[(new, rows)](
            k, v, table.places, table.head, layer, new,
            k.stride(0), k.stride(1), k.stride(2), table.places.stride(0),
            K=kv_heads, D=dim, BLOCK_D=_power(dim), BLOCK_K=_power(kv_heads), num_warps=2,
        )  # fmt: skip


@torch.no_grad()
def attend_tables(
    q: Tensor,
    tables: Sequence[KVTable],
    layer: int,
    *,
    softmax_scale: float | None = None,
    packed: bool = False,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention of few queries over all segments of the tables.

    Args:
        q: ``(B, T, H, D)``.
        tables: Each with B rows, or with one that all rows of the queries share.
        layer: Which layer.
        softmax_scale: Factor on the scores; None for ``D ** -0.5``.
        packed: Whether the lse is wanted too, ready to be sent and merged.
        tuning: How the kernel is built; None to choose.

    Returns:
        ``out (B, T, H, D)`` in q's dtype; packed, ``(B, T, H, D + 1)`` float32 (float64), the lse
        last.
    """
    batch, new, heads, dim = q.shape
    if q.device.type == "cpu" and not _interpreted():
        out, lse = _attend_in_torch(q, tables, layer, softmax_scale)
        return torch.cat([out, lse.unsqueeze(-1)], dim=-1) if packed else out.to(q.dtype)
    tuning = tuning or default_tuning(dim)
    folded = [
        q if table.rows == batch else q.reshape(1, batch * new, heads, dim) for table in tables
    ]
    parts = _Parts(q, [_spans_of(each, tables[0].kv_heads, tuning) for each in folded])
    for number, (queries, table) in enumerate(zip(folded, tables, strict=True)):
        _launch(
            queries, parts, number, softmax_scale, tuning,
            kv_heads=table.kv_heads, table=table, layer=layer,
        )  # fmt: skip
    if packed:
        whole = parts.out.new_empty((batch, new, heads, dim + 1))
        _merge_into(parts.out, parts.lse, whole[..., :dim], whole[..., dim])
        return whole
    return merge_parts(parts.out, parts.lse, dtype=q.dtype)[0]


def merge_parts(outs: Tensor, lses: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join partial attention over disjoint sets of keys, in the order of the parts.

    Args:
        outs: ``(P, B, T, H, D)`` float32, perhaps a view of packed results.
        lses: ``(P, B, T, H)``, likewise; -inf where a part has no key for a query.
        dtype: Of the output.

    Returns:
        ``out (B, T, H, D)`` and ``lse (B, T, H)``.
    """
    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:])
    if outs.device.type == "cpu" and not _interpreted():
        result = merge_many(list(outs), [part.transpose(1, 2) for part in lses])
        out.copy_(result[0])
        lse.copy_(result[1].transpose(1, 2))
        return out, lse
    _merge_into(outs, lses, out, lse)
    return out, lse


# ---- launches ----------------------------------------------------------------------------------


def _merge_into(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    parts, *shape, dim = outs.shape
    with _current(out.device):
        _loaded().merge_kernel[(math.prod(shape),)](
            outs, lses, out, lse, parts, outs.stride(0), lses.stride(0), outs.stride(-2),
            lses.stride(-1), out.stride(-2), lse.stride(-1),
            D=dim, BLOCK_D=_power(dim), BLOCK_P=16, num_warps=2,
        )  # fmt: skip


class _Parts:
    """Room for the partial results of one or two launches."""

    def __init__(self, q: Tensor, spans: Sequence[int]) -> None:
        shape = (sum(spans), *q.shape[:3])
        self.spans = spans
        self.out = q.new_empty((*shape, q.shape[3]), dtype=torch.float32)
        self.lse = q.new_empty(shape, dtype=torch.float32)

    def of(self, launch: int) -> tuple[Tensor, Tensor]:
        first = sum(self.spans[:launch])
        return self.out[first:], self.lse[first:]


def _spans_of(q: Tensor, kv_heads: int, tuning: Tuning) -> int:
    queries = q.shape[1] * (q.shape[2] // kv_heads)
    tiles = -(-queries // _tile(queries, q.device))
    return _spans(q.device, q.shape[0] * tiles * kv_heads, tuning)


def _launch(
    q: Tensor,
    parts: _Parts,
    number: int,
    softmax_scale: float | None,
    tuning: Tuning,
    *,
    kv_heads: int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    lengths: Tensor | None = None,
    newest: int = 0,
    table: KVTable | None = None,
    layer: int = 0,
) -> None:
    """Run the split kernel over tensors or over a table."""
    kernels = _loaded()
    batch, new, heads, dim = q.shape
    if q.stride(3) != 1:
        q = q.contiguous()
    group = heads // kv_heads
    tile = _tile(new * group, q.device)
    out, lse = parts.of(number)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    line = heads * new * batch
    if table is not None:
        places, head = table.places, table.head
        k = v = q  # not read
        strides = (0, kv_heads * dim, dim, places.stride(0))
        tokens = 0
    else:
        assert k is not None and v is not None
        places = head = q
        strides = (0 if k.shape[0] == 1 else k.stride(0), k.stride(1), k.stride(2), 0)
        tokens = k.shape[1]
    grid = (parts.spans[number] * kv_heads, -(-new * group // tile), batch)
    with _current(q.device):
        kernels.split_kernel[grid](
            q, k, v, q if lengths is None else lengths, places, head, out, lse,
            scale * kernels.LOG2_E.value, layer, tokens, newest, new,
            q.stride(0), q.stride(1), q.stride(2), *strides, line,
            TABLE=table is not None, LENGTHS=lengths is not None,
            ROWS=1 if table is None else table.rows, K=kv_heads, G=group, D=dim,
            BLOCK_D=_power(dim), BLOCK_M=tile, BLOCK_N=tuning.block_tokens,
            num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip


def _attend_in_torch(
    q: Tensor, tables: Sequence[KVTable], layer: int, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """What the kernels do, from the same tables."""
    batch, new, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for table in tables:
        segments = table.segments(layer)
        if not segments:
            continue
        keys, values = (
            torch.cat(each, dim=1).to(wide).expand(batch, -1, -1, -1)
            for each in zip(*segments, strict=True)
        )
        newest, length = table.head[1:3].tolist()
        ranges = table.head[2 + table.rows :].view(-1, 2).expand(batch, 2)
        places = torch.arange(length)
        limit = length - newest + (torch.arange(new) + 1).clamp(max=newest)
        seen = places < limit[:, None]
        hidden = (places >= ranges[:, :1]) & (places < ranges[:, 1:])
        grouped = q.unflatten(2, (table.kv_heads, -1)).to(wide)
        scores = torch.einsum("btkgd,bnkd->btkgn", grouped, keys) * scale
        masked = (~seen)[None] | hidden[:, None]
        scores = scores.masked_fill(masked[:, :, None, None], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
        outs.append(torch.einsum("btkgn,bnkd->btkgd", weights, values).reshape(q.shape))
        lses.append(lse.reshape(batch, new, heads).transpose(1, 2))
    if not outs:
        return q.new_zeros(q.shape, dtype=wide), q.new_full(
            (batch, new, heads), -math.inf, dtype=wide
        )
    out, lse = merge_many(outs, lses)
    return out, lse.transpose(1, 2)
