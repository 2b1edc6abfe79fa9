"""Decoding by table on a CPU, and when the split kernel is refused.

The kernels themselves run in ``tests/gpu/test_decode.py``.
"""

from __future__ import annotations

import pytest
import torch

from longvila.ops.decode import decode_attention, decode_refusal
from longvila.ops.kv_table import MAX_SEGMENTS, KVTable

from .decode_cases import by_table, draw, merging

SHAPE = {"kv_heads": 2, "group": 3, "dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "new", "shared", "own", "keeps"),
    [
        (1, 1, [], [0], True),
        (1, 3, [], [40, 3, 0], True),
        (3, 1, [50, 9], [4], True),
        (2, 2, [50], [20, 6], False),
        (2, 1, [5], [0, 7], True),
    ],
)
def test_segments_by_address(
    dtype: torch.dtype, batch: int, new: int, shared: list[int], own: list[int], keeps: bool
) -> None:
    by_table("cpu", dtype, batch=batch, new=new, shared=shared, own=own, keeps=keeps, **SHAPE)


def test_hidden_tokens_are_not_seen() -> None:
    ranges = [(0, 0), (0, 7), (3, 12)]
    by_table("cpu", torch.float32, batch=3, new=1, shared=[30], own=[12, 5], hidden=ranges, **SHAPE)


def test_parts_without_keys_are_neutral() -> None:
    merging("cpu")


def table(rows: int = 1) -> KVTable:
    return KVTable(2, rows, 2, 16, torch.float32, torch.device("cpu"))


def segments(
    *lengths: int, rows: int = 1, room: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        tuple(draw(rows, n + room, 2, 16, device="cpu", dtype=torch.float32) for _ in range(2))
        for n in lengths
    ]  # type: ignore[misc]


def test_a_table_is_written_when_segments_change_and_only_then() -> None:
    found = table()
    layers = [segments(5, 3), segments(5, 3)]
    assert found.load(layers) is None
    found.step(7, 1)
    for layer, parts in enumerate(layers):
        first, second = found.segments(layer)
        assert torch.equal(first[0], parts[0][0]) and torch.equal(second[1], parts[1][1][:, :2])
    before = found.places.clone()
    found.places.zero_()
    assert found.load(layers) is None
    assert not found.places.any()  # nothing to write
    layers[1][1] = segments(3)[0]
    assert found.load(layers) is None
    changed = found.places[:3] != before[:3]
    assert changed.nonzero().tolist() == [[1, 4], [1, 5]]
    found.clear()
    assert found.segments(0) == []
    assert found.load(layers) is None and found.places[0].tolist() == before[0].tolist()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (segments(*[1] * (MAX_SEGMENTS + 1)), f"more than {MAX_SEGMENTS}"),
        ([(torch.zeros(1, 4, 2, 16).half(),) * 2], "a segment is torch.float16"),
        ([(torch.zeros(2, 4, 2, 16),) * 2], "has the shape"),
        ([(torch.zeros(1, 2, 4, 16).transpose(1, 2),) * 2], "has strides"),
        ([(torch.zeros(1 + 4 * 32)[1:].view(1, 4, 2, 16),) * 2], "multiple of 16 bytes"),
    ],
)
def test_what_is_not_in_a_table(parts: list, reason: str) -> None:
    found = table()
    said = found.load([parts, parts])
    assert said is not None and reason in said
    assert not found.head.any() and found.segments(0) == []


def test_keys_and_values_of_several_rows_lie_alike() -> None:
    keys, values = segments(4, rows=2, room=3)[0]
    reason = table(2).load([[(keys[:, :4], values[:, :4].contiguous())]] * 2)
    assert reason is not None and "different strides" in reason


@pytest.mark.parametrize(
    ("dtype", "dim", "device", "reason"),
    [
        (torch.bfloat16, 128, "cpu", "needs a CUDA tensor"),
        (torch.float32, 128, "cuda", "needs bfloat16 or float16"),
        (torch.bfloat16, 36, "cuda", "multiple of 8"),
        (torch.bfloat16, 8, "cpu", "from 16 to 256"),
        (torch.bfloat16, 512, "cuda", "from 16 to 256"),
    ],
)
def test_refusals(dtype: torch.dtype, dim: int, device: str, reason: str) -> None:
    said = decode_refusal(dtype, dim, torch.device(device))
    assert said is not None and reason in said


def test_arguments_that_do_not_belong_together() -> None:
    q = torch.zeros(2, 1, 6, 16)
    k = torch.zeros(2, 5, 4, 16)
    with pytest.raises(ValueError, match="do not belong together"):
        decode_attention(q, k, k)
    shared = torch.zeros(1, 5, 2, 16)
    with pytest.raises(ValueError, match="no tokens of their own"):
        decode_attention(q, shared, shared, causal=True)
