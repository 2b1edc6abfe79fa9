"""Subtitles read, and chosen by the frames a model sees."""

from __future__ import annotations

from pathlib import Path

from longvila.evaluation.subtitles import Line, on_screen, read_srt

TEXT = """\ufeff2
00:00:02,500 --> 00:00:04,000
<font color="white" size=".72c">Second</font>
on two lines

1
00:00:00,000 --> 00:00:01,250 X1:40 X2:600
{\\an8}First

3
01:00:00.5 --> 01:00:01.0

4
no times
Lost
"""


def test_read(tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    file.write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert read_srt(file) == [
        Line(0.0, 1.25, "First"),
        Line(2.5, 4.0, "Second on two lines"),
    ]


def test_chosen_in_order_once_and_the_end_is_outside() -> None:
    lines = [Line(0, 1, "a"), Line(1, 2, "b"), Line(1.5, 3, "c"), Line(5, 6, "d")]
    assert [line.text for line in on_screen(lines, [2.5, 1.0, 1.6, 0.5])] == ["a", "b", "c"]
    assert [line.text for line in on_screen(lines, [1.0])] == ["b"]
    assert on_screen(lines, []) == []
