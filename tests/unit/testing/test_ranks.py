"""The multi-rank helper: it runs, it reports every rank, and it ends what hangs."""

from __future__ import annotations

import multiprocessing.connection
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longvila.errors import RankError
from longvila.testing import Rank, ranks, run_ranks


@ranks(1, 2, 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_run_collectives(rank: Rank, dtype: torch.dtype) -> None:
    x = torch.full((3,), float(rank.rank), dtype=dtype)
    dist.all_reduce(x)
    assert x[0].item() == sum(range(rank.world_size))


def fail_on_odd(rank: Rank) -> None:
    if rank.rank % 2:
        raise ValueError(f"rank {rank.rank} says no")


def hang_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        time.sleep(290)


def square(rank: Rank, power: int) -> int:
    return rank.rank**power


def test_results_come_back_by_rank() -> None:
    assert run_ranks(square, 4, 2) == [0, 1, 4, 9]


def loaded(rank: Rank, names: list[str]) -> list[str]:
    return [name for name in names if name not in sys.modules]


def test_ranks_have_models_loaded() -> None:
    names = ["torch.distributed.fsdp", "longvila.testing.tiny", "longvila.parallel.apply"]
    names += [f"transformers.models.{n}.modeling_{n}" for n in ("qwen2", "siglip")]
    assert run_ranks(loaded, 1, names) == [[]]


def test_ranks_that_end_at_once_leave_nobody_connecting() -> None:
    for _ in range(5):
        assert run_ranks(square, 4, 1) == [0, 1, 2, 3]


def test_every_failing_rank_shows_its_traceback() -> None:
    with pytest.raises(RankError) as error:
        run_ranks(fail_on_odd, 4)
    assert "rank 1 says no" in str(error.value) and "rank 3 says no" in str(error.value)
    assert "2 of 4 ranks" in str(error.value)


def test_a_hanging_rank_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is passed, here, as soon as one of two ranks has answered."""
    wait, limits = multiprocessing.connection.wait, []

    def waited(pipes: Any, timeout: float) -> Any:
        limits.append(timeout)
        return wait(pipes, timeout if len(pipes) == 2 else 0.5)

    monkeypatch.setattr(sys.modules[run_ranks.__module__], "wait", waited)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"no answer from ranks \[1\] \(limit 200 s\)"):
        run_ranks(hang_on_one, 2, timeout_s=200.0)
    assert time.monotonic() - start < 250
    assert limits[0] == pytest.approx(200, abs=1) and 0 < limits[1] < limits[0]


def test_local_functions_are_refused() -> None:
    def local(rank: Rank) -> None:
        return None

    with pytest.raises(TypeError, match="module-level"):
        run_ranks(local, 1)
