"""Records survive a death, refuse other settings, and never hold an answer twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longvila.evaluation.answerer import Watched
from longvila.evaluation.answers import AnswersError
from longvila.evaluation.runner import Records, RecordsError, answered, ask, read_records, run
from longvila.evaluation.task import Question, Scene
from longvila.testing.ranks import Rank, ranks

SETTINGS = {"seed": 0, "depths": (0.0, 1.0)}


def _row(name: str) -> dict[str, Any]:
    return {"id": name, "said": "Ünï\n"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with Records(tmp_path / "new", SETTINGS) as records:
        records.add(_row("a"))
        records.add(_row("b"))
        assert (tmp_path / "new" / "records.jsonl").read_bytes().count(b"\n") == 3
    with Records(tmp_path / "new", SETTINGS) as again:
        assert again.rows == {"a": _row("a"), "b": _row("b")}
        again.add(_row("c"))
    rows = read_records(tmp_path / "new" / "records.jsonl", SETTINGS)
    assert [row["id"] for row in rows] == ["a", "b", "c"]


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    with Records(tmp_path, SETTINGS) as records:
        for name in "abc":
            records.add(_row(name))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(whole[:-cut])
        with Records(tmp_path, SETTINGS) as records:
            assert list(records.rows) == ["a", "b"]
            records.add(_row("c"))
        assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"id": "b"', b'"id": "b'))
    with pytest.raises(RecordsError, match="line 3 is damaged"):
        Records(tmp_path, SETTINGS)


def test_a_second_run_into_the_folder_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    with Records(tmp_path, SETTINGS) as records:
        records.add(_row("a"))
        with pytest.raises(AnswersError, match=r"another run is writing .*records.jsonl: wait"):
            Records(tmp_path, SETTINGS)
        assert list(Records(tmp_path, SETTINGS, writes=False).rows) == ["a"]
        records.add(_row("b"))
    with pytest.raises(RecordsError, match="seed was"):
        Records(tmp_path, {"seed": 1})
    with Records(tmp_path, SETTINGS) as records:
        assert list(records.rows) == ["a", "b"]


def test_a_death_over_the_first_line_leaves_an_empty_run(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(b'{"key": "12')
    with Records(tmp_path, SETTINGS) as records:
        records.add(_row("a"))
    with Records(tmp_path, SETTINGS) as records:
        assert list(records.rows) == ["a"]


def test_other_settings_and_second_answers_are_errors(tmp_path: Path) -> None:
    with Records(tmp_path, SETTINGS) as records:
        records.add(_row("a"))
        with pytest.raises(RecordsError, match="two answers to a"):
            records.add(_row("a"))
    with pytest.raises(RecordsError, match=r"seed was 0, is 1"):
        Records(tmp_path, {**SETTINGS, "seed": 1})
    (tmp_path / "records-1.jsonl").write_bytes((tmp_path / "records.jsonl").read_bytes())
    with pytest.raises(RecordsError, match="two answers to a"):
        Records(tmp_path, SETTINGS)
    (tmp_path / "records-1.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(RecordsError, match="does not begin with the settings"):
        Records(tmp_path, SETTINGS)


class _Echo:
    """Says what a question asks it to say."""

    def choose(self, watched: Watched, question: str, options: Any) -> list[float]:
        return [float(option == question) for option in options]

    def predict(self, watched: Watched, question: str, answer: str) -> str:
        return question

    def answer(self, watched: Watched, question: str, *, max_new_tokens: int) -> str:
        return question[:max_new_tokens]


def _scenes(count: int = 4) -> list[Scene]:
    return [
        Scene(f"s{k}", (k,), 1.0, tuple(
            Question(f"s{k}/{n}", "t", "free", "yes", "yes", shape={"frames": 1}) for n in range(2)
        ))
        for k in range(count)
    ]  # fmt: skip


def test_each_way_of_asking_leaves_a_whole_record() -> None:
    watched = Watched(None, 7, ())
    for way, said in (("choice", "b"), ("forced", "b"), ("free", "b")):
        question = Question(
            "q", "t", way, "b", "b", options=("a", "b"), chance=0.5, shape={"frames": 3}
        )
        row = ask(_Echo(), watched, question)  # type: ignore[arg-type]
        assert (row["said"], row["correct"], row["tokens"], row["shape"]) == (
            said, True, 7, {"frames": 3},
        )  # fmt: skip
        assert ("scores" in row) == (way == "choice")
        json.dumps(row)


def test_only_open_scenes_are_read_and_only_open_questions_asked(tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(scene: Scene) -> Watched:
        seen.append(scene.id)
        return Watched(None, 0, ())

    with Records(tmp_path, SETTINGS) as records:
        for name in ("s0/0", "s0/1", "s2/0"):
            records.add(_row(name))
        told: list[Any] = []
        run(
            _Echo(), _scenes(), watch, records,  # type: ignore[arg-type]
            progress=lambda done, total, scene: told.append((done, total, scene.id)),
        )  # fmt: skip
        assert seen == ["s1", "s2", "s3"] and told[-1] == (3, 3, "s3")
        assert len(records.rows) == 8 and records.rows["s2/0"] == _row("s2/0")
        with pytest.raises(ValueError, match="2 questions share their id"):
            run(_Echo(), [*_scenes(1), *_scenes(1)], watch, records)  # type: ignore[arg-type]


@ranks(2)
def test_data_parallel_groups_share_the_scenes(rank: Rank, tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, part=rank.rank)
    run(
        _Echo(), _scenes(), lambda scene: Watched(None, 0, ()), records,  # type: ignore[arg-type]
        part=rank.rank, parts=2,
    )  # fmt: skip
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records-1.jsonl", "records.jsonl"]
    with Records(tmp_path, SETTINGS, writes=False) as every:
        assert len(every.rows) == 8
    # One that does not see the files of the others follows the first rank.
    mine = records.rows if rank.rank == 0 else {}
    assert answered(mine) == {f"s{k}/{n}" for k in (0, 2) for n in range(2)}
    dist.barrier()


def test_ids_without_ranks() -> None:
    assert answered(["b", "a"]) == {"a", "b"}
