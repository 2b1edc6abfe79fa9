"""`longvila train` ended from outside, in every way, and begun again: the run that was not ended.

Two ranks that share every row, real files. The run is killed with its ranks left behind, loses one
rank, and is asked to stop; what it makes in the end is, to the bit, what an undisturbed run makes.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.waiting import wait_until

sys.path.insert(0, str(Path(__file__).parent))
from stage_files import SMALL, write_files

from longvila.cli.train import main
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks

#: So many that a run is still under way when it is ended some time after its sixth.
STEPS = 20
#: What a step saw and gave; times differ.
SAME = ("loss", "gradient_norm", "rate", "progress", "documents", "tokens", "targets", "frames")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("ended"))


class Run:
    """The command, running."""

    def __init__(self, files: Path, output: Path) -> None:
        self.output = output
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.log = output.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longvila.cli.train", *arguments(files, output)],
                stderr=log,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )

    def until(self, step: int) -> list[psutil.Process]:
        """Wait until a step is done and a little longer; return the ranks, in order."""

        def is_done() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"ended before step {step}:\n{self.said()}")
            return max((line["step"] for line in read_lines(self.output)), default=0) >= step

        wait_until(is_done, lambda: f"step {step}:\n{self.said()}", seconds=250)
        ranks = psutil.Process(self.process.pid).children()
        time.sleep(random.uniform(0, 0.4))
        return sorted(ranks, key=lambda each: int(each.environ()["RANK"]))

    def end(self) -> int:
        return self.process.wait(timeout=280)

    def said(self) -> str:
        return self.log.read_text()


def arguments(files: Path, output: Path) -> list[str]:
    sets = [
        *SMALL[:5], f"max_steps={STEPS}", "epochs=null", "optimizer.eps=1e-4",
        "samples_per_step=3", "num_frames=3", "seq_parallel_size=2", "saving.every=1",
    ]  # fmt: skip
    return [
        "sft", "--ranks", "2", "--model", str(files / "base"), "--data", str(files / "data.yaml"),
        "--output", str(output), *(part for each in sets for part in ("--set", each)),
    ]  # fmt: skip


def read_lines(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    # The last line may be on its way.
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def steps(output: Path) -> dict[int, list[Any]]:
    """What each step saw; one that was done again counts as it was done last."""
    return {line["step"]: [line[name] for name in SAME] for line in read_lines(output)}


def rank_of_a_run(rank: Rank, given: list[str]) -> int:
    """What a launcher starts, in a process that has its imports."""
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.world_size)}
    return main(given)


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_ranks(rank_of_a_run, 2, arguments(files, output), timeout_s=280) == [0, 0]
    return output


def assert_same_run(run: Run, expected: Path) -> None:
    assert steps(run.output) == steps(expected) and list(steps(expected)) == [*range(1, STEPS + 1)]
    for name in ("model.safetensors", "config.json"):
        assert (run.output / name).read_bytes() == (expected / name).read_bytes(), name


def kill_all(run: Run, step: int) -> None:
    """Kill the command; its ranks see that and end."""
    ranks = run.until(step)
    assert len(ranks) == 2
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    gone, alive = psutil.wait_procs(ranks, timeout=120)
    assert len(gone) == 2 and not alive
    assert not (run.output / "config.json").exists()


@pytest.mark.timeout(900)
def test_ended_in_every_way_it_is_the_undisturbed_run(
    files: Path, tmp_path: Path, undisturbed: Path
) -> None:
    output = tmp_path / "out"
    kill_all(Run(files, output), 2)

    lost = Run(files, output)
    lost.until(4)[1].kill()
    assert lost.end() == 1
    said = lost.said()
    assert re.search(r"ended by .*rank 1 \(process \d+\): killed by SIGKILL, perhaps", said), said
    assert re.search(r"rank 0 \(dp 0, ring 0, ulysses 0\), step \d+ failed: ", said), said

    asked = Run(files, output)
    asked.until(6)
    asked.process.terminate()
    assert asked.end() == 128 + signal.SIGTERM, asked.said()
    found = re.search(r"SIGTERM: saved step (\d+) \(.* %", asked.said())
    assert found is not None and not (output / "config.json").exists()
    newest = max(int(p.name.split("-")[1]) for p in (output / "saves").glob("step-*"))
    assert newest == int(found[1]) < STEPS

    last = Run(files, output)
    assert last.end() == 0, last.said()
    assert f"resumed from {output}/saves/step-{newest}\n" in last.said()
    assert_same_run(last, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again(files: Path, tmp_path: Path, undisturbed: Path) -> None:
    done = 0
    for _ in range(5):
        run = Run(files, tmp_path / "out")
        done = min(done + random.randint(1, 3), STEPS - 2)
        kill_all(run, done)
    last = Run(files, tmp_path / "out")
    assert last.end() == 0, last.said()
    assert_same_run(last, undisturbed)
