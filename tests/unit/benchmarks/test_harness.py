"""The harness on two gloo ranks: right methods are timed, wrong or absent ones are named."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks import _cluster, attention
from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks._harness import check, race
from benchmarks._links import measure_links
from benchmarks.peers._method import About, Method, Runner, layout_tokens
from benchmarks.peers.ideal import Ideal
from torch import Tensor

from longvila.testing import Rank, ranks

CASE = Case(64, 4, 2, 8, torch.float32)


class Local(Method):
    """Attends within this rank's own part only: wrong, and must be caught."""

    kind = "peer"
    name = "local_only"
    about = About("cpu", "contiguous", "none", shipped=True)

    def setup(self, case: Case, cluster: Cluster) -> Runner:
        return _LocalRunner(case, cluster)


class _LocalRunner(Runner):
    def tokens(self) -> Tensor:
        cluster = self.cluster
        return layout_tokens("contiguous", self.case.tokens, cluster.rank, cluster.world_size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2)


class Broken(Local):
    """Raises on every rank."""

    name = "broken"

    def setup(self, case: Case, cluster: Cluster) -> Runner:
        raise RuntimeError("no such kernel")


@ranks(2)
def test_wrong_and_broken_methods_are_not_timed(rank: Rank) -> None:
    cluster = _cluster.start()
    entrants, rejected = check([Ideal("cpu"), Local(), Broken(), Ideal("fa4")], CASE, cluster)
    assert [e.method.name for e in entrants] == ["ideal_cpu"]
    reasons = {r.method: r.reason for r in rejected}
    assert reasons["local_only"].startswith("wrong: ")
    assert "no such kernel" in reasons["broken"]
    assert "CUDA" in reasons["ideal_fa4"]
    assert max(entrants[0].errors.values()) < 1e-5


@ranks(1, 2)
def test_race_reports_medians_and_percent(rank: Rank) -> None:
    cluster = _cluster.start()
    entrants, _ = check([Ideal("cpu")], CASE, cluster)
    (row,) = race(entrants, CASE, cluster, repeats=3, block_s=0.01, min_calls=2)
    assert row.kind == "ideal" and row.tokens == 64
    assert len(row.samples) == 3
    assert row.metrics["percent_of_ideal"] == 100.0
    assert row.shape["sequence_parallel"] == rank.world_size
    flops = CASE.forward_flops / rank.world_size
    expected = flops * 3.5 / (row.metrics["total_ms"] * 1e-3) / 1e12
    assert abs(row.metrics["total_tflops_per_gpu"] / expected - 1) < 1e-3


@ranks(2)
def test_links_are_measured(rank: Rank) -> None:
    (row,) = measure_links(_cluster.start(), (1,))
    assert row["message_mib"] == 1
    assert all(row[f"{name}_gb_per_s"] > 0 for name in ("all_to_all", "all_gather", "ring"))
    assert row["between"] == "all ranks"


@ranks(4)
def test_links_inside_and_across_emulated_hosts(rank: Rank) -> None:
    cluster = _cluster.start(emulate_hosts=2)
    rows = measure_links(cluster, (1,))
    assert [row["between"] for row in rows] == ["all ranks", "inside a host", "across hosts"]
    assert all(row["ring_gb_per_s"] > 0 for row in rows)
    assert cluster.ranks_per_host == 2


def test_a_kernel_alone_counts_by_its_share_of_heads() -> None:
    cluster = _cluster.Cluster(3, 4, torch.device("cpu"))
    even = Ideal("cpu").setup(Case(8, 28, 4, 8, torch.float32), cluster)
    assert even.heads() == (slice(21, 28), slice(3, 4)) and even.time_share == 1.0
    uneven = Ideal("cpu").setup(Case(8, 6, 2, 8, torch.float32), cluster)
    assert uneven.heads() == (slice(3, 6), slice(1, 2)) and uneven.time_share == 0.5


def test_hosts_are_an_option_with_and_without_a_number() -> None:
    assert attention.parse([]).emulate_hosts == 1
    assert attention.parse(["--emulate-hosts", "2"]).emulate_hosts == 2


@ranks(2)
def test_the_attention_benchmark_writes_its_file(rank: Rank, tmp_path: Path) -> None:
    options = attention.parse(
        "--lengths 64 128 --check-tokens 64 --shapes 4/2x16 --dtype float32 "
        f"--block-s 0.01 --methods ideal_cpu --out {tmp_path}".split()
    )
    report = attention.run(options, _cluster.start())
    assert {row.tokens for row in report.rows} == {64, 128}
    absent = [entry["method"] for entry in report.not_measured]
    assert any("transformer-engine" in name for name in absent)
    if rank.rank == 0:
        assert len(list(tmp_path.glob("*_attention_2xcpu.json"))) == 1


def test_zigzag_pairs_front_and_back() -> None:
    assert layout_tokens("zigzag", 8, 0, 2).tolist() == [0, 1, 6, 7]
    assert layout_tokens("zigzag", 8, 1, 2).tolist() == [2, 3, 4, 5]
    assert layout_tokens("contiguous", 8, 1, 2).tolist() == [4, 5, 6, 7]
