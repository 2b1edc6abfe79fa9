"""Sequence-parallel attention: the one entry that models call.

Letters: B batch, L tokens of this rank, S tokens of its Ulysses group, H query heads, K kv heads,
D head dim, U Ulysses ranks.

1. Each rank holds L tokens of all heads. The head exchange (:mod:`longvila.sp.ulysses`) turns that
   into all S tokens of the ring rank for some heads; the ring (:mod:`longvila.sp.ring`) lets the
   keys of the other ring ranks visit; the exchange back gives L tokens of all heads::

       q, k, v (B, L, H, D) --one all-to-all--> (B, S, H/U, D) --ring--> out (B, S, H/U, D)
       out (B, L, H, D)     <--one all-to-all--------------------------------'

2. With ``context.head_chunks > 1`` this runs a few heads at a time: while one part is computed, the
   next part's inputs and the last part's output are on their way.
3. All of it is one ``autograd.Function``: every block's backward needs the merged out and lse.

Checkpointing (:func:`longvila.keep.keep`): out and lse are kept. When the layer runs again nothing
is computed or exchanged here; the backward then sends q, k, v and out along with dout in the same
all-to-all. Without such a checkpoint the exchanged q, k, v and out are saved, and dout travels
alone.

On a mesh without sequence parallelism this is :func:`longvila.ops.attention.attention`, and nothing
else: no exchange, no copy.

Batches: the primary form is one row of packed documents (B = 1). For B > 1 every row has the
documents of the context; rows go through the exchanges side by side, dense calls take them as a
batch and packed calls row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longvila.keep import is_keeping, keep
from longvila.ops.attention import attention
from longvila.sp.blocks import PackedCall, RingPlan
from longvila.sp.comm import wide_dtype
from longvila.sp.context import SPContext
from longvila.sp.ring import Kernel, ring_backward, ring_forward
from longvila.sp.ulysses import (
    HeadExchange,
    Heads,
    PendingHeads,
    batch_first,
    plan_head_chunks,
    plan_heads,
    split_columns,
)

_QKV: tuple[Heads, ...] = ("q", "kv", "kv")


def sp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: SPContext,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return attention of this rank's tokens over the whole packed sequence.

    Every rank of the sequence-parallel group must call it, ranks without tokens too. Tokens attend
    only within their document.

    Args:
        q: ``(B, L, H, D)`` local queries.
        k: ``(B, L, K, D)`` local keys; K divides H, and neither need fit the mesh.
        v: Like k.
        context: The batch's context.
        softmax_scale: Factor on the scores; None for ``D ** -0.5``.
        causal: Whether a token sees only tokens up to itself.
        backend: Name of an attention back end; None to choose.

    Returns:
        ``(B, L, H, D)`` in q's dtype; differentiable once.

    Raises:
        ValueError: If the tensors do not have the shape that the context says.
        TypeError: If their dtypes differ.

    Comm: Forward: an all-to-all-v of ``B * L * (H + 2 K') * D`` elements (K' counts a kv head
        once for each rank it goes to), the ring's messages of k and v, an all-to-all-v of
        ``B * S * H / U * D``; with head chunks, as many smaller ones. Backward: the same exchanges
        reversed, the ring's messages twice. No other collective, no barrier, no lengths.

    Source: DeepSpeed-Ulysses (arXiv 2309.14509) and ring attention (arXiv 2310.01889) on one mesh,
        as in LongVILA (arXiv 2408.10188, section 3.3); uneven heads, unrepeated kv heads, the
        packed exchange and the direct return of dK and dV differ.
    """
    if torch.compiler.is_compiling():
        # Plans and messages are not to be traced. Named here, since naming the compiler loads it.
        untraced = torch.compiler.disable(sp_attention)
        options = {"softmax_scale": softmax_scale, "causal": causal, "backend": backend}
        return cast(Tensor, untraced(q, k, v, context, **options))
    _check(q, k, v, context)
    if not context.is_parallel:
        return _local(q, k, v, context, softmax_scale, causal, backend)
    # Outside of autograd, so that a plan is made even if the function below is skipped.
    plan = context.ring_plan(causal)
    kernel = Kernel(softmax_scale, backend, needs_backward=torch.is_grad_enabled())
    return cast(Tensor, _SPAttention.apply(q, k, v, context, plan, kernel))  # type: ignore[no-untyped-call]


