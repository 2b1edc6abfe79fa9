"""Every attention kernel of this machine against the float64 oracle, in bf16; prints a table.

Run with ``pytest -m gpu tests/gpu/test_attention_backends.py``. A back end that cannot serve a case
here is skipped with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from longvila.ops.attention import (
    attention,
    attention_backward,
    attention_forward,
    list_backends,
    select_backend,
)
from longvila.ops.backends import BACKENDS, AttentionSpec
from longvila.ops.lse import merge_many
from longvila.ops.varlen import from_lengths
from longvila.testing.asserts import relative_error
from longvila.testing.oracles import attention_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # What the kernel packages say while they compile is not ours to act on; a copy in cuDNN is.
    pytest.mark.filterwarnings("ignore", "error:.*cuDNN SDPA.*:UserWarning"),
]

LIMIT = 1e-2
NAMES_OF_BACKENDS = [name for name in list_backends() if name != "cpu"]
NAMES = ("out", "lse", "dq", "dk", "dv")
ROWS: list[tuple[str, str, dict[str, float], float]] = []


@pytest.fixture(scope="module", autouse=True)
def _table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, relative errors")
        print(
            f"{'back end':8} {'case':44} " + " ".join(f"{n:>8}" for n in NAMES) + "  first call s"
        )
        for backend, case, errors, seconds in sorted(ROWS):
            cells = " ".join(f"{errors.get(n, float('nan')):8.1e}" for n in NAMES)
            print(f"{backend:8} {case:44} {cells}  {seconds:.2f}")


@dataclass(frozen=True)
class Case:
    """Shapes of a call; the batch is 0 for packed ones."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int
    causal: bool
    batch: int = 1

    @property
    def packed(self) -> bool:
        return self.batch == 0

    def __str__(self) -> str:
        kind = "packed" if self.packed else f"B{self.batch}"
        q, k = "+".join(map(str, self.lengths_q)), "+".join(map(str, self.lengths_k))
        mask = "causal" if self.causal else "full"
        lengths = q if q == k else f"{q}/{k}"
        return f"{kind} {lengths} {self.heads[0]}/{self.heads[1]}x{self.head_dim} {mask}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(tokens: int, heads: int) -> Tensor:
            lead = (tokens,) if self.packed else (self.batch, tokens)
            x = torch.randn(*lead, heads, self.head_dim, device="cuda", generator=generator)
            return x.bfloat16()

        q, dout = (draw(sum(self.lengths_q), self.heads[0]) for _ in range(2))
        k, v = (draw(sum(self.lengths_k), self.heads[1]) for _ in range(2))
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def options(self) -> dict[str, Any]:
        if not self.packed:
            return {"causal": self.causal}
        return {
            "causal": self.causal,
            "cu_seqlens_q": from_lengths(self.lengths_q, device="cuda"),
            "cu_seqlens_k": from_lengths(self.lengths_k, device="cuda"),
            "lengths_q": self.lengths_q,
            "lengths_k": self.lengths_k,
        }

    def oracle(self) -> tuple[Tensor, ...]:
        q, k, v, dout = self.tensors()
        packing = {"lengths_q": self.lengths_q, "lengths_k": self.lengths_k} if self.packed else {}
        out, lse = attention_oracle(q, k, v, causal=self.causal, **packing)
        return (out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout.double()))


def refusal(backend: str, case: Case) -> str | None:
    spec = AttentionSpec(
        dtype=torch.bfloat16,
        head_dim=case.head_dim,
        device_type="cuda",
        causal=case.causal,
        packed=case.packed,
        capability=torch.cuda.get_device_capability(),
    )
    (candidate,) = (b for b in BACKENDS if b.name == backend)
    return candidate.refusal(spec)


def skip_unless_served(backend: str, case: Case) -> None:
    reason = refusal(backend, case)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def check(backend: str, name: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...],
          seconds: float) -> None:  # fmt: skip
    errors = {}
    for label, a, b in zip(NAMES, actual, expected, strict=True):
        if label == "lse":
            assert torch.equal(torch.isneginf(a), torch.isneginf(b)), f"{name}: unseen rows"
            a, b = a[~torch.isneginf(a)], b[~torch.isneginf(b)]
        assert a.shape == b.shape, f"{name}: {label} {a.shape}, expected {b.shape}"
        assert not a.isnan().any(), f"{name}: {label} has nan"
        errors[label] = relative_error(a, b)
    ROWS.append((backend, name, errors, seconds))
    assert max(errors.values()) < LIMIT, f"{backend} {name}: {errors}"


