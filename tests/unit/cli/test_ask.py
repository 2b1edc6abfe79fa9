"""The verb on a tiny saved model and a real clip."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from longvila.cli import ask, index, serve
from longvila.cli.main import main
from longvila.errors import LongVILAError
from longvila.media.synthetic import clip, numbered_frame
from longvila.model.convert_vila import convert_to_vila
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config()
    tiny_model(config=config).save_pretrained(folder)
    LongVILAProcessor.from_config(config, tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(numbered_frame(9)).save(folder / "picture.png")
    frames = folder / "frames"
    frames.mkdir()
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(frames / f"{number}.png")
    return {
        "film": str(clip(folder / "film.mp4", 40)),
        "other": str(clip(folder / "other film.mkv", 20)),
        "picture": str(folder / "picture.png"),
        "frames": str(frames),
    }


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(["ask", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_an_answer_and_a_line_of_timings(
    checkpoint: str, media: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(
        capsys,
        *(media["film"], "What is shown?", "--model", checkpoint),
        *("--frames", "4", "--max-new-tokens", "16"),
    )
    assert status == 0
    assert out.strip()
    last = err.strip().splitlines()[-1]
    for part in ("4 frames x 10 tokens", "decode", "vision", "prefill", "tokens/s", "prompt"):
        assert part in last
    _, as_json, _ = run(
        capsys,
        *(media["film"], "What is shown?", "--model", checkpoint),
        *("--frames", "4", "--max-new-tokens", "16", "--json"),
    )
    assert json.loads(as_json)["answer"] == out.strip()


def test_two_processes_answer_as_one(
    checkpoint: str,
    media: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = (media["film"], "What?", "--chat", "--model", checkpoint, "--device", "cpu")
    argv = (*argv, "--frames", "7", "--max-new-tokens", "8")
    outs = []
    for gpus in ("1", "2"):
        lines = ["And then?", "/video no/such.mp4", f"/video {media['other']} 3", "Both?"]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        status, out, err = run(capsys, *argv, "--gpus", gpus)
        assert status == 0
        assert "no/such.mp4: no such file" in err
        assert sum(line.startswith("[") for line in err.splitlines()) == 3
        outs.append(out)
    assert outs[0] == outs[1]


def test_a_checkpoint_in_the_original_layout_answers_alike(
    checkpoint: str, media: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_to_vila(checkpoint, tmp_path / "vila")
    answers = [
        run(
            capsys,
            *(media["film"], "What is shown?", "--model", model),
            *("--frames", "3", "--max-new-tokens", "6", "--json"),
        )
        for model in (checkpoint, str(tmp_path / "vila"))
    ]
    ours, theirs = (json.loads(out)["answer"] for _, out, _ in answers)
    assert ours == theirs


def test_json_tells_everything(
    checkpoint: str, media: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(
        capsys,
        *(media["film"], media["picture"], media["other"], media["frames"], "Which?"),
        *("--model", checkpoint, "--frames", "3", "--json", "--max-new-tokens", "4"),
    )
    found = json.loads(out)
    assert status == 0
    assert found["question"] == "Which?"
    kinds = [one["kind"] for one in found["media"]]
    assert kinds == ["video", "image", "video", "video"]
    names = [Path(one["name"]).name for one in found["media"]]
    assert names == ["film.mp4", "picture.png", "other film.mkv", "frames"]
    assert [one["frames"] for one in found["media"]] == [3, 1, 3, 3]
    assert found["media"][0]["tokens_per_frame"] == 10
    assert found["media"][0]["timestamps_s"] == pytest.approx([0, 20 / 24, 39 / 24])
    assert found["new_tokens"] <= 4
    for key in ("decode_s", "vision_s", "prefill_s", "generate_s", "tokens_per_s"):
        assert found[key] > 0


def test_fps(checkpoint: str, media: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = (media["film"], "What?", "--model", checkpoint, "--json", "--max-new-tokens", "2")
    _, out, _ = run(capsys, *argv, "--fps", "2")
    assert json.loads(out)["media"][0]["timestamps_s"] == pytest.approx([0, 0.5, 1.0, 1.5])
    _, out, _ = run(capsys, *argv, "--fps", "2", "--frames", "2")
    assert len(json.loads(out)["media"][0]["timestamps_s"]) == 2


def test_chat(
    checkpoint: str,
    media: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "",
        "What is shown?",
        "And then?",
        f"/image {media['picture']}",
        f"/video {media['other']} 2",
        "What of these?",
        "/video no/such.mp4",
        "/nonsense",
        "/help",
        "/clear",
        "Still there?",
        "/quit",
        "never reached",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, out, err = run(
        capsys,
        *(media["film"], "--chat", "--model", checkpoint),
        *("--frames", "3", "--max-new-tokens", "4"),
    )
    assert status == 0
    answers = [line for line in err.splitlines() if line.startswith("[")]
    assert len(answers) == 4
    assert "3 frames x 10 tokens" in answers[0] and "read before" not in answers[0]
    assert "read before" in answers[1] and "frames x" not in answers[1]
    assert "1 tiles x 10 tokens" in answers[2] and "2 frames x 10 tokens" in answers[2]
    assert "read before" not in answers[3]
    assert "no/such.mp4: no such file" in err
    assert "no command /nonsense" in err
    assert err.count("forget the conversation") == 2
    assert len(out.splitlines()) >= 4


def test_chat_may_start_with_a_question_and_ends_with_its_input(
    checkpoint: str,
    media: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("And?\n"))
    status, _, err = run(
        capsys,
        *(media["film"], "What?", "--chat", "--model", checkpoint),
        *("--frames", "2", "--max-new-tokens", "2"),
    )
    assert status == 0
    assert sum(line.startswith("[") for line in err.splitlines()) == 2


def test_a_first_question_that_is_stopped_or_too_long_does_not_end_the_chat(
    checkpoint: str,
    media: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turn, faults = ask.turn, [KeyboardInterrupt()]

    def interrupted(*args: object) -> None:
        if faults:
            raise faults.pop()
        turn(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ask, "turn", interrupted)
    argv = (media["film"], "What? " * 2000, "--chat", "--model", checkpoint, "--frames", "2")
    for said in ("(stopped)", "the model's context is 4096"):
        monkeypatch.setattr("sys.stdin", io.StringIO("And?\n"))
        status, _, err = run(capsys, *argv, "--max-new-tokens", "2")
        # The film waits for the next question.
        assert status == 0 and said in err and "2 frames x 10 tokens" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such.mp4", "What?"], "no/such.mp4: no such file"),
        (["FILM"], "the question is missing"),
        (["FILM", "What?", "--frames", "4000"], "the model's context is 4096"),
        (["FILM", "What?", "--max-new-tokens", "5000"], "5000 new ones were asked for"),
    ],
)
def test_errors_have_no_traceback(
    checkpoint: str,
    media: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    argv = [media["film"] if part == "FILM" else part for part in argv]
    status, out, err = run(capsys, *argv, "--model", checkpoint)
    assert status == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there(
    media: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(capsys, media["film"], "What?", "--model", str(tmp_path / "none"))
    assert status == 1
    assert f"--model {tmp_path / 'none'}: " in err


@pytest.mark.parametrize(
    ("source", "image"),
    [
        ("a.PNG", True),
        ("https://host/a.jpg?size=3", True),
        ("data:image/png;base64,AA", True),
        ("data:video/mp4;base64,AA", False),
        ("a.mp4", False),
        ("folder", False),
    ],
)
def test_what_counts_as_an_image(source: str, image: bool) -> None:
    assert ask.is_image(source) is image


def test_a_tilde_that_is_nobodys_home_is_a_part_of_the_name(
    checkpoint: str,
    media: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~9.mp4").write_bytes(Path(media["film"]).read_bytes())
    common = ("--model", checkpoint, "--frames", "4", "--max-new-tokens", "4")
    assert run(capsys, "~9.mp4", "~9 or more?", *common)[0] == 0
    status, _, err = run(capsys, "~no such user/film.mp4", "Who?", *common)
    assert status == 1 and "~no such user/film.mp4" in err


def test_a_question_that_is_no_text(
    checkpoint: str, media: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, media["film"], "Qu\udce9?", "--model", checkpoint, "--frames", "4")
    assert status == 1 and "no text in UTF-8: " in err and "Qu\\udce9?" in err


def test_a_very_long_question_is_a_question() -> None:
    long = "why " * 2000
    assert ask.split_inputs(ask.Options(("a.mp4", long))) == (["a.mp4"], [long])
    assert ask.split_inputs(ask.Options(("no such",), chat=True)) == ([], ["no such"])
    assert ask.split_inputs(ask.Options((), chat=True)) == ([], [])


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_questions_of_a_file_are_answered_as_one_by_one(
    checkpoint: str,
    media: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gpus: str,
) -> None:
    if gpus == "1":  # other processes would not know
        monkeypatch.setattr(ask, "_TOGETHER", 2)
    file = tmp_path / "questions.txt"
    questions = ["What is shown?", "Who?", "And what happens at the end of it all?"]
    file.write_text("\ufeff\n" + "\n\n".join(questions) + "\n")
    common = ("--model", checkpoint, "--frames", "4", "--max-new-tokens", "8", "--device", "cpu")
    several = (media["film"], "--questions", str(file), *common, "--gpus", gpus)
    status, out, _ = run(capsys, *several, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [each["question"] for each in found] == questions
    if gpus == "1":
        alone = [run(capsys, media["film"], each, *common)[1].strip() for each in questions]
        assert [each["answer"] for each in found] == alone and len(set(alone)) > 1
        status, out, err = run(capsys, *several)
        shown = "".join(f"> {q}\n{a}\n\n" for q, a in zip(questions, alone, strict=True))
        assert out == shown and "2 questions" in err and "1 questions" not in err
    else:
        _, out, _ = run(capsys, *several[:-1], "1", "--json")
        alone = [json.loads(line)["answer"] for line in out.splitlines()]
        assert [each["answer"] for each in found] == alone


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_questions_through_a_pipe_are_read_once(
    checkpoint: str, media: dict[str, str], capsys: pytest.CaptureFixture[str], gpus: str
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"What is shown?\nWho?\n")
    os.close(writer)
    try:
        status, out, err = run(
            capsys,
            *(media["film"], "--questions", f"/dev/fd/{reader}", "--model", checkpoint, "--json"),
            *("--frames", "2", "--max-new-tokens", "2", "--device", "cpu", "--gpus", gpus),
        )
    finally:
        os.close(reader)
    assert status == 0, err
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["What is shown?", "Who?"]


def test_questions_of_a_file_that_do_not_do(
    media: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "questions.txt"
    for content, said in ((None, "No such file"), (b"\n \n", "no question"), (b"\xff", "utf-8")):
        if content is not None:
            file.write_bytes(content)
        status, _, err = run(capsys, media["film"], "--questions", str(file))
        assert status == 1 and f"--questions {file}: " in err and said in err
    file.write_text("Who?")
    status, _, err = run(capsys, media["film"], "What?", "--questions", str(file))
    assert status == 1 and "What?: no such file (with --questions all are media)" in err
    status, _, err = run(capsys, media["film"], "--chat", "--questions", str(file))
    assert status == 1 and "exclude each other" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--frames 0", "--frames must be at least 1, got 0"),
        ("--fps nan", "--fps must be a number above 0, got nan"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--kv-offload -1", "--kv-offload must be 0 GiB or more, got -1.0"),
        ("--kv-offload inf", "--kv-offload must be 0 GiB or more, got inf"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
        ("--temperature -1", "--temperature must be 0 or more, got -1.0"),
        ("--temperature 1 --top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("--device toaster", "--device toaster: torch knows no such device"),
        ("--device cuda:77", "--device cuda:77: torch sees"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_loading(
    given: str, said: str, media: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, media["film"], "What?", "--model", "no/model", *given.split())
    assert status == 1
    assert said in err


def test_gpus_that_are_not_there_are_not_processes(
    media: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run(capsys, media["film"], "What?", "--model", "no/model", "--gpus", "2")
    assert status == 1 and "--gpus 2: torch sees no GPU on this machine; --device cpu" in err
    with pytest.raises(LongVILAError, match="--gpus 3: torch sees no GPU"):
        serve.main(["--gpus", "3"])
    with pytest.raises(LongVILAError, match="--gpus 4: torch sees no GPU"):
        index.main([media["film"], "--output", "out", "--gpus", "4"])


def test_a_file_that_is_not_there_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "gone.mp4")
    assert status == 1
    assert "gone.mp4: no such file, and no question follows it" in err
