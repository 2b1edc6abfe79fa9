"""A conversation gives what one call of generate on the whole prompt gives."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longvila.errors import ContextLengthError, ModelError
from longvila.inference.engine import Engine
from longvila.inference.session import Session
from longvila.inference.workers import Ranks
from longvila.media.synthetic import clip, damage, numbered_frame
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing.ranks import Rank, run_ranks
from longvila.testing.tiny import tiny_config, tiny_model, tiny_tokenizer

from .cases import language_model


def build(seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    config = tiny_config(**overrides)
    return tiny_model(seed, config=config), LongVILAProcessor.from_config(config, tiny_tokenizer())


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("session") / "film.mp4", 40)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "picture.png"
    Image.fromarray(numbered_frame(77)).save(path)
    return path


def whole(model: Any, processor: Any, messages: list[dict], new: int, **options: Any) -> Any:
    """The oracle: everything at once, pixels and all, by transformers' own means."""
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        **options,
    )
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    return inputs, out[0, inputs["input_ids"].shape[1] :].tolist()


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def said(answer: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer.text}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "overrides", [{}, {"pool_sizes": [[2, 1, 1], [1, 3, 3]]}, {"frame_separator": ""}]
)
def test_one_question_equals_generate(seed: int, overrides: dict, film: Path) -> None:
    model, processor = build(seed, **overrides)
    session = Session(model, processor)
    answer = session.ask("What is it?", [session.load_video(film, num_frames=6)], max_new_tokens=12)
    messages = [user({"type": "video", "path": str(film)}, text("What is it?"))]
    inputs, expected = whole(model, processor, messages, 12, num_frames=6)
    assert list(answer.token_ids) == expected
    assert answer.timings.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.timings.cached_tokens == 0
    assert answer.timings.new_tokens == len(expected)


def test_images_and_videos_keep_their_order(film: Path, picture: Path) -> None:
    model, processor = build()
    session = Session(model, processor)
    media = [
        session.load_video(film, num_frames=2),
        session.load_image(str(picture), tiled=False),
        session.load_video(film, num_frames=3),
    ]
    answer = session.ask("Which?", media, max_new_tokens=8)
    frames = [m.frames for m in media]
    assert frames == [2, 1, 3]
    parts = [{"type": m.kind} for m in media]
    prompt = processor.apply_chat_template(
        [user(*parts, text("Which?"))], add_generation_prompt=True
    )
    from longvila.media.video import read_frames

    size = processor.video_processor.height_width
    inputs = processor(
        text=[prompt],
        images=[picture],
        videos=[read_frames(film, num_frames=n, size=size) for n in (2, 3)],
        return_tensors="pt",
        add_special_tokens=False,
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert list(answer.token_ids) == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_turns_equal_the_whole_conversation_and_reuse_the_cache(film: Path, picture: Path) -> None:
    model, processor = build(seed=3)
    calls: list[int] = []
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: calls.append(inputs[0].shape[0])
    )
    session = Session(model, processor)
    first = session.ask("One?", [session.load_video(film, num_frames=5)], max_new_tokens=6)
    encoded = sum(calls)
    assert encoded == 5
    second = session.ask("Two?", max_new_tokens=6)
    assert sum(calls) == encoded
    third = session.ask("Three?", [session.load_image(str(picture))], max_new_tokens=6)
    assert sum(calls) == encoded + 1
    # Only the new turn is read, and what the first answer's rendering changed.
    assert second.timings.cached_tokens >= first.timings.prompt_tokens
    assert third.timings.cached_tokens >= second.timings.prompt_tokens
    messages = [
        user({"type": "video", "path": str(film)}, text("One?")),
        said(first),
        user(text("Two?")),
    ]
    _, expected = whole(model, processor, messages, 6, num_frames=5)
    assert list(second.token_ids) == expected
    messages += [said(second), user({"type": "image", "path": str(picture)}, text("Three?"))]
    _, expected = whole(model, processor, messages, 6, num_frames=5, tile_images=True)
    assert list(third.token_ids) == expected


def test_clear_forgets(film: Path) -> None:
    model, processor = build()
    session = Session(model, processor)
    fresh = session.ask("What?", max_new_tokens=6)
    session.clear()
    session.ask("Else?", [session.load_video(film, num_frames=4)], max_new_tokens=6)
    session.clear()
    again = session.ask("What?", max_new_tokens=6)
    assert again.token_ids == fresh.token_ids
    assert again.timings.cached_tokens == 0


def test_another_video_of_the_same_layout_is_not_mistaken_for_the_old_one(
    film: Path, tmp_path: Path
) -> None:
    model, processor = build(seed=4)
    other = clip(tmp_path / "other.mp4", 40, first_number=30_000)
    answers = []
    session = Session(model, processor)
    for source in (film, other):
        session.clear()
        medium = session.load_video(source, num_frames=6)
        answers.append(session.ask("What?", [medium], max_new_tokens=10).token_ids)
        _, expected = whole(
            model,
            processor,
            [user({"type": "video", "path": str(source)}, text("What?"))],
            10,
            num_frames=6,
        )
        assert list(answers[-1]) == expected


