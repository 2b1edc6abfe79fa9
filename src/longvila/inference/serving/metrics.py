"""Counters, gauges and histograms in Prometheus' text format, without a dependency for it."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Metrics:
    """A set of metrics; safe to use from several threads.

    Args:
        prefix: Before each name.
    """

    def __init__(self, prefix: str = "longvila") -> None:
        self.prefix = prefix
        self._lock = threading.Lock()
        self._about: dict[str, tuple[str, str]] = {}
        self._counters: dict[str, dict[Labels, float]] = {}
        self._gauges: dict[str, Callable[[], Mapping[Labels, float]]] = {}
        self._histograms: dict[str, tuple[tuple[float, ...], list[int], float]] = {}

    def counter(self, name: str, about: str) -> None:
        """Declare a counter."""
        self._about[name] = ("counter", about)
        self._counters[name] = {}

    def gauge(self, name: str, about: str, read: Callable[[], Mapping[Labels, float]]) -> None:
        """Declare a gauge that is read when it is asked for."""
        self._about[name] = ("gauge", about)
        self._gauges[name] = read

    def histogram(self, name: str, about: str, bounds: Sequence[float] = SECONDS) -> None:
        """Declare a histogram."""
        self._about[name] = ("histogram", about)
        self._histograms[name] = (tuple(bounds), [0] * (len(bounds) + 1), 0.0)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            values = self._counters[name]
            values[key] = values.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        with self._lock:
            bounds, counts, total = self._histograms[name]
            counts[bisect_left(bounds, value)] += 1
            self._histograms[name] = (bounds, counts, total + value)

    def value(self, name: str, **labels: str) -> float:
        """Return the value of a counter."""
        with self._lock:
            return self._counters[name].get(tuple(sorted(labels.items())), 0)

    def render(self) -> str:
        """Return everything in Prometheus' text format."""
        lines: list[str] = []
        for name, (kind, about) in self._about.items():
            full = f"{self.prefix}_{name}"
            lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
            if kind == "histogram":
                lines += self._render_histogram(name, full)
                continue
            if kind == "gauge":
                values = dict(self._gauges[name]())
            else:
                with self._lock:
                    values = dict(self._counters[name])
            lines += [f"{full}{_braces(key)} {_number(value)}" for key, value in values.items()]
        return "\n".join(lines) + "\n"

    def _render_histogram(self, name: str, full: str) -> list[str]:
        with self._lock:
            bounds, counts, total = self._histograms[name]
            counts = list(counts)
        lines, seen = [], 0
        for bound, count in zip((*map(_number, bounds), "+Inf"), counts, strict=True):
            seen += count
            lines.append(f'{full}_bucket{{le="{bound}"}} {seen}')
        return [*lines, f"{full}_sum {_number(total)}", f"{full}_count {seen}"]


def _braces(key: Labels) -> str:
    if not key:
        return ""
    escaped = (
        (name, text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, text in key
    )
    return "{" + ",".join(f'{name}="{text}"' for name, text in escaped) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
