"""The report is whole on disk after every change and goes on after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from longvila.data.report import Event, Report


def event(number: int) -> Event:
    return Event(number, f"d/{number}", "broken", "cut off", "decoding", "d/9")


def test_counts_go_on_and_lists_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "left-out.json"
    report = Report(path, keep=2)
    for number in range(3):
        report.add(event(number))
        report.write()
        assert json.loads(path.read_text())["counts"] == {"broken": number + 1}
    report.used(documents=3, tokens=40, frames_cut=5, shortened=1)
    assert [e.position for e in report.events] == [0, 1]
    other = Report(path)
    other.load_state_dict(json.loads(json.dumps(report.state_dict())))
    assert other.counts == report.counts and other.events == report.events
    other.add(event(7))
    other.write()
    written = json.loads(path.read_text())
    assert written["counts"]["broken"] == 4 and written["counts"]["tokens"] == 40
    assert written["events"][-1]["substitute"] == "d/9"
    assert list(path.parent.iterdir()) == [path]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    report = Report()
    report.add(event(1))
    report.write()
    assert report.counts["broken"] == 1 and not list(tmp_path.iterdir())


def test_what_a_group_alone_found_stays_in_its_file_when_it_goes_on_from_anothers_state(
    tmp_path: Path,
) -> None:
    """Groups that were fewer in between have one state, and each its file."""
    first, second = Report(tmp_path / "dp0.json"), Report(tmp_path / "dp1.json")
    for report, numbers in ((first, (1,)), (second, (2, 3))):
        for number in numbers:
            report.add(event(number))
        report.write()
    again = Report(tmp_path / "dp1.json")
    again.load_state_dict(first.state_dict())
    # The third came after the save, so it is met once more.
    again.add(event(3))
    again.add(event(4))
    again.write()
    written = json.loads((tmp_path / "dp1.json").read_text())
    assert sorted(each["position"] for each in written["events"]) == [1, 2, 3, 4]
    assert written["counts"]["broken"] == 4
    (tmp_path / "dp1.json").write_text("{")
    broken = Report(tmp_path / "dp1.json")
    broken.load_state_dict(first.state_dict())
    assert broken.events == first.events
