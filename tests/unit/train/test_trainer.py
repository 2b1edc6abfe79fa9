"""The Trainer: the same steps on any mesh, and the same as the plain loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import assert_same, fresh_model, put_on_mesh, row, whole
from trainer_cases import ROWS, trained

from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.stages import Optimizer, Rates
from longvila.train.step import build_optimizer, train_step

RATE = 1e-2
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp 2": {}, "sp 2": {"seq_parallel_size": 2}},
    4: {
        "ring 2 x ulysses 2": {"seq_parallel_size": 4, "seq_parallel_ring_size": 2},
        "dp 2 x ring 2": {"seq_parallel_size": 2, "seq_parallel_ring_size": 2},
    },
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Five steps of the plain loop, on one process."""
    model, mesh = put_on_mesh(fresh_model(), fsdp=False)
    rates = Rates(vision_tower=RATE, projector=RATE, language_model=RATE)
    optimizer = build_optimizer(model, rates, Optimizer(weight_decay=0.1, eps=1e-4))
    results = [
        train_step(
            model,
            [row(seed) for seed in range(ROWS * step, ROWS * (step + 1))],
            optimizer,
            mesh,
            clip_norm=0.5,
        )
        for step in range(5)
    ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "weights": whole(model),
    }


def assert_equal_runs(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
    assert_same(actual["weights"], expected["weights"], tolerance=1e-4)


def test_one_process_equals_the_plain_loop(plain: dict[str, Any], tmp_path: Path) -> None:
    assert max(plain["norms"]) > 0.5  # clipping is at work
    assert_equal_runs(trained(None, str(tmp_path)), plain)


def each_layout(rank: Rank, folder: str) -> dict[str, dict[str, Any]]:
    layouts = LAYOUTS[rank.world_size]
    return {name: trained(rank, folder, **options) for name, options in layouts.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_mesh_equals_the_plain_loop(ranks: int, plain: dict[str, Any], tmp_path: Path) -> None:
    for results in run_ranks(each_layout, ranks, str(tmp_path)):
        for result in results.values():
            assert_equal_runs(result, plain)
