"""Ranks divide rows as the layout does; switches that mean nothing are refused."""

from __future__ import annotations

import pytest

from longvila.memory.settings import Ranks, Settings
from longvila.memory.sizes import PlanError
from longvila.sp.layout import SequenceLayout


@pytest.mark.parametrize(("tokens", "ring", "ulysses"), [(1000, 1, 1), (1000, 2, 2), (999, 3, 4)])
def test_local_tokens_are_those_of_the_layout(tokens: int, ring: int, ulysses: int) -> None:
    ranks = Ranks(ring=ring, ulysses=ulysses)
    filled = tokens if ranks.sp == 1 else -(-tokens // (2 * ranks.sp)) * 2 * ranks.sp
    layout = SequenceLayout((filled,), ring, ulysses, "zigzag")
    assert ranks.local_tokens(tokens) == max(layout.local_lengths)


def test_shards() -> None:
    ranks = Ranks(dp=3, ring=2, ulysses=4)
    assert (ranks.sp, ranks.world, ranks.shards) == (8, 24, 24)
    assert Ranks(dp=3, ring=2, ulysses=4, replicate=True).shards == 8
    assert ranks.local_frames(17) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is one of"),
        ({"backend": "eager"}, "backend is one of"),
        ({"mlp_tile_rows": 0}, "at least 1"),
        ({"offload_bytes": -1}, "must not be negative"),
        ({"plain_layers": -1}, "must not be negative"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Settings(**values)  # type: ignore[arg-type]
