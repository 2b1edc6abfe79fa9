"""What records say: shares with intervals, by task, length and tier; and the grid of a heat map.

1. Records are grouped by task, way of asking, tier and control. Tiers are never averaged together,
   nor controls with what they control.
2. Each group gets its share of right answers with Wilson's interval, the mean score with an error
   clustered by scene, what guessing would give, and how many answers could not be read; and the
   same again for each length.
3. `result_rows` writes the groups as rows of the repository's result files, `grid_rows` the grids
   of those that lie on one, so that heat maps can be drawn again from a result file alone.

Cost: a pass over the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longvila.evaluation.metrics import clustered_mean, wilson_interval
from longvila.evaluation.runner import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A group of answers.

    Attributes:
        n: Answers.
        correct: Those that are right.
        low: Lower end of the interval of their share.
        high: Its upper end.
        score: Mean score.
        error: Its standard error, clustered by scene; NaN with one scene.
        chance: Mean score of a guess.
        unread: Answers in which nothing could be read.
        tokens: Most tokens of a prompt.
    """

    n: int
    correct: int
    low: float
    high: float
    score: float
    error: float
    chance: float
    unread: int
    tokens: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.n


@dataclass(frozen=True)
class Group:
    """Answers to one kind of question.

    Attributes:
        task: What was measured.
        ask: How it was put.
        tier: Of its needles.
        control: None, or what was taken away.
        all: Over all lengths.
        by_frames: By the number of frames.
        by_depth: By depth, where there is one.
    """

    task: str
    ask: str
    tier: str
    control: str | None
    all: Share
    by_frames: Mapping[int, Share] = field(default_factory=dict)
    by_depth: Mapping[float, Share] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [f"{self.task}, {self.ask}"]
        parts += [self.tier] if self.tier else []
        return " | ".join(parts + ([f"control: {self.control}"] if self.control else []))


def share(records: Sequence[Record]) -> Share:
    """Summarise one group.

    Args:
        records: At least one.
    """
    correct = sum(bool(row["correct"]) for row in records)
    low, high = wilson_interval(correct, len(records), confidence=CONFIDENCE)
    score, error = clustered_mean(
        [float(row["score"]) for row in records], [row["scene"] for row in records]
    )
    return Share(
        n=len(records), correct=correct, low=low, high=high, score=score, error=error,
        chance=math.fsum(row["chance"] for row in records) / len(records),
        unread=sum(row["read"] is None for row in records),
        tokens=max(row["tokens"] for row in records),
    )  # fmt: skip


def summarise(records: Iterable[Record]) -> list[Group]:
    """Group records and summarise each group.

    Args:
        records: Of one run, in any order.

    Returns:
        Groups, sorted by task, way of asking, tier and control.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in records:
        shape = row["shape"]
        key = (row["task"], row["ask"], shape.get("tier") or "", shape.get("control") or "")
        groups.setdefault(key, []).append(row)
    out = []
    for (task, ask, tier, control), rows in sorted(groups.items()):
        rows = sorted(rows, key=lambda row: str(row["id"]))
        out.append(
            Group(task, ask, tier, control or None, share(rows),
                  _by(rows, "frames"), _by(rows, "depth"))
        )  # fmt: skip
    return out


def _by(rows: Sequence[Record], name: str) -> dict[Any, Share]:
    values = sorted({row["shape"][name] for row in rows if row["shape"].get(name) is not None})
    return {v: share([row for row in rows if row["shape"].get(name) == v]) for v in values}


def cells(records: Iterable[Record], group: Group) -> dict[tuple[int, float], Share]:
    """Return the grid of a group's heat map.

    Args:
        records: Of the run.
        group: Which of them.

    Returns:
        For each (frames, depth) its share.
    """
    found: dict[tuple[int, float], list[Record]] = {}
    for row in records:
        shape = row["shape"]
        mine = (row["task"], row["ask"]) == (group.task, group.ask)
        mine &= ((shape.get("tier") or "") == group.tier) & (shape.get("control") == group.control)
        if mine and shape.get("depth") is not None:
            found.setdefault((shape["frames"], shape["depth"]), []).append(row)
    return {cell: share(rows) for cell, rows in sorted(found.items())}


def result_rows(method: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the groups as rows of a result file: one over all lengths, and one a length.

    Args:
        method: What the model is called.
        groups: What `summarise` returned.
    """
    rows = []
    for group in groups:
        parts: list[tuple[int | None, Share]] = [(None, group.all), *group.by_frames.items()]
        for frames, part in parts:
            rows.append(
                {
                    "method": method,
                    "kind": "ours",
                    "tokens": part.tokens,
                    "shape": {
                        "task": group.task, "ask": group.ask, "tier": group.tier,
                        "control": group.control, "n": part.n,
                        "frames_max": frames or max(group.by_frames, default=0),
                        "frames": frames,
                    },
                    "metrics": {
                        "accuracy": round(part.accuracy, 4),
                        "accuracy_interval": [round(part.low, 4), round(part.high, 4)],
                        "score": round(part.score, 4),
                        "chance": round(part.chance, 4),
                        "unread": part.unread,
                    },
                    "samples": [],
                }
            )  # fmt: skip
    return rows


def grid_rows(records: Iterable[Record], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the grids of groups for a result file; controls have none.

    Args:
        records: Of the run.
        groups: What `summarise` returned.

    Returns:
        For each group its task, ask, tier, chance and ``cells``: frames, depth, right, n of each.
    """
    records, rows = list(records), []
    for group in groups:
        grid = {} if group.control else cells(records, group)
        if not grid:
            continue
        found = [[frames, depth, one.correct, one.n] for (frames, depth), one in grid.items()]
        rows.append(
            {"task": group.task, "ask": group.ask, "tier": group.tier,
             "chance": round(group.all.chance, 4), "cells": found}
        )  # fmt: skip
    return rows
