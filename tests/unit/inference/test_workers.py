"""Ranks of one command: the first is this process, and a rank that dies ends all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longvila.errors import LongVILAError, RankError
from longvila.inference.engine import Engine
from longvila.inference.workers import Ranks, leave_ranks, run_over_ranks
from longvila.testing.ranks import Rank, run_ranks

from .cases import language_model, prompt

SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from longvila.errors import LongVILAError
from longvila.inference import workers
from longvila.inference.workers import run_over_ranks

if __name__ == "__mp_main__" and sys.argv[1] == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C while another rank imports

def work(ranks, case):
    assert dist.get_world_size() == ranks.size == 2 and dist.get_rank() == ranks.rank
    assert ranks.share({"from": ranks.rank}) == {"from": 0}
    if case == "one" and ranks.rank == 1:
        raise LongVILAError("film.mp4 is gone here")
    if case == "killed" and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "all":
        raise LongVILAError("too long everywhere")
    if case == "alone":
        if ranks.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)  # holds the pipes that the test reads to their end
    if case in ("one", "killed"):
        time.sleep(60)  # as in a collective that nobody else joins
    total = torch.tensor(ranks.rank + 1)
    dist.all_reduce(total)
    if ranks.is_first:
        print("sum", int(total))
    return 7

if __name__ == "__main__":
    if sys.argv[1] == "all":
        workers._GRACE_S = 100.0  # the first rank fails by itself, however late
    try:
        sys.exit(run_over_ranks(work, sys.argv[1], size=2, device="cpu"))
    except LongVILAError as error:
        print("own error:", error, file=sys.stderr)
        sys.exit(3)
"""


@pytest.mark.parametrize(
    ("case", "status", "said"),
    [
        ("none", 7, "sum 3"),
        ("interrupted", 7, "sum 3"),
        ("one", 1, "longvila: rank 1: film.mp4 is gone here"),
        ("killed", 1, "longvila: rank 1: was killed; the system does that when"),
        ("all", 3, "own error: too long everywhere"),
    ],
)
def test_two_ranks_of_a_command(tmp_path: Any, case: str, status: int, said: str) -> None:
    script = tmp_path / "command.py"
    script.write_text(SCRIPT.replace("sleep(60)", "sleep(600)"))
    done = subprocess.run(
        [sys.executable, str(script), case], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    if case == "all":
        assert "rank 1" not in done.stderr


def test_the_other_ranks_end_with_the_first(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), "alone"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == -signal.SIGKILL and time.monotonic() - start < 90
    assert "Traceback" not in done.stderr


def alone(ranks: Ranks, argument: str) -> int:
    assert not dist.is_initialized() and ranks.is_first and ranks.mesh(None) is None
    assert ranks.share(argument) == argument and ranks.together(lambda: 5) == 5
    return 2


def test_one_rank_needs_no_group_and_gpus_must_be_there() -> None:
    assert run_over_ranks(alone, "x", size=1, device="cpu") == 2
    if torch.cuda.device_count() < 99:
        with pytest.raises(LongVILAError, match="there is no GPU 98"):
            run_over_ranks(alone, "x", size=99, device="cuda")


def fail_on_one(rank: Rank) -> None:
    ranks = Ranks(rank.rank, 2, torch.device("cpu"))
    assert ranks.together(lambda: rank.rank + 5) == rank.rank + 5
    fails = {0: 5}
    expected = pytest.raises(KeyError) if rank.rank else pytest.raises(RankError, match="rank 1: 1")
    with expected:
        ranks.together(lambda: fails[rank.rank])
    assert Ranks(0, 1, torch.device("cpu")).together(lambda: 5) == 5


def test_what_fails_on_one_rank_fails_on_all() -> None:
    run_ranks(fail_on_one, 2)


def test_graphs_go_before_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for them; an engine that is still referred to must not matter."""
    order: list[str] = []
    engine = Engine(language_model("qwen2"), decode_graphs="uncaptured")
    engine.generate(prompt(9), max_new_tokens=2, do_sample=False)
    (step,) = engine.static._steps.values()
    step.graph = SimpleNamespace(reset=lambda: order.append("graph"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: order.append("group"))
    leave_ranks()
    assert order == ["graph", "group"]
    assert step.graph is None and not engine.static.captured
    engine.generate(prompt(9), max_new_tokens=2, do_sample=False)  # may go on
