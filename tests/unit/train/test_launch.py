"""Processes: a rank ends with who started it, and a failure says which rank it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from longvila.train.launch import _describe

CHILD = """
import time
from longvila.train.launch import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(280)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


#: A rank of another launcher, in the imports that its settings need.
IMPORTING = """
import os, time
os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
from longvila.cli import train
def settings_of(options):
    print("ready", flush=True)
    time.sleep(280)
train.settings_of = settings_of
train.main(["sft"])
"""


@pytest.mark.parametrize("code", [CHILD, IMPORTING])
def test_a_rank_ends_with_who_started_it(code: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    # Two processes write; either may be first.
    number, ready = sorted(process.stdout.readline() for _ in range(2))
    assert ready == "ready\n"
    child = psutil.Process(int(number))
    time.sleep(0.7)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    process.kill()
    process.wait()
    process.stdout.close()
    gone, alive = psutil.wait_procs([child], timeout=30)
    for left in alive:
        left.kill()
    assert gone == [child]


#: Stands in for a rank: it is adopted by another process before it comes to watch its parent, as
#: a rank is whose command is killed while it still imports.
LATE_RANK = """
import os, time
with open(os.environ["RANK_FOLDER"] + "/number", "w") as file:
    file.write(f"{os.getpid()}\\n")
first = os.getppid()
while os.getppid() == first:
    time.sleep(0.02)
from longvila.train.launch import end_with_parent
end_with_parent()
time.sleep(280)
"""
COMMAND = """
from longvila.train.launch import launch
launch(1, "late_rank", [])
"""


def test_a_rank_that_still_starts_ends_with_a_killed_command(tmp_path: Path) -> None:
    (tmp_path / "late_rank.py").write_text(LATE_RANK)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": paths, "RANK_FOLDER": str(tmp_path)},
    )
    number = tmp_path / "number"
    until = time.monotonic() + 120
    while not (number.exists() and number.read_text().endswith("\n")):
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    rank = psutil.Process(int(number.read_text()))
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs([rank], timeout=60)
    for left in alive:
        left.kill()
    assert not alive


def test_a_failure_names_ranks_and_how_they_ended() -> None:
    failures = {
        3: SimpleNamespace(exitcode=-9, pid=11),
        1: SimpleNamespace(exitcode=1, pid=10),
        2: SimpleNamespace(exitcode=-11, pid=12),
    }
    said = _describe(SimpleNamespace(failures=failures))
    assert "by rank 1 (process 10): exit status 1; rank 2 (process 12): killed by SIGSEGV; " in said
    assert "rank 3 (process 11): killed by SIGKILL, perhaps for want of memory. Its own" in said
