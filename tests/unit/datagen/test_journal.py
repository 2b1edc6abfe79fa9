"""Journals: what was kept is there after any kind of end, what is torn is cut off."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from longvila.datagen.journal import Failures, Journal, JournalError, Lock, write_whole


def test_results_are_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.add("x", value=1)
    journal.add("y", value="ü")
    journal.close()
    again = Journal(tmp_path / "a.jsonl")
    assert len(again) == 2 and again["y"]["value"] == "ü" and "z" not in again
    again.close()


@pytest.mark.parametrize("torn", ['{"key": "y", "val', '{"key": "y", "value": 2}', "\x00\x00"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "x", "value": 1}\n' + torn)
    journal = Journal(path)
    assert list(journal.done) == ["x"]
    journal.add("y", value=3)
    journal.close()
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("line", ["no json", '{"value": 1}', "[1]"])
def test_damage_elsewhere_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + '\n{"key": "x"}\n')
    with pytest.raises(JournalError, match="line 1 is damaged"):
        Journal(path)
    assert path.read_text().startswith(line)


def test_threads_may_add(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    threads = [
        threading.Thread(target=lambda n=n: [journal.add(f"{n}-{i}", n=i) for i in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    again = Journal(tmp_path / "a.jsonl")
    assert len(again) == 80
    again.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Lock(tmp_path / "out"), pytest.raises(JournalError, match="in use by another"):
        Lock(tmp_path / "out")
    with Lock(tmp_path / "out"):
        pass


def test_failures_are_counted_over_runs(tmp_path: Path) -> None:
    for number in (1, 2):
        failures = Failures(tmp_path / "f.jsonl")
        failures.add("captions", "film#1", ValueError(f"no. {number}"))
        assert failures.attempts == {("captions", "film#1"): number}
        assert failures.last["captions", "film#1"]["message"] == f"no. {number}"
        failures.close()
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == 2


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "x.json", "1")
    write_whole(tmp_path / "deep" / "x.json", "2")
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["x.json"]
    assert (tmp_path / "deep" / "x.json").read_text() == "2"


def test_a_line_that_does_not_fit_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "j.jsonl", os.write
    journal = Journal(path)
    journal.add("a", value=1)
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:7]))
    with pytest.raises(JournalError, match=r"j.jsonl cannot be written \(No space left"):
        journal.add("b", value=2)
    monkeypatch.undo()
    journal.add("c", value=3)
    journal.close()
    again = Journal(path)
    assert list(again.done) == ["a", "c"]
    again.close()
