"""Live bytes: what is referred to counts once, with its present size; what is freed does not."""

from __future__ import annotations

import gc

import torch
from torch import nn

from longvila.testing.live_bytes import LiveBytes


def test_counts_what_is_alive_and_no_more() -> None:
    with LiveBytes() as live:
        kept = torch.ones(1000)
        view = kept[10:]
        assert live.now_bytes == 4000, "a view is no second storage"
        temporary = kept + view.sum()
        assert live.now_bytes == 8000 + 0
        del temporary
        assert live.now_bytes == 4000
    assert live.peak_bytes >= 8000
    assert any("(1000,)" in name for _, name in live.peak_parts)


def test_the_graph_keeps_what_it_saved() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(100, 64)
    gc.collect()
    with LiveBytes([x, *layer.parameters()]) as live:
        start = live.now_bytes
        assert start == 100 * 64 * 4 + 64 * 64 * 4
        hidden = layer(x).exp()
        out = hidden.sum()
        del hidden
        # exp saves its result; the linear layer its input, which was there
        assert live.now_bytes == start + 100 * 64 * 4 + 4
        out.backward()
        del out
        assert live.now_bytes == start + 64 * 64 * 4, "the gradient is left"


def test_a_storage_counts_with_its_present_size() -> None:
    with LiveBytes() as live:
        buffer = torch.ones(256)
        buffer.untyped_storage().resize_(0)
        assert live.now_bytes == 0
        buffer.untyped_storage().resize_(1024)
        assert live.now_bytes == 1024
    assert LiveBytes([torch.ones(4)], min_bytes=64).now_bytes == 0