def test_text_streams_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build()
    session = Session(model, processor)
    words = "A rabbit smells the flowers."
    reply = [*processor.tokenizer(words)["input_ids"], processor.tokenizer.eos_token_id]

    def generate(prompt: torch.Tensor, *, streamer: Any, **options: Any) -> torch.Tensor:
        streamer.put(prompt[0])
        for token in reply:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([prompt, torch.tensor([reply])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    pieces: list[str] = []
    answer = session.ask("What?", on_text=pieces.append)
    assert len(pieces) >= 5
    assert "".join(pieces) == answer.text == words
    assert answer.complete and answer.token_ids == tuple(reply)


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_encoded(film: Path) -> None:
    model, processor = build(text_config={"max_position_embeddings": 128})
    session = Session(model, processor)
    long = session.load_video(film, num_frames=16)
    with pytest.raises(ContextLengthError, match=r"film\.mp4: 160\).*the model's context is 128"):
        session.ask("What?", [long], max_new_tokens=4)
    assert session.messages == [] and session.media == []
    vast = session.load_video(film, num_frames=10**6)
    assert vast.tokens == 10**7 and not vast.text  # counted, not written
    for call in (session.watch, lambda media: session.ask("What?", media)):
        with pytest.raises(ContextLengthError, match=r"film\.mp4: 10000000\), but the model's"):
            call([vast])
    with pytest.raises(ContextLengthError, match="100 new ones"):
        session.ask("What?", max_new_tokens=100)
    assert session.ask("What?", max_new_tokens=4).timings.new_tokens <= 4


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(film: Path) -> None:
    model, processor = build(seed=5)
    session = Session(model, processor)
    first = session.ask("One?", [session.load_video(film, num_frames=3)], max_new_tokens=5)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask("Never?", [session.load_video(film, num_frames=3)], on_text=stop)
    second = session.ask("Two?", max_new_tokens=5)
    messages = [
        user({"type": "video", "path": str(film)}, text("One?")),
        said(first),
        user(text("Two?")),
    ]
    _, expected = whole(model, processor, messages, 5, num_frames=3)
    assert list(second.token_ids) == expected


def test_progress_and_missing_frames(tmp_path: Path) -> None:
    model, processor = build()
    path = clip(tmp_path / "hit.mp4", 30, codec="mjpeg", pixel_format="yuvj420p")
    content = path.read_bytes()
    starts = [i for i in range(len(content)) if content[i : i + 3] == b"\xff\xd8\xff"]
    damage(path, starts[10] / len(content), starts[12] / len(content))
    seen: list[tuple[str, int, int]] = []
    session = Session(model, processor, progress=lambda *step: seen.append(step))
    medium = session.load_video(path, num_frames=30)
    answer = session.ask("What?", [medium], max_new_tokens=2)
    assert medium.missing and medium.frames + len(medium.missing) == 30
    assert len(medium.timestamps_s) == medium.frames
    stages = {name: [step for step in seen if step[0] == name] for name in ("decode", "encode")}
    for name, steps in stages.items():
        assert steps[-1] == (name, medium.frames, medium.frames)
        assert len(steps) > 1
    messages = [user({"type": "video", "path": str(path)}, text("What?"))]
    _, expected = whole(model, processor, messages, 2, num_frames=30)
    assert list(answer.token_ids) == expected


@pytest.mark.parametrize("background", [False, True])
def test_frames_are_decoded_while_the_prompt_is_read_and_are_not_kept(
    film: Path, background: bool
) -> None:
    model, processor = build(vision_batch_size=2)
    session = Session(Engine(model, chunk_tokens=16), processor, background=background)
    medium = session.load_video(film, num_frames=12)
    seen: list[str] = []
    session.progress = lambda stage, done, total: seen.append(stage)
    assert seen == []  # nothing is decoded before it is asked for
    alive: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: alive.append((args or tuple(kwargs.values()))[0].shape[0]),
        with_kwargs=True,
    )
    answer = session.ask("What?", [medium], max_new_tokens=4)
    assert max(alive) == 2 and sum(alive) == 12
    if not background:
        # The text model reads before the last frames are decoded.
        assert seen.index("read") < len(seen) - 1 - seen[::-1].index("decode")
    messages = [user({"type": "video", "path": str(film)}, text("What?"))]
    _, expected = whole(model, processor, messages, 4, num_frames=12)
    assert list(answer.token_ids) == expected


def test_a_video_is_watched_before_it_is_asked_about(film: Path) -> None:
    model, processor = build(seed=6)
    session = Session(model, processor)
    watching = session.watch([session.load_video(film, num_frames=5)])
    assert watching.prompt_tokens > 50 and watching.new_tokens == 0
    answer = session.ask("What is it?", max_new_tokens=8)
    assert answer.timings.cached_tokens == watching.prompt_tokens
    _, expected = whole(
        model, processor, [user({"type": "video", "path": str(film)}, text("What is it?"))], 8,
        num_frames=5,
    )  # fmt: skip
    assert list(answer.token_ids) == expected
    second = session.ask("And?", max_new_tokens=4)
    assert second.timings.cached_tokens >= answer.timings.prompt_tokens


def test_questions_apart_are_answered_at_once(film: Path) -> None:
    model, processor = build(seed=8)
    questions = ["What?", "Is it day or night, and how can one tell?", "Who?"]
    session = Session(model, processor)
    session.watch([session.load_video(film, num_frames=5)])
    answers = session.ask_each(questions, max_new_tokens=6)
    for question, answer in zip(questions, answers, strict=True):
        messages = [user({"type": "video", "path": str(film)}, text(question))]
        _, expected = whole(model, processor, messages, 6, num_frames=5)
        assert list(answer.token_ids) == expected
    assert [one.token_ids for one in session.ask_each(questions[1:2], max_new_tokens=6)] == [
        answers[1].token_ids
    ]
    # The conversation is where it was, and goes on.
    assert session.messages == [] and len(session.watched) == 1
    assert session.ask("What?", max_new_tokens=6).token_ids == answers[0].token_ids
    again = session.ask_each(["And?", "Why so?"], max_new_tokens=4)
    messages = [user({"type": "video", "path": str(film)}, text("What?")), said(answers[0])]
    _, expected = whole(model, processor, [*messages, user(text("Why so?"))], 4, num_frames=5)
    assert list(again[1].token_ids) == expected


def test_sessions_of_one_model_share_its_engine(film: Path) -> None:
    model, processor = build(seed=7)
    with Engine(model) as engine:
        one, two = (Session(engine, processor) for _ in range(2))
        first = one.ask("What?", [one.load_video(film, num_frames=3)], max_new_tokens=4)
        second = two.ask("What?", [two.load_video(film, num_frames=3)], max_new_tokens=4)
        assert first.token_ids == second.token_ids
    alone = Session(model, processor)
    alone.close()
    assert "forward" not in vars(model)


def test_sampling_follows_the_seed() -> None:
    model, processor = build()
    session = Session(model, processor)
    found = []
    for _ in range(2):
        session.clear()
        torch.manual_seed(0)
        found.append(session.ask("What?", max_new_tokens=8, temperature=1.5, top_p=0.9).token_ids)
    assert found[0] == found[1]
    session.clear()
    likeliest = session.ask("What?", max_new_tokens=8).token_ids
    session.clear()  # so small that nothing can be divided by it
    assert session.ask("What?", max_new_tokens=8, temperature=1e-40).token_ids == likeliest


def test_a_checkpoint_s_own_way_of_generating_breaks_no_conversation() -> None:
    model, processor = build()
    expected = [
        answer.token_ids for answer in (Session(model, processor).ask(q) for q in ("What?",))
    ]
    model, processor = build()
    model.generation_config.update(
        num_beams=2, num_return_sequences=2, return_dict_in_generate=True, use_cache=False
    )
    session = Session(model, processor)
    assert [session.ask("What?").token_ids] == expected
    assert session.ask("And?").timings.cached_tokens > 0


def test_a_session_that_cannot_be_made_gives_the_model_back() -> None:
    model = language_model()
    with pytest.raises(ModelError, match="no video processor"):
        Session(model, object())
    assert "forward" not in vars(model)


def test_timings_add_up(film: Path) -> None:
    model, processor = build()
    session = Session(model, processor)
    timings = session.ask("What?", [session.load_video(film, num_frames=4)]).timings
    for seconds in (timings.decode_s, timings.vision_s, timings.prefill_s, timings.generate_s):
        assert 0 < seconds < 60
    assert timings.tokens_per_s == pytest.approx(timings.new_tokens / timings.generate_s)
    again = session.ask("And?").timings
    assert again.decode_s == 0.0


def time_over_ranks(rank: Rank, film: str) -> list[Any]:
    model, processor = build()
    tower, forward = model.model.vision_tower, model.model.vision_tower.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.0 * rank.rank)
        return forward(*args, **kwargs)

    tower.forward = slow
    mesh = Ranks(rank.rank, 2, model.device).mesh(model.config.get_text_config())
    session = Session(Engine(model, mesh), processor)

    def media() -> list[Any]:
        return [session.load_video(film, num_frames=8)]

    found = [session.ask("What?", media(), max_new_tokens=4).timings]
    session.clear()
    found.append(session.watch(media()))
    found += [each.timings for each in session.ask_each(["What?", "Who?"], max_new_tokens=4)]
    session.engine.close()
    return found


def test_timings_over_ranks_are_those_of_the_slowest(film: Path) -> None:
    first, second = run_ranks(time_over_ranks, 2, str(film), timeout_s=60)
    assert first == second
    for timings in first[:2]:
        assert timings.vision_s >= 1.0 and timings.decode_s > 0
        # The wait of the other rank for those frames is not counted as reading.
        assert 0 < timings.prefill_s < 1.0
    for timings in (first[0], *first[2:]):
        assert timings.generate_s > 0
