"""The vision and whole-step benchmarks on two gloo ranks, with tiny shapes, checks included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import _cluster, attention, mmsp_step, trace, vision_balance
from benchmarks._case import Case
from benchmarks._interleave import interleave
from benchmarks.ours import PLACEMENTS, default_placement

from longvila.testing import Rank, ranks

TOWER = (
    "--image-size 28 --width 32 --mlp-width 64 --vision-heads 2 --frame-batch 4 "
    "--dtype float32 --repeats 2 "
)


@ranks(2)
def test_ours_takes_part_in_the_attention_benchmark(rank: Rank) -> None:
    flags = (
        "--lengths 96 --check-tokens 64 --shapes 6/2x16 --dtype float32 "
        "--block-s 0.01 --repeats 1 --methods ideal_cpu|longvila_.*_cpu"
    )
    options = attention.parse(flags.split())
    report = attention.run(options, _cluster.start())
    ours = {row.method for row in report.rows if row.kind == "ours"}
    expected = {"ulysses", "ulysses_chunked", "ring", "gather"}
    assert ours == {f"longvila_{name}_cpu" for name in expected}, report.not_measured
    assert report.notes["default_mesh"] == {"6/2": "ulysses"}


@ranks(4)
def test_every_factorisation_of_four_ranks(rank: Rank) -> None:
    flags = (
        "--lengths 96 --check-tokens 64 --shapes 6/2x16 --dtype float32 --repeats 1 "
        "--block-s 0.01 --methods ideal_cpu|longvila_.*_cpu"
    )
    report = attention.run(attention.parse(flags.split()), _cluster.start(emulate_hosts=2))
    rows = {row.method: row.metrics for row in report.rows}
    assert {f"longvila_{name}_cpu" for name in PLACEMENTS} | {"ideal_cpu"} == set(rows)
    assert report.notes["default_mesh"] == {"6/2": "2d"}
    assert rows["longvila_ulysses_cpu"]["head_bound"] == 1.3333
    assert rows["longvila_2d_cpu"]["head_bound"] == 1.0


@pytest.mark.parametrize(
    ("heads", "ranks", "hosts", "expected"),
    [
        (28, 4, 1, "ulysses"), (6, 4, 1, "2d_gather"), (14, 4, 1, "2d_gather"), (28, 4, 2, "2d"),
        (28, 4, 4, "ring"), (28, 2, 1, "ulysses"), (1, 4, 1, "gather"),
        (28, 8, 1, "2d_gather"), (6, 8, 1, "ring 4 x ulysses 2"),
    ],
)  # fmt: skip
def test_the_default_mesh_is_one_of_the_placements(
    heads: int, ranks: int, hosts: int, expected: str
) -> None:
    cluster = _cluster.Cluster(0, ranks, torch.device("cpu"), hosts)
    case = Case(64, heads, 1, 8, torch.float32)
    assert default_placement(case, cluster)[0] == expected


@ranks(2)
def test_ours_reads_no_scalar_inside_the_layer(rank: Rank) -> None:
    flags = (
        "--tokens 64 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32 --passes 2 "
        "--methods longvila_.*_cpu"
    )
    options = trace.parse(flags.split())
    report = trace.run(options, _cluster.start())
    assert len(report.rows) == 4
    assert all(row.metrics["scalar_reads"] == 0 for row in report.rows)


@ranks(2)
def test_vision_balance(rank: Rank, tmp_path: Path) -> None:
    options = vision_balance.parse(
        (
            TOWER + "--frames 8 --vision-layers 3 --model-dim 32 --exchange-rows-per-frame 4 "
            f"--mixed 28:4,56:2 --mixed-batch-pixels 1568 --check-frames 5 --out {tmp_path}"
        ).split()
    )
    report = vision_balance.run(options, _cluster.start())
    rows = {row.method: row for row in report.rows}
    assert {name.split("/")[0] for name in rows} == {"exchange", "tower", "mixed"}
    assert rows["tower/longvila_exchange"].metrics["error_gradient"] < 1e-5
    # The in-place sum hides rows from autograd; the baseline shows the fault it stands for.
    assert rows["tower/all_reduce_reshard"].metrics["error_gradient"] > 0.1
    assert rows["tower/all_reduce_reshard"].metrics["error_rows"] < 1e-5
    by_cost, by_count = rows["mixed/longvila_by_cost"], rows["mixed/by_count"]
    assert by_cost.metrics["balance_percent"] > by_count.metrics["balance_percent"]


@ranks(2)
def test_controls_of_the_vision_stage(rank: Rank) -> None:
    flags = TOWER + "--frames 8 --vision-layers 3 --model-dim 32 --check-frames 5 --controls"
    rows = {
        row.method: row.metrics
        for row in vision_balance.run(vision_balance.parse(flags.split()), _cluster.start()).rows
    }
    assert set(rows) == {f"tower/{name}" for name in vision_balance.KINDS | vision_balance.CONTROLS}
    assert rows["tower/all_reduce_with_gradients"]["error_gradient"] < 1e-5
    # The same rows lose their gradients as in the all-reduce that it is compared with.
    lost = rows["tower/exchange_losing_gradients"]["error_gradient"]
    assert abs(lost - rows["tower/all_reduce_reshard"]["error_gradient"]) < 1e-5


@ranks(2)
def test_mmsp_step(rank: Rank, fsdp: str) -> None:
    options = mmsp_step.parse(
        (
            TOWER + "--frames 6 --vision-layers 3 --model-dim 64 --text-mlp 96 --layers 2 "
            f"--heads 4 --kv-heads 2 --vocab 128 --answer 8 --check-frames 5 {fsdp}"
        ).split()
    )
    report = mmsp_step.run(options, _cluster.start())
    assert [row.method for row in report.rows] == list(mmsp_step.VARIANTS)
    ours = report.rows[0].metrics
    assert ours["check_tower_gradient_error"] < 1e-4
    assert ours["check_loss_error"] < 1e-5
    parts = sum(ours[f"{part}_s"] for part in mmsp_step.PARTS)
    assert 0 < parts < 10 * ours["step_s"]


test_mmsp_step = pytest.mark.parametrize("fsdp", ["--fsdp", "--no-fsdp"])(test_mmsp_step)


def test_interleave_turns_the_order() -> None:
    order: list[str] = []
    steps = interleave(
        _cluster.start(),
        {name: lambda name=name: order.append(name) for name in "abc"},
        repeats=3,
        warm_up={"a": lambda: order.append("warm")},
    )
    assert order == ["warm", "b", "c", *"abc", *"bca", *"cab"]
    assert all(len(found.total_ms) == 3 for found in steps.values())


def test_runs_join_equal_neighbours() -> None:
    assert vision_balance.runs([28, 28, 56, 28], range(1, 4)) == [
        (28, 1, 2),
        (56, 2, 3),
        (28, 3, 4),
    ]
