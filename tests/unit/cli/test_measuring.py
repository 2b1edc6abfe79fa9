"""What the verbs that measure say while they run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from longvila.cli import _measuring
from longvila.cli._measuring import lasting, progress_line


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (12_000, "3 h 20 min")],
)
def test_times_as_one_reads_them(seconds: float, told: str) -> None:
    assert lasting(seconds) == told


def test_a_line_now_and_then_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(_measuring, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tell = progress_line()
    for done in range(1, 5):
        now[0] += 2.0
        tell(done, 4, SimpleNamespace(id=f"scene {done}"))
    assert capsys.readouterr().err.splitlines() == [
        "[1/4] scene 1  2 s, about 6 s left", "[4/4] scene 4  8 s, about 0 s left",
    ]  # fmt: skip
    tell = progress_line()
    for done in range(1, 4):
        now[0] += 5.0
        tell(done, 4, SimpleNamespace(id="x"))
    assert len(capsys.readouterr().err.splitlines()) == 3
