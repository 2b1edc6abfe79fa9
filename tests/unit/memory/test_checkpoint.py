"""Checkpointing that keeps attention: the same gradients, and each kernel runs once."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from longvila.keep import keep
from longvila.memory.checkpoint import KeptResults, checkpoint, store
from longvila.memory.offload import Offload
from longvila.ops.attention import attention
from longvila.ops.backends.cpu import CpuBackend

LAYERS = 4


class Exchange(torch.autograd.Function):
    """Stands for a sequence-parallel attention: collectives and kernels inside one node."""

    calls: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        def compute() -> tuple[Tensor, Tensor]:
            Exchange.calls["forward"] += 1
            return x.sin(), x.cos()

        out, slope = keep(compute)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        Exchange.calls["backward"] += 1
        return dout * ctx.saved_tensors[0]


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (2 * self.heads, -1))
        q, k, v = qkv.split([self.heads, self.heads // 2, self.heads // 2], dim=2)
        attended, _ = attention(q, k, v, causal=True)
        x = x + self.out(attended.flatten(2)) * scale
        return x + Exchange.apply(self.mlp(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the kernels that run and the rows of the matrix products' first Linear."""
    counter = Exchange.calls
    counter.clear()
    for name in ("forward", "backward"):
        original = getattr(CpuBackend, name)

        def counted(self: Any, *args: Any, _n: str = name, _o: Any = original, **kw: Any) -> Any:
            counter[f"attention {_n}"] += 1
            return _o(self, *args, **kw)

        monkeypatch.setattr(CpuBackend, name, counted)
    yield counter


def step(run: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor], list[nn.Module]]:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(LAYERS)]
    x = torch.randn(2, 24, 32, requires_grad=True)
    hidden = x
    for layer in layers:
        hidden = layer(hidden) if run is None else run(layer, hidden, **options)
    loss = hidden.square().mean()
    loss.backward()
    grads = {f"{i}.{n}": p.grad for i, layer in enumerate(layers)
             for n, p in layer.named_parameters()}  # fmt: skip
    assert x.grad is not None
    return loss.detach(), {**grads, "x": x.grad}, layers  # type: ignore[dict-item]


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


def offload(**options: Any) -> Offload:
    return Offload(**({"budget_bytes": 1 << 30, "keep_last": 1, "min_bytes": 0} | options))


@pytest.mark.parametrize(
    "make",
    [
        lambda: checkpoint,
        lambda: partial(checkpoint, keep_results=False),
        lambda: partial(checkpoint, offload=offload()),
        lambda: partial(checkpoint, offload=offload(keep_last=0)),
        lambda: partial(checkpoint, offload=offload(budget_bytes=30_000)),
        lambda: partial(checkpoint, offload=offload(), keep_results=False),
        lambda: partial(checkpoint, preserve_rng_state=False),
    ],
    ids=["keep", "plain", "offload", "offload all", "small budget", "inputs only", "no rng"],
)
def test_loss_and_gradients_are_bit_for_bit_those_without_checkpointing(make: Any) -> None:
    assert_same(step(make()), step(None))


def test_attention_runs_once_a_layer_and_so_does_what_is_kept(calls: Counter[str]) -> None:
    step(checkpoint)
    assert calls == {
        "attention forward": LAYERS,
        "attention backward": LAYERS,
        "forward": LAYERS,
        "backward": LAYERS,
    }


def test_without_keeping_it_runs_twice(calls: Counter[str]) -> None:
    """The counter can fail: plain checkpointing runs every forward a second time."""
    step(partial(checkpoint, keep_results=False))
    assert calls["attention forward"] == 2 * LAYERS and calls["forward"] == 2 * LAYERS


def test_offload_moves_inputs_and_results_and_keeps_attention_at_one_run(
    calls: Counter[str],
) -> None:
    host = offload(keep_last=1)
    step(partial(checkpoint, offload=host))
    assert calls["attention forward"] == LAYERS
    hidden, lse = 2 * 24 * 32 * 4, 2 * 4 * 24 * 4
    # a layer: its input, attention's out and lse, the exchange's two results
    layer_bytes = hidden + (hidden + lse) + 2 * hidden
    assert host.moved_bytes == (LAYERS - 1) * layer_bytes
    assert host.returned_bytes == host.moved_bytes, "nothing is copied back twice"
    gc.collect()
    assert host.used_bytes == 0


