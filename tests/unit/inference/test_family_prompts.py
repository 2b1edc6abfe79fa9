"""Conversations with other families are those of their processors, where torchvision is there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tests.integration.family_cases import CASES, PAD
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from longvila.inference.engine import Engine
from longvila.inference.family_prompts import FamilyPrompts
from longvila.inference.prompts import describe, said
from longvila.inference.session import Session
from longvila.media.synthetic import clip, numbered_frame
from longvila.parallel.families import CAUSAL_LM
from longvila.testing.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("prompts") / "film.mp4", 40)


# ---- other families --------------------------------------------------------------------------

MARKS = {
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "qwen3_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "llava_onevision": ("<image>", "<video>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
}


def template(image: str, video: str) -> str:
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% elif part['type'] == 'video' %}{{ '" + video + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def processor_of(name: str, tokenizer: Any, config: Any) -> Any:
    if name.startswith("qwen"):
        from transformers import Qwen2VLImageProcessor

        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        limits = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
        image = Qwen2VLImageProcessor(**sizes, **limits)
        wrapped = [f"<|vision_start|>{mark}<|vision_end|>" for mark in MARKS[name][:2]]
        if name == "qwen2_5_vl":
            from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

            video = Qwen2VLVideoProcessor(**sizes, **limits)
            return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=template(*wrapped))
        from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

        video = Qwen3VLVideoProcessor(**sizes, **limits)
        return Qwen3VLProcessor(image, tokenizer, video, chat_template=template(*wrapped))
    if name == "llava_onevision":
        from transformers import (
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        size = {"height": 12, "width": 12}
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(
                size=size, image_grid_pinpoints=config.image_grid_pinpoints
            ),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=size, crop_size=size),
            num_image_tokens=9, vision_feature_select_strategy="full",
            vision_aspect_ratio=config.vision_aspect_ratio,
            chat_template=template("<image>", "<video>"),
        )  # fmt: skip
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 16, "width": 16}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size), tokenizer, InternVLVideoProcessor(size=size),
        image_seq_length=4, chat_template=template("<IMG_CONTEXT>", "<video>"),
    )  # fmt: skip


def build(name: str) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    image, video, *_ = MARKS[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[name])})
    names = {"image_token": image, "video_token": video}
    if name == "internvl":
        names = {"context_image_token": image, "start_image_token": "<img>",
                 "end_image_token": "</img>", "video_token": video}  # fmt: skip
    for attribute, token in names.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    config = CASES[name].config()
    config.text_config.vocab_size = len(tokenizer) + 3
    config.text_config.pad_token_id = tokenizer.pad_token_id
    config.image_token_id = tokenizer.convert_tokens_to_ids(image)
    config.video_token_id = tokenizer.convert_tokens_to_ids(video)
    if name.startswith("qwen"):
        config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, processor_of(name, tokenizer, config)


@pytest.mark.skipif(not is_torchvision_available(), reason="their processors need torchvision")
@pytest.mark.parametrize("name", list(CASES))
def test_conversations_with_other_families(name: str, film: Path, tmp_path: Path) -> None:
    model, processor = build(name)
    picture = tmp_path / "picture.png"
    Image.fromarray(numbered_frame(77)).save(picture)
    session = Session(Engine(model, chunk_tokens=16), processor)
    video = session.load_video(str(film), num_frames=4)
    first = session.ask("What is it?", [video], max_new_tokens=6)
    second = session.ask("And this?", [session.load_image(str(picture))], max_new_tokens=6)
    assert second.timings.cached_tokens >= first.timings.prompt_tokens - 1
    assert video.tokens > 4 and video.frames == 4
    session.close()
    media = [video]
    messages = [said("user", "What is it?", media)]
    prompts = FamilyPrompts(model, processor, session.engine.family)
    for answer, more in ((first, None), (second, prompts.load_image(str(picture)))):
        if more is not None:
            media.append(more)
            messages += [said("assistant", first.text), said("user", "And this?", [more])]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        frames = [medium.pixels for medium in media if medium.kind == "video"]
        inputs = processor(
            text=[text],
            images=[medium.pixels for medium in media if medium.kind == "image"] or None,
            videos=[list(each.frames) for each in frames],
            do_sample_frames=False,
            video_metadata=[
                {"total_num_frames": 40, "fps": each.metadata.fps,
                 "frames_indices": each.indices.tolist(), "duration": each.metadata.duration_s}
                for each in frames
            ],
            return_tensors="pt",
        )  # fmt: skip
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        )  # fmt: skip
        assert list(answer.token_ids) == out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("chosen", [{"indices": [3, 30]}, {"timestamps_s": [0.1, 1.0]}, {"fps": 4}])
def test_a_video_is_recalled_with_the_frames_it_had(
    chosen: dict[str, Any], film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FamilyPrompts, "_count", lambda self, medium: None)  # needs a processor
    part = SimpleNamespace(size=None, num_frames=6)
    prompts = FamilyPrompts(None, SimpleNamespace(video_processor=part), CAUSAL_LM)
    video = prompts.load_video(str(film), **chosen)
    again = prompts.recall(json.loads(json.dumps(describe(video))))
    assert again.frames == video.frames != 6
    assert again.pixels.indices.tolist() == video.pixels.indices.tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_padding_goes_with_all_that_says_something_of_a_token(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64).eval()
    inputs = case.batches["images"](torch.float64)
    del inputs["labels"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**inputs, **options)[0, -5:].tolist()
    padded = {
        name: functional.pad(inputs[name], (3, 0), value=filler)
        for name, filler in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0))
    }
    with Engine(model) as engine:
        out = engine.generate({**inputs, **padded}, **options)
    assert out[0, -5:].tolist() == expected
