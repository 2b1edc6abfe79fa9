"""The processor: layout, counts, labels, batches, files, and its way through pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.video_utils import VideoMetadata

from longvila.media.synthetic import clip
from longvila.model.conversation import move_spans
from longvila.model.processing_longvila import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    LongVILAProcessor,
    add_media_tokens,
    clock,
    default_chat_template,
)
from longvila.testing.tiny import tiny_config, tiny_inputs, tiny_model, tiny_processor
from longvila.testing.tiny import tiny_tokenizer as tokenizer_of

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
FRAME = VIDEO_TOKEN * 9
TILE = IMAGE_TOKEN * 9


def frames(n: int, seed: int = 0, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *size, 3), dtype=np.uint8)


def user(*parts: Any) -> list[dict[str, Any]]:
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, Image.Image):
            content.append({"type": "image", "image": part})
        else:
            part = str(part) if isinstance(part, Path) else part
            content.append({"type": "video", "video": part})
    return [{"role": "user", "content": content}]


def run(processor: LongVILAProcessor, chat: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def text_of(processor: LongVILAProcessor, out: Any, row: int = 0) -> str:
    ids = out["input_ids"][row][out["attention_mask"][row].bool()]
    return processor.tokenizer.decode(ids)


# ---- layout


def test_video_then_text_as_upstream_lays_it_out() -> None:
    processor = tiny_processor()
    out = run(processor, user(frames(3), "What is it?"), add_generation_prompt=True)
    assert text_of(processor, out) == (
        SYSTEM + "<|im_start|>user\n" + (FRAME + "\n") * 3 + "What is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert out["pixel_values_videos"].shape == (3, 3, 20, 20)
    assert out["video_num_frames"].tolist() == [3]


def test_media_stay_where_they_stand() -> None:
    processor = tiny_processor()
    picture = Image.fromarray(frames(1)[0])
    chat = user("First", picture, "then", frames(2), frames(1), "end")
    out = run(processor, chat)
    assert text_of(processor, out) == (
        SYSTEM
        + "<|im_start|>user\nFirst"
        + TILE
        + "\nthen"
        + (FRAME + "\n") * 3
        + "end<|im_end|>\n"
    )
    assert out["video_num_frames"].tolist() == [2, 1]
    assert out["image_num_tiles"].tolist() == [1]


def test_needle_layout_has_no_separators() -> None:
    processor = tiny_processor()
    out = run(processor, user(frames(3), "Q"), frame_separator="")
    assert FRAME * 3 + "Q" in text_of(processor, out)


def test_timestamps_before_frames(tmp_path: Path) -> None:
    processor = tiny_processor()
    film = clip(tmp_path / "film.mp4", num_frames=41, fps=10)
    out = run(processor, user(film, "Q"), num_frames=3, timestamps=True)
    assert f"00:00 {FRAME}\n00:02 {FRAME}\n00:04 {FRAME}\nQ" in text_of(processor, out)
    assert [clock(t) for t in (0, 59.9, 61, 3600 + 61)] == ["00:00", "00:59", "01:01", "61:01"]


def test_pooled_videos_have_fewer_placeholders() -> None:
    config = tiny_config(pool_sizes=[[2, 1, 1], [4, 3, 3]], pool_separator="\n")
    processor = tiny_processor(config)
    out = run(processor, user(frames(5), "Q"), timestamps=False)
    block = (FRAME + "\n") * 3 + "\n" + (VIDEO_TOKEN + "\n") * 2 + "\n"
    assert block + "Q" in text_of(processor, out)
    assert tiny_model(config=config)(**out).logits.isfinite().all()


def test_tiles_of_an_image_that_is_alone() -> None:
    processor = tiny_processor(image_aspect_ratio="dynamic", max_tiles=4)
    wide = Image.fromarray(frames(1, size=(20, 40))[0])
    out = run(processor, user(wide, "Q"))
    assert out["image_num_tiles"].tolist() == [3]  # two and the thumbnail
    # Upstream writes a newline after each tile in the prompt, and the encoder adds another.
    assert (TILE + "\n\n") * 3 + "Q" in text_of(processor, out)
    out = run(processor, user(wide, wide, "Q"))
    assert out["image_num_tiles"].tolist() == [1, 1]
    assert (TILE + "\n") * 2 + "Q" in text_of(processor, out)
    data = processor._get_num_multimodal_tokens(image_sizes=[(20, 40), (20, 20)])
    assert data["num_image_patches"] == [3, 1] and data["num_image_tokens"] == [27, 9]


def test_system_turns() -> None:
    processor = tiny_processor()
    own = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    assert processor.apply_chat_template(own).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n"
    )
    assert processor.apply_chat_template(user("Hi")).startswith(SYSTEM)
    named = tiny_processor(system_prompt="Be kind.")
    assert named.apply_chat_template(user("Hi")).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>"
    )


def test_typed_placeholders_are_not_media() -> None:
    processor = tiny_processor()
    text = processor.apply_chat_template(user(f" a {IMAGE_TOKEN} b {VIDEO_TOKEN} "))
    assert text == SYSTEM + "<|im_start|>user\na  b<|im_end|>\n"


def test_values_are_stripped_as_a_whole() -> None:
    processor = tiny_processor()
    text = processor.apply_chat_template(user("  one ", frames(1), "  two\n"))
    assert text == SYSTEM + f"<|im_start|>user\none {VIDEO_TOKEN}  two<|im_end|>\n"


def test_openai_items() -> None:
    processor = tiny_processor()
    content = [
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        "text",
    ]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat)
    assert f"{VIDEO_TOKEN}{IMAGE_TOKEN}text" in text
    assert content[0]["type"] == "video_url"  # the caller's list is not touched


# ---- equality with the model's own inputs


def test_inputs_fit_the_model_and_generate() -> None:
    processor, model = tiny_processor(), tiny_model()
    out = run(processor, user(frames(3), "What is it?"), add_generation_prompt=True)
    by_hand = tiny_inputs(model.config, videos=(3,))
    assert torch.equal(
        out["input_ids"][0, -by_hand["input_ids"].shape[1] :], by_hand["input_ids"][0]
    )
    tokens = model.generate(**out, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= out["input_ids"].shape[1] + 4


def test_a_batch_is_padded_on_the_left_and_gives_the_same_answers() -> None:
    processor, model = tiny_processor(), tiny_model()
    picture = Image.fromarray(frames(1)[0])
    chats = [user(frames(3, 1), "One?"), user(frames(2, 2), picture, "A longer question?")]
    batch = run(processor, chats, padding=True, add_generation_prompt=True)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)[:, -5:]
    for row, chat in enumerate(chats):
        alone = model.generate(**run(processor, chat, add_generation_prompt=True), **options)
        assert torch.equal(together[row], alone[0, -5:])


# ---- labels


def answer(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    for question, reply in turns:
        chat += [*user(question), {"role": "assistant", "content": reply}]
    return chat


def labelled(processor: LongVILAProcessor, out: Any, row: int = 0) -> str:
    labels = out["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize(
    "reply",
    ["Yes.", "A\nB", "A.\n\nB\n\n\nC\n1.\n2.", "the\n\nthe an", "\n lone \n", "é ü 日本\n🎬"],
)
def test_labels_are_the_answer_and_the_end_of_its_turn(reply: str) -> None:
    processor = tiny_processor()
    out = processor.apply_chat_template(answer(("Q", reply)), return_labels=True)
    assert labelled(processor, out) == reply.strip() + "<|im_end|>"
    assert out["labels"].shape == out["input_ids"].shape
    # What is no target is what the template and the user wrote.
    rest = processor.tokenizer.decode(out["input_ids"][0][out["labels"][0] == -100])
    assert rest == SYSTEM + "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n\n"


def test_labels_of_several_turns_and_media_and_padding() -> None:
    processor = tiny_processor()
    first = answer(("One?", "A\nB"), ("Two?", "C\n\nD"))
    first[0]["content"].insert(0, {"type": "video", "video": frames(3)})
    first[2]["content"].append({"type": "image", "image": Image.fromarray(frames(1)[0])})
    second = answer(("Three?", "E"))
    out = processor.apply_chat_template([first, second], return_labels=True)
    assert labelled(processor, out, 0) == "A\nB<|im_end|>C\n\nD<|im_end|>"
    assert labelled(processor, out, 1) == "E<|im_end|>"
    assert (out["labels"][out["attention_mask"] == 0] == -100).all()
    assert "offset_mapping" not in out
    assert tiny_model()(**out).loss.isfinite()


def test_labels_equal_the_mask_of_transformers_where_that_is_right() -> None:
    processor = tiny_processor()
    chat = answer(("One?", "A.\n\nB"))
    out = processor.apply_chat_template(chat, return_labels=True)
    mask = run(processor, chat, return_assistant_tokens_mask=True)["assistant_masks"]
    assert torch.equal(torch.as_tensor(mask).bool(), out["labels"] != -100)


def test_options_of_a_template_s_call_all_arrive(tmp_path: Path) -> None:
    processor = tiny_processor()
    path = clip(tmp_path / "v.mp4", num_frames=12)
    chat = user(path)
    options: dict[str, Any] = {"num_frames": 3, "padding": "max_length", "max_length": 100}
    out = run(processor, chat, **options, return_mm_token_type_ids=True)
    assert out["video_num_frames"].tolist() == [3]
    assert out["input_ids"].shape == out["mm_token_type_ids"].shape == (1, 100)
    chat.append({"role": "assistant", "content": "A"})
    marked = processor.apply_chat_template(
        chat, **options, return_labels=True, return_assistant_tokens_mask=True, return_tensors="np"
    )
    assert marked["labels"].shape == (1, 100) and isinstance(marked["labels"], np.ndarray)
    assert (marked["assistant_masks"] == (marked["labels"] != -100)).all()
    with pytest.raises(ValueError, match="cannot be truncated"):
        processor.apply_chat_template(chat, truncation=True, max_length=5, return_labels=True)


def test_labels_by_a_template_s_name() -> None:
    processor = tiny_processor()
    processor.chat_template = {
        "default": "no answer",
        "other": processor.chat_template,
    }
    out = processor.apply_chat_template(
        answer(("Q", "A")), chat_template="other", return_labels=True
    )
    assert labelled(processor, out) == "A<|im_end|>"


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("Q", "list of messages"),
        ({"role": "user", "content": "Q"}, "message alone"),
        ([], "at least one message"),
        ([[]], "at least one message"),
        ([{"content": "Q"}], "needs a role"),
        ([{"role": "user", "content": 5}], "text or a list, got int"),
        ([{"role": "user", "content": [{"text": "Q"}]}], "dict with a type"),
    ],
)
def test_what_is_no_conversation_is_said(conversation: Any, message: str) -> None:
    for options in ({}, {"return_labels": True}):
        with pytest.raises((TypeError, ValueError), match=message):
            tiny_processor().apply_chat_template(conversation, **options)


@pytest.mark.parametrize("text", [5, b"a", ["a", None], [["a"]], []])
def test_what_is_no_prompt_is_said(text: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^text "):
        tiny_processor()(text=text)


def test_an_empty_prompt() -> None:
    ids = tiny_processor()(text="", return_tensors="pt")["input_ids"]
    assert ids.dtype == torch.int64
    with pytest.raises(ValueError, match="the prompt is empty"):
        tiny_model().generate(input_ids=ids)


def test_no_answer_to_learn_from() -> None:
    processor = tiny_processor()
    with pytest.raises(ValueError, match="no assistant turn"):
        processor.apply_chat_template(user("Q"), return_labels=True)
    with pytest.raises(ValueError, match="does not mark it"):
        processor.apply_chat_template(
            answer(("Q", "A")),
            chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}",
            return_labels=True,
        )


def test_spans_move_with_expansions() -> None:
    moves = [
        {"span": (2, 4), "new_span": (2, 10)},
        {"span": (6, 8), "new_span": (12, 13)},
    ]
    assert move_spans([(0, 2), (4, 6), (5, 9), (0, 9)], moves) == [
        (0, 2),
        (10, 12),
        (11, 14),
        (0, 14),
    ]


# ---- sampling and errors


def test_files_are_sampled_and_decoded_videos_are_not(tmp_path: Path) -> None:
    processor = tiny_processor(num_frames=4)
    film = clip(tmp_path / "film.mp4", num_frames=20, fps=10)
    assert run(processor, user(film, "Q"))["video_num_frames"].tolist() == [4]
    assert run(processor, user(frames(7), "Q"))["video_num_frames"].tolist() == [7]
    assert run(processor, user(frames(7), "Q"), num_frames=3)["video_num_frames"].tolist() == [3]
    assert run(processor, user(film, "Q"), fps=2.0)["video_num_frames"].tolist() == [4]
    pictures = [Image.fromarray(f) for f in frames(5)]
    out = run(processor, user(pictures, "Q"), return_metadata=True)
    assert out["video_num_frames"].tolist() == [5]
    out = processor(text=VIDEO_TOKEN, videos=film, indices=[0, 3, 19], return_metadata=True)
    assert out["video_metadata"][0].indices.tolist() == [0, 3, 19]
    with pytest.raises(ValueError, match="do_sample_frames=False needs decoded frames"):
        processor(text=VIDEO_TOKEN, videos=str(film), do_sample_frames=False)


def test_a_video_given_as_a_list_of_paths_is_one_video(tmp_path: Path) -> None:
    processor = tiny_processor(num_frames=3)
    paths = []
    for i, frame in enumerate(frames(3)):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(frame).save(paths[-1])
    chat = user({"not": "used"}, "Q")
    chat[0]["content"][0] = {"type": "video", "video": paths}
    out = run(processor, chat)
    assert out["video_num_frames"].tolist() == [3]
    expected = run(processor, user(frames(3), "Q"))["pixel_values_videos"]
    assert torch.equal(out["pixel_values_videos"], expected)
    labelled = processor.apply_chat_template(
        [*chat, {"role": "assistant", "content": "A"}], return_labels=True
    )
    assert torch.equal(labelled["pixel_values_videos"], expected)


@pytest.mark.parametrize("kind", [dict, VideoMetadata])
def test_metadata_are_the_clock_of_decoded_videos(kind: Any) -> None:
    processor = tiny_processor(timestamps=True)
    facts = kind(total_num_frames=96, fps=24.0)

    def times(metadata: Any, **options: Any) -> list[float]:
        out = processor(
            text=[VIDEO_TOKEN] * 2,
            videos=[frames(96), frames(96)],
            video_metadata=[facts, metadata],
            padding=True,
            return_metadata=True,
            **options,
        )
        return out["video_metadata"][1].timestamps_s.tolist()

    assert times(facts, num_frames=3) == [0.0, pytest.approx(48 / 24), pytest.approx(95 / 24)]
    assert times(facts, fps=1.0) == [0.0, 1.0, 2.0, 3.0]
    taken = kind(total_num_frames=960, fps=24.0, frames_indices=list(range(0, 960, 10)))
    assert times(taken, num_frames=2) == [0.0, pytest.approx(950 / 24)]
    with pytest.raises(ValueError, match="1 video_metadata for 2 videos"):
        processor(text=[VIDEO_TOKEN] * 2, videos=[frames(2)] * 2, video_metadata=facts)


def test_options_that_mean_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tiny_processor()(text="a", num_framez=3, max_length=5, return_offsets_mapping=True)
    assert [r.message for r in caplog.records] == ["options that mean nothing here: ['num_framez']"]


def test_ways_to_hand_over_media() -> None:
    processor = tiny_processor()
    video, other = frames(2), frames(3)
    text = [VIDEO_TOKEN, VIDEO_TOKEN]
    for videos in ([video, other], [[video], [other]], [list(video), list(other)]):
        out = processor(text=text, videos=videos, padding=True, return_tensors="pt")
        assert out["video_num_frames"].tolist() == [2, 3]
    out = processor(text=VIDEO_TOKEN, videos=[Image.fromarray(f) for f in video])
    assert list(out["video_num_frames"]) == [2]
    assert isinstance(out["input_ids"][0], list)
    nested = processor(
        text=VIDEO_TOKEN,
        videos=video,
        videos_kwargs={"num_frames": 1},
        text_kwargs={"return_tensors": "pt"},
    )
    assert nested["video_num_frames"].tolist() == [1]


def test_counts_of_placeholders_and_media() -> None:
    processor = tiny_processor()
    with pytest.raises(ValueError, match="1 placeholders <vila/video> but 0 videos"):
        processor(text=VIDEO_TOKEN)
    with pytest.raises(ValueError, match="0 placeholders <image> but 1 images"):
        processor(text="Hi", images=Image.fromarray(frames(1)[0]))
    pictures = [Image.fromarray(f) for f in frames(3)]
    text = [IMAGE_TOKEN, IMAGE_TOKEN * 2]
    assert len(processor(text=text, images=[pictures[:1], pictures[1:]])["image_num_tiles"]) == 3
    with pytest.raises(ValueError, match="prompt 0 has 1 placeholders <image> but its list has 2"):
        processor(text=text, images=[pictures[:2], pictures[2:]])
    clips = [frames(2), frames(3), frames(4)]
    with pytest.raises(
        ValueError, match="prompt 0 has 1 placeholders <vila/video> but its list has 2 videos"
    ):
        processor(text=[VIDEO_TOKEN, VIDEO_TOKEN * 2], videos=[clips[:2], clips[2:]])
    listed = [list(clip) for clip in clips[:2]]  # frames of each video
    out = processor(text=[VIDEO_TOKEN * 2, "Hi"], videos=listed, padding=True)
    assert list(out["video_num_frames"]) == [2, 3]
    with pytest.raises(ValueError, match="give text, images or videos"):
        processor()
    for part in ({"type": "image_url"}, {"type": "video_url", "video_url": {"detail": "low"}}):
        with pytest.raises(ValueError, match=f"needs '{part['type']}', an address or"):
            processor.apply_chat_template([{"role": "user", "content": [part]}])
    with pytest.raises(ValueError, match="needs one of 'video', 'url', 'path' and 'base64'"):
        processor.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "video"}]},
                {"role": "assistant", "content": "A"},
            ],
            return_labels=True,
        )


def test_unknown_content_is_named() -> None:
    with pytest.raises(Exception, match="content of type audio is not known"):
        tiny_processor().apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])


def test_tokenizers_without_placeholders() -> None:
    tokenizer = tokenizer_of(media_tokens=False)
    config = tiny_config()
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"has no token '<image>'; add it with .*add_media_tokens"):
        LongVILAProcessor(processor.image_processor, tokenizer, processor.video_processor)
    ids = add_media_tokens(tokenizer)
    assert ids == (config.image_token_id, config.video_token_id)
    assert add_media_tokens(tokenizer) == ids
    assert add_media_tokens(tokenizer_of()) == ids
    assert tokenizer(IMAGE_TOKEN)["input_ids"] == [ids[0]]
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") is not None
    LongVILAProcessor.from_config(config, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer's ids of <image> and <vila/video>"):
        LongVILAProcessor.from_config(tiny_config(image_token_id=3), tokenizer)


# ---- files and other libraries


def test_saves_and_loads(tmp_path: Path) -> None:
    config = tiny_config(pool_sizes=[[2, 1, 1]], num_video_frames=5)
    processor = tiny_processor(config, timestamps=True, fps=2.0, system_prompt="S")
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    files = {"chat_template.jinja", "processor_config.json", "tokenizer.json"}
    assert files <= {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / "chat_template.jinja").read_text() == default_chat_template()
    for again in (
        AutoProcessor.from_pretrained(tmp_path),
        LongVILAProcessor.from_pretrained(tmp_path),
    ):
        assert type(again) is LongVILAProcessor
        assert again.to_dict() == processor.to_dict()
        assert (again.video_processor.num_frames, again.video_processor.fps) == (5, 2.0)
        chat = user(frames(3), "Q")
        assert torch.equal(run(again, chat)["input_ids"], run(processor, chat)["input_ids"])
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": 20, "width": 20}


def test_counting_tokens_for_vllm() -> None:
    processor = tiny_processor()
    data = processor._get_num_multimodal_tokens(video_sizes=[(4, 10, 10), (1, 5, 5)])
    assert data["num_video_tokens"] == [36, 9]
    out = processor(
        text=VIDEO_TOKEN,
        videos=frames(4),
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    assert out["text_replacement_offsets"][0][0]["replacement"] == (FRAME + "\n") * 4
    assert processor.replace_video_token(out, 0) == (FRAME + "\n") * 4
    names = {"pixel_values", "image_num_tiles", "pixel_values_videos", "video_num_frames"}
    assert names <= set(processor.model_input_names)


def test_token_types() -> None:
    processor = tiny_processor()
    out = processor(
        text=f"{VIDEO_TOKEN}{IMAGE_TOKEN}x",
        videos=frames(1),
        images=Image.fromarray(frames(1)[0]),
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    assert out["mm_token_type_ids"][0].tolist() == [2] * 9 + [0] + [1] * 9 + [0] + [0]


def test_pipeline(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    film = clip(tmp_path / "film.mp4", num_frames=6, fps=10)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    picture = Image.fromarray(frames(1)[0])
    model, processor = tiny_model(), tiny_processor()
    for chat in (user(picture, "What?"), user(film, "What?")):
        out = pipe(text=chat, max_new_tokens=4, return_full_text=False)
        inputs = run(processor, chat, add_generation_prompt=True)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected = processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert out[0]["generated_text"] == expected
