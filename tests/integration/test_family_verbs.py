"""The verbs on tiny checkpoints of other people's families, read from folders.

What the conversation of ``longvila ask`` says (`Session`, held against transformers' own generate
elsewhere) is what server and evaluation must say.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_files import PROCESSORS, needs_torchvision, save_family
from PIL import Image

from longvila.cli.main import main
from longvila.inference.engine import Engine
from longvila.inference.session import Session
from longvila.media.synthetic import clip
from longvila.model.opening import open_checkpoint
from longvila.sp.mesh import build_mesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks

FAMILIES = sorted(PROCESSORS)
QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    needs_torchvision()
    base = tmp_path_factory.mktemp("families")
    return {name: save_family(name, base / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("film") / "film.mp4", 24)


def opened(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return open_checkpoint(str(folder), device="cpu")


def conversation(folder: Path, film: Path, *questions: str, frames: int, new: int) -> list[str]:
    """What ``longvila ask`` answers."""
    model, processor = opened(folder)
    with Engine(model) as engine:
        session = Session(engine, processor)
        media = [session.load_video(str(film), num_frames=frames)]
        texts = []
        for question in questions:
            texts.append(session.ask(question, media, max_new_tokens=new).text)
            media = []
        return texts


def uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# ---- serve -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_serve(name: str, folders: dict[str, Path], film: Path, tmp_path: Path) -> None:
    import openai

    from longvila.inference.serving.local import LocalServer
    from longvila.inference.serving.settings import Settings

    picture = tmp_path / "picture.png"
    Image.new("RGB", (24, 24), (200, 30, 60)).save(picture)
    expected = conversation(folders[name], film, QUESTION, "And now?", frames=4, new=6)
    model, processor = opened(folders[name])
    local = LocalServer(model, processor, Settings(name="tiny", slice_tokens=16))
    with local as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def said(messages: list[Any], new: int = 6) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=new, temperature=0
            )

        shown = {"type": "video_url", "video_url": {"url": uri(film, "video/mp4"), "num_frames": 4}}
        first = {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}
        answer = said([first])
        assert answer.choices[0].message.content.strip() == expected[0]
        turns = [
            first,
            {"role": "assistant", "content": expected[0]},
            {"role": "user", "content": "And now?"},
        ]
        answer = said(turns)
        assert answer.choices[0].message.content.strip() == expected[1]
        # The film was read before: its tokens come from the first request.
        assert answer.usage.prompt_tokens_details.cached_tokens > 4
        image = {"type": "image_url", "image_url": {"url": uri(picture, "image/png")}}
        content = [image, {"type": "text", "text": "Which colour?"}]
        assert said([{"role": "user", "content": content}], 2).usage.completion_tokens >= 1
        with pytest.raises(openai.BadRequestError, match="own placeholder"):
            said([{"role": "user", "content": f"a {processor.video_token}"}])
        assert local.server.scheduler.alive


def serve_over_ranks(rank: Rank, folders: dict[str, Path], film: Path) -> None:
    import uvicorn

    from longvila.inference.leading import Leader, control_group, follow
    from longvila.inference.serving.app import Server
    from longvila.inference.serving.settings import Settings

    shown = {"type": "video_url", "video_url": {"url": uri(film, "video/mp4"), "num_frames": 4}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}]
    for name, folder in folders.items():
        model, processor = opened(folder)
        text = model.config.get_text_config()
        mesh = build_mesh(
            2, num_heads=text.num_attention_heads, num_kv_heads=text.num_key_value_heads,
            device_type="cpu",
        )  # fmt: skip
        group = control_group()
        with Engine(model, mesh) as engine:
            if rank.rank:
                follow(engine, group)
                continue
            expected = conversation(folder, film, QUESTION, frames=4, new=6)[0]
            leader = Leader(engine, group)
            settings = Settings(name="tiny", slice_tokens=16)
            server = Server(leader, processor, settings, on_close=leader.close)
            with (
                ThreadPoolExecutor(1) as thread,
                socket.create_server(("127.0.0.1", 0)) as listener,
            ):
                running = uvicorn.Server(uvicorn.Config(server.app, log_level="error"))
                done = thread.submit(running.run, [listener])
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
                try:
                    for _ in range(2):
                        assert answered(url, messages) == expected, name
                finally:
                    running.should_exit = True
                done.result(120)


def answered(url: str, messages: list[Any]) -> str:
    """What a server says."""
    import openai

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0
        )
    return str(answer.choices[0].message.content).strip()


def test_serve_over_ranks(folders: dict[str, Path], film: Path) -> None:
    run_ranks(serve_over_ranks, 2, folders, film, timeout_s=280)


def test_another_time_between_frames_is_another_prompt(
    folders: dict[str, Path], film: Path
) -> None:
    """Qwen2.5-VL's positions depend on the frame rate; its ids do not."""
    from longvila.inference.family_prompts import FamilyPrompts, decoded_medium
    from longvila.inference.serving.family_prompt import build_family_prompt
    from longvila.inference.serving.media import Medium
    from longvila.inference.sight import FamilySampler

    model, processor = opened(folders["qwen2_5_vl"])

    class Numbers:
        def number(self, *data: Any) -> int:
            return -1 - (hash(b"".join(bytes(part) for part in data)) & 0xFFFFFFFF)

    with Engine(model) as engine:
        prompts = FamilyPrompts(model, processor, engine.family)
        video = FamilySampler(processor).sample(str(film), num_frames=8)
        slow = replace(video, metadata=replace(video.metadata, num_frames=2400))
        messages = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}
        ]
        made = [
            build_family_prompt(
                prompts, messages,
                [Medium("video", 8, video.indices, -1, video=each)], Numbers(),  # type: ignore[arg-type]
            )
            for each in (video, video, slow)
        ]  # fmt: skip
        assert decoded_medium(video).frames == 8
    assert (made[0].ids == made[2].ids).all()
    assert (made[0].keys == made[1].keys).all()
    assert (made[0].keys != made[2].keys).any()
    block = made[0].blocks[0]
    assert made[0].slice_end(0, block.start + 1) == block.start
    assert made[0].slice_end(block.start, 1) == block.stop


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stored_video_is_asked_about(
    name: str,
    folders: dict[str, Path],
    film: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = conversation(folders[name], film, QUESTION, frames=4, new=6)
    given = ["--model", str(folders[name])]
    stored = str(tmp_path / "film.index")
    assert main(["index", str(film), "--output", stored, "--frames", "4", *given]) == 0
    capsys.readouterr()
    assert main(["ask", stored, QUESTION, "--max-new-tokens", "6", "--json", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == expected[0] and found["cached_tokens"] > 4


# ---- eval --------------------------------------------------------------------------------------


def ask_all(folder: Path, questions: list[Any], answers: Path) -> tuple[list[str], list[int]]:
    """Answers of a benchmark's questions, and the lengths of prompts that were read."""
    from longvila.evaluation.answers import Answers
    from longvila.evaluation.asking import Asking
    from longvila.evaluation.families import open_answerer

    model, processor = opened(folder)
    with Engine(model) as engine:
        read, lengths = engine.read, []

        def noted(batch: Any, **options: Any) -> Any:
            lengths.append(batch["input_ids"].shape[1])
            return read(batch, **options)

        engine.read = noted  # type: ignore[method-assign]
        kept = Answers(answers, "a")
        asking = Asking(open_answerer(engine, processor), kept, settings={})
        found = [record["answer"] for record in asking.ask(questions)]
        kept.close()
        return found, lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_benchmarks_are_answered_as_in_a_conversation(
    name: str, folders: dict[str, Path], film: Path, tmp_path: Path
) -> None:
    from longvila.evaluation.asking import Question

    texts = ["Which fruit is it?", "\n Who won"]

    def question(number: int, *parts: Any) -> Question:
        messages = ({"role": "user", "content": list(parts)},)
        options = {"max_new_tokens": 5}
        return Question("t", "test", number, 0, messages, frames=4, options=options)

    shown = {"type": "video", "source": str(film)}
    said = [{"type": "text", "text": text} for text in texts]
    questions = [question(n, shown, text) for n, text in enumerate(said)]
    questions.append(question(2, said[0], shown, said[1]))  # words, video, words
    questions.append(question(3, said[0]))
    found, lengths = ask_all(folders[name], questions, tmp_path)
    expected = [conversation(folders[name], film, text, frames=4, new=5)[0] for text in texts]
    assert found[:2] == expected
    # The video once for its two questions, once more with words around it, and a text alone.
    assert len(lengths) == 3, lengths
    model, processor = opened(folders[name])
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [said[0]]}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert found[3] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def answered_over_ranks(rank: Rank, folders: dict[str, str], film: str) -> dict[str, Any]:
    """What each family answers and thinks likely, over all ranks of the test."""
    from longvila.evaluation.families import FamilyAnswerer

    found = {}
    for name, folder in folders.items():
        model, processor = opened(Path(folder))
        text = model.config.get_text_config()
        mesh = build_mesh(
            rank.world_size, num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
        )  # fmt: skip
        with Engine(model, mesh) as engine:
            answerer = FamilyAnswerer(engine, processor)
            watched = answerer.watch(answerer.sampler.sample(film, num_frames=5))
            said = answerer.answer(watched, QUESTION, max_new_tokens=4)
            found[name] = said, answerer.choose(watched, QUESTION, ["yes", "no no"])
    return found


def test_two_ranks_answer_as_one(folders: dict[str, Path], film: Path) -> None:
    given = {name: str(folder) for name, folder in folders.items()}
    (one,) = run_ranks(answered_over_ranks, 1, given, str(film))
    for many in run_ranks(answered_over_ranks, 2, given, str(film)):
        for name, (said, scores) in one.items():
            assert many[name][0] == said, name
            assert many[name][1] == pytest.approx(scores, rel=1e-4), name


@pytest.mark.parametrize("name", FAMILIES)
def test_words_that_join_the_media_are_read_with_them(
    name: str, folders: dict[str, Path], film: Path
) -> None:
    """Where what follows the media cannot be tokenised apart, the prompt is written anew."""
    from longvila.evaluation.families import FamilyAnswerer, WatchedMedia

    model, processor = opened(folders[name])
    with Engine(model) as engine:
        answerer = FamilyAnswerer(engine, processor)
        video = answerer.sampler.sample(str(film), num_frames=4)
        watched = answerer.watch(video)
        assert isinstance(watched, WatchedMedia)
        said = answerer.answer(watched, QUESTION, max_new_tokens=5)
        scores = answerer.choose(watched, QUESTION, ["yes", "no no"])
        anew = replace(watched, text_only=False)
        assert torch.equal(answerer._tail(anew, QUESTION), answerer._tail(watched, QUESTION))
        assert answerer.answer(anew, QUESTION, max_new_tokens=5) == said
        assert answerer.choose(anew, QUESTION, ["yes", "no no"]) == pytest.approx(scores)
        assert isinstance(answerer.predict(watched, QUESTION, "yes"), str)


def test_the_verb_runs_a_benchmark(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    from tests.unit.evaluation.fixture import write_videomme

    write_videomme(tmp_path / "mme", videos=1, questions=2)
    done = subprocess.run(
        [
            sys.executable, "-m", "longvila", "eval", "--tasks", "videomme", "--data",
            f"videomme={tmp_path / 'mme'}", "--model", str(folders["qwen3_vl"]), "--frames", "4",
            "--out", str(tmp_path / "out"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
             "HF_HOME": str(tmp_path / "hf")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "videomme" in done.stdout and (tmp_path / "out" / "report.html").exists()


# ---- needle, bench, plan -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_needle(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [
        "needle", "--model", str(folders[name]), "--out", str(out), "--lengths", "16", "32",
        "--depth-interval", "1", "--tier", "seen", "--no-control", "--tasks", "retrieval",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "paper, forced | seen" in printed.out
    result = json.loads((out / "result.json").read_text())
    assert result["settings"]["layout"] == "model"
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    cells = {
        (row["shape"]["frames"], row["shape"]["depth"])
        for row in records
        if str(row.get("id", "")).startswith("paper")
    }
    assert len(cells) == 4, cells
    assert main([*arguments, "--keep-rows"]) == 1
    assert "kept for LongVILA only" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_scene_are_known_before_it_is_decoded(
    name: str, folders: dict[str, Path]
) -> None:
    from longvila.evaluation.families import FamilyAnswerer, WholeReader
    from longvila.evaluation.needle_sets import open_haystack
    from longvila.evaluation.task import Scene

    model, processor = opened(folders[name])
    with Engine(model) as engine:
        answerer = FamilyAnswerer(engine, processor)
        film = open_haystack("synthetic", num_frames=9, fps=1.0, processor=answerer.sampler)
        reader = WholeReader(answerer, film.book)
        for frames in (range(9), (0, 3, 8, 5)):
            scene = Scene("s", tuple(frames), 1.0, ())
            tokens = reader.tokens_of(scene)
            assert tokens == reader.watch(scene).tokens > len(frames)


def test_scenes_beyond_the_context_are_refused_before_any_is_asked(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Engine, "context_length", 40)
    arguments = ["needle", "--model", str(folders["qwen3_vl"]), "--out", str(tmp_path / "out")]
    arguments += ["--lengths", "4", "64", "--depth-interval", "1", "--protocol", "paper"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "the longest scene, 65 frames" in said and "context of 40" in said
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_bench(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--model", str(folders["internvl"]), "--out", str(tmp_path), "--small"]
    options = ["--captions", "2", "--no-control", "--beyond-context"]
    assert main(["bench", *arguments, *options]) == 0
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("verb", ["ask", "serve", "needle", "bench"])
def test_language_models_are_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_family("qwen3", tmp_path / "text")
    film = ["film.mp4", "Why?"] if verb == "ask" else []
    out = ["--out", str(tmp_path / "out")] if verb in ("needle", "bench") else []
    assert main([verb, *film, "--model", str(folder), *out]) == 1
    assert "qwen3 is a language model and sees no images or videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2.5-vl-7b", "8.29 G"), ("qwen3-vl-8b", "8.77 G")]
)
def test_plan(
    name: str, parameters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the published sizes, from the configuration alone."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks import family_step
    from benchmarks.family_shapes import SHAPES

    with torch.device("meta"):
        model: Any = SHAPES[name].make(family_step.parse([]))
    model.config.save_pretrained(tmp_path / name)
    given = ["plan", "--model", str(tmp_path / name), "--frames", "1000", "--gpus", "2"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert f"{parameters} parameters" in printed and "fits" in printed
    assert main([*given, "--inference"]) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_of_any_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from family_cases import CASES

    CASES[name].config().save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--frames", "16", "--gpus", "2"]) == 0
    assert "tower" in capsys.readouterr().out
