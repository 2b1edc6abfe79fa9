"""Prompts from sizes alone, and those of other families' processors, where torchvision is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvila.errors import LongVILAError
from longvila.inference.engine import Engine
from longvila.inference.prompts import LongVILAPrompts, common_prefix, said, write_turns
from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("prompts") / "film.mp4", 40)


def test_what_is_left_behind_a_prefix(film: Path) -> None:
    model = tiny_model()
    with Engine(model) as engine:
        prompts = LongVILAPrompts(model, tiny_processor(model.config), engine.family)
        media = [prompts.load_video(film, num_frames=n) for n in (2, 3)]
        rendered = prompts.render([said("user", "What?", media)], media)
        places = (torch.tensor(rendered.ids) == model.config.video_token_id).nonzero().flatten()
        first, second, end = int(places[0]), int(places[18]), int(places[-1]) + 1
        total = len(rendered.ids)
        for kept, expected, frames in [
            (0, 0, 5), (first, first, 5), (first + 4, first, 5), (second - 1, second - 1, 3),
            (second, second, 3), (second + 9, second, 3), (end, end, 0), (total - 1, total - 1, 0),
        ]:  # fmt: skip
            stays, batch = rendered.behind(kept, total, engine.family, model.config)
            assert stays == expected
            assert batch["input_ids"].tolist() == [rendered.ids[stays:]]
            source = batch.get("pixel_values_videos")
            assert (0 if source is None else source.num_frames) == frames
            if frames == 3:
                assert batch["video_num_frames"].tolist() == [3]


def test_runs_of_placeholders_are_tokenised_as_if_written_out() -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    with Engine(model) as engine:
        prompts = LongVILAPrompts(model, processor, engine.family)
    video, image = processor.video_token, processor.image_token
    for text in (
        "no media.\n\n", video * 9 + "\n" + video * 9 + "\n", f"a{video}{image * 3}{video * 2} the",
        f"{image}\n\n{image}", f"00:01 {video * 5}00:02 {video * 5}.\n", image * 4,
    ):  # fmt: skip
        expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompts._tokenise(text) == expected


def test_a_question_that_begins_with_a_newline_is_the_processor_s(film: Path) -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    content = [{"type": "video", "path": str(film)}, {"type": "text", "text": "\nWhat?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, num_frames=3,
        add_generation_prompt=True,
    )["input_ids"]  # fmt: skip
    with Engine(model) as engine:
        prompts = LongVILAPrompts(model, processor, engine.family)
    video = prompts.load_video(str(film), num_frames=3)
    rendered = prompts.render([said("user", "\nWhat?", [video])], [video])
    assert rendered.ids == list(expected[0] if isinstance(expected[0], list) else expected)


def test_the_common_prefix_of_long_lists() -> None:
    long = list(range(1000))
    for cut in (0, 1, 7, 500, 999):
        assert common_prefix(long, [*long[:cut], -1, *long[cut + 1 :]]) == cut
    assert common_prefix(long, long[:300]) == 300 == common_prefix(long[:300], long)


@pytest.mark.parametrize("template", ["{{ messages", "{{ raise_exception('only one turn') }}"])
def test_a_template_that_cannot_write_is_a_sentence(template: str) -> None:
    processor = tiny_processor()
    processor.chat_template = template
    with pytest.raises(LongVILAError, match=r"chat template cannot write this .* is it whole"):
        write_turns(processor, [said("user", "What?", [])])
