"""Answers read behind a shared prefix are those of whole prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fixtures.sentencepiece import write_tokenizer_files

from longvila.evaluation.answerer import Answerer
from longvila.inference.engine import Engine
from longvila.media.video import SampledVideo, read_frames
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.model.vila.tokens import IMAGE, VIDEO, choose_template, load_tokenizer
from longvila.testing.tiny import tiny_config, tiny_model, tiny_processor

QUESTIONS = ("What is shown at 00:02?", "\nWhy?", "The the?")


def _video(frames: int = 4, seed: int = 0) -> SampledVideo:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 20, 20, 3), dtype=np.uint8)
    return read_frames(pixels, indices=range(frames))


def _model() -> Any:
    return tiny_model(1, dtype=torch.float64)


def _inputs(processor: Any, media: list[Any], question: str, **options: Any) -> Any:
    content: list[dict[str, Any]] = [
        {"type": "image", "image": item}
        if isinstance(item, Image.Image)
        else {"type": "video", "video": item}
        for item in media
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


MEDIA: dict[str, list[Any]] = {
    "one video": [_video()],
    "two videos": [_video(3, 1), _video(2, 2)],
    "picture last": [_video(2), Image.new("RGB", (30, 12), "red")],
    "pictures": [Image.new("RGB", (30, 12), "red"), Image.new("RGB", (12, 30), "blue")],
    "nothing": [],
}


@pytest.mark.parametrize("media", list(MEDIA.values()), ids=list(MEDIA))
@pytest.mark.parametrize("timestamps", [False, True])
def test_prompt_and_answer_are_those_of_the_whole_prompt(
    media: list[Any], timestamps: bool
) -> None:
    processor = tiny_processor(timestamps=timestamps, image_aspect_ratio="dynamic", max_tiles=2)
    model = _model()
    with Engine(model) as engine:
        answerer = Answerer(engine, processor)
        watched = answerer.watch(media)
        said = [answerer.answer(watched, q, max_new_tokens=5) for q in QUESTIONS]
        before = [] if watched.cache is None else watched.cache.input_ids[0].tolist()
        tails = [answerer._tail(watched, q)[0].tolist() for q in QUESTIONS]
    for question, tail, answer in zip(QUESTIONS, tails, said, strict=True):
        inputs = _inputs(processor, media, question)
        assert before + tail == inputs["input_ids"][0].tolist()
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


def test_vicuna_prompts_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """A space stands before an answer and not in the invitation; none behind a medium."""
    tokenizer = load_tokenizer(write_tokenizer_files(tmp_path))
    template = choose_template(tokenizer, "VILA1.5-3b")
    image_id, video_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    config = tiny_config(image_token_id=image_id, video_token_id=video_id)
    config.text_config.vocab_size = len(tokenizer)
    processor = LongVILAProcessor.from_config(config, tokenizer, chat_template=template.text)
    picture = Image.new("RGB", (30, 12), "red")
    with Engine(LongVILAForConditionalGeneration(config).eval()) as engine:
        answerer = Answerer(engine, processor)
        assert answerer.end_id == tokenizer.eos_token_id
        for media in ([picture], [_video()]):
            watched = answerer.watch(media)
            tail = answerer._tail(watched, "yes?")[0]
            whole = _inputs(processor, media, "yes?")["input_ids"][0]
            assert torch.equal(whole[watched.tokens :], tail)


def test_layout_is_the_answerers_own() -> None:
    processor = tiny_processor(timestamps=True)
    with Engine(_model()) as engine:
        answerer = Answerer(engine, processor, frame_separator="", timestamps=False)
        watched = answerer.watch(_video())
        ids = watched.cache.input_ids[0].tolist()
        built = answerer.head_ids() + [i for k in range(4) for i in answerer.frame_ids(float(k))]
    plain = _inputs(processor, [_video()], "?", frame_separator="", timestamps=False)
    assert ids == plain["input_ids"][0, : len(ids)].tolist()
    assert built == ids


@pytest.mark.parametrize("separator", ["\n", ""])
@pytest.mark.parametrize("timestamps", [False, True])
def test_frames_can_be_built_one_by_one(separator: str, timestamps: bool) -> None:
    processor = tiny_processor(timestamps=timestamps, frame_separator=separator)
    with Engine(_model()) as engine:
        answerer = Answerer(engine, processor)
        ids = answerer.watch(_video()).cache.input_ids[0].tolist()
        frames = [i for k in range(4) for i in answerer.frame_ids(float(k))]
        assert answerer.head_ids() + frames == ids


def test_choice_is_the_likelihood_of_whole_answers() -> None:
    model, processor = _model(), tiny_processor()
    options, question, video = ["cat", "a green dog", "x", "the the"], "What is it?", _video()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with Engine(model) as engine:
        answerer = Answerer(engine, processor)
        assert answerer.end_id == end
        watched = answerer.watch(video)
        scores = answerer.choose(watched, question, options)
        again = answerer.choose(watched, question, options[::-1])
        blind = answerer.choose(answerer.watch([]), question, options)
    for media, found in (([video], scores), ([], blind)):
        for option, score in zip(options, found, strict=True):
            inputs = _inputs(processor, media, question)
            reply = [*processor.tokenizer(option)["input_ids"], end]
            length = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], 1)
            inputs.pop("attention_mask")
            with torch.no_grad():
                table = model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
            wanted = float(table[range(len(reply)), reply].sum())
            # Scores are added in float32.
            assert score == pytest.approx(wanted, abs=1e-3)
    assert again[::-1] == pytest.approx(scores, abs=1e-6)


def test_prediction_is_teacher_forced() -> None:
    model, processor, video = _model(), tiny_processor(), _video()
    answer = "a dog"
    with Engine(model) as engine:
        answerer = Answerer(engine, processor)
        watched = answerer.watch(video)
        said = answerer.predict(watched, "What?", answer)
        tokens = watched.cache.get_seq_length()
        # Nothing of it stays.
        assert answerer.predict(watched, "What?", answer) == said
        assert watched.cache.get_seq_length() == tokens
    inputs = _inputs(processor, [video], "What?")
    length = inputs["input_ids"].shape[1]
    reply = processor.tokenizer(answer)["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], 1)
    inputs.pop("attention_mask")
    with torch.no_grad():
        best = model(**inputs).logits[0, length - 1 : -1].argmax(-1)
    assert said == processor.tokenizer.decode(best)


def test_the_checkpoints_sampling_does_not_leak_in() -> None:
    model, processor = _model(), tiny_processor()
    with Engine(model) as engine:
        answerer = Answerer(engine, processor)
        watched = answerer.watch(_video())
        plain = answerer.answer(watched, "What?", max_new_tokens=6)
        model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
        assert answerer.answer(watched, "What?", max_new_tokens=6) == plain
        hot = {"do_sample": True, "temperature": 9.0}
        one, two, three = (
            answerer.answer(watched, "What?", max_new_tokens=6, seed=seed, **hot)
            for seed in (1, 1, 2)
        )
    assert one == two and len({plain, one, three}) == 3


def test_errors() -> None:
    with Engine(_model()) as engine:
        answerer = Answerer(engine, tiny_processor())
        nothing = answerer.watch([])
        with pytest.raises(ValueError, match="options that are not empty"):
            answerer.choose(nothing, "?", ["a", ""])
        with pytest.raises(ValueError, match="has no token"):
            answerer.predict(nothing, "?", "")
        broken = tiny_processor(chat_template="{{ messages[0]['content'] }}")
        with pytest.raises(ValueError, match="chat template does not write an answer"):
            Answerer(engine, broken)
