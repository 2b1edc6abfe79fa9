"""One table over all results of `benchmarks.prefill`: lengths, numbers of GPUs, and the peer.

A line is a length on a number of GPUs. The speed-up is over one GPU at the same length. Where
several runs measured the same line one that had the peer counts, so that both times are of the
same run; then the newest, then the last by file name. A prompt that was added up from a sample of
its chunks stands in, marked, for one that nobody read whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADER = [
    "tokens", "GPUs", "first token s", "times the floor", "times one GPU's speed",
    "`generate` of transformers, s", "times the peer's speed", "peak GiB", "planned GiB",
]  # fmt: skip


def prefill_summary(
    folder: Path,
) -> tuple[list[str], list[list[str]], list[str], list[str]]:
    """Return header, lines, remarks, and the names of the files they come from.

    Args:
        folder: Of the results.
    """
    found = [(path.stem, json.loads(path.read_text())) for path in folder.glob("*_prefill_*.json")]
    ours: dict[tuple[int, int], dict[str, Any]] = {}
    peers: dict[tuple[int, int], dict[str, Any]] = {}
    files: dict[tuple[int, int, str], str] = {}
    for name, result in sorted(found, key=lambda each: (each[1]["date"], each[0])):
        count = int(result["hardware"]["count"])
        # Older runs timed the first prompt of their process.
        warm = "first_prompt" in result.get("notes", {})
        for row in result["rows"]:
            place, metrics = (row["tokens"], count), row["metrics"]
            if row["kind"] == "peer" and warm:
                peers[place] = metrics
                files[(*place, "peer")] = name
            elif row["kind"] == "ours" and (warm or metrics["sampled"]):
                before = ours.get(place)
                if before is None or _rank(metrics) >= _rank(before):
                    ours[place] = metrics
                    files[(*place, "ours")] = name
    lines, sampled = [], False
    for tokens, count in sorted(ours.keys() | peers.keys()):
        own, peer = (each.get((tokens, count), {}) for each in (ours, peers))
        alone = ours.get((tokens, 1), {})
        faster = alone["ttft_s"] / own["ttft_s"] if alone and own and count > 1 else None
        theirs = "out of memory" if peer.get("out_of_memory") else _figure(peer.get("ttft_s"), 1)
        mark, mark_alone = ("\\*" if each.get("sampled") else "" for each in (own, alone))
        sampled = sampled or bool(mark or mark_alone)
        lines.append([
            f"{tokens:,}", str(count), _figure(own.get("ttft_s"), 1) + mark,
            _figure(own.get("ttft_over_floor"), 2),
            _figure(faster, 2) + (mark_alone if faster else ""), theirs,
            _figure(own.get("times_peer"), 2), _figure(own.get("peak_gib"), 1),
            _figure(own.get("planned_peak_gib"), 1),
        ])  # fmt: skip
    remark = "\\* added up from a sample of the prompt's chunks, not read whole."
    return HEADER, lines, ["", remark] if sampled else [], sorted(set(files.values()))


def _rank(metrics: dict[str, Any]) -> tuple[bool, bool]:
    """What counts more: a prompt read whole, then one beside the peer."""
    return not metrics["sampled"], "times_peer" in metrics


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
