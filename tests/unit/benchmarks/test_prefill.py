"""The prefill benchmark with tiny shapes: whole prompts and samples, alone and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import _cluster, _peer_generate, prefill
from benchmarks._peer_generate import Held
from benchmarks._results import Report

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
    assert ours["times_peer"] == pytest.approx(
        report.rows[0].metrics["ttft_s"] / ours["ttft_s"], rel=1e-3
    )
    first = ours["ttft_s"] + 3e-3 * ours["decode_step_ms"]
    assert ours["question_percent_of_first"] == pytest.approx(
        100 * ours["question_s"] / first, rel=1e-3
    )
    whole = report.rows[-1].about["questions_s"]
    assert len(whole) == 2 and max(whole) == pytest.approx(ours["question_s"], abs=1e-4)
    assert ours["planned_peak_gib"] > ours["cache_gib"] > 0
    (written,) = tmp_path.glob("*_prefill_1xcpu.json")
    notes = json.loads(written.read_text())["notes"]
    assert notes["ceilings"]["attention_kernel"] == "cpu"
    assert notes["first_prompt"].keys() == {"tokens", "first_token_s", "again_s"}
    assert "reading" not in notes


def test_what_would_end_too_late_is_left_out_and_said() -> None:
    flags = ["--tiny", "--lengths", "120", "--stop-after-s", "0"]
    report = prefill.run(prefill.parse(flags), _cluster.start())
    assert [row.kind for row in report.rows] == []
    reasons = [each["reason"] for each in report.not_measured]
    assert len(reasons) == 2 and all("would end after" in reason for reason in reasons)


def test_a_long_prompt_says_how_far_it_is() -> None:
    report, saved = _report(), []
    reading = prefill.Reading(report, _cluster.start(), lambda: saved.append(1), every_s=0)
    reading("encode", 4, 8)
    reading("read", 16, 64)
    assert (report.notes["reading"]["tokens"], report.notes["reading"]["of"]) == (16, 64)
    assert saved == [1]


def _report() -> Report:
    return Report("prefill", prefill.QUESTION, {"gpu": "cpu", "count": 1, "link": ""})


def test_the_longest_prompt_follows_from_two_peaks_of_every_gpu() -> None:
    # 2 and 5 bytes a token; the second GPU is full first.
    short, longer = Held(100, 1.0, (1200, 1500)), Held(200, 3.0, (1400, 2000))
    assert _peer_generate.longest_tokens(short, longer, (10_000.0, 4_000.0)) == 600
    # a S + b S^2 with a = 0.005, b = 0.00005.
    assert _peer_generate.predicted_s(short, longer, 600) == pytest.approx(3 + 18)


def test_the_peer_is_placed_without_cutting_a_layer() -> None:
    model = prefill.build_model(prefill.parse(["--tiny"]), torch.device("meta"))
    whole = {"Qwen2DecoderLayer", "SiglipEncoderLayer", "LongVILAProjector"}
    assert whole <= set(model._no_split_modules)
    assert "past_key_values" in model._skip_keys_device_placement


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
    flags = ["--tiny", "--lengths", "120", "--peer-lengths", "120,160", "--peer-longest"]
    report = prefill.run(prefill.parse(flags), _cluster.start())
    rows = [(row.kind, row.tokens) for row in report.rows]
    ours = [("ours", 119), ("ours", 159)]  # the second is the peer's longest, on every rank
    assert rows == ([("peer", 119), ("peer", 159), *ours] if rank.rank == 0 else ours)


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
