"""The verb: grades by a recording, again alike, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvila.cli.main import main
from longvila.evaluation.answers import Answers, write_lines
from longvila.evaluation.judge import grade_all, read_items


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --endpoint, --local and --replay"),
        (["--local=x", "--replay=y"], "give one of"),
        (["--endpoint=http://localhost/v1"], "--endpoint needs --judge-model"),
        (["--local=x", "--parallel=2"], "one thing at a time"),
        (["--replay=none.jsonl"], "there is no recording none.jsonl"),
        (["--replay=x", "--attempts=0"], "must be at least 1"),
        (
            ["--endpoint=http://localhost/v1", "--judge-model=m", "--key-env=NO_SUCH_KEY_"],
            "NO_SUCH_KEY_ is not set",
        ),
    ],
)
def test_refusals(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_answers(tmp_path)
    assert main(["judge", str(file), f"--out={tmp_path / 'out'}", *arguments]) == 1
    assert message in capsys.readouterr().err