def test_recomputation_happens_at_all(calls: Counter[str]) -> None:
    """What is not kept runs again: the second run of a layer goes through its norm."""
    torch.manual_seed(0)
    layer, runs = Layer(), []
    layer.norm.register_forward_hook(lambda *_: runs.append(1))
    checkpoint(layer, torch.randn(1, 5, 32, requires_grad=True)).sum().backward()
    assert len(runs) == 2


def test_stored_results_die_with_the_graph() -> None:
    original = KeptResults.contexts

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out, _ = attention(x, x, x)
            return out * 2

    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    stores: list[weakref.ref[KeptResults]] = []

    def contexts(self: KeptResults) -> Any:
        stores.append(weakref.ref(self))
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptResults, "contexts", contexts)
        y = checkpoint(Watch(), x)
    assert stores[0]() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert stores[0]() is None


def test_two_backward_passes_through_one_graph(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(1, 5, 32, requires_grad=True)
    for options in ({}, {"offload": offload()}):
        y = checkpoint(layer, x, **options).sum()
        checkpoint(layer, x, **options)  # another region, so that the first one moves
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y, x)[0])


def test_dropout_sees_the_same_random_numbers() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(Exchange.apply(x), 0.5) * x

    x = torch.randn(50, requires_grad=True)
    torch.manual_seed(7)
    (a,) = torch.autograd.grad(checkpoint(Noisy(), x).sum(), x)
    torch.manual_seed(7)
    (b,) = torch.autograd.grad(Noisy()(x).sum(), x)
    assert torch.equal(a, b)


def test_keyword_arguments_and_no_grad(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(1, 5, 32)
    host = offload()
    with torch.no_grad():
        assert torch.equal(checkpoint(layer, x, scale=0.5, offload=host), layer(x, scale=0.5))
    assert host.moved_bytes == 0
    x.requires_grad_()
    assert torch.equal(checkpoint(layer, x, scale=0.5), layer(x, scale=0.5))


def test_more_results_in_the_second_run_is_an_error() -> None:
    class Growing(nn.Module):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            for _ in range(self.runs):
                x = Exchange.apply(x)
            return x

    y = checkpoint(Growing(), torch.randn(3, requires_grad=True), preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=r"kept 1 results in its first run and asks for more"):
        # early stopping would end the second run before the call too many
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            y = checkpoint(Growing(), torch.randn(3, requires_grad=True))
        y.sum().backward()


def test_inside_the_decoder_layers_of_a_transformers_model(calls: Counter[str]) -> None:
    """Our attention inside a Hugging Face layer, checkpointed by the model's own switch."""
    transformers = pytest.importorskip("transformers")
    from transformers import AttentionInterface, AttentionMaskInterface

    def ours(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        out, _ = attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            causal=True,
            softmax_scale=options["scaling"],
        )
        return out, None

    AttentionInterface.register("memory_test", ours)
    AttentionMaskInterface.register("memory_test", lambda *a, **k: None)
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "memory_test"
    tokens = torch.arange(20).view(2, 10)
    results = []
    for function in (None, checkpoint, partial(checkpoint, offload=offload(keep_last=0))):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).train()
        if function is not None:
            model._set_gradient_checkpointing(True, gradient_checkpointing_func=function)
        calls.clear()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert calls == {"attention forward": 3, "attention backward": 3}
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_store_moves_what_is_saved_and_no_parameter() -> None:
    """The same bits as the plain layer; nothing runs twice."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16, bias=False)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    offload = Offload(budget_bytes=1 << 20, keep_last=0, min_bytes=0)
    calls = Counter[str]()
    layer[1].register_forward_hook(lambda *_: calls.update(["tanh"]))
    inputs = (x, *layer.parameters())
    expected = torch.autograd.grad(layer(x).sin().sum(), inputs)
    calls.clear()
    y = store(layer, x, offload=offload, parameters=layer.parameters)
    # The input and tanh's result, which two operations save; neither weights nor their transposes.
    assert offload.moved_bytes == x.nbytes + 2 * 5 * 32 * 8
    actual = torch.autograd.grad(y.sin().sum(), inputs)
    assert calls["tanh"] == 1
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        moved = offload.moved_bytes
        store(layer, x, offload=offload, parameters=layer.parameters)
        assert offload.moved_bytes == moved, "nothing is saved, so nothing moves"