def _check(q: Tensor, k: Tensor, v: Tensor, context: SPContext) -> None:
    local = context.num_local_tokens
    where = context.mesh.describe_rank()
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be (B, L, H, D) and k, v (B, L, K, D), got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)} on {where}"
        )
    if q.shape[1] != local or k.shape[1] != local:
        raise ValueError(
            f"{where} holds {local} of {context.num_tokens} tokens, got q {tuple(q.shape)} and k "
            f"{tuple(k.shape)}: was the input sharded with this context?"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head dim ({where})"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    plan_heads(q.shape[2], k.shape[2], 1)  # K divides H


def _local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: SPContext,
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
) -> Tensor:
    """The plain attention: dense for one document, packed for several."""
    calls = context.ring_plan(causal).local
    options: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "backend": backend,
    }
    call = calls[0] if calls else None
    if not isinstance(call, PackedCall):
        return attention(q, k, v, **options)[0]
    options["cu_seqlens_q"] = call.cu_seqlens_q.on(q.device)
    options["lengths_q"] = call.q_lengths
    rows = [
        attention(q_row, k_row, v_row, **options)[0]
        for q_row, k_row, v_row in zip(q, k, v, strict=True)
    ]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


@dataclass
class _Exchanged:
    """What the forward leaves for the backward, a head chunk each: views of exchanged buffers."""

    qkv: list[Tensor]
    out: list[Tensor]


class _SPAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: SPContext,
        plan: RingPlan,
        kernel: Kernel,
    ) -> Tensor:
        kept = is_keeping()
        exchanged = _Exchanged([], [])

        def compute() -> tuple[Tensor, ...]:
            return _forward(q, k, v, context, plan, kernel, exchanged)

        out, *lses = keep(compute)
        ctx.call = (context, plan, kernel)
        ctx.heads = (q.shape[2], k.shape[2])
        # Under a checkpoint both passes must save alike, and the second has nothing exchanged.
        ctx.saved_exchanged = not kept and context.mesh.ulysses_size > 1
        if ctx.saved_exchanged:
            ctx.save_for_backward(*exchanged.qkv, *exchanged.out, *lses)
        else:
            ctx.save_for_backward(q, k, v, out, *lses)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        local: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        exchanged: _Exchanged | None = None
        if ctx.saved_exchanged:
            third = len(saved) // 3
            exchanged = _Exchanged(list(saved[:third]), list(saved[third : 2 * third]))
            lses = saved[2 * third :]
        else:
            local, lses = saved[:4], saved[4:]
        context, plan, kernel = ctx.call
        grads = _backward(dout, local, exchanged, lses, context, plan, kernel, ctx.heads)
        return (*grads, None, None, None)


def _exchanges(context: SPContext, heads: int, kv_heads: int) -> tuple[list[HeadExchange], bool]:
    mesh = context.mesh
    chunks = plan_head_chunks(heads, kv_heads, mesh.ulysses_size, context.head_chunks)
    exchanges = [
        HeadExchange(plan, context.ulysses_lengths, mesh.ulysses_rank, mesh.ulysses_group)
        for plan in chunks.plans
    ]
    return exchanges, chunks.kv_is_shared


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: SPContext,
    plan: RingPlan,
    kernel: Kernel,
    exchanged: _Exchanged,
) -> tuple[Tensor, ...]:
    """Return out and the lse of each head chunk; fill ``exchanged``."""
    mesh = context.mesh
    if mesh.ulysses_size == 1:
        (share,) = plan_heads(q.shape[2], k.shape[2], 1).shares
        return ring_forward(q, k, v, plan, share.runs, mesh.ring_group, kernel)
    exchanges, _ = _exchanges(context, q.shape[2], k.shape[2])
    out = q.new_empty(q.shape)
    lses: list[Tensor] = []
    arriving = _Ahead(exchanges, (q, k, v), _QKV)
    leaving: PendingHeads | None = None
    for chunk, exchange in enumerate(exchanges):
        rows = arriving.next()
        share = exchange.share
        columns = [share.num_heads, share.num_kv_heads, share.num_kv_heads]
        q_part, k_part, v_part = split_columns(rows, columns)
        part, lse = ring_forward(q_part, k_part, v_part, plan, share.runs, mesh.ring_group, kernel)
        # (B, S, heads, D) -> (S, B, heads, D)
        part_rows = part.transpose(0, 1).contiguous()
        exchanged.qkv.append(rows)
        exchanged.out.append(part_rows)
        lses.append(lse)
        sent = exchange.post_gather(part_rows, ("q",))
        if leaving is not None:
            exchanges[chunk - 1].collect(leaving.wait(), ("q",), (out,))
        leaving = sent
    assert leaving is not None
    exchanges[-1].collect(leaving.wait(), ("q",), (out,))
    return (out, *lses)


