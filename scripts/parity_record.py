"""Run every cell of both parity grids and write down what was run and what came of it.

    OMP_NUM_THREADS=1 PYTHONPATH=src python scripts/parity_record.py --lanes 8 --work FOLDER
    PYTHONPATH=src python scripts/parity_record.py --work FOLDER --collect benchmarks/results

1. The cells of a grid are cut into chunks of one world size, largest worlds first; each lane is a
   process that takes every n-th chunk and runs it on ranks started once.
2. A chunk that fails is run again cell by cell, so that one failure hides no other.
3. Each lane appends a line a chunk to its own file in ``--work``: the grid's fingerprint, the
   commit, how many cells, the largest errors, failures. A run that was stopped goes on behind them,
   on this machine or another; lines of another grid do not count.
4. ``--collect`` adds the lines up: a row for each grid and number of ranks, cells by the value of
   each factor, cells by commit, every failure.

The fingerprint is that of the cells alone, and stands in the record: a record of other cells than
the tests have is stale (tests/unit/testing/test_parity_record.py).

Cost: hours on two cores; `make test` runs the pairwise subsets of the same cells.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
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


def fingerprint() -> str:
    """Of all cells in the order of their chunks."""
    digest = hashlib.sha256()
    for name, world, cells in chunks():
        values = [tuple(c.items()) if isinstance(c, dict) else tuple(c) for c in cells]
        digest.update(repr((name, world, values)).encode())
    return digest.hexdigest()[:16]


def by_factor() -> dict[str, dict[str, dict[str, int]]]:
    """Cells of each grid by the value of each factor."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for grid, cells in (("model", model_cells()), ("attention", attention_cells())):
        counts: dict[str, Counter[str]] = {}
        for _, world, cell in cells:
            values = cell if isinstance(cell, dict) else cell._asdict()
            for factor, value in {**values, "world": world}.items():
                counts.setdefault(factor, Counter())[str(value)] += 1
        found[grid] = {factor: dict(sorted(each.items())) for factor, each in counts.items()}
    return found


def checker(name: str) -> Callable[..., Any]:
    attention = name.startswith("attention")
    return test_attention.check_all if attention else test_mmsp_parity.check_cells


