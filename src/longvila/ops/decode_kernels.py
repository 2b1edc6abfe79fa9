"""Triton kernels of decoding: few queries over a very long cache, as fast as the cache can be read.

1. *Split*. The cached tokens are cut into as many spans as fill the device once. A program takes
   one span and one kv head; the queries of that head (its group, times the new tokens) are one tile
   of at least 16 rows, so keys and values are read once and multiplied on tensor cores::

       program (span s, kv head h)   q (16.., D) x keys of the span, block by block
                                     -> out (rows, D), lse (rows,) of the span, float32

2. *Merge*. One program for each query and head joins the spans by log-sum-exp. The same kernel
   joins the results of several ranks.

Keys and values are found in one of two ways. Dense: two tensors. By a table: on the device, the
address of each segment of a layer and the number of its first token. Lengths, the table and its
number of rows are read by the kernel and may change between two replays of a captured graph.

Nothing is imported from here where Triton is not installed (`longvila.ops.decode`). The
interpreter of Triton (``TRITON_INTERPRET=1``) runs these kernels on a CPU.

Letters: B rows, T new tokens, H query heads, K kv heads, G = H / K, D head dim.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are Triton's, which has no annotations for them but constexpr.

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_span(
    acc, top, total, q, limit, hide_from, hide_to, k_ptr, v_ptr, start, stop, token_stride,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens ``start..stop`` of one segment, whose token 0 is at ``k_ptr``.

    ``limit`` is one past the last token that each query sees, ``hide_from..hide_to`` tokens that
    nobody does, all counted as ``start`` is.
    """
    dims = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)
    inside = dims < D
    wide = tl.cast(token_stride, tl.int64)
    for n in tl.range(start, stop, BLOCK_N):
        tokens = n + offsets
        live = tokens < stop
        base = n * wide
        places = offsets[:, None] * token_stride + dims[None, :]
        mask = live[:, None]
        if BLOCK_D != D:
            mask = mask & inside[None, :]
        k = tl.load(k_ptr + base + places, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        seen = live & ((tokens < hide_from) | (tokens >= hide_to))
        scores = tl.where(seen[None, :] & (tokens[None, :] < limit[:, None]), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.math.exp2(scores - safe[:, None])
        shrink = tl.math.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + base + places, mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["layer", "tokens", "newest"])
def split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, head_ptr, out_ptr, lse_ptr,
    scale, layer, tokens, newest, new_tokens,
    q_row, q_token, q_head, kv_row, token_stride, kv_head_stride, table_stride, part_stride,
    TABLE: tl.constexpr, LENGTHS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One span of the cache for one kv head, one tile of queries, and one row of the batch.

    The grid is ``(spans * K, tiles, B)``, kv heads fastest: programs that run at the same time read
    neighbouring memory. ``out (spans, B, T, H, D)`` and ``lse (spans, B, T, H)`` are float32.

    With ``TABLE``: ``head`` is ``[segments, newest, length of each row, hidden from/to of each
    row]`` and ``table`` has a line a segment, ``[first token, elements between rows, address of the
    keys of layer 0, of its values, of layer 1 ...]``, and one more line that ends the last segment.
    Without: ``k, v (B or 1, tokens, K, D)`` and, with ``LENGTHS``, how many of a row are valid.
    """
    part = tl.program_id(0) // K
    kv_head = tl.program_id(0) % K
    spans = tl.num_programs(0) // K
    row = tl.program_id(2)

    # The queries of this kv head: token by token, of each the G heads.
    index = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = index // G
    head = kv_head * G + index % G
    real = index < new_tokens * G
    dims = tl.arange(0, BLOCK_D)
    q_at = q_ptr + row.to(tl.int64) * q_row + token[:, None] * q_token + head[:, None] * q_head
    q = tl.load(q_at + dims[None, :], mask=real[:, None] & (dims[None, :] < D), other=0.0)

    if TABLE:
        length = tl.load(head_ptr + 2 + row).to(tl.int32)
        own = tl.load(head_ptr + 1).to(tl.int32)
        hide_from = tl.load(head_ptr + 2 + ROWS + 2 * row).to(tl.int32)
        hide_to = tl.load(head_ptr + 3 + ROWS + 2 * row).to(tl.int32)
    else:
        length = tokens
        if LENGTHS:
            length = tl.load(lengths_ptr + row).to(tl.int32)
        own = newest
        hide_from = length
        hide_to = length
    # Of the newest tokens, query t sees those up to its own.
    limit = length - own + tl.minimum(token + 1, own)

    each = tl.cdiv(tl.cdiv(length, spans), BLOCK_N) * BLOCK_N
    start = part * each
    stop = tl.minimum(start + each, length)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if TABLE:
        kind: tl.constexpr = tl.pointer_type(q_ptr.dtype.element_ty)
        for number in range(tl.load(head_ptr).to(tl.int32)):
            line = table_ptr + number * table_stride
            first = tl.load(line).to(tl.int32)
            after = tl.load(line + table_stride).to(tl.int32)
            begin, end = tl.maximum(start, first), tl.minimum(stop, after)
            if begin < end:
                # Rows of a table are apart by whole heads of a multiple of 8 elements.
                apart = tl.multiple_of(tl.load(line + 1), 8)
                at = row * apart + kv_head * D
                keys = tl.multiple_of(tl.load(line + 2 + 2 * layer).to(kind), 16) + at
                values = tl.multiple_of(tl.load(line + 3 + 2 * layer).to(kind), 16) + at
                acc, top, total = _over_span(
                    acc, top, total, q, limit - first, hide_from - first, hide_to - first,
                    keys, values, begin - first, end - first, token_stride, scale,
                    D, BLOCK_D, BLOCK_N,
                )  # fmt: skip
    else:
        at = row.to(tl.int64) * kv_row + kv_head * kv_head_stride
        acc, top, total = _over_span(
            acc, top, total, q, limit, hide_from, hide_to, k_ptr + at, v_ptr + at, start, stop,
            token_stride, scale, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip

    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, top * LN_2 + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    heads: tl.constexpr = K * G
    place = part.to(tl.int64) * part_stride + (row * new_tokens + token) * heads + head
    tl.store(lse_ptr + place, lse, mask=real)
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :], out,
        mask=real[:, None] & (dims[None, :] < D),
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, parts, out_part, lse_part, out_from, lse_from,
    out_to, lse_to, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query and head: line ``program_id(0)`` of every part.

    ``*_part`` are elements from part to part, ``*_from`` from line to line of the parts, ``*_to``
    of the result.
    """
    line = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        here = part < parts
        lse = tl.load(
            part_lse_ptr + part * lse_part + line * lse_from, mask=here, other=-float("inf")
        )
        higher = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.math.exp2((lse - safe) * LOG2_E)
        shrink = tl.math.exp2((top - safe) * LOG2_E)
        out = tl.load(
            part_out_ptr + part[:, None] * out_part + line * out_from + dims[None, :],
            mask=here[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        acc = acc * shrink + tl.sum(out * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        top = higher
    some = total > 0
    whole = tl.where(some, total, 1.0)
    tl.store(out_ptr + line * out_to + dims, acc / whole, mask=inside)
    tl.store(lse_ptr + line * lse_to, tl.where(some, top + tl.log(whole), -float("inf")))


@triton.jit(do_not_specialize=["layer"])
def append_kernel(
    k_ptr, v_ptr, table_ptr, head_ptr, layer, new_tokens,
    row_stride, token_stride, head_stride, table_stride,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one new token of one row, ``program_id`` (token, row), where the table ends.

    The length counts it already. Nothing is written where no token is the queries' own.
    """
    token = tl.program_id(0)
    row = tl.program_id(1)
    own = tl.load(head_ptr + 1).to(tl.int32)
    if own > 0:
        length = tl.load(head_ptr + 2 + row).to(tl.int32)
        line = table_ptr + (tl.load(head_ptr) - 1) * table_stride
        first = tl.load(line).to(tl.int32)
        apart = tl.load(line + 1)
        heads = tl.arange(0, BLOCK_K)[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :]
        mask = (heads < K) & (dims < D)
        at = row.to(tl.int64) * row_stride + token * token_stride + heads * head_stride + dims
        to = (length - new_tokens + token - first).to(tl.int64) * (K * D) + row * apart
        to = to + heads * D + dims
        kind: tl.constexpr = tl.pointer_type(k_ptr.dtype.element_ty)
        keys = tl.load(line + 2 + 2 * layer).to(kind)
        values = tl.load(line + 3 + 2 * layer).to(kind)
        tl.store(keys + to, tl.load(k_ptr + at, mask=mask), mask=mask)
        tl.store(values + to, tl.load(v_ptr + at, mask=mask), mask=mask)
