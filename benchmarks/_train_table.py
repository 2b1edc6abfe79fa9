"""One table over all results of `benchmarks.train_step` on long text: GPUs, lengths, methods.

Where several runs measured a length on as many GPUs, the newest that had peers counts, so that all
times of a length are of one run; else the newest, then the last by file name. Steps that recompute
nothing answer another question, and steps on video another still: both are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def train_step_lines(
    folder: Path,
) -> tuple[list[tuple[int, dict[str, Any], float | None]], list[str]]:
    """Return ``(GPUs, row, how much faster ours is)`` in the table's order, and the files' names.

    Args:
        folder: Of the results.
    """
    chosen: dict[tuple[int, int], tuple[tuple[bool, str, str], dict[str, Any]]] = {}
    for path in folder.glob("*_train_step_*.json"):
        result = json.loads(path.read_text())
        rows = [row for row in result["rows"] if _is_wanted(row)]
        for tokens in {row["tokens"] for row in rows}:
            place = (int(result["hardware"]["count"]), tokens)
            peers = any(row["kind"] == "peer" and row["tokens"] == tokens for row in rows)
            rank = (peers, result["date"], path.stem)
            if place not in chosen or rank > chosen[place][0]:
                chosen[place] = (rank, result)
    lines: list[tuple[int, dict[str, Any], float | None]] = []
    for (count, tokens), (_, result) in sorted(chosen.items(), key=lambda each: each[0]):
        faster = {
            each["peer"]: each["speedup"]
            for each in result.get("notes", {}).get("comparisons", [])
            if each["tokens"] == tokens
        }
        rows = [row for row in result["rows"] if _is_wanted(row) and row["tokens"] == tokens]
        for row in sorted(rows, key=lambda row: row["metrics"]["step_s"]):
            lines.append((count, row, faster.get(row["method"])))
    return lines, sorted({rank[2] for rank, _ in chosen.values()})


def _is_wanted(row: dict[str, Any]) -> bool:
    metrics = row["metrics"]
    if "step_s" not in metrics or "vision_forward_s" in metrics:
        return False
    return row["about"].get("plain_layers") != row["shape"]["layers"]