CASES = [
    Case((512,), (512,), (8, 8), 64, causal=False, batch=2),
    Case((729,), (729,), (16, 16), 72, causal=False, batch=3),
    Case((1024,), (1024,), (16, 16), 80, causal=False),
    Case((1024,), (1024,), (28, 4), 128, causal=True),
    Case((1024,), (1024,), (28, 4), 128, causal=False, batch=2),
    Case((1000,), (1003,), (7, 1), 128, causal=True, batch=2),
    Case((512,), (1536,), (28, 4), 128, causal=True),
    Case((1536,), (512,), (28, 4), 128, causal=True),
    Case((1536,), (512,), (6, 2), 64, causal=True, batch=2),
    Case((5,), (2048,), (8, 2), 128, causal=True),
    Case((2048,), (7,), (8, 2), 128, causal=False),
    Case((1,), (300,), (8, 2), 128, causal=True),
    Case((300,), (1,), (8, 2), 128, causal=True),
    Case((640,), (640,), (12, 3), 72, causal=True, batch=2),
    Case((700, 33, 1200, 1), (700, 33, 1200, 1), (28, 4), 128, causal=True, batch=0),
    Case((700, 0, 33, 129), (700, 0, 33, 129), (8, 2), 64, causal=True, batch=0),
    Case((300, 500, 64), (400, 100, 64), (8, 2), 128, causal=True, batch=0),
    Case((300, 0, 64), (400, 100, 0), (8, 2), 128, causal=False, batch=0),
    Case((4500, 100, 200, 4096, 50), (4500, 100, 200, 4096, 50), (4, 1), 128, causal=True, batch=0),
    Case((400, 600), (400, 600), (16, 16), 72, causal=False, batch=0),
]


