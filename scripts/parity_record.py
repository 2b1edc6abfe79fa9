"""Run every cell of both parity grids and write down what was run and what came of it.

    OMP_NUM_THREADS=1 PYTHONPATH=src python scripts/parity_record.py --out record.json --lanes 8

1. The cells of a grid are cut into chunks of one world size, largest worlds first; each lane is a
   process that takes every n-th chunk and runs it on ranks started once.
2. A chunk that fails is run again cell by cell, so that one failure hides no other.
3. Each lane appends a line a chunk to its own file beside ``--out``; a run that was stopped goes on
   behind them. The record holds totals by world and mesh, every failure, and versions.

Cost: hours on two cores; `make test` runs the pairwise subsets of the same cells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/integration"), str(ROOT / "tests/unit/sp")]

import test_attention  # noqa: E402
import test_mmsp_parity  # noqa: E402

from longvila.errors import RankError  # noqa: E402
from longvila.testing.ranks import run_ranks  # noqa: E402

CHUNK = 22
Chunk = tuple[str, int, list[Any]]


def model_cells() -> list[tuple[str, int, Any]]:
    cells = test_mmsp_parity.grid(test_mmsp_parity.ALL_MESHES)
    return [(f"model {cell.world} {cell.mesh}", cell.world, cell) for cell in cells]


def attention_cells() -> list[tuple[str, int, Any]]:
    cells = test_attention.grid.full_grid()
    return [
        (f"attention {case.world_size} {case.mesh}", case.world_size, asdict(case))
        for case in cells
    ]


def chunks() -> Iterator[Chunk]:
    """Chunks of cells of one grid and mesh, larger worlds first."""
    for cells in (model_cells(), attention_cells()):
        groups: dict[str, tuple[int, list[Any]]] = {}
        for name, world, cell in cells:
            groups.setdefault(name, (world, []))[1].append(cell)
        for name, (world, members) in sorted(groups.items(), key=lambda item: -item[1][0]):
            for start in range(0, len(members), CHUNK):
                yield name, world, members[start : start + CHUNK]


def checker(name: str) -> Callable[..., None]:
    attention = name.startswith("attention")
    return test_attention.check_all if attention else test_mmsp_parity.check_cells


def run_chunk(name: str, world: int, cells: list[Any]) -> list[str]:
    """Run a chunk; return a message for each cell that failed."""
    try:
        run_ranks(checker(name), world, cells, timeout_s=280)
        return []
    except RankError:
        failures = []
        for cell in cells:
            try:
                run_ranks(checker(name), world, [cell], timeout_s=120)
            except RankError as error:
                failures.append(f"{name} {cell}: {str(error)[-2000:]}")
        return failures


def lines_of(out: Path) -> list[dict[str, Any]]:
    """What all lanes have written, of runs before too."""
    files = out.parent.glob(f"{out.stem}.*.jsonl")
    return [json.loads(line) for file in files for line in file.open()]


def run_lane(out: Path, lane: int, lanes: int, until: float) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(f".{lane}.jsonl")
    done = {line["chunk"] for line in lines_of(out)}
    for number, (name, world, cells) in enumerate(chunks()):
        if number % lanes != lane or number in done:
            continue
        if time.time() > until:
            return
        failures = run_chunk(name, world, cells)
        line = {"chunk": number, "mesh": name, "cells": len(cells), "failures": failures}
        with path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def collect(out: Path, seconds: float, commit: str) -> bool:
    """Write the record; return whether every cell has run and passed."""
    lines = lines_of(out)
    meant, ran, failed = Counter[str](), Counter[str](), Counter[str]()
    for name, _, cells in chunks():
        meant[name] += len(cells)
    for line in lines:
        ran[line["mesh"]] += line["cells"]
        failed[line["mesh"]] += len(line["failures"])
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": date.today().isoformat(),
        "commit": commit,
        "command": "python scripts/parity_record.py",
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cells": sum(meant.values()),
        "ran": sum(ran.values()),
        "failed": sum(failed.values()),
        "by_mesh": {
            name: {"cells": meant[name], "ran": ran[name], "failed": failed[name]} for name in meant
        },
        "failures": [failure for line in lines for failure in line["failures"]],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['ran']} of {record['cells']} cells, {record['failed']} failed: {out}")
    return record["ran"] == record["cells"] and not record["failed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=max((os.cpu_count() or 1) // 3, 1))
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no chunk later")
    parser.add_argument("--commit", default=os.environ.get("LONGVILA_COMMIT", ""))
    parser.add_argument("--lane", type=int, help="run this lane only (used by the command itself)")
    options = parser.parse_args()
    started = time.time()
    if options.lane is not None:
        run_lane(options.out, options.lane, options.lanes, started + options.limit_s)
        return 0
    command = [
        sys.executable, __file__, "--out", str(options.out), "--lanes", str(options.lanes),
        "--limit-s", str(options.limit_s),
    ]  # fmt: skip
    lanes = [
        subprocess.Popen([*command, "--lane", str(lane)], cwd=ROOT) for lane in range(options.lanes)
    ]
    codes = [lane.wait() for lane in lanes]
    if any(codes):
        print(f"lanes ended with {codes}", file=sys.stderr)
    whole = collect(options.out, time.time() - started, options.commit)
    return 0 if whole and not any(codes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
