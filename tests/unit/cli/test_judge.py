"""The verb: grades by a recording, again alike, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvila.cli.main import main
from longvila.evaluation.answers import Answers, write_lines
from longvila.evaluation.judge import grade_all, read_items
from longvila.evaluation.runs import begin, refresh, write_results


class Kind:
    """Gives five, but has no form for the third answer."""

    name = "kind"

    def reply(self, messages: list[dict[str, str]]) -> str:
        return "Lovely!" if "said 2" in messages[1]["content"] else '{"score": 5}'


def write_answers(folder: Path) -> Path:
    rows = [
        {"question": f"Q{i}", "answer": "a", "prediction": f"said {i}", "video": f"v{i}"}
        for i in range(4)
    ]
    write_lines(folder / "answers.jsonl", rows)
    return folder / "answers.jsonl"


def test_a_recording_is_replayed_to_equal_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_answers(tmp_path)
    axes = ("correctness", "temporal")
    records = grade_all(read_items(file), axes, Kind(), Answers(None, None), attempts=2)
    write_lines(tmp_path / "judged.jsonl", records)
    arguments = ["--axes=correctness,temporal", "--attempts=2", f"--replay={tmp_path}/judged.jsonl"]
    for name in ("one", "two", "one"):
        assert main(["judge", str(file), f"--out={tmp_path / name}", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "correctness  5.00" in printed and "3.75 to 5.00" in printed and "judge: kind" in printed
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (one / "judged.jsonl").read_bytes() == (tmp_path / "judged.jsonl").read_bytes()
    for part in ("judged.jsonl", "scores.json", "answers/grades.jsonl"):
        assert (one / part).read_bytes() == (two / part).read_bytes()
    scores = json.loads((one / "scores.json").read_text())
    assert (scores["temporal"]["graded"], scores["temporal"]["ungraded"]) == (3, 1)
    assert scores["correctness"]["counts"] == [0, 0, 0, 0, 0, 3]


def test_grades_of_a_run_are_on_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "key": str(i), "task": "activitynetqa", "benchmark": "activitynetqa", "split": "test",
            "doc_id": i, "repeat": 0, "media": [], "prompt": f"Q{i}", "answer": f"said {i}",
            "parsed": f"said {i}", "gold": "a", "correct": None, "error": None, "video": f"v{i}",
            "duration": None, "category": None, "group": None,
        }
        for i in range(4)
    ]  # fmt: skip
    run = tmp_path / "run"
    begin(run, {"model": "m"}, {})
    write_results(run, rows, {})
    assert "not judged" in (run / "report.txt").read_text()

    class Half(Kind):
        def reply(self, messages: list[dict[str, str]]) -> str:
            right = "yes" if "said 1" in messages[1]["content"] else "no"
            return json.dumps({"match": right, "score": 3})

    records = grade_all(read_items(run), (), Half(), Answers(None, None))
    write_lines(tmp_path / "judged.jsonl", records)
    assert main(["judge", str(run), f"--replay={tmp_path}/judged.jsonl"]) == 0
    assert "25.0 %" in capsys.readouterr().out
    assert "match" in (run / "report.txt").read_text()
    assert "25.0 right" in (run / "report.html").read_text()
    scores = json.loads((run / "results.json").read_text())
    assert scores["activitynetqa"]["judged"]["match"]["accuracy"] == 0.25
    before = (run / "samples.jsonl").read_bytes()
    refresh(run)
    assert (run / "samples.jsonl").read_bytes() == before


def test_a_file_of_answers_needs_a_folder_for_its_grades(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_answers(tmp_path)
    write_lines(tmp_path / "judged.jsonl", [])
    assert main(["judge", str(file), f"--replay={tmp_path}/judged.jsonl"]) == 1
    assert "--out is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --endpoint, --local and --replay"),
        (["--local=x", "--replay=y"], "give one of"),
        (["--endpoint=http://localhost/v1"], "--endpoint needs --judge-model"),
        (["--local=x", "--parallel=2"], "one thing at a time"),
        (["--replay=none.jsonl"], "there is no recording none.jsonl"),
        (["--replay=x", "--attempts=0"], "must be at least 1"),
        (["--replay=x", "--limit=0"], "--limit must be at least 1, got 0"),
        (["--replay=x", "--axes=,"], "--axes names none"),
        (["--replay=x", "--prompts=none"], "there is no folder none"),
        ([f"--replay={Path(__file__).with_name('none.json')}"], "there is no recording"),
        (["--local=x", "--device=foo"], "torch knows no such device"),
        (
            ["--endpoint=http://localhost/v1", "--judge-model=m", "--key-env=NO_SUCH_KEY_"],
            "NO_SUCH_KEY_ holds no key",
        ),
    ],
)
def test_refusals(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_answers(tmp_path)
    assert main(["judge", str(file), f"--out={tmp_path / 'out'}", *arguments]) == 1
    assert message in capsys.readouterr().err
