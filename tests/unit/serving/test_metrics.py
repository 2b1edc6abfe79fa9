"""The text that Prometheus reads."""

from __future__ import annotations

from longvila.inference.serving.metrics import Metrics


def test_every_kind_is_rendered() -> None:
    metrics = Metrics("x")
    metrics.counter("events_total", "Things.")
    metrics.gauge("level", "How high.", lambda: {(("of", 'a"b\\c\nd'),): 1.5})
    metrics.histogram("seconds", "How long.", (0.1, 1.0))
    metrics.add("events_total")
    metrics.add("events_total", 2, kind="odd", age="new")
    for value in (0.05, 0.1, 0.5, 7.0):
        metrics.observe("seconds", value)
    assert metrics.value("events_total", kind="odd", age="new") == 2
    assert metrics.value("events_total", kind="even") == 0
    assert metrics.render() == (
        "# HELP x_events_total Things.\n"
        "# TYPE x_events_total counter\n"
        "x_events_total 1\n"
        'x_events_total{age="new",kind="odd"} 2\n'
        "# HELP x_level How high.\n"
        "# TYPE x_level gauge\n"
        'x_level{of="a\\"b\\\\c\\nd"} 1.5\n'
        "# HELP x_seconds How long.\n"
        "# TYPE x_seconds histogram\n"
        'x_seconds_bucket{le="0.1"} 2\n'
        'x_seconds_bucket{le="1"} 3\n'
        'x_seconds_bucket{le="+Inf"} 4\n'
        "x_seconds_sum 7.65\n"
        "x_seconds_count 4\n"
    )