@pytest.mark.parametrize("backend", NAMES_OF_BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_and_its_gradients_are_the_oracles(backend: str, case: Case) -> None:
    skip_unless_served(backend, case)
    q, k, v, dout = case.tensors()
    start = time.perf_counter()
    out, lse = attention(q, k, v, backend=backend, **case.options())
    grads = torch.autograd.grad(out, (q, k, v), dout)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert lse.dtype == torch.float32
    check(backend, str(case), (out.detach(), lse, *grads), case.oracle(), seconds)


@pytest.mark.parametrize("backend", NAMES_OF_BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_block_gradients_with_the_merged_lse_sum_to_the_whole(backend: str, causal: bool) -> None:
    """Three blocks of keys, as a ring would see them; merged out and lse in each backward."""
    tokens = 768
    case = Case((tokens,), (tokens,), (28, 4), 128, causal=causal)
    skip_unless_served(backend, case)
    q, k, v, dout = (x.detach() for x in case.tensors())
    calls: list[tuple[slice, slice, bool]] = []
    for start, end in pairwise([0, 200, 512, tokens]):
        block = slice(start, end)
        if causal:
            calls += [(slice(start, end), block, True), (slice(end, tokens), block, False)]
        else:
            calls.append((slice(0, tokens), block, False))
    outs, lses = [], []
    for rows, block, mask in calls:
        out = torch.zeros_like(q)
        lse = q.new_full((1, 28, tokens), float("-inf"), dtype=torch.float32)
        out[:, rows], lse[:, :, rows] = attention_forward(
            q[:, rows], k[:, block], v[:, block], causal=mask, backend=backend
        )
        outs.append(out)
        lses.append(lse)
    merged, lse = merge_many(outs, lses)
    out = merged.bfloat16()
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for rows, block, mask in calls:
        part = attention_backward(
            dout[:, rows], q[:, rows], k[:, block], v[:, block], out[:, rows], lse[:, :, rows],
            causal=mask, backend=backend,
        )  # fmt: skip
        for total, at, grad in zip((dq, dk, dv), (rows, block, block), part, strict=True):
            total[:, at] += grad
    name = f"3 key blocks, merged lse, {'causal' if causal else 'full'}"
    check(backend, name, (out, lse, dq, dk, dv), case.oracle(), 0.0)


@pytest.mark.parametrize("tokens", [96 * 1024, 131 * 1024 + 64])
def test_long_causal_cudnn_forward_in_pieces_is_the_flash_forward(tokens: int) -> None:
    case = Case((tokens,), (tokens,), (2, 1), 128, causal=True)
    skip_unless_served("cudnn", case)
    q, k, v, dout = (x.detach() for x in case.tensors())
    results = {}
    for backend in ("cudnn", "flash"):
        out, lse = attention_forward(q, k, v, causal=True, backend=backend)
        grads = attention_backward(dout, q, k, v, out, lse, causal=True, backend=backend)
        results[backend] = (out, lse, *grads)
    check("cudnn", f"{tokens} causal, against flash", results["cudnn"], results["flash"], 0.0)


@pytest.mark.parametrize("backend", NAMES_OF_BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(backend: str, packed: bool) -> None:
    if packed and backend == "eager":
        pytest.skip("eager loops over documents")
    lengths = (4200, 70, 300) if packed else (600,)
    case = Case(lengths, lengths, (8, 2), 128, causal=True, batch=0 if packed else 1)
    skip_unless_served(backend, case)
    q, k, v, dout = case.tensors()
    options = case.options()
    for mode in ("default", "error"):  # the first round compiles and plans
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, _ = attention(q, k, v, backend=backend, **options)
            torch.autograd.grad(out, (q, k, v), dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [name for name in NAMES_OF_BACKENDS if name != "eager"])
def test_transposed_views_are_not_copied(backend: str) -> None:
    """Forward allocates out and lse, and nothing of the size of its inputs beside them."""
    case = Case((8192,), (8192,), (16, 16), 128, causal=False)
    skip_unless_served(backend, case)
    q, k, v, _ = (x.detach() for x in case.tensors())
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = attention_forward(q, k, v, causal=False, backend=backend)
        extra = torch.cuda.max_memory_allocated() - before
        own = out.nbytes + lse.nbytes
        del out, lse
    assert extra < own + q.nbytes // 2, f"{extra} bytes allocated for a result of {own}"


def test_automatic_choice_prefers_a_fused_kernel() -> None:
    spec = AttentionSpec(
        dtype=torch.bfloat16,
        head_dim=128,
        device_type="cuda",
        causal=True,
        capability=torch.cuda.get_device_capability(),
    )
    assert select_backend(spec).name in ("fa4", "fa3", "cudnn", "flash")


def test_strided_inputs() -> None:
    """q, k, v cut out of one projection go to every kernel as views."""
    case = Case((512,), (512,), (8, 2), 128, causal=True, batch=2)
    for backend in NAMES_OF_BACKENDS:
        if refusal(backend, case) is not None:
            continue
        torch.manual_seed(0)
        qkv = torch.randn(2, 512, 12, 128, device="cuda").bfloat16().requires_grad_()
        q, k, v = qkv.split([8, 2, 2], dim=2)
        out, lse = attention(q, k, v, causal=True, backend=backend)
        (actual,) = torch.autograd.grad(out.sum(), qkv)
        expected, expected_lse = attention_oracle(q, k, v, causal=True)
        (gradient,) = torch.autograd.grad(expected.sum(), qkv)
        errors = [
            relative_error(a, b)
            for a, b in ((out, expected), (lse, expected_lse), (actual, gradient))
        ]
        assert max(errors) < LIMIT, f"{backend}: {errors}"


@pytest.mark.parametrize("backend", ["fa4"])
def test_the_last_heads_of_a_float32_sum_beyond_two_gib(backend: str) -> None:
    """As large as what a rank of four sums dQ in for a million tokens: 3.5 GiB in float32."""
    tokens, heads, kv_heads, dim = 65536, 112, 16, 128
    skip_unless_served(backend, Case((tokens,), (tokens,), (heads, kv_heads), dim, causal=True))
    generator = torch.Generator("cuda").manual_seed(5)

    def draw(n: int) -> Tensor:
        x = torch.empty((1, tokens, n, dim), dtype=torch.bfloat16, device="cuda")
        return x.normal_(generator=generator)

    q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    options: dict[str, Any] = {"causal": True, "backend": backend}
    whole = attention_forward(q, k, v, **options)
    grads = attention_backward(dout, q, k, v, *whole, **options)
    group = heads // kv_heads
    for kv in (0, kv_heads // 2 - 1, kv_heads - 1):
        own, one = slice(kv * group, (kv + 1) * group), slice(kv, kv + 1)
        parts = [x[:, :, at].contiguous() for x, at in ((q, own), (k, one), (v, one), (dout, own))]
        out, lse = attention_forward(*parts[:3], **options)
        alone = attention_backward(parts[3], *parts[:3], out, lse, **options)
        assert relative_error(whole[0][:, :, own], out) < LIMIT
        for found, wanted, at in zip(grads, alone, (own, one, one), strict=True):
            assert relative_error(found[:, :, at], wanted) < LIMIT
