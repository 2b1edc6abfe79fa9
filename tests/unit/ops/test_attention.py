"""Attention against the oracle: forward, every gradient, shapes, packing, choice, errors."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longvila.ops import attention as module
from longvila.ops.attention import (
    attention,
    attention_backward,
    attention_forward,
    list_backends,
    select_backend,
)
from longvila.ops.backends import AttentionSpec, fa3, fa4
from longvila.ops.lse import merge_many
from longvila.ops.varlen import from_lengths
from longvila.testing.asserts import TOLERANCE, assert_close
from longvila.testing.oracles import attention_oracle

BACKENDS = ["cpu", "eager"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
HEADS = [(4, 4), (6, 2), (7, 1)]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """lse is float32 or wider whatever the dtype, so it is held to the float32 line."""
    names = ("out", "lse", "dq", "dk", "dv")
    for name, a, b in zip(names, actual, expected, strict=True):
        limit = TOLERANCE[dtype]
        if name == "lse":
            assert torch.equal(torch.isneginf(a), torch.isneginf(b)), "rows that see nothing"
            a, b = a[~torch.isneginf(a)], b[~torch.isneginf(b)]
            limit = min(limit, 1e-5)
        assert not a.isnan().any(), name
        assert_close(a, b.to(a.dtype) if b.dtype != torch.float64 else b, name=name,
                     tolerance=limit)  # fmt: skip


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, lse = attention(q, k, v, **options)
    assert not lse.requires_grad
    return (out, lse, *torch.autograd.grad(out, (q, k, v), dout))


def run_oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out, lse = attention_oracle(q, k, v, **options)
    return (out, lse, *torch.autograd.grad(out, (q, k, v), dout.double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5), (1, 8), (8, 1)], ids=str)
def test_dense_attention_and_its_gradients_are_the_oracles(
    backend: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    causal: bool,
    lengths: tuple[int, int],
) -> None:
    (h, kv), (queries, keys) = heads, lengths
    q = draw(2, queries, h, 16, dtype=dtype)
    k, v = draw(2, keys, kv, 16, dtype=dtype, seed=1), draw(2, keys, kv, 16, dtype=dtype, seed=2)
    dout = draw(2, queries, h, 16, dtype=dtype, seed=3).detach()
    actual = run(q, k, v, dout, causal=causal, backend=backend)
    compare(actual, run_oracle(q, k, v, dout, causal=causal), dtype)
    assert actual[0].dtype == actual[2].dtype == dtype
    assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [20, 64, 72, 80, 128])
def test_head_dims(backend: str, head_dim: int) -> None:
    q, k, v, dout = (draw(1, 40, 2, head_dim, seed=i) for i in range(4))
    actual = run(q, k, v, dout.detach(), causal=True, softmax_scale=0.3, backend=backend)
    compare(actual, run_oracle(q, k, v, dout, causal=True, softmax_scale=0.3), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_longer_than_a_tile(backend: str) -> None:
    q, k, v = draw(1, 600, 2, 16), draw(1, 1100, 1, 16, seed=1), draw(1, 1100, 1, 16, seed=2)
    dout = draw(1, 600, 2, 16, seed=3).detach()
    compare(run(q, k, v, dout, causal=True, backend=backend),
            run_oracle(q, k, v, dout, causal=True), torch.float64)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@given(documents=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_packed_documents_do_not_see_each_other(
    backend: str, causal: bool, documents: list[tuple[int, int]]
) -> None:
    lengths_q, lengths_k = [d[0] for d in documents], [d[1] for d in documents]
    q = draw(sum(lengths_q), 4, 8)
    k, v = draw(sum(lengths_k), 2, 8, seed=1), draw(sum(lengths_k), 2, 8, seed=2)
    dout = draw(sum(lengths_q), 4, 8, seed=3).detach()
    packing = {"cu_seqlens_q": from_lengths(lengths_q), "cu_seqlens_k": from_lengths(lengths_k)}
    actual = run(q, k, v, dout, causal=causal, backend=backend, **packing)
    oracle = run_oracle(q, k, v, dout, causal=causal, lengths_q=lengths_q, lengths_k=lengths_k)
    compare(actual, oracle, torch.float64)


def test_packed_self_attention_needs_only_the_queries_documents() -> None:
    q, k, v = draw(10, 4, 8), draw(10, 2, 8, seed=1), draw(10, 2, 8, seed=2)
    dout = draw(10, 4, 8, seed=3).detach()
    actual = run(q, k, v, dout, causal=True, cu_seqlens_q=from_lengths([3, 7]))
    compare(actual, run_oracle(q, k, v, dout, causal=True, lengths_q=[3, 7]), torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_inputs_give_zeros_of_the_right_shape(
    backend: str, shape: tuple[int, int], packed: bool
) -> None:
    queries, keys = shape
    lead: tuple[int, ...] = () if packed else (2,)
    q = draw(*lead, queries, 4, 8)
    k, v = draw(*lead, keys, 2, 8, seed=1), draw(*lead, keys, 2, 8, seed=2)
    options: dict[str, Any] = {"backend": backend, "causal": True}
    if packed:
        options["cu_seqlens_q"] = from_lengths([queries])
        options["cu_seqlens_k"] = from_lengths([keys])
    out, lse, dq, dk, dv = run(q, k, v, torch.ones_like(q), **options)
    assert out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert lse.shape == (*lead, 4, queries) and torch.isneginf(lse).all()
    for x in (out, dq, dk, dv):
        assert not x.any()


def test_no_documents_at_all() -> None:
    q = draw(0, 4, 8)
    out, lse = attention(q, q, q, cu_seqlens_q=from_lengths([]))
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    cuts=st.lists(st.integers(1, 15), max_size=4, unique=True).map(sorted),
    queries=st.integers(1, 20),
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_gradients_of_key_blocks_with_the_merged_lse_sum_to_the_whole(
    backend: str, cuts: list[int], queries: int, causal: bool
) -> None:
    """The identity on which ring, all-gather and decode merges stand.

    Causal blocks are made as a ring makes them: the last block of keys is causal in its own
    right (bottom-right), the earlier ones are cut by their queries.
    """
    keys = 16
    q = draw(2, queries, 4, 8)
    k, v = draw(2, keys, 2, 8, seed=1), draw(2, keys, 2, 8, seed=2)
    dout = draw(2, queries, 4, 8, seed=3).detach()
    expected = run_oracle(q, k, v, dout, causal=causal)
    # Query i sees keys up to i + keys - queries, so keys [start, end) are a bottom-right causal
    # block for the queries up to row end - (keys - queries), and full for those after it.
    calls: list[tuple[slice, slice, bool]] = []
    for start, end in pairwise([0, *cuts, keys]):
        block = slice(start, end)
        if not causal:
            calls.append((slice(0, queries), block, False))
            continue
        last = min(max(end - (keys - queries), 0), queries)
        calls += [(slice(0, last), block, True), (slice(last, queries), block, False)]
    outs, lses = [], []
    for rows, block, mask in calls:
        out, lse = torch.zeros(2, queries, 4, 8), torch.full((2, 4, queries), float("-inf"))
        out, lse = out.double(), lse.double()
        out[:, rows], lse[:, :, rows] = attention_forward(
            q[:, rows], k[:, block], v[:, block], causal=mask, backend=backend
        )
        outs.append(out)
        lses.append(lse)
    out, lse = merge_many(outs, lses)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, block, mask in calls:
        part = attention_backward(
            dout[:, rows], q[:, rows], k[:, block], v[:, block], out[:, rows], lse[:, :, rows],
            causal=mask, backend=backend,
        )  # fmt: skip
        for total, at, grad in zip((dq, dk, dv), (rows, block, block), part, strict=True):
            total[:, at] += grad
    compare((out, lse, dq, dk, dv), expected, torch.float64)


def test_gradcheck() -> None:
    q, k, v = draw(1, 4, 2, 8), draw(1, 5, 1, 8, seed=1), draw(1, 5, 1, 8, seed=2)
    torch.autograd.gradcheck(lambda *x: attention(*x, causal=True)[0], (q, k, v))


def test_only_the_inputs_that_need_it_get_a_gradient() -> None:
    q, k, v = draw(1, 4, 2, 8), draw(1, 4, 2, 8, seed=1).detach(), draw(1, 4, 2, 8, seed=2)
    out, _ = attention(q, k, v)
    out.sum().backward()
    assert q.grad is not None and v.grad is not None and k.grad is None


def test_strided_inputs_and_gradients() -> None:
    """q, k, v cut out of one projection, and a gradient that is an expanded scalar."""
    qkv = draw(2, 6, 8, 16)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    out, _ = attention(q, k, v, causal=True)
    (actual,) = torch.autograd.grad(out.sum(), qkv)
    expected, _ = attention_oracle(q, k, v, causal=True)
    assert_close(actual, torch.autograd.grad(expected.sum(), qkv)[0])


def test_the_choice_on_the_cpu_is_the_tiled_kernel(caplog: pytest.LogCaptureFixture) -> None:
    module._select.cache_clear()
    with caplog.at_level(logging.DEBUG):
        spec = AttentionSpec(dtype=torch.float32, head_dim=48, device_type="cpu", causal=True)
        assert select_backend(spec).name == "cpu"
        assert select_backend(spec).name == "cpu"
    (line,) = [record.message for record in caplog.records if "head dim 48" in record.message]
    assert "attention back end cpu" in line and "cudnn: needs a CUDA tensor" in line


def test_the_quadratic_back_end_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module._select.cache_clear()
    spec = AttentionSpec(dtype=torch.float32, head_dim=56, device_type="cuda", capability=(9, 0))
    with caplog.at_level(logging.WARNING):
        assert select_backend(spec).name == "eager"
    assert any("memory grows" in record.message for record in caplog.records)


def test_list_backends_names_all() -> None:
    assert list_backends() == ["fa4", "fa3", "cudnn", "flash", "cpu", "eager"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cudnn", {}, "needs a CUDA tensor, got one on cpu"),
        ("fa4", {}, "needs a CUDA tensor, got one on cpu"),
        ("flash", {"device_type": "cuda"}, "needs bfloat16 or float16, got torch.float32"),
        ("flash", {"device_type": "cuda", "dtype": torch.bfloat16, "head_dim": 20}, "of 8"),
        ("flash", {"device_type": "cuda", "dtype": torch.bfloat16, "capability": (7, 5)}, "8.0"),
        ("fa4", {"device_type": "cuda", "dtype": torch.bfloat16, "capability": (8, 0)}, "9.0"),
        ("fa4", {"device_type": "cuda", "dtype": torch.bfloat16}, "not installed"),
        ("fa3", {"device_type": "cuda", "dtype": torch.bfloat16}, "not installed"),
        ("fa3", {"device_type": "cuda", "dtype": torch.bfloat16, "capability": (10, 0)}, "9.x"),
        ("cpu", {"device_type": "cuda"}, "needs a CPU tensor, got one on cuda"),
        ("eager", {"dtype": torch.int32}, "needs a float dtype"),
        ("cpu", {"dtype": torch.int32}, "needs float64"),
    ],
)  # fmt: skip
def test_forcing_an_unusable_back_end_says_why(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], reason: str
) -> None:
    for package in (fa3, fa4):  # as on a machine without them
        monkeypatch.setattr(package, "_load", lambda: "it is not installed")
    spec = {"dtype": torch.float32, "head_dim": 64, "device_type": "cpu"} | change
    with pytest.raises(ValueError, match=f"(?s){name}.*cannot serve.*{reason}"):
        select_backend(AttentionSpec(**spec), name)


def test_an_unknown_back_end_lists_the_known() -> None:
    q = draw(1, 2, 2, 8)
    with pytest.raises(ValueError, match=r"unknown attention back end 'flash5'.*'eager'"):
        attention(q, q, q, backend="flash5")


def test_no_back_end_at_all_gives_every_reason() -> None:
    spec = AttentionSpec(dtype=torch.int64, head_dim=64, device_type="cpu")
    with pytest.raises(ValueError, match=r"(?s)fa4: .*cudnn: .*eager: needs a float dtype"):
        select_backend(spec)


def test_cudnn_wants_packed_lengths_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    spec = AttentionSpec(
        dtype=torch.bfloat16, head_dim=64, device_type="cuda", packed=True, host_lengths=False
    )
    with pytest.raises(ValueError, match="pass lengths_q and lengths_k"):
        select_backend(spec, "cudnn")


_Q, _KV = (1, 4, 4, 8), (1, 4, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (_Q[1:], _KV[1:], _KV[1:], {}, "must be .B, S, heads, D.*come with cu_seqlens_q"),
        (_Q, _KV, (1, 5, 2, 8), {}, "must have one shape"),
        (_Q, (2, 4, 2, 8), (2, 4, 2, 8), {}, "agree in batch and head dim"),
        (_Q, (1, 4, 2, 16), (1, 4, 2, 16), {}, "agree in batch and head dim"),
        (_Q, (1, 4, 3, 8), (1, 4, 3, 8), {}, "4 query heads are not a multiple of 3 kv heads"),
        (_Q, _KV, _KV, {"max_seqlen_k": 4}, "max_seqlen_k given without cu_seqlens_q"),
        (_Q[1:], _KV[1:], _KV[1:], {"cu_seqlens_q": [0, 3]}, "hold 3 tokens.*the packed tensor 4"),
        (_Q[1:], _KV[1:], _KV[1:], {"cu_seqlens_q": [0, 4], "cu_seqlens_k": [0, 2, 4]},
         "1 documents, cu_seqlens_k 2"),
        (_Q[1:], _KV[1:], _KV[1:], {"cu_seqlens_q": [0, 4], "max_seqlen_q": 3},
         "max_seqlen_q is 3, but a document has 4"),
        (_Q[1:], _KV[1:], _KV[1:], {"cu_seqlens_q": [0, 4], "lengths_q": [2, 2]},
         "names 2 documents, cu_seqlens_q 1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_belong_together(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options = options | {name: torch.tensor(options[name], dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        attention(draw(*q), draw(*k), draw(*v), **options)


@pytest.mark.parametrize("ends", [[0, 12, 10], [1, 5, 11]])
def test_cu_seqlens_begin_at_zero_and_do_not_fall(ends: list[int]) -> None:
    """The sum of the lengths fits in both; a kernel would end the process, or shift tokens."""
    q = torch.randn(10, 2, 8)
    with pytest.raises(ValueError, match=r"must begin at 0 and not fall, got \["):
        attention(q, q, q, cu_seqlens_q=torch.tensor(ends, dtype=torch.int32))


def test_cu_seqlens_must_be_int32() -> None:
    q = draw(4, 2, 8)
    with pytest.raises(ValueError, match=r"must be int32 .*got torch.int64"):
        attention(q, q, q, cu_seqlens_q=torch.tensor([0, 4]))


def test_dtypes_must_agree_and_float() -> None:
    q = draw(*_Q)
    with pytest.raises(TypeError, match="must share a float dtype"):
        attention(q, q.float(), q.float())


def test_lengths_on_a_gpu_are_never_read_back() -> None:
    """On a device without data the check still has to come before any read."""
    q = torch.empty(4, 2, 8, device="meta")
    with pytest.raises(ValueError, match="needs max_seqlen_q or lengths_q"):
        attention(q, q, q, cu_seqlens_q=torch.empty(2, dtype=torch.int32, device="meta"))


def test_backward_checks_what_it_is_given() -> None:
    q = draw(*_Q).detach()
    k = draw(*_KV).detach()
    out, lse = attention_forward(q, k, k, causal=True)
    with pytest.raises(ValueError, match=r"lse must be \(1, 4, 4\)"):
        attention_backward(q, q, k, k, out, lse[:, :2], causal=True)
    with pytest.raises(ValueError, match="must have q's shape"):
        attention_backward(q[:, :2], q, k, k, out, lse, causal=True)
    with pytest.raises(TypeError, match="cast a float32 merge"):
        attention_backward(q, q, k, k, out.float(), lse, causal=True)
