"""The benchmark of a full step on two gloo ranks, with tiny shapes, checks included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import _cluster, train_step
from benchmarks._attempt import OUT_OF_MEMORY, attempt
from benchmarks._cluster import Cluster
from benchmarks._results import Row
from benchmarks.peers.train_steps import TextEngine, peer_engines

from longvila.testing import Rank, ranks

ALONE = Cluster(0, 1, torch.device("cpu"))


@ranks(2)
def test_every_memory_setting_is_checked_and_timed(rank: Rank, tmp_path: Path) -> None:
    flags = (
        "--tiny --no-compile --lengths 64 96 128 --plain-layers 0:3,96:1,128:0 --mlp-tile 96:20 "
        f"--offload-gib 0:0.01,128:0 --host-moments 0:0,128:1 --out {tmp_path} --suffix x"
    )
    report = train_step.run(train_step.parse(flags.split()), _cluster.start())
    assert [row.tokens for row in report.rows] == [64, 96, 128]
    for row in report.rows:
        assert row.metrics["check_loss_error"] < 1e-5
        assert row.metrics["check_gradient_norm_error"] < 1e-4
        parts = sum(row.metrics[f"{part}_s"] for part in train_step.PARTS)
        assert 0 < parts < 2 * row.metrics["step_s"]
    assert [row.about["plain_layers"] for row in report.rows] == [3, 1, 0]
    assert report.rows[2].about["moments_on_host"]
    assert all(row.about["planned_gib"] >= 0 for row in report.rows)
    if rank.rank == 0:
        (path,) = tmp_path.glob("*_train_step_*_x.json")
        assert len(json.loads(path.read_text())["rows"]) == 3


@ranks(2)
def test_a_video_is_timed_by_part(rank: Rank) -> None:
    flags = "--tiny --video --no-compile --lengths 96 --plain-layers 0:1 --image-size 56"
    options = train_step.parse(flags.split())
    (row,) = train_step.run(options, _cluster.start()).rows
    assert row.metrics["check_loss_error"] < 1e-5
    assert row.metrics["check_gradient_norm_error"] < 1e-4
    assert all(row.metrics[f"{part}_s"] > 0 for part in train_step.VIDEO_PARTS)
    assert row.shape["frames"] == 16


def test_a_document_of_one_video() -> None:
    options = train_step.parse(["--video"])
    tokens = 20 + 2 * 197 + 256
    ids = train_step.document(options, tokens, ALONE)
    given = train_step.arguments(options, ids)
    assert given["pixel_values_videos"].shape == (2, 3, 384, 384)
    assert given["video_num_frames"].tolist() == [2]
    assert int((ids == options.vocab - 1).sum()) == 2 * 196
    assert (given["labels"] != -100).sum() == 256
    assert (ids[:, -256:] < options.vocab - 2).all() and (ids[:, :20] < options.vocab - 2).all()


def test_settings_go_by_length() -> None:
    table = train_step._table("65536:8,131072:2")
    assert [train_step.at_length(table, n, 5) for n in (1, 65536, 70000, 200000)] == [5, 8, 8, 2]
    options = train_step.parse(["--tiny", "--lengths", "48"])
    assert options.lengths == [48] and options.layers == 3


def test_operations_are_those_of_the_text() -> None:
    """Qwen2-7B without its input embedding, and causal attention."""
    options = train_step.parse([])
    tokens = 1000
    layer = 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    weights = 28 * layer + 3584 * 152064
    expected = 6 * weights * tokens + 6 * tokens**2 * 3584 * 28
    assert train_step.model_flops(options, tokens) == expected
    assert 7.0e9 < weights < 7.1e9


def test_out_of_memory_is_a_reason_and_other_faults_are_named() -> None:
    def runs_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    def is_wrong() -> None:
        raise ValueError("no such thing")

    assert attempt(lambda: 3, ALONE) == (3, None)
    assert attempt(runs_out, ALONE) == (None, OUT_OF_MEMORY)

    def lacks_a_file() -> None:
        raise FileNotFoundError("kernel.cpp")

    assert attempt(is_wrong, ALONE) == (None, "failed: ValueError: no such thing")
    assert attempt(lacks_a_file, ALONE) == (None, "failed: FileNotFoundError: kernel.cpp")
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: (_ for _ in ()).throw(KeyboardInterrupt), ALONE)


def test_a_row_without_figures_takes_no_part_in_comparisons() -> None:
    report = train_step.Report("train_step", "?", {})
    for method, kind, seconds in (("a", "ours", 2.0), ("b", "peer", None), ("c", "peer", 3.0)):
        metrics = {} if seconds is None else {"step_s": seconds}
        report.rows.append(Row(method, kind, 8, {}, metrics))
    found = train_step.compare(report)
    assert found == [{"tokens": 8, "ours": "a", "peer": "c", "speedup": 1.5}]


def test_peers_that_cannot_run_say_why() -> None:
    options = train_step.parse(["--tiny"])
    reasons = {name: reason for name, reason, _ in peer_engines(options, ALONE)}
    assert set(reasons) == {
        "torch_cp_allgather", "torch_cp_alltoall", "deepspeed_ulysses", "deepspeed_alst"
    }  # fmt: skip
    assert set(reasons.values()) == {"needs two ranks"}
    options.methods = "ulysses"
    assert [name for name, _, _ in peer_engines(options, ALONE)] == ["deepspeed_ulysses"]


@ranks(2)
def test_a_peers_states_are_there_before_it_is_timed(rank: Rank) -> None:
    """A step at a rate of nothing changes no weight, and makes all states, as ours does."""
    options, cluster = train_step.parse(["--tiny"]), _cluster.start()
    # Two ranks that train on the same tokens need no peer's attention.
    engine = TextEngine(options, cluster)
    engine.build()
    engine.shard(64)
    parameters = list(engine.model.parameters())
    before = [p.full_tensor().clone() for p in parameters]
    engine.step(train_step.document(options, 64, cluster), 0.0)
    assert len(engine.optimizer.state) == len(parameters)
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(parameters, before, strict=True))
    engine.step(train_step.document(options, 64, cluster), 1.0)
    assert not all(torch.equal(p.full_tensor(), o) for p, o in zip(parameters, before, strict=True))
