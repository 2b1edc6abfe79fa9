"""Videos are found by name, decisions read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvila.datagen.dataset import Video, check_decisions, find_videos, opened, read_decisions
from longvila.errors import LongVILAError


def test_folders_files_and_lists(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "deep/c.webm", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_videos([tmp_path])
    assert [(v.id, v.listed) for v in found] == [
        ("a", "a.MKV"), ("b", "b.mp4"), ("deep/c", "deep/c.webm"),
    ]  # fmt: skip
    (tmp_path / "list.txt").write_text("b.mp4\n\ndeep/c.webm\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"id": 7, "video": "b.mp4"}) + "\n")
    listed = find_videos([tmp_path / "list.txt", tmp_path / "list.jsonl"])
    assert [v.id for v in listed] == ["b", "c", "7"]
    assert listed[2].path == listed[0].path == str(tmp_path / "b.mp4")
    (tmp_path / "odd.jsonl").write_text('\ufeff{"id": "a\u2028b\x85", "video": "b.mp4"}\r\n')
    assert [v.id for v in find_videos([tmp_path / "odd.jsonl"])] == ["a\u2028b\x85"]
    single = find_videos([tmp_path / "b.mp4"])
    assert single == [Video("b", str(tmp_path / "b.mp4"), str(tmp_path / "b.mp4"))]


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(LongVILAError, match="no such file"):
        find_videos([tmp_path / "none.mp4"])
    with pytest.raises(LongVILAError, match="no video"):
        find_videos([tmp_path])
    (tmp_path / "a.mp4").touch()
    with pytest.raises(LongVILAError, match=r"called \['a'\]"):
        find_videos([tmp_path, tmp_path / "a.mp4"])
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4"}\n')
    with pytest.raises(LongVILAError, match="line 1: expected an object with 'video'"):
        find_videos([tmp_path / "list.jsonl"])


def test_decisions_are_read_strictly(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == {}
    (tmp_path / "decisions.json").write_text('{"a/summary": "reject"}')
    assert read_decisions(tmp_path) == {"a/summary": "reject"}
    (tmp_path / "decisions.json").write_text("{")
    with pytest.raises(LongVILAError, match=r"decisions\.json"):
        read_decisions(tmp_path)
    for wrong in ([], {"a": "maybe"}, {"a": True}):
        with pytest.raises(LongVILAError, match="accept and reject"):
            check_decisions(wrong, "here")
    with (
        pytest.raises(LongVILAError, match="no folder of `longvila data long-sft`"),
        opened(tmp_path),
    ):
        raise AssertionError("not reached")
