"""The loss curve of every mesh is that of data parallelism, on gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import _cluster, loss_curve

from longvila.testing import Rank, ranks


@ranks(4)
def test_all_meshes_learn_alike(rank: Rank, tmp_path: Path) -> None:
    options = loss_curve.parse(
        ["--tiny", "--steps", "2", "--meshes", "2 x", "--out", str(tmp_path)]
    )
    report = loss_curve.run(options, _cluster.start())
    assert [row.method for row in report.rows] == ["dp 4", "ring 2 x ulysses 2"]
    assert len({row.tokens for row in report.rows}) == 1
    assert all(len(row.samples) == 2 for row in report.rows)
    assert max(row.metrics["loss_apart"] for row in report.rows) < 1e-5
    assert max(row.metrics["gradient_norm_apart"] for row in report.rows) < 1e-4
    assert report.rows[0].metrics["last_loss"] != report.rows[0].metrics["first_loss"]
    if rank.rank == 0:
        assert len(list(tmp_path.glob("*_loss_curve_4xcpu.json"))) == 1


def test_a_curve_that_parts_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = iter([[3.0, 2.0], [3.0, 2.5], [3.0, 2.0]])

    def train(*_: object) -> tuple[list[float], list[float], dict[str, int]]:
        losses = next(curves)
        return losses, losses, {"tokens_a_step": 8}

    monkeypatch.setattr(loss_curve, "train", train)
    options = loss_curve.parse(["--tiny"])
    with pytest.raises(RuntimeError, match=r"ring 2.*0\.25"):
        loss_curve.run(options, _cluster.Cluster(0, 2, _cluster.torch.device("cpu")))
