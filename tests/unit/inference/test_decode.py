"""Attention over segments is attention over all of their keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvila.inference.decode import attend_segment, chunk_tokens, merge_stacked
from longvila.ops.attention import attention_forward
from longvila.ops.lse import merge_many


def tensors(rows: int, new: int, tokens: int, *, shared: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + new + tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kv_rows = 1 if shared else rows
    return [draw(rows, new, 6, 8), draw(kv_rows, tokens, 2, 8), draw(kv_rows, tokens, 2, 8)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("split", [None, 1, 5, 7, 100])
@pytest.mark.parametrize(("rows", "new"), [(1, 1), (1, 3), (2, 2), (3, 9)])
def test_folding_sharing_and_splitting_change_nothing(
    rows: int, new: int, split: int | None, shared: bool
) -> None:
    q, k, v = tensors(rows, new, 23, shared=shared)
    out, lse = attend_segment(q, k, v, causal=False, softmax_scale=0.3, split_tokens=split)
    wide = [x.expand(rows, -1, -1, -1).contiguous() for x in (k, v)]
    expected = attention_forward(
        q, *wide, causal=False, softmax_scale=0.3, backend="eager", needs_backward=False
    )
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("piece", [5, 17, 22, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_of_a_long_segment_change_nothing(causal: bool, piece: int) -> None:
    q, k, v = tensors(1, 20, 40)
    out, lse = attend_segment(q, k, v, causal=causal, softmax_scale=None, piece_tokens=piece)
    expected = attention_forward(q, k, v, causal=causal, backend="eager", needs_backward=False)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("tokens", [600, 9000, 65_537, 1_182_000])
@pytest.mark.parametrize("kv_heads", [1, 4, 8, 32])
def test_chunks_fill_every_round_and_leave_little_over(tokens: int, kv_heads: int) -> None:
    chunk = chunk_tokens(tokens, kv_heads, 132)
    chunks = tokens // chunk
    assert chunk >= 512 and tokens - chunks * chunk < max(chunks, 2)
    if tokens > 10**6:
        assert 4 * 132 - kv_heads < chunks * kv_heads <= 4 * 132


@pytest.mark.parametrize("new", [1, 4])
def test_a_segment_with_the_new_tokens_is_causal_at_its_end(new: int) -> None:
    q, k, v = tensors(2, new, 12)
    out, lse = attend_segment(q, k, v, causal=True, softmax_scale=None, split_tokens=3)
    expected = attention_forward(q, k, v, causal=True, backend="eager", needs_backward=False)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_rows_cannot_share_the_segment_they_end_in() -> None:
    q, k, v = tensors(2, 3, 12, shared=True)
    with pytest.raises(ValueError, match="cannot share"):
        attend_segment(q, k, v, causal=True, softmax_scale=None)


def test_stacked_parts_merge_as_one_after_the_other_and_nothing_is_neutral() -> None:
    generator = torch.Generator().manual_seed(2)
    outs = torch.randn(5, 2, 3, 4, 8, generator=generator, dtype=torch.float64)
    lses = 30 * torch.randn(5, 2, 3, 4, generator=generator, dtype=torch.float64)
    outs[1], lses[1] = 0, float("-inf")
    lses[:, 0, 0, 0], outs[:, 0, 0, 0] = float("-inf"), 0  # a query that nobody answers
    out, lse = merge_stacked(outs, lses)
    expected = merge_many(list(outs), [x.transpose(1, 2) for x in lses])
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse.transpose(1, 2), expected[1])
    assert out[0, 0, 0].eq(0).all() and lse[0, 0, 0] == float("-inf")
