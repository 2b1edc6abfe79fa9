"""What was used longest ago goes first, by weight."""

from __future__ import annotations

from longvila.inference.serving.lru import WeightedLRU


def test_the_oldest_go_until_the_rest_fits() -> None:
    kept: WeightedLRU[str, int] = WeightedLRU(10)
    for name, weight in (("a", 4), ("b", 4)):
        kept.put(name, weight, weight)
    assert kept.get("a") == 4
    kept.put("c", 4, 4)
    assert kept.get("b") is None and kept.get("a") == 4 and kept.weight == 8
    kept.put("a", 1, 1)
    assert kept.weight == 5 and kept.get("a") == 1 and len(kept) == 2
    kept.put("c", 9, 11)
    assert kept.get("c") is None, "what is too heavy is not kept, nor what it replaces"
    kept.clear()
    assert len(kept) == kept.weight == 0
