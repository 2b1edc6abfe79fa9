"""Attention with its log-sum-exp: one signature over every kernel.

``attention`` returns ``(out, lse)`` and is differentiable in ``out``. ``attention_forward`` and
``attention_backward`` are its two halves without autograd. The backward half accepts an ``out``
and ``lse`` that belong to more keys than it is given, which is all that ring, all-gather and
decode merges need: run each block forward, merge by lse (:mod:`longvila.ops.lse`), run each block
backward with the merged pair, add the gradients.

Steps of a call: check the arguments; answer empty inputs here (no kernel takes them); describe
the call by an :class:`AttentionSpec`; take the first back end of
:data:`longvila.ops.backends.BACKENDS` that does not refuse it, or the one asked for; run it.

Conventions (flash-attention's): dense ``q (B, Sq, H, D)``, ``k, v (B, Sk, K, D)``,
``lse (B, H, Sq)``; packed ``q (T, H, D)`` with int32 ``cu_seqlens``, ``lse (H, T)``. lse is
float32, and float64 for float64 inputs. K divides H and kv heads are not repeated by the caller.
Causal is aligned at the bottom right: query ``i`` sees keys ``j <= i + Sk - Sq``; a query that
sees none has ``out = 0`` and ``lse = -inf``.

What it does not do: dropout, windows, biases, gradients through lse.

Dimensions: B batch, S tokens, T packed tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longvila.keep import keep
from longvila.log import log_once
from longvila.ops.backends import BACKENDS, AttentionSpec, Backend, Packing
from longvila.ops.backends.base import no_results


def list_backends() -> list[str]:
    """Return the names of all back ends, best first, usable here or not."""
    return [backend.name for backend in BACKENDS]


def select_backend(spec: AttentionSpec, backend: str | None = None) -> Backend:
    """Return the best back end for a kind of call, or the one asked for.

    Args:
        spec: What the call needs.
        backend: A name from :func:`list_backends`; None to choose.

    Raises:
        ValueError: If the name is unknown, the back end asked for refuses the call, or all do;
            the message gives the reasons.
    """
    return _select(spec, backend)


@functools.cache
def _select(spec: AttentionSpec, name: str | None) -> Backend:
    refusals: dict[str, str] = {}
    for backend in BACKENDS:
        if name is not None and backend.name != name:
            continue
        reason = backend.refusal(spec)
        if reason is None:
            _log_choice(backend.name, spec, refusals, forced=name is not None)
            return backend
        refusals[backend.name] = reason
    if name is None:
        reasons = "".join(f"\n  {other}: {why}" for other, why in refusals.items())
        raise ValueError(f"no attention back end serves {spec}:{reasons}")
    if name not in refusals:
        raise ValueError(f"unknown attention back end {name!r}; there are {list_backends()}")
    raise ValueError(f"attention back end {name!r} cannot serve this call: {refusals[name]}")


def _log_choice(name: str, spec: AttentionSpec, refusals: dict[str, str], forced: bool) -> None:
    dtype = str(spec.dtype).removeprefix("torch.")
    kind = "packed" if spec.packed else "dense"
    text = f"attention back end {name} for {kind} {dtype} head dim {spec.head_dim}"
    text += " (asked for)" if forced else "".join(f"; {n}: {why}" for n, why in refusals.items())
    quadratic = name == "eager" and not forced
    # On a CPU there is nothing to wonder about.
    level = logging.DEBUG if spec.device_type == "cpu" else logging.INFO
    level = logging.WARNING if quadratic else level
    log_once(__name__, level, text + ("; memory grows with Sq * Sk" if quadratic else ""))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lengths_q: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp, differentiable in the first.

    Args:
        q: ``(B, Sq, H, D)`` or, with ``cu_seqlens``, packed ``(T, H, D)``.
        k: ``(B, Sk, K, D)`` or ``(Tk, K, D)``; K divides H.
        v: Like k.
        causal: Whether query ``i`` sees only keys ``j <= i + Sk - Sq`` (of its document).
        cu_seqlens_q: ``(documents + 1,)`` int32 on q's device; makes the call a packed one.
        cu_seqlens_k: The same for the keys; ``cu_seqlens_q`` if not given.
        max_seqlen_q: The longest document's queries; derived from ``lengths_q`` if given.
        max_seqlen_k: The longest document's keys.
        lengths_q: Queries of each document on the host. Some back ends call a kernel a document
            and need it; on a GPU nothing is read back from ``cu_seqlens``.
        lengths_k: Keys of each document.
        softmax_scale: Factor on the scores; None for ``D ** -0.5``.
        backend: A name from :func:`list_backends`; None to choose.

    Returns:
        ``out`` of q's shape and dtype; ``lse (B, H, Sq)`` or ``(H, T)``, float32 (float64 for
        float64), without gradient.

    Raises:
        ValueError: If shapes do not belong together, packing is incomplete, or no back end (or
            not the one asked for) serves the call.
        TypeError: If dtypes differ or are not floating.
    """
    packing = _packing(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lengths_q, lengths_k
    )
    scale = _check(q, k, v, packing, softmax_scale)
    out, lse = _Attention.apply(q, k, v, packing, causal, scale, backend)  # type: ignore[no-untyped-call]
    return out, lse


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    backend: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lengths_q: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
    needs_backward: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return ``out`` and ``lse`` without autograd; arguments as for :func:`attention`.

    Args:
        needs_backward: Whether :func:`attention_backward` will follow; a back end that has only a
            forward kernel may be chosen otherwise.
    """
    packing = _packing(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lengths_q, lengths_k
    )
    scale = _check(q, k, v, packing, softmax_scale)
    return _forward(q, k, v, packing, causal, scale, backend, needs_backward)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    backend: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    lengths_q: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the part of the gradients that comes from these keys.

    Args:
        dout: Gradient of the loss in ``out``, of q's shape.
        q: Queries; this and all others as for :func:`attention`.
        k: A block of keys: all, or some of those that ``out`` and ``lse`` cover.
        v: Its values.
        out: Attention over *all* keys, ``(B, Sq, H, D)`` or ``(T, H, D)``, in q's dtype.
        lse: Log-sum-exp over *all* keys, ``(B, H, Sq)`` or ``(H, T)``.

    Returns:
        ``dq, dk, dv`` of the shapes and dtypes of q, k, v. ``dq`` summed over the blocks is the
        gradient of q.

    Raises:
        ValueError: If shapes do not belong together, or no back end serves the call.
        TypeError: If dtypes differ or are not floating.
    """
    packing = _packing(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lengths_q, lengths_k
    )
    scale = _check(q, k, v, packing, softmax_scale)
    _check_results(q, dout, out, lse)
    return _backward(dout, q, k, v, out, lse, packing, causal, scale, backend)


