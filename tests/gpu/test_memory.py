"""Tiled head, checkpointing and asynchronous offload on a GPU, in bf16 and with real streams."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longvila.memory.checkpoint import checkpoint, store
from longvila.memory.cross_entropy import tiled_cross_entropy
from longvila.memory.offload import Offload
from longvila.memory.tiled import tiled_apply
from longvila.ops import attention as attention_module
from longvila.ops.attention import attention
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.sp.mesh import SPMesh
from longvila.testing.asserts import assert_close
from longvila.testing.oracles import cross_entropy_oracle
from longvila.testing.tiny import tiny_model
from longvila.train.host_adamw import HostAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # torch says once a process that its check, which these tests turn on, is a prototype.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]


def test_tiled_cross_entropy_in_bf16_and_without_a_sync() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(700, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(40_000, 256, device="cuda") / 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 40_000, (700,), device="cuda")
    targets[::3] = -100
    rows = (targets != -100).nonzero().flatten()
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=128, target_rows=rows)
            actual = torch.autograd.grad(loss, (hidden, weight))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = cross_entropy_oracle(hidden, weight, targets)
    assert_close(loss, expected, tolerance=1e-5)  # logits are not rounded to bf16
    for a, b in zip(actual, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert_close(a, b, tolerance=1e-2)


def test_tiled_mlp_lowers_the_peak_and_changes_nothing() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(512, 4096), nn.SiLU(), nn.Linear(4096, 512)).cuda().bfloat16()
    x = torch.randn(1, 16384, 512, device="cuda").bfloat16().requires_grad_()
    results, peaks = [], []
    for rows in (16384, 1000):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = tiled_apply(mlp, x, tile_rows=rows)
        grads = torch.autograd.grad(y.float().square().mean(), (x, *mlp.parameters()))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append((y.detach(), *grads))
        del y, grads
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    assert peaks[1] < peaks[0] / 2, peaks


class Layer(nn.Module):
    """Heavy enough for copies to overlap with it."""

    def __init__(self, width: int = 1024, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (2 * self.heads, -1))
        q, k, v = qkv.split([self.heads, self.heads // 2, self.heads // 2], dim=2)
        x = x + attention(q, k, v, causal=True, backend="flash")[0].flatten(2)
        return x + self.mlp(x)


def run(
    step: Any, layers: list[Layer], x: Tensor, steps: int = 3, collect: bool = True
) -> tuple[list[Tensor], int]:
    for _ in range(steps):  # later steps reuse pinned buffers of earlier ones
        for layer in layers:
            layer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        hidden = x
        for layer in layers:
            hidden = step(layer, hidden)
        loss = hidden.float().square().mean()
        del hidden
        loss.backward()
    if not collect:
        return [], 0
    # To the host: results of one variant must not count in the peak of the next.
    grads = [p.grad.cpu() for layer in layers for p in layer.parameters() if p.grad is not None]
    return [loss.detach().cpu(), *grads], torch.cuda.max_memory_allocated()


def test_checkpoint_and_offload_are_exact_lower_the_peak_and_never_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layers = [Layer().cuda().bfloat16() for _ in range(10)]
    x = torch.randn(1, 16384, 1024, device="cuda").bfloat16()
    calls: Counter[str] = Counter()
    original = attention_module._forward
    monkeypatch.setattr(
        attention_module, "_forward", lambda *a: (calls.update(["forward"]), original(*a))[1]
    )
    host = Offload(budget_bytes=4 << 30, keep_last=1)
    half = Offload(budget_bytes=200 << 20, keep_last=2)
    variants = {
        "plain torch": partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
        "keep": checkpoint,
        "keep and offload": partial(checkpoint, offload=host),
        "keep and offload part": partial(checkpoint, offload=half),
    }
    results, peaks = {}, {}
    for name, step in variants.items():
        calls.clear()
        results[name], peaks[name] = run(step, layers, x)
        assert calls["forward"] == 3 * 10 * (2 if name == "plain torch" else 1), name
        torch.cuda.synchronize()
    # The flash backward adds dq atomically, so gradients of two runs agree to rounding only.
    for name in list(variants)[1:]:
        assert torch.equal(results[name][0], results["plain torch"][0]), f"{name}: loss"
        for a, b in zip(results[name], results["plain torch"], strict=True):
            assert_close(a, b, name=name, tolerance=1e-2)
    assert peaks["keep and offload"] < peaks["keep"] - 8 * x.nbytes, peaks
    assert peaks["keep and offload"] < peaks["plain torch"], peaks
    gc.collect()
    assert host.used_bytes == half.used_bytes == 0
    assert half.peak_bytes <= half.budget_bytes
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(variants["keep and offload"], layers, x, steps=1, collect=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_come_back_exact_under_memory_pressure() -> None:
    """Freed memory is rewritten at once; a copy that came too late would show."""
    offload = Offload(budget_bytes=4 << 30, keep_last=0, min_bytes=0)
    torch.manual_seed(0)
    values = [torch.randn(4 << 20, device="cuda") for _ in range(20)]
    sums = [value.double().sum() for value in values]
    regions, stored = [], []
    for i in range(20):
        regions.append(offload.region())
        stored.append(regions[-1].put(values[i]))
        values[i] = None  # type: ignore[call-overload]
        torch.full((4 << 20,), float("nan"), device="cuda")
    for i in reversed(range(20)):
        tensor = stored[i].fetch()
        assert torch.equal(tensor.double().sum(), sums[i])
        del tensor
        torch.full((4 << 20,), float("nan"), device="cuda")
    again = stored[3].fetch()
    assert torch.equal(again.double().sum(), sums[3])


def test_a_layer_that_is_not_recomputed_waits_on_the_host() -> None:
    torch.manual_seed(0)
    layers = [Layer().cuda().bfloat16() for _ in range(10)]
    x = torch.randn(1, 16384, 1024, device="cuda").bfloat16()
    host = Offload(budget_bytes=8 << 30, keep_last=1)

    def stored(layer: Layer, hidden: Tensor) -> Tensor:
        result: Tensor = store(layer, hidden, offload=host, parameters=layer.parameters)
        return result

    plain, plain_peak = run(lambda layer, hidden: layer(hidden), layers, x)
    moved, moved_peak = run(stored, layers, x)
    assert torch.equal(moved[0], plain[0])
    for a, b in zip(moved, plain, strict=True):
        assert_close(a, b, tolerance=1e-2)
    # Eight layers' MLP activations (two of 134 MB each) are on the host.
    assert moved_peak < plain_peak - 8 * 8 * x.nbytes, (moved_peak, plain_peak)
    gc.collect()
    assert host.used_bytes == 0 and host.moved_bytes > 3 * 8 * 8 * x.nbytes


# The compiler itself looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("tile", [None, 40])
def test_a_second_run_leaves_out_the_last_product_of_a_compiled_mlp(
    monkeypatch: pytest.MonkeyPatch, tile: int | None
) -> None:
    """As tests/unit/parallel/test_apply.py, with the compiler's own code."""
    gradients = []
    linear, products = nn.functional.linear, Counter[str]()

    def last_counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products["last"] += weight.shape == (256, 512)
        return linear(x, weight, bias)

    if tile is not None:
        monkeypatch.setattr(nn.functional, "linear", last_counted)
    for compiled in (False, True):
        torch.compiler.reset()
        size = {"hidden_size": 256, "intermediate_size": 512}
        model = tiny_model(text_config=size).cuda().bfloat16().train()
        layers = model.model.language_model.layers
        counts = [Counter[str]() for _ in layers]
        for layer, seen in zip(layers, counts, strict=True):
            forward = layer.mlp.down_proj.forward

            def counted(x: Tensor, seen: Any = seen, forward: Any = forward) -> Tensor:
                seen["begun"] += 1
                y = forward(x)
                seen["ended"] += 1
                return y

            if tile is None:
                monkeypatch.setattr(layer.mlp.down_proj, "forward", counted)
        plan = ParallelPlan(
            fsdp=False, two_stage=True, compile_modules=compiled, mlp_tile_rows=tile
        )
        parallelize(model, SPMesh(), plan)
        products.clear()
        ids = torch.arange(99, device="cuda")[None] % 250
        model(input_ids=ids, labels=ids).loss.backward()
        if tile is None:
            assert all(seen == {"begun": 2, "ended": 1} for seen in counts), counts
        else:
            assert products == {"last": 3 * len(layers)}, "three tiles, forward only"
        # Together: the gradient of a key's bias is zero but for rounding.
        gradients.append(torch.cat([p.grad.flatten() for p in model.lm_head.parameters()]))
        text = model.model.language_model.parameters()
        gradients[-1] = torch.cat([gradients[-1], *(p.grad.flatten() for p in text)])
    assert_close(*gradients, tolerance=2e-2)


def test_moments_on_the_host_are_adamws_bit_for_bit() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1000, 3001), nn.LayerNorm(3001), nn.Linear(3001, 7)).cuda()

    ours, theirs = model(), model()
    host = HostAdamW(ours.parameters(), lr=1e-2, weight_decay=0.1, piece=1 << 18, small=5000)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, device="cuda")
            b.grad = a.grad.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            host.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain.step()
    host.synchronize()
    kinds = set()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq"):
            kinds.add(host.state[a][name].device.type)
            assert torch.equal(host.state[a][name].cuda(), plain.state[b][name]), name
    assert kinds == {"cpu", "cuda"}
    again = HostAdamW(ours.parameters(), lr=1e-2, small=5000)
    again.load_state_dict(host.state_dict())
    first = next(ours.parameters())
    assert again.state[first]["exp_avg"].device.type == "cpu"
    assert torch.equal(again.state[first]["exp_avg"], host.state[first]["exp_avg"])
