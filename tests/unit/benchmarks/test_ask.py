"""The benchmark of ask runs the verb as its own process and says where the time went."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from benchmarks import ask, render

from longvila.media.synthetic import clip


def test_a_tiny_model_answers_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = clip(tmp_path / "film.mp4", num_frames=12)
    options = ["--tiny", "--frames", "3", "--new-tokens", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["ask", str(film), *options, "--out", str(tmp_path)])
    assert ask.main() == 0
    (path,) = tmp_path.glob("*_ask_1xcpu.json")
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert "warn" not in row["about"]["stderr"].lower()
    assert row["samples"][0]["new_tokens"] == 2
    assert row["samples"][0]["media"][0]["name"] == "film.mp4"
    assert row["tokens"] == row["samples"][0]["prompt_tokens"] > 3 * 9
    assert any(line.startswith("| 1 | 3 |") for line in render.ask(result))
