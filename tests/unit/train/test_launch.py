"""Processes: a rank ends with who started it, and a failure says which rank it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil

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


def test_a_rank_ends_with_who_started_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True,
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
    gone, _ = psutil.wait_procs([child], timeout=120)
    assert gone == [child]


def test_a_failure_names_ranks_and_how_they_ended() -> None:
    failures = {
        3: SimpleNamespace(exitcode=-9, pid=11),
        1: SimpleNamespace(exitcode=1, pid=10),
        2: SimpleNamespace(exitcode=-11, pid=12),
    }
    said = _describe(SimpleNamespace(failures=failures))
    assert "by rank 1 (process 10): exit status 1; rank 2 (process 12): killed by SIGSEGV; " in said
    assert "rank 3 (process 11): killed by SIGKILL, perhaps for want of memory. Its own" in said