def _backward(
    dout: Tensor,
    local: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    exchanged: _Exchanged | None,
    lses: Sequence[Tensor],
    context: SPContext,
    plan: RingPlan,
    kernel: Kernel,
    heads: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv from local q, k, v, out, or from what the forward exchanged."""
    mesh = context.mesh
    if mesh.ulysses_size == 1:
        assert local is not None
        q, k, v, out = local
        (share,) = plan_heads(*heads, 1).shares
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        ring_backward(dout, q, k, v, out, lses[0], plan, share.runs, mesh.ring_group, kernel, grads)
        return grads
    exchanges, add = _exchanges(context, *heads)
    shape = dout.shape
    dq = dout.new_empty(shape)
    kv_shape = (shape[0], shape[1], heads[1], shape[3])
    if add:
        wide = wide_dtype(dout.dtype)
        dk, dv = (dout.new_zeros(kv_shape, dtype=wide) for _ in range(2))
    else:
        dk, dv = dout.new_empty(kv_shape), dout.new_empty(kv_shape)
    if exchanged is not None:
        arriving = _Ahead(exchanges, (dout,), ("q",))
    else:
        assert local is not None
        arriving = _Ahead(exchanges, (*local, dout), (*_QKV, "q", "q"))
    leaving: PendingHeads | None = None
    for chunk, exchange in enumerate(exchanges):
        rows = arriving.next()
        share = exchange.share
        columns = [share.num_heads, share.num_kv_heads, share.num_kv_heads]
        if exchanged is not None:
            (dpart,) = split_columns(rows, [share.num_heads])
            q, k, v = split_columns(exchanged.qkv[chunk], columns)
            out = batch_first(exchanged.out[chunk])
        else:
            q, k, v, out, dpart = split_columns(rows, [*columns, share.num_heads, share.num_heads])
        gradient = rows.new_empty((*rows.shape[:2], sum(columns), rows.shape[3]))
        dq_part, dk_part, dv_part = split_columns(gradient, columns)
        ring_backward(
            dpart, q, k, v, out, lses[chunk], plan, share.runs, mesh.ring_group, kernel,
            (dq_part, dk_part, dv_part),
        )  # fmt: skip
        sent = exchange.post_gather(gradient, _QKV)
        if leaving is not None:
            exchanges[chunk - 1].collect(leaving.wait(), _QKV, (dq, dk, dv), add)
        leaving = sent
    assert leaving is not None
    exchanges[-1].collect(leaving.wait(), _QKV, (dq, dk, dv), add)
    return dq, dk.to(dout.dtype), dv.to(dout.dtype)


class _Ahead:
    """The head chunks of some tensors; the next chunk is always under way."""

    def __init__(
        self, exchanges: Sequence[HeadExchange], tensors: Sequence[Tensor], kinds: Sequence[Heads]
    ) -> None:
        self._exchanges = iter(exchanges)
        self._tensors = tensors
        self._kinds = kinds
        self._next = self._post()

    def _post(self) -> PendingHeads | None:
        exchange = next(self._exchanges, None)
        return None if exchange is None else exchange.post_scatter(self._tensors, self._kinds)

    def next(self) -> Tensor:
        """Return the next chunk ``(S, B, W, D)`` and start the one after it."""
        assert self._next is not None
        current, self._next = self._next, self._post()
        return current.wait()
