"""Planned peaks of real training steps against the bytes that are alive, on the CPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from benchmarks import _cluster, memory_plan
from benchmarks._results import Row
from benchmarks.memory_plan import Case, measure, measure_rates, parse

from longvila.memory.rates import GPUS, with_results
from longvila.testing import Rank, ranks

SHAPE = (
    "--image-size 56 --width 32 --mlp-width 64 --vision-layers 3 --vision-heads 2 --model-dim 64 "
    "--text-mlp 256 --heads 4 --kv-heads 2 --vocab 300"
)
TINY = Case(name="text", layers=3, tokens=1024, targets=64)
#: Off by at most so many percent: small tensors of a tiny model are in no formula.
CLOSE = 2.0


def options(more: str = "") -> argparse.Namespace:
    return parse(f"{SHAPE} {more}".split())


def row_of(case: Case, more: str = "") -> Row:
    return measure(case, options(more), _cluster.start(), GPUS["h200"])


@ranks(1)
def test_one_rank(_: Rank) -> None:
    cases = [
        (TINY, ""),
        # a narrow MLP: the norm before it is the peak
        (replace(TINY, tokens=2048), "--text-mlp 32"),
        (replace(TINY, tokens=512, checkpointing=False), ""),
        (replace(TINY, tokens=512, micro_batches=2), ""),
        (replace(TINY, mlp_tile_rows=128), ""),
        (replace(TINY, layers=4, tokens=512, plain_layers=2, mlp_tile_rows=128), ""),
        # many targets and a wide vocabulary: the loss is
        (replace(TINY, tokens=512, targets=None), "--vocab 4000"),
        # few tokens, many frames: the tower is
        (Case(name="frames", layers=2, tokens=192, frames=32, targets=8, frames_per_call=32), ""),
        (Case(name="frozen", layers=2, tokens=512, frames=16, targets=8, tuned="pl"), ""),
    ]
    moments = set()
    for case, more in cases:
        row = row_of(case, more)
        assert abs(row.metrics["error_percent"]) < CLOSE, (case, more, row.metrics, row.about)
        assert row.metrics["planned_s"] > 0
        moments.add(str(row.about["moment"]).partition(",")[0])
    assert moments >= {"MLP backward", "norm backward", "loss", "tower backward"}, moments


@ranks(2)
def test_two_ranks_share_a_row(_: Rank) -> None:
    narrow = replace(TINY, tokens=2048)
    for case, more in ((TINY, ""), (narrow, "--text-mlp 32 --ring-size 2")):
        row = row_of(case, more)
        assert abs(row.metrics["error_percent"]) < 4.0, (case, more, row.metrics, row.about)
        assert row.shape["sequence_parallel"] == 2


@ranks(1)
def test_the_whole_run_and_its_file(_: Rank) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        given = options(f"--rate-seconds 0.01 --rate-rows 64 --only frames --out {folder}")
        report = memory_plan.run(given, _cluster.start())
        assert [row.method for row in report.rows] == [
            "rate/matrices", "rate/device_memory", "step/frames"
        ]  # fmt: skip
        (file,) = Path(folder).glob("*_memory_plan_*.json")
        gpu = with_results(GPUS["h200"], [file])
    assert gpu.matrices[0] == 1e12 * report.rows[0].metrics["forward_tflops_per_gpu"]
    assert gpu.memory_rate != GPUS["h200"].memory_rate


def test_cases_fit_their_rows() -> None:
    for case in memory_plan.CASES:
        assert case.frames * 197 <= case.tokens
        assert case.targets is None or case.targets <= case.tokens
    assert not dist.is_initialized()
    assert measure_rates(options("--rate-seconds 0.01 --rate-rows 32"), _cluster.start())
    with pytest.raises(ValueError, match="frames have"):
        from longvila.testing.tiny import tiny_config

        memory_plan.make_batch(tiny_config(), Case(name="x", tokens=8, frames=4), 1)