def worst_of(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The largest of several tables of errors, by precision and quantity."""
    worst: dict[str, dict[str, float]] = {}
    for table in found:
        for dtype, errors in table.items():
            seen = worst.setdefault(dtype, {})
            for name, error in errors.items():
                seen[name] = max(seen.get(name, 0.0), error)
    return worst


def run_chunk(
    name: str, world: int, cells: list[Any]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Run a chunk; return the largest errors over ranks, and a message for each failed cell."""
    try:
        return worst_of(run_ranks(checker(name), world, cells, timeout_s=280)), []
    except RankError:
        tables, failures = [], []
        for cell in cells:
            try:
                tables += run_ranks(checker(name), world, [cell], timeout_s=120)
            except RankError as error:
                failures.append(f"{name} {cell}: {str(error)[-2000:]}")
        return worst_of(tables), failures


def lines_of(work: Path) -> list[dict[str, Any]]:
    """What all lanes have written for these cells, of runs before too; a chunk counts once."""
    grid, lines = fingerprint(), {}
    for file in sorted(work.glob("*.jsonl")):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if line["grid"] == grid:
                lines[line["chunk"]] = line
    return [lines[number] for number in sorted(lines)]


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_lane(work: Path, lane: int, numbers: set[int], until: float, commit: str) -> None:
    grid = fingerprint()
    for number, (name, world, cells) in enumerate(chunks()):
        if number not in numbers:
            continue
        if time.time() > until:
            return
        worst, failures = run_chunk(name, world, cells)
        line = {
            "grid": grid, "commit": commit, "chunk": number, "mesh": name, "cells": len(cells),
            "versions": versions(), "worst": worst, "failures": failures,
        }  # fmt: skip
        with (work / f"r.{lane}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def record(lines: list[dict[str, Any]], commit: str) -> dict[str, Any]:
    """The record of these lines, in the form of a benchmark's result."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    meant = list(enumerate(chunks()))
    ran = {line["chunk"]: line for line in lines}
    for number, (name, world, cells) in meant:
        grid, _, rest = name.partition(" ")
        row = rows.setdefault((grid, world), {"meshes": [], "cells": 0, "lines": []})
        mesh = rest.partition(" ")[2]
        row["meshes"] += [] if mesh in row["meshes"] else [mesh]
        row["cells"] += len(cells)
        row["lines"] += [ran[number]] if number in ran else []
    found = []
    for (grid, world), row in rows.items():
        tables = [line["worst"] for line in row["lines"] if line["worst"]]
        errors = worst_of(tables)
        noted = sum(line["cells"] for line in row["lines"] if line["worst"])
        found.append({
            "method": f"{grid}, {world} rank{'s' if world > 1 else ''}",
            "kind": "ours",
            "tokens": 0,
            "shape": {"grid": grid, "ranks": world, "meshes": row["meshes"]},
            "metrics": {
                "cells": row["cells"],
                "ran": sum(line["cells"] for line in row["lines"]),
                "failed": sum(len(line["failures"]) for line in row["lines"]),
                "errors_of_cells": noted,
                **{
                    f"{dtype}_error": float(f"{max(each.values()):.2e}")
                    for dtype, each in sorted(errors.items())
                },
            },
            "samples": [],
            "about": {"errors": {
                dtype: {name: float(f"{error:.2e}") for name, error in sorted(each.items())}
                for dtype, each in sorted(errors.items())
            }},
        })  # fmt: skip
    commits = Counter[str]()
    for line in lines:
        commits[line["commit"]] += line["cells"]
    return {
        "benchmark": "parity",
        "question": "Does every cell of the parity grids equal one process?",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "command": "python scripts/parity_record.py",
        "hardware": {"gpu": "cpu", "count": 1, "link": "gloo"},
        "versions": {
            name: ", ".join(sorted({line["versions"][name] for line in lines}))
            for name in versions()
        },
        "rows": found,
        "notes": {
            "grid": fingerprint(),
            "cells_by_commit": dict(commits),
            "cells_by_factor": by_factor(),
            "failures": [failure for line in lines for failure in line["failures"]],
        },
    }


def collect(work: Path, folder: Path, commit: str) -> bool:
    """Write the record; return whether every cell has run and passed."""
    content = record(lines_of(work), commit)
    metrics = [row["metrics"] for row in content["rows"]]
    cells, ran, failed = (
        sum(each[name] for each in metrics) for name in ("cells", "ran", "failed")
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['date']}_parity_cpu.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{ran} of {cells} cells, {failed} failed: {path}")
    return ran == cells and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where lanes write")
    parser.add_argument("--lanes", type=int, default=max((os.cpu_count() or 1) // 3, 1))
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no chunk later")
    parser.add_argument("--commit", default=os.environ.get("LONGVILA_COMMIT", ""))
    parser.add_argument("--collect", type=Path, help="run nothing, write the record to this folder")
    parser.add_argument("--lane", type=int, help="run this lane only (used by the command itself)")
    parser.add_argument("--chunks", default="", help="chunks of that lane")
    options = parser.parse_args()
    started = time.time()
    if options.collect is not None:
        return 0 if collect(options.work, options.collect, options.commit) else 1
    if options.lane is not None:
        until = started + options.limit_s
        numbers = {int(number) for number in options.chunks.split(",") if number}
        run_lane(options.work, options.lane, numbers, until, options.commit)
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    done = {line["chunk"] for line in lines_of(options.work)}
    missing = [str(number) for number, _ in enumerate(chunks()) if number not in done]
    command = [
        sys.executable, __file__, "--work", str(options.work), "--commit", options.commit,
        "--limit-s", str(options.limit_s),
    ]  # fmt: skip
    lanes = [
        subprocess.Popen(
            [*command, "--lane", str(lane), "--chunks", ",".join(missing[lane :: options.lanes])],
            cwd=ROOT,
        )
        for lane in range(options.lanes)
    ]
    codes = [lane.wait() for lane in lanes]
    lines = lines_of(options.work)
    ran, failed = (sum(line["cells"] for line in lines), sum(len(x["failures"]) for x in lines))
    print(f"{ran} cells so far, {failed} failed, lanes ended with {codes}")
    return 1 if any(codes) or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