class _Attention(torch.autograd.Function):
    """``out`` with gradient; the results may be kept by a checkpoint around it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packing: Packing | None,
        causal: bool,
        scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        needs_backward = any(ctx.needs_input_grad[:3])
        out, lse = keep(lambda: _forward(q, k, v, packing, causal, scale, backend, needs_backward))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (packing, causal, scale, backend)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, out, lse = ctx.saved_tensors
        return (*_backward(dout, q, k, v, out, lse, *ctx.call), None, None, None, None)


@torch.no_grad()
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None,
    causal: bool,
    scale: float,
    backend: str | None,
    needs_backward: bool,
) -> tuple[Tensor, Tensor]:
    chosen = select_backend(_spec(q, packing, causal, needs_backward), backend)
    if q.numel() == 0 or k.numel() == 0:
        return no_results(q)
    return chosen.forward(q, k, v, causal=causal, softmax_scale=scale, packing=packing)


@torch.no_grad()
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: Packing | None,
    causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = select_backend(_spec(q, packing, causal, True), backend)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return chosen.backward(
        dout, q, k, v, out, lse, causal=causal, softmax_scale=scale, packing=packing
    )


def _spec(q: Tensor, packing: Packing | None, causal: bool, needs_backward: bool) -> AttentionSpec:
    known = packing is None or not (packing.lengths_q is None or packing.lengths_k is None)
    return AttentionSpec(
        dtype=q.dtype,
        head_dim=q.shape[-1],
        device_type=q.device.type,
        causal=causal,
        packed=packing is not None,
        needs_backward=needs_backward,
        host_lengths=known or q.device.type == "cpu",
        capability=_capability(q.device),
    )


def _packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    lengths_q: Sequence[int] | None,
    lengths_k: Sequence[int] | None,
) -> Packing | None:
    """Return where the documents are, or None for a dense call."""
    if cu_seqlens_q is None:
        given = {
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "lengths_q": lengths_q,
            "lengths_k": lengths_k,
        }
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(
                f"{', '.join(extra)} given without cu_seqlens_q; a packed call needs it"
            )
        return None
    if cu_seqlens_k is None:
        # Self-attention: the keys are packed like the queries.
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        lengths_k = lengths_q if lengths_k is None else lengths_k
    host_q = _host_lengths("q", cu_seqlens_q, lengths_q, q.shape[0])
    host_k = _host_lengths("k", cu_seqlens_k, lengths_k, k.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q names {cu_seqlens_q.shape[0] - 1} documents, cu_seqlens_k "
            f"{cu_seqlens_k.shape[0] - 1}: both must name the same ones"
        )
    return Packing(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=_longest("q", host_q, max_seqlen_q),
        max_seqlen_k=_longest("k", host_k, max_seqlen_k),
        lengths_q=host_q,
        lengths_k=host_k,
    )


def _host_lengths(
    which: str, cu_seqlens: Tensor, lengths: Sequence[int] | None, tokens: int
) -> tuple[int, ...] | None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens_{which} must be int32 of shape (documents + 1,), got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if lengths is None and cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends):
            # Kernels read past the tensors, or divide by zero.
            raise ValueError(f"cu_seqlens_{which} must begin at 0 and not fall, got {ends}")
        lengths = [b - a for a, b in itertools.pairwise(ends)]
    if lengths is None:
        return None
    if len(lengths) != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"lengths_{which} names {len(lengths)} documents, cu_seqlens_{which} "
            f"{cu_seqlens.shape[0] - 1}"
        )
    if sum(lengths) != tokens:
        raise ValueError(
            f"the documents of lengths_{which} (or cu_seqlens_{which}) hold {sum(lengths)} tokens, "
            f"the packed tensor {tokens}"
        )
    return tuple(lengths)


def _longest(which: str, lengths: tuple[int, ...] | None, longest: int | None) -> int:
    if lengths is not None:
        actual = max(lengths, default=0)
        if longest is not None and longest < actual:
            raise ValueError(f"max_seqlen_{which} is {longest}, but a document has {actual} tokens")
        return actual if longest is None else longest
    if longest is None:
        raise ValueError(
            f"a packed call on a GPU needs max_seqlen_{which} or lengths_{which}: reading "
            "cu_seqlens back would make every layer wait for the device"
        )
    return longest


def _check(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, softmax_scale: float | None
) -> float:
    """Refuse tensors that do not belong together; return the scale."""
    dims, layout = (4, "(B, S, heads, D)") if packing is None else (3, "(T, heads, D)")
    if not q.dim() == k.dim() == v.dim() == dims:
        raise ValueError(
            f"{'dense' if packing is None else 'packed'} q, k, v must be {layout}, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            + ("; packed inputs come with cu_seqlens_q" if q.dim() == 3 else "")
        )
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if q.shape[-1] != k.shape[-1] or (packing is None and q.shape[0] != k.shape[0]):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head dim"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{q.shape[-2]} query heads are not a multiple of {k.shape[-2]} kv heads; layout is "
            f"{layout}, is it heads first?"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"q, k, v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")
    return q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)


def _check_results(q: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> None:
    if dout.shape != q.shape or out.shape != q.shape:
        raise ValueError(
            f"dout {tuple(dout.shape)} and out {tuple(out.shape)} must have q's shape "
            f"{tuple(q.shape)}"
        )
    if not dout.dtype == out.dtype == q.dtype:
        raise TypeError(
            f"dout ({dout.dtype}) and out ({out.dtype}) must have q's dtype {q.dtype}; cast a "
            "float32 merge before the backward"
        )
    expected = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    if tuple(lse.shape) != expected:
        raise ValueError(f"lse must be {expected} (heads before tokens), got {tuple(lse.shape)}")
