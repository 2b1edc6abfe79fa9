"""The decode benchmark with tiny shapes, alone and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import _cluster, decode
from benchmarks.render import decode as rendered

from longvila.testing import Rank, ranks


def test_one_process_measures_every_way_and_what_is_there_of_kernels(tmp_path: Path) -> None:
    options = decode.parse(["--tiny", "--out", str(tmp_path)])
    report = decode.run(options, _cluster.start())
    steps = [row for row in report.rows if row.method.startswith("longvila_")]
    ways = ("captured", "uncaptured", "general")
    assert [(row.method, row.tokens) for row in steps] == [
        (f"longvila_{way}", tokens) for way in ways for tokens in (40, 64)
    ]
    for row in steps:
        floor, step = row.metrics["decode_floor_ms"], row.metrics["decode_step_ms"]
        assert row.metrics["decode_percent_of_floor"] == pytest.approx(100 * floor / step, rel=1e-3)
        assert row.metrics["error_logits"] < 1e-4
    assert [row.metrics.get("tokens_equal") for row in steps] == [None, None, 1, 1, None, None]
    kernels = {(row.method, row.tokens): row for row in report.rows if row not in steps}
    assert {("table", 40), ("cpu", 40), ("chunks", 64)} <= set(kernels)
    assert all(row.metrics["error_out"] < 1e-5 for (_, n), row in kernels.items() if n == 40)
    left_out = {each["method"]: each["reason"] for each in report.not_measured}
    assert "needs a CUDA tensor" in left_out["flash"]
    (written,) = tmp_path.glob("*_decode_1xcpu.json")
    lines = rendered(json.loads(written.read_text()))
    assert len(lines) == 2 + 2 and lines[2].startswith("| 40 ")


def test_no_time_is_a_reason(tmp_path: Path) -> None:
    options = decode.parse(["--tiny", "--stop-after-s", "0"])
    report = decode.run(options, _cluster.start())
    assert not report.rows
    assert all("stopped after" in each["reason"] for each in report.not_measured)


@ranks(2)
def test_two_ranks(rank: Rank) -> None:
    options = decode.parse(["--tiny", "--no-kernels"])
    report = decode.run(options, _cluster.start())
    assert len(report.rows) == 6 and not report.not_measured
    equal = [row.metrics.get("tokens_equal") for row in report.rows]
    assert equal == [None, None, 1, 1, None, None]
