"""Options that may be left out: shown as what they take, None only when not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from longvila.cli._options import parse


@dataclass(frozen=True)
class Options:
    """Try it."""

    frames: int | None = None
    """Frames."""
    fps: float | None = None
    """Rate."""
    model: str | None = None
    """Name."""
    out: Path | None = None
    """Folder."""
    quick: bool = False
    """Hurry."""
    order: Literal["row", "column"] | None = None
    """Order."""


def test_each_kind_is_read_and_none_is_what_was_not_given() -> None:
    assert parse(Options, [], "try", None) == Options()
    argv = ["--frames", "3", "--fps", "2", "--model", "None", "--out", "a/b"]
    given = parse(Options, [*argv, "--order", "row"], "try", None)
    assert given == Options(3, 2.0, "None", Path("a/b"), order="row")


def test_help_names_what_an_option_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Options, ["--help"], "try", "What it does.", flag_pairs=False)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: longvila try" in shown and "What it does." in shown
    assert "--frames INT" in shown and "--out PATH" in shown and "{None" not in shown
    assert "--order {row,column}" in shown
    assert "--no-quick" not in shown


def test_what_cannot_be_read_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for option, word in (("--frames", "many"), ("--order", "None"), ("--order", "diagonal")):
        with pytest.raises(SystemExit) as ended:
            parse(Options, [option, word], "try", None)
        assert ended.value.code == 2
        assert word in capsys.readouterr().err
