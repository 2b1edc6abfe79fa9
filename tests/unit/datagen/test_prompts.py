"""Prompts: the package's can be filled in, one's own take their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvila.datagen.prompts import NAMES, Prompts
from longvila.errors import LongVILAError


def test_every_text_is_packaged() -> None:
    prompts = Prompts()
    assert "from 0:01" in prompts.fill("caption", frames=3, start="0:01", end="0:09")
    assert [line.split(":")[0] for line in prompts.lines("kinds")] == [
        "spatial", "attribute", "action", "object", "ocr", "synopsis", "temporal",
    ]  # fmt: skip
    assert all(prompts.lines(name) for name in NAMES)


def test_own_texts_take_their_place(tmp_path: Path) -> None:
    (tmp_path / "caption.txt").write_text("From $start: costs $$1\n")
    prompts = Prompts(tmp_path)
    assert prompts.fill("caption", start=1, end=2, frames=3) == "From 1: costs $1"
    assert prompts.lines("kinds") == Prompts().lines("kinds")
    assert prompts.fingerprint != Prompts().fingerprint == Prompts().fingerprint


def test_wrong_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "caption.txt").write_text("From $begin")
    with pytest.raises(LongVILAError, match=r"'caption' cannot be filled in: 'begin'.*'start'"):
        Prompts(tmp_path).fill("caption", start=1)
    (tmp_path / "captoin.txt").write_text("")
    with pytest.raises(LongVILAError, match="no prompt is called"):
        Prompts(tmp_path)
    with pytest.raises(LongVILAError, match="no such folder"):
        Prompts(tmp_path / "none")
