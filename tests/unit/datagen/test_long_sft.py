"""The whole way from videos to a dataset: resumed, refused, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint, Says, describe, kind_of, numbers_of, text_of

from longvila.data.datasets import open_dataset
from longvila.datagen.caption import CaptionOptions
from longvila.datagen.dataset import Video, find_videos
from longvila.datagen.journal import Journal, JournalError
from longvila.datagen.long_sft import EndpointDown, LongSFT, LongSFTOptions
from longvila.datagen.prompts import Prompts
from longvila.datagen.qa import QuestionOptions
from longvila.datagen.review import save_decisions
from longvila.datagen.segment import SegmentOptions
from longvila.inference.caller import EndpointCaller

OPTIONS = LongSFTOptions(
    segment=SegmentOptions(by="length", length_s=2, min_s=0.5),
    caption=CaptionOptions(frames=2, attempts=2),
    question=QuestionOptions(attempts=2, answer_words=(1, 20)),
    workers=2,
)


def make(
    endpoint: Endpoint,
    output: Path,
    *sources: Path,
    options: LongSFTOptions = OPTIONS,
    tries: int = 1,
) -> dict[str, Any]:
    ask = EndpointCaller(endpoint.url, "m", tries=tries, timeout_s=120, sleep=lambda s: None)
    return LongSFT(find_videos(sources), output, ask, ask, options=options).run()


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_videos_become_samples(endpoint: Endpoint, videos: Path, tmp_path: Path) -> None:
    endpoint.script = describe
    report = make(endpoint, tmp_path, videos)
    assert report["videos"] == report["whole"] == 2 and not report["waiting"]
    assert report["results"] == {
        "segments": 2, "captions": 6, "summaries": 2, "questions": 2, "kept": 2,
    }  # fmt: skip
    assert report["dropped"] == {"source": 2, "duplicate": 2, "blind": 2}
    assert report["written"] == {"captions": 2, "questions": 4, "samples": 4, "rejected": 0}
    captions = {each["key"]: each["caption"] for each in lines(tmp_path / "captions.jsonl")}
    # Two seconds at two frames a second: the first and the last of four numbers.
    assert captions["first#2"] == "The numbers on the screen are 4 7 in this order."
    assert captions["more/second#1"] == "The numbers on the screen are 100 103 in this order."
    dataset = open_dataset("longvila-sft", tmp_path / "dataset.jsonl", media_dir=videos)
    assert [sample.id for sample in dataset] == [
        "first-caption", "first-questions", "more/second-caption", "more/second-questions",
    ]  # fmt: skip
    caption, asked = dataset[2], dataset[3]
    assert caption.media[0].source == str(videos / "more" / "second.mp4")
    assert "100 103 104 107" in caption.turns[1].text
    assert [turn.role for turn in asked.turns] == ["user", "assistant"] * 2
    assert len(asked.media) == 1 and asked.turns[3].text == "The next higher one."


def test_a_question_a_sample(endpoint: Endpoint, videos: Path, tmp_path: Path) -> None:
    endpoint.script = describe
    make(endpoint, tmp_path, videos / "first.mp4")
    asked = len(endpoint.bodies)
    each = LongSFTOptions(OPTIONS.segment, OPTIONS.caption, OPTIONS.question, "each", 2)
    make(endpoint, tmp_path, videos / "first.mp4", options=each)
    assert len(endpoint.bodies) == asked
    made = lines(tmp_path / "dataset.jsonl")
    assert [m["id"] for m in made] == ["first-caption", "first-question-1", "first-question-2"]
    assert all(m["conversations"][0]["value"].endswith("\n<video>") for m in made)
    assert made[0]["video"] == str((videos / "first.mp4").resolve())


def test_a_finished_run_asks_nothing_and_new_videos_are_added(
    endpoint: Endpoint, videos: Path, tmp_path: Path
) -> None:
    endpoint.script = describe
    make(endpoint, tmp_path, videos / "more")
    asked, before = len(endpoint.bodies), (tmp_path / "dataset.jsonl").read_bytes()
    make(endpoint, tmp_path, videos / "more")
    assert len(endpoint.bodies) == asked
    assert (tmp_path / "dataset.jsonl").read_bytes() == before
    report = make(endpoint, tmp_path, videos / "more", videos / "first.mp4")
    assert report["whole"] == 2 and len(endpoint.bodies) == asked + 4 + 4


def test_own_words_ask_for_captions_and_stay_after_a_review(
    endpoint: Endpoint, videos: Path, tmp_path: Path
) -> None:
    endpoint.script = describe
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ask_caption.txt").write_text("Tell me all.\n")
    ask, out = EndpointCaller(endpoint.url, "m", timeout_s=120), tmp_path / "out"
    found = find_videos([videos / "first.mp4"])
    LongSFT(found, out, ask, ask, options=OPTIONS, prompts=Prompts(tmp_path / "own")).run()
    for _ in range(2):
        said = lines(out / "dataset.jsonl")[0]["conversations"][0]["value"]
        assert said == "Tell me all.\n<video>"
        save_decisions(out, {})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_whose_progress_cannot_be_said_ends(
    endpoint: Endpoint, videos: Path, tmp_path: Path, workers: int
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError("nobody reads")

    endpoint.script = describe
    ask = EndpointCaller(endpoint.url, "m", timeout_s=120)
    options = LongSFTOptions(
        SegmentOptions(by="length", length_s=0.5, min_s=0),
        workers=workers,
        question=OPTIONS.question,
    )
    run = LongSFT(find_videos([videos]), tmp_path, ask, ask, options=options, progress=closed)
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        run.run()


def test_a_full_disk_ends_the_run_and_asks_no_more(
    endpoint: Endpoint, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, record: Any) -> None:
        raise JournalError(f"{self.path} cannot be written")

    endpoint.script = describe
    make(endpoint, tmp_path, videos / "more")
    asked = len(endpoint.bodies)
    monkeypatch.setattr(Journal, "_append", full)
    with pytest.raises(JournalError, match=r"segments.jsonl cannot be written"):
        make(endpoint, tmp_path, videos)
    assert len(endpoint.bodies) == asked


def test_other_settings_are_refused(endpoint: Endpoint, videos: Path, tmp_path: Path) -> None:
    endpoint.script = describe
    make(endpoint, tmp_path, videos / "more")
    other = LongSFTOptions(SegmentOptions(by="length", length_s=4), OPTIONS.caption)
    with pytest.raises(JournalError, match="begun with other settings of segment, question"):
        make(endpoint, tmp_path, videos / "more", options=other)


class Rubbish:
    """Answers well but for one kind of prompt, whose first answers are wrong."""

    def __init__(self, kind: str, *wrong: Says) -> None:
        self.kind, self.wrong, self.lock = kind, list(wrong), threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Says:
        with self.lock:
            if kind_of(body) == self.kind and self.wrong:
                return self.wrong.pop(0)
        return describe(body)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("caption", "captions"),
        ("compose", "summaries"),
        ("questions", "questions"),
        ("blind", "kept"),
        ("judge", "kept"),
    ],
)
@pytest.mark.parametrize(
    "wrong",
    [
        [Says("No."), Says("No.")],
        [Says(status=500, body=b"down")],
        [Says(body=b"%%")],
        [Says(status=400, body=b"too long")],
    ],
    ids=["rubbish", "fails", "no protocol", "refused"],
)
def test_a_failure_is_listed_and_made_good_by_the_next_run(
    endpoint: Endpoint, videos: Path, tmp_path: Path, kind: str, step: str, wrong: list[Says]
) -> None:
    options = LongSFTOptions(OPTIONS.segment, OPTIONS.caption, OPTIONS.question, workers=1)
    endpoint.script = Rubbish(kind, *wrong)
    report = make(endpoint, tmp_path, videos / "more", options=options)
    assert report["whole"] == 0 and report["failures"] == 1
    (waiting,) = report["waiting"]
    item = "second#1" if kind == "caption" else "second"
    assert (waiting["step"], waiting["item"], waiting["attempts"]) == (step, item, 1)
    assert waiting["message"] and lines(tmp_path / "dataset.jsonl") == []
    again = make(endpoint, tmp_path, videos / "more", options=options)
    assert again["whole"] == 1 and not again["waiting"] and again["failures"] == 1
    assert [m["id"] for m in lines(tmp_path / "dataset.jsonl")] == [
        "second-caption", "second-questions",
    ]  # fmt: skip


def test_slow_endpoints_and_broken_videos_are_listed(
    endpoint: Endpoint, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "good.mp4").write_bytes((videos / "first.mp4").read_bytes())
    over, urlopen = threading.Event(), urllib.request.urlopen

    def is_slow(body: dict[str, Any]) -> bool:
        return kind_of(body) == "caption" and numbers_of(body)[0] == 0

    def script(body: dict[str, Any]) -> Says:
        assert not is_slow(body) or over.wait(100)
        return describe(body)

    def impatient(request: Any, *, timeout: float) -> Any:
        return urlopen(request, timeout=timeout if is_slow(json.loads(request.data)) else 120)

    endpoint.script = script
    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    ask = EndpointCaller(endpoint.url, "m", tries=1, timeout_s=0.3)
    report = LongSFT(find_videos([folder]), tmp_path / "out", ask, ask, options=OPTIONS).run()
    over.set()
    problems = {each["item"]: each for each in report["waiting"]}
    assert set(problems) == {"broken", next(i for i in problems if i.startswith("good#"))}
    assert problems["broken"]["cause"] == "VideoError"
    assert "timed out" in next(v["message"] for k, v in problems.items() if "#" in k)
    # The video goes between two runs.
    (folder / "good.mp4").unlink()
    known = [*find_videos([folder, videos / "more"]), Video("good", str(folder / "good.mp4"), "x")]
    report = LongSFT(known, tmp_path / "out", ask, ask, options=OPTIONS).run()
    gone = next(each for each in report["waiting"] if each["video"] == "good")
    assert gone["attempts"] == 2 and "good.mp4" in gone["message"] and report["whole"] == 1


def test_an_endpoint_that_is_down_ends_the_run(
    endpoint: Endpoint, videos: Path, tmp_path: Path
) -> None:
    endpoint.script = lambda body: Says(status=503, body=b"down")
    options = LongSFTOptions(
        SegmentOptions(by="length", length_s=0.5, min_s=0), workers=2, give_up_after=5
    )
    with pytest.raises(EndpointDown, match=r"5 calls in a row failed, .*status 503: down"):
        make(endpoint, tmp_path, videos, options=options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert 5 <= report["failures"] <= 8 and len(endpoint.bodies) == report["failures"]
    assert len(report["waiting"]) == 16 + 8
    assert {each["cause"] for each in report["waiting"]} == {"CallError", "not tried"}
    endpoint.script = describe
    assert make(endpoint, tmp_path, videos, options=options)["whole"] == 2


KILLED = """
import sys, json
sys.path.insert(0, {here!r})
from pathlib import Path
from test_long_sft import OPTIONS
from longvila.inference.caller import EndpointCaller
from longvila.datagen.dataset import find_videos
from longvila.datagen.long_sft import LongSFT
ask = EndpointCaller({url!r}, "m", tries=1)
LongSFT(find_videos([{videos!r}]), Path({output!r}), ask, ask, options=OPTIONS).run()
"""


def test_killed_and_begun_again_it_ends_in_the_same_dataset(
    endpoint: Endpoint, videos: Path, tmp_path: Path
) -> None:
    endpoint.script = describe
    make(endpoint, tmp_path / "whole", videos)
    asked = {text_of(body) for body in endpoint.bodies}
    number = len(endpoint.bodies)
    for stop in (2, 9):
        endpoint.bodies.clear()
        ready, killed = threading.Event(), threading.Event()

        def script(
            body: dict[str, Any], stop: int = stop, ready: Any = ready, killed: Any = killed
        ) -> Says:
            if len(endpoint.bodies) > stop:
                ready.set()
                assert killed.wait(100)
                return Says(body=b"late")
            return describe(body)

        endpoint.script = script
        code = KILLED.format(
            here=str(Path(__file__).parent), url=endpoint.url, videos=str(videos),
            output=str(tmp_path / "killed"),
        )  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        assert ready.wait(240)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed.set()
    with (tmp_path / "killed" / "captions.jsonl").open("a") as file:
        file.write('{"key": "torn')
    endpoint.bodies.clear()
    endpoint.script = describe
    report = make(endpoint, tmp_path / "killed", videos)
    assert report["whole"] == 2 and 0 < len(endpoint.bodies) < number
    assert {text_of(body) for body in endpoint.bodies} < asked
    mine, theirs = (tmp_path / name / "dataset.jsonl" for name in ("killed", "whole"))
    assert mine.read_bytes() == theirs.read_bytes()
