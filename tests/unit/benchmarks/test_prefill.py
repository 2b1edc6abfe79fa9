"""The prefill benchmark with tiny shapes: whole prompts and samples, alone and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import _cluster, prefill

from longvila.testing import Rank, ranks


def test_one_process_measures_ours_and_the_peer(tmp_path: Path) -> None:
    options = prefill.parse(["--tiny", "--lengths", "120", "--out", str(tmp_path)])
    report = prefill.run(options, _cluster.start())
    assert [(row.method, row.kind) for row in report.rows] == [
        ("transformers_generate_auto", "peer"),
        ("longvila_engine", "ours"),
    ]
    for row in report.rows:
        assert row.metrics["ttft_s"] > 0 and row.metrics["decode_tokens_per_s"] > 0
        assert row.tokens == row.shape["frames"] * 2 + 5
    ours = report.rows[-1].metrics
    assert ours["ttft_over_floor"] == pytest.approx(ours["ttft_s"] / ours["floor_s"], rel=1e-3)
    assert {"decode_ms_chosen", "decode_ms_one", "decode_ms_1_rounds"} <= set(ours)
    (written,) = tmp_path.glob("*_prefill_1xcpu.json")
    assert json.loads(written.read_text())["notes"]["ceilings"]["attention_kernel"] == "cpu"


@ranks(2)
def test_two_ranks_sample_chunks(rank: Rank) -> None:
    flags = ["--tiny", "--lengths", "200", "--sample-chunks", "3", "--no-peer"]
    report = prefill.run(prefill.parse(flags), _cluster.start())
    (row,) = report.rows
    assert row.shape["sequence_parallel"] == 2 and row.metrics["sampled"] == 1
    assert [s["past_tokens"] for s in row.samples] == [0, 83, 167]
    assert row.metrics["cache_gib"] == pytest.approx(100 * 2 * 2 * 2 * 8 * 4 / 2**30, rel=0.02)


def test_two_ranks_read_whole_prompts_and_wait_for_the_peer() -> None:
    from longvila.testing.ranks import run_ranks

    run_ranks(whole_on_two, 2)


def whole_on_two(rank: Rank) -> None:
    flags = ["--tiny", "--lengths", "120"]
    report = prefill.run(prefill.parse(flags), _cluster.start())
    kinds = [row.kind for row in report.rows]
    assert kinds == (["peer", "ours"] if rank.rank == 0 else ["ours"])


def test_a_line_through_exact_points_and_the_floor_of_a_prompt() -> None:
    base, slope, error = prefill.line([(0, 1.0), (10, 3.0), (20, 5.0)])
    assert (base, slope) == pytest.approx((1.0, 0.2)) and error == pytest.approx(0, abs=1e-12)
    options = prefill.parse(["--tiny"])
    ceilings = prefill.Ceilings(1e-3, "cpu", 2.0, 3.0, 1.0)
    # 2 S^2 M layers at 1 GFLOP/s; 2 layers of 2 ms a chunk of 16; 3 ms for 4 frames.
    expected = 2 * 160**2 * 32 * 2 / 1e9 + 2 * 2e-3 * 10 + 3e-3 * 2
    assert prefill.floor_s(options, ceilings, 160, 8, 1) == pytest.approx(expected)
    assert prefill.floor_s(options, ceilings, 160, 8, 2) == pytest.approx(expected / 2)


def test_lengths() -> None:
    assert prefill.parse(["--lengths", "64k,1182000"]).lengths == [65536, 1182000]
