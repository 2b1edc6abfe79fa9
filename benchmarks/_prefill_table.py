"""One table over all results of `benchmarks.prefill`: lengths, numbers of GPUs, and the peer.

A line is a length on a number of GPUs. The speed-up is over one GPU at the same length, whole
prompts both. Where several runs measured the same line one that had the peer counts, so that both
times are of the same run; then the newest, then the last by file name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADER = [
    "tokens", "GPUs", "first token s", "times the floor", "times one GPU's speed",
    "`generate` of transformers, s", "times the peer's speed", "peak GiB", "planned GiB",
]  # fmt: skip


def prefill_summary(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Return header and lines.

    Args:
        folder: Of the results.
    """
    found = [(path.name, json.loads(path.read_text())) for path in folder.glob("*_prefill_*.json")]
    ours: dict[tuple[int, int], dict[str, Any]] = {}
    peers: dict[tuple[int, int], dict[str, Any]] = {}
    for _, result in sorted(found, key=lambda each: (each[1]["date"], each[0])):
        count = int(result["hardware"]["count"])
        for row in result["rows"]:
            metrics = row["metrics"]
            # Older runs timed the first prompt of their process.
            place = row["tokens"], count
            if row["kind"] == "ours" and "planned_peak_gib" in metrics and not metrics["sampled"]:
                if "times_peer" in metrics or "times_peer" not in ours.get(place, {}):
                    ours[place] = metrics
            elif row["kind"] == "peer":
                peers[place] = metrics
    lines = []
    for tokens, count in sorted(ours.keys() | peers.keys()):
        own, peer = (each.get((tokens, count), {}) for each in (ours, peers))
        alone = ours.get((tokens, 1), {}).get("ttft_s")
        faster = alone / own["ttft_s"] if alone and own and count > 1 else None
        theirs = "out of memory" if peer.get("out_of_memory") else _figure(peer.get("ttft_s"), 1)
        lines.append([
            f"{tokens:,}", str(count), _figure(own.get("ttft_s"), 1),
            _figure(own.get("ttft_over_floor"), 2), _figure(faster, 2), theirs,
            _figure(own.get("times_peer"), 2), _figure(own.get("peak_gib"), 1),
            _figure(own.get("planned_peak_gib"), 1),
        ])  # fmt: skip
    return HEADER, lines


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
