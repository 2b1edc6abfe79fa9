"""Questions put to a tiny model: once each, a video read once, over ranks, again after a crash."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longvila import build_mesh
from longvila.errors import VideoError
from longvila.evaluation.answerer import Answerer
from longvila.evaluation.answers import Answers
from longvila.evaluation.asking import Asking, Place, Question
from longvila.evaluation.lmms_share import Ranks
from longvila.evaluation.presets import Sample
from longvila.inference.engine import Engine
from longvila.media.synthetic import clip
from longvila.testing.ranks import Rank, ranks
from longvila.testing.tiny import tiny_model, tiny_processor

OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def question(source: Any, text: str, doc_id: int = 0, **changes: Any) -> Question:
    content = [{"type": "video", "source": source}, {"type": "text", "text": text}]
    values: dict[str, Any] = {
        "task": "longvila_videomme",
        "split": "test",
        "doc_id": doc_id,
        "repeat": 0,
        "messages": ({"role": "user", "content": content},),
        "frames": 3,
        "options": OPTIONS,
        "benchmark": "videomme",
        "sample": Sample("A", "ABCD", ("a", "b", "c", "d"), str(source), "short", "OCR"),
    }
    return Question(**{**values, **changes})


def questions(folder: Path) -> list[Question]:
    out = []
    for number in range(6):
        video = folder / f"clip{number % 3}.mp4"
        if not video.exists():
            clip(video, 6 + 3 * number, first_number=50 * number)
        out.append(question(str(video), f"Question {number}?", number))
    return out


def asking(folder: Path | None, mesh: Any = None, place: Place | None = None) -> Asking:
    model = tiny_model(3)
    place = place or Place()
    engine = Engine(model, mesh)
    writer = f"group-{place.group}" if place.leads else None
    return Asking(
        Answerer(engine, tiny_processor(model.config)),
        Answers(folder, writer),
        settings={"model": "tiny"},
        place=place,
    )


def count_prefills(ask: Asking) -> list[int]:
    engine: Any = ask.answerer.engine
    lengths: list[int] = []
    read = engine.prefill

    def prefill(inputs: Any, **options: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return read(inputs, **options)

    engine.prefill = prefill
    return lengths


def reference(item: Question) -> str:
    """The answer of transformers' own generate to the whole prompt."""
    model = tiny_model(3)
    processor = tiny_processor(model.config)
    content = [
        {"type": "video", "video": item.messages[0]["content"][0]["source"]},
        item.messages[0]["content"][1],
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        num_frames=item.frames,
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_each_video_is_read_once_and_answers_are_those_of_generate(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    ask = asking(None)
    prefills = count_prefills(ask)
    records = ask.ask(asked)
    assert len(prefills) == 3
    assert [record["answer"] for record in records] == [reference(item) for item in asked]
    assert len({record["answer"] for record in records}) > 1
    assert [record["doc_id"] for record in records] == list(range(6))
    assert records[0]["media"][0]["frames"] == [0, 2, 5]
    assert records[0]["prompt"] == "Question 0?"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    whole = asking(tmp_path / "whole")
    expected = whole.ask(asked)
    part = asking(tmp_path / "part")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    part.progress = stop
    with pytest.raises(KeyboardInterrupt):
        part.ask(asked)
    file = tmp_path / "part" / "group-0.jsonl"
    assert file.read_bytes().count(b"\n") == 4
    part.answers.close()
    file.write_bytes(file.read_bytes()[:-5])  # the machine died while it wrote
    again = asking(tmp_path / "part")
    prefills = count_prefills(again)
    assert again.ask(asked) == expected
    assert len(prefills) == 2
    assert again.answers.records() == whole.answers.records()
    lines = file.read_bytes().splitlines()
    assert len(lines) == len(set(lines)) == 6
    again.answers.close()
    assert asking(tmp_path / "part").ask(asked) == expected
    assert file.read_bytes().splitlines() == lines


def test_two_runs_leave_equal_bytes(tmp_path: Path) -> None:
    sampled = [
        question(q.messages[0]["content"][0]["source"], f"{i}?", i, options=options)
        for i, q in enumerate(questions(tmp_path))
        for options in [{"max_new_tokens": 4, "do_sample": True, "temperature": 1.5}]
    ]
    texts = []
    for name in ("one", "two"):
        torch.manual_seed(len(texts))  # what else draws in the process does not matter
        asking(tmp_path / name).ask(sampled)
        texts.append((tmp_path / name / "group-0.jsonl").read_bytes())
    assert texts[0] == texts[1]
    other = asking(tmp_path / "three")
    other.seed = 7
    other.ask(sampled)
    assert (tmp_path / "three" / "group-0.jsonl").read_bytes() != texts[0]


def test_anything_that_decides_an_answer_changes_its_key(tmp_path: Path) -> None:
    ask = asking(None)
    item = question("a.mp4", "Who?")
    keys = {
        ask.key(item),
        ask.key(question("b.mp4", "Who?")),
        ask.key(question("a.mp4", "What?")),
        ask.key(question("a.mp4", "Who?", 1)),
        ask.key(question("a.mp4", "Who?", frames=4)),
        ask.key(question("a.mp4", "Who?", fps=1.0)),
        ask.key(question("a.mp4", "Who?", repeat=1)),
        ask.key(question("a.mp4", "Who?", until=("x",))),
        ask.key(question("a.mp4", "Who?", options={**OPTIONS, "max_new_tokens": 6})),
    }
    ask.settings["dtype"] = "bfloat16"
    keys.add(ask.key(item))
    assert len(keys) == 10


def test_a_broken_video_fails_its_questions_alone_and_is_tried_again(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    broken = tmp_path / "clip1.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"no video")
    records = asking(tmp_path / "log").ask(asked)
    assert [bool(record["error"]) for record in records] == [False, True] * 1 + [
        False, False, True, False,
    ]  # fmt: skip
    assert records[1]["error"].startswith("VideoError") and "clip1" in records[1]["error"]
    assert (records[1]["answer"], records[1]["correct"], records[1]["media"]) == ("", False, [])
    broken.write_bytes(whole)
    again = asking(tmp_path / "log")
    prefills = count_prefills(again)
    assert not any(record["error"] for record in again.ask(asked))
    assert len(prefills) == 1
    assert len(again.answers.records()) == 6


def test_a_missing_video_fails_its_questions_but_not_if_all_are_missing(tmp_path: Path) -> None:
    words = ({"role": "user", "content": [{"type": "text", "text": "Who?"}]},)
    gone = question("", "", 9, messages=words, missing="FileNotFoundError: no film")
    (kept, lost) = asking(tmp_path / "log").ask([questions(tmp_path)[0], gone])
    assert not kept["error"] and lost["error"] == "FileNotFoundError: no film"
    assert (lost["correct"], lost["answer"], lost["prompt"]) == (False, "", "Who?")
    with pytest.raises(VideoError, match=r"none of 1 questions can be asked; the first: .*no film"):
        asking(tmp_path / "other").ask([gone])
    assert not (tmp_path / "other" / "group-0.jsonl").read_bytes()


def test_a_prompt_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    short, *_ = questions(tmp_path)
    file = short.messages[0]["content"][0]["source"]
    long = question(file, "word " * 5000, 1)
    wide = question(file, "Question?", 2, frames=4000)
    ask = asking(tmp_path / "log")
    records = ask.ask([long, short, wide])
    assert [bool(record["error"]) for record in records] == [True, False, True]
    assert "context" in records[0]["error"] and records[0]["correct"] is False
    assert records[1]["answer"] == asking(None).ask([short])[0]["answer"]
    with pytest.raises(VideoError, match=r"none of 2 questions can be asked.*context"):
        asking(None).ask([long, wide])


def test_the_next_video_is_decoded_while_one_is_answered(tmp_path: Path) -> None:
    ask = asking(None)
    events: list[str] = []
    opened, watch = ask._open, ask.answerer.watch

    def note_open(item: Question) -> Any:
        events.append(f"open {item.doc_id}")
        return opened(item)

    def note_watch(media: Any) -> Any:
        while len([event for event in events if event.startswith("open")]) < min(
            3, 2 + len([event for event in events if event == "watch"])
        ):
            time.sleep(0.001)  # the thread is ahead: else this waits until the test times out
        events.append("watch")
        return watch(media)

    ask._open, ask.answerer.watch = note_open, note_watch  # type: ignore[method-assign]
    ask.ask(questions(tmp_path))
    assert events == ["open 0", "open 1", "watch", "open 2", "watch", "watch"]


def test_pictures_among_words_are_read_in_their_order(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (20, 20), name) for name in ("red", "blue"))

    def between(first: Image.Image, second: Image.Image) -> Question:
        content = [
            {"type": "text", "text": "First "},
            {"type": "image", "source": first},
            {"type": "text", "text": " then "},
            {"type": "image", "source": second},
            {"type": "text", "text": "?"},
        ]
        return question("", "", messages=({"role": "user", "content": content},))

    ask = asking(None)
    one, two = ask.ask([between(red, blue), between(blue, red)])
    assert one["key"] != two["key"]
    assert one["answer"] != two["answer"]
    assert [medium["kind"] for medium in one["media"]] == ["image", "image"]


def test_words_alone_and_texts_that_end_an_answer() -> None:
    words = ({"role": "user", "content": [{"type": "text", "text": "Hello"}]},)
    ask = asking(None)
    (plain,) = ask.ask([question("", "", messages=words)])
    assert plain["media"] == [] and len(plain["answer"]) > 1
    stop = plain["answer"][1]
    (cut,) = ask.ask([question("", "", messages=words, until=(stop,))])
    assert cut["answer"] == plain["answer"][: plain["answer"].index(stop)].strip()


@ranks(2)
def test_two_groups_share_the_videos(rank: Rank, tmp_path: Path) -> None:
    _over_ranks(rank, tmp_path, groups=2)


@ranks(2)
def test_a_broken_video_breaks_no_rank(rank: Rank, tmp_path: Path) -> None:
    if rank.rank == 0:
        questions(tmp_path)
        (tmp_path / "clip1.mp4").write_bytes(b"no video")
    torch.distributed.barrier()
    mesh = build_mesh(2, num_heads=4, num_kv_heads=2)
    shares = Ranks(mesh.sp_group, mesh.sp_rank, mesh.sp_size)
    ask = asking(None, mesh, Place(2, rank.rank, 1, 0, rank.rank == 0, shares))
    records = ask.ask(questions(tmp_path)[rank.rank :: 2])
    assert [bool(record["error"]) for record in records] == [
        record["doc_id"] % 3 == 1 for record in records
    ]


@ranks(2)
def test_two_ranks_share_a_sequence(rank: Rank, tmp_path: Path) -> None:
    _over_ranks(rank, tmp_path, groups=1)


def _over_ranks(rank: Rank, folder: Path, *, groups: int) -> None:
    """lmms-eval deals documents in turn; whoever answers, every rank gets its own answers."""
    if rank.rank == 0:
        questions(folder)
    torch.distributed.barrier()
    asked = questions(folder)
    expected = asking(None).ask(asked)
    mesh = build_mesh(rank.world_size // groups, num_heads=4, num_kv_heads=2)
    shares = Ranks(mesh.sp_group, mesh.sp_rank, mesh.sp_size) if mesh.sp_size > 1 else None
    place = Place(2, rank.rank, mesh.dp_size, mesh.dp_rank, mesh.sp_rank == 0, shares)
    assert place.groups == groups
    ask = asking(folder / "log", mesh, place)
    prefills = count_prefills(ask)
    records = ask.ask(asked[rank.rank :: 2])
    assert records == expected[rank.rank :: 2]
    counts = [None, None]
    torch.distributed.all_gather_object(counts, len(prefills))
    assert sum(counts) == (3 if groups == 2 else 6)
    torch.distributed.barrier()
    assert [r["doc_id"] for r in Answers(folder / "log", None).records()] == list(range(6))
    ask.answers.close()
    again = asking(folder / "log", None, Place(2, rank.rank, 1, 0, rank.rank == 0))
    assert again.ask(asked[rank.rank :: 2]) == records
