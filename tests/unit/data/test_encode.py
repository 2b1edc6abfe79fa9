"""Documents: exact labels, frames chosen from metadata, the length policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import text_sample, video_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.upstream_case import write_checkpoint

from longvila.data.encode import IGNORE_INDEX, Document, Encoder, Rejected, SampleTooLong
from longvila.data.families import coders
from longvila.data.sample import Media, Sample, Turn
from longvila.media.sampling import uniform_indices
from longvila.media.synthetic import truncate
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.testing.tiny import tiny_config, tiny_processor


def learned(processor: Any, document: Document) -> str:
    return str(processor.tokenizer.decode(document.labels[document.labels != IGNORE_INDEX]))


def encoded(encoder: Encoder, sample: Sample) -> Document:
    document = encoder(sample)
    assert isinstance(document, Document), document
    return document


def test_a_question_that_begins_with_a_newline_is_not_merged(
    processor: Any, media_dir: Path
) -> None:
    media = Media("video", str(media_dir / "clip0.mp4"))
    sample = Sample("x", "y", (Turn("user", (media, "\n\nWhat?")), Turn("assistant", ("!",))))
    document = encoded(Encoder(processor, 4096), sample)
    whole = processor.apply_chat_template(sample.to_chat(), return_labels=True)
    assert torch.equal(document.input_ids, whole["input_ids"][0])


ANSWERS = ["One.", "One.\n\nTwo\n- three\n", "\nline\n\n\nline", "a\tb  c", "é 字\n🙂"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_ids_and_labels_are_the_processors_own(
    processor: Any, media_dir: Path, answer: str
) -> None:
    sample = video_sample(media_dir / "clip0.mp4", answer=answer)
    document = encoded(Encoder(processor, 4096), sample)
    whole = processor.apply_chat_template(sample.to_chat(), return_labels=True)
    assert torch.equal(document.input_ids, whole["input_ids"][0])
    assert document.input_ids.dtype == document.labels.dtype == torch.int64
    assert torch.equal(document.labels, whole["labels"][0])
    assert document.media[0].indices.tolist() == [0, 8, 15, 23]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.just("\n")))
@settings(max_examples=80, deadline=None)
def test_what_is_learned_is_the_answer_and_its_end(answer: str) -> None:
    if not answer.strip() or "<" in answer:
        return
    processor = tiny_processor()
    document = encoded(Encoder(processor, 4096), text_sample(answer=answer))
    # jinja's trim is str.strip; nothing else may change.
    assert learned(processor, document) == f"{answer.strip()}<|im_end|>"


def test_all_answers_of_a_conversation_are_learned_and_nothing_else(processor: Any) -> None:
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", ("First?",)),
        Turn("assistant", ("One\n\nand more.",)),
        Turn("user", ("One\n\nand more.",)),
        Turn("assistant", ("Two.",)),
    )
    document = encoded(Encoder(processor, 4096), Sample("x", "y", turns))
    assert learned(processor, document) == "One\n\nand more.<|im_end|>Two.<|im_end|>"


def test_plain_captions_have_no_template(processor: Any, media_dir: Path) -> None:
    image = Media("image", str(media_dir / "image0.png"))
    turns = (Turn("user", (image, "Describe.")), Turn("assistant", (" A grey\n\nsquare. ",)))
    document = encoded(Encoder(processor, 4096, style="plain"), Sample("x", "y", turns))
    assert learned(processor, document) == "A grey\n\nsquare.\n"
    text = processor.tokenizer.decode(document.input_ids)
    assert text == "<image>" * 9 + "\nA grey\n\nsquare.\n"


def test_a_samples_own_style_goes_before_the_stages(processor: Any, media_dir: Path) -> None:
    image = Media("image", str(media_dir / "image0.png"))
    turns = (Turn("user", (image, "Describe.")), Turn("assistant", ("A square.",)))
    expected = encoded(Encoder(processor, 4096), Sample("x", "y", turns))
    own = Sample("x", "y", turns, style="chat")
    document = encoded(Encoder(processor, 4096, style="plain"), own)
    assert torch.equal(document.input_ids, expected.input_ids)
    # A set that is plain in every stage ends with the end of text, as in the original.
    document = encoded(Encoder(processor, 4096), Sample("x", "y", turns, style="plain"))
    end = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(document.input_ids) == f"{'<image>' * 9}\nA square.{end}"
    assert learned(processor, document) == f"A square.{end}"


def test_plain_texts_begin_with_the_tokenizers_begin_token(media_dir: Path, tmp_path: Path) -> None:
    llama = LongVILAProcessor.from_pretrained(
        write_checkpoint("llama3_row", tmp_path / "llama3"), conversation="llama_3"
    )
    image = Media("image", str(media_dir / "image0.png"))
    turns = (Turn("user", (image,)), Turn("assistant", ("A square.",)))
    document = encoded(Encoder(llama, 4096, style="plain"), Sample("x", "y", turns))
    assert document.input_ids[:2].tolist() == [llama.tokenizer.bos_token_id, llama.image_token_id]
    assert learned(llama, document) == "A square.\n"


def test_interleaved_documents_learn_their_sentences(processor: Any, media_dir: Path) -> None:
    image = Media("image", str(media_dir / "image0.png"))
    sample = Sample("x", "y", (Turn("assistant", ("First. ", image, "Second.")),))
    document = encoded(Encoder(processor, 4096, style="plain"), sample)
    assert processor.tokenizer.decode(document.input_ids) == (
        "First. " + "<image>" * 9 + "\nSecond.\n"
    )
    # The very first token of a document has nothing before it that could predict it.
    assert learned(processor, document) == "irst. Second.\n"
    with pytest.raises(ValueError, match="style='plain'"):
        Encoder(processor, 4096)(sample)


def test_clips_take_their_own_stretch(processor: Any, media_dir: Path) -> None:
    path = media_dir / "clip1.mp4"
    encoder = Encoder(processor, 4096)
    for times, expected in (
        ({"start_s": 0.5}, [12, 16, 19, 23]),
        ({"start_s": 0.25, "end_s": 0.5}, [6, 8, 9, 11]),
        ({"end_s": 0.5, "num_frames": 3}, [0, 6, 11]),
        ({"start_s": 0.5, "fps": 8.0}, [12, 15, 18, 21]),
        ({"start_s": 0.98, "num_frames": 1}, [23]),
        ({"fps": 4.0}, [0, 6, 12, 18]),
        # What is beyond the video's end is not its last frame again and again.
        ({"start_s": 0.5, "end_s": 9.0, "fps": 8.0}, [12, 15, 18, 21]),
    ):
        planned = encoded(encoder, video_sample(path, **times)).media[0]
        assert planned.indices is not None
        assert planned.indices.tolist() == expected, times
    late = encoder(video_sample(path, start_s=5.0))
    assert isinstance(late, Rejected) and late.cause == "broken"
    assert "begins at 5 s, the video ends at 1 s" in late.reason


def test_timestamps_are_written_as_the_processor_does(media_dir: Path) -> None:
    processor = tiny_processor(num_frames=4, timestamps=True)
    sample = video_sample(media_dir / "clip0.mp4")
    document = encoded(Encoder(processor, 4096), sample)
    whole = processor.apply_chat_template(sample.to_chat(), return_labels=True)
    assert torch.equal(document.input_ids, whole["input_ids"][0])


def test_dynamic_tiles_are_counted_from_the_picture(media_dir: Path) -> None:
    processor = tiny_processor(tiny_config(image_aspect_ratio="dynamic"))
    image = Media("image", str(media_dir / "image0.png"))
    alone = Sample("x", "y", (Turn("user", (image, "?")), Turn("assistant", ("!",))))
    two = Sample("x", "y", (Turn("user", (image, image, "?")), Turn("assistant", ("!",))))
    video = Media("video", str(media_dir / "clip0.mp4"))
    beside = Sample("x", "y", (Turn("user", (image, video, "?")), Turn("assistant", ("!",))))
    for sample in (alone, two, beside):
        document = encoded(Encoder(processor, 4096), sample)
        whole = processor.apply_chat_template(sample.to_chat(), return_labels=True)
        assert torch.equal(document.input_ids, whole["input_ids"][0])
        images = [m.count for m in document.media if m.media.kind == "image"]
        assert images == whole["image_num_tiles"].tolist()


def test_too_many_frames_are_spread_anew_to_the_most_that_fit(
    processor: Any, media_dir: Path
) -> None:
    sample = video_sample(media_dir / "clip0.mp4", num_frames=24)
    whole = encoded(Encoder(processor, 4096), sample)
    for budget in (whole.length - 1, 200, 100):
        document = encoded(Encoder(processor, budget), sample)
        frames = document.media[0].count
        assert document.frames_cut == 24 - frames > 0
        assert document.length <= budget < document.length + 10  # nine tokens and a newline
        assert document.media[0].indices.tolist() == uniform_indices(24, frames).tolist()
        assert learned(processor, document) == learned(processor, whole)


def test_every_video_of_a_sample_gives_its_share(processor: Any, media_dir: Path) -> None:
    parts = tuple(
        Media("video", str(media_dir / f"clip{n}.mp4"), num_frames=f) for n, f in ((0, 20), (1, 5))
    )
    sample = Sample("x", "y", (Turn("user", (*parts, "?")), Turn("assistant", ("!",))))
    document = encoded(Encoder(processor, 200), sample)
    assert [m.count for m in document.media] == [11, 2]
    assert document.frames_cut == 12


def test_the_length_policy_is_explicit(processor: Any, media_dir: Path) -> None:
    sample = video_sample(media_dir / "clip0.mp4", num_frames=24)
    dropped = Encoder(processor, 100, too_long="drop")(sample)
    assert isinstance(dropped, Rejected) and dropped.cause == "too_long"
    with pytest.raises(SampleTooLong, match=r"videos/v0: \d+ tokens, a row holds 100"):
        Encoder(processor, 100, too_long="error")(sample)
    text = Encoder(processor, 80)(video_sample(media_dir / "clip0.mp4", answer="word " * 50))
    assert isinstance(text, Rejected) and "with 1 frames a video" in text.reason
    least = Encoder(processor, 100, min_frames=8)(sample)
    assert isinstance(least, Rejected) and "with 8 frames a video" in least.reason
    for wrong in ({"too_long": "cut"}, {"style": "chatty"}, {"max_tokens": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Encoder(processor, **{"max_tokens": 100, **wrong})


def test_rows_of_ids_keep_their_documents() -> None:
    ids = np.arange(10, dtype=np.int32)
    document = encoded(
        Encoder(None, 10), Sample("r", "rows", token_ids=ids, document_lengths=(4, 6))
    )
    assert document.input_ids.tolist() == list(range(10)) and document.lengths == (4, 6)
    assert document.labels.tolist() == [-100, 1, 2, 3, -100, 5, 6, 7, 8, 9]
    assert isinstance(Encoder(None, 9)(Sample("r", "rows", token_ids=ids)), Rejected)
    with pytest.raises(SampleTooLong, match="a row of 10 token ids"):
        Encoder(None, 9, too_long="error")(Sample("r", "rows", token_ids=ids))
    with pytest.raises(ValueError, match="needs the model's processor"):
        Encoder(None, 9)(text_sample())


def test_ids_that_the_model_has_not_are_refused_with_their_row(processor: Any) -> None:
    config = tiny_config()
    encoder, _ = coders(processor, config, encoder={"max_tokens": 10}, collator={})
    rows = config.get_text_config().vocab_size
    last = Sample("r", "rows", token_ids=np.array([0, rows - 1]))
    assert encoded(encoder, last).input_ids.tolist() == [0, rows - 1]
    with pytest.raises(ValueError, match=f"rows/s: token id {rows}, the model has {rows} "):
        encoder(Sample("s", "rows", token_ids=np.array([0, rows])))


def test_texts_that_no_tokenizer_takes_are_said_not_raised(processor: Any) -> None:
    result = Encoder(processor, 4096)(text_sample(answer="a\0b"))
    assert isinstance(result, Rejected) and "NUL" in result.reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% generation %}{{ messages[1]['content'][0]['text'] }}{% endgeneration %}", "1 placeh"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_texts_that_the_template_or_the_placeholders_refuse_are_said_not_raised(
    template: str, reason: str
) -> None:
    processor = tiny_processor()
    processor.chat_template = template
    result = Encoder(processor, 200)(text_sample(answer=f"Write {processor.image_token}."))
    assert isinstance(result, Rejected)
    assert result.cause == "broken" and reason in result.reason and "texts/t0" in result.reason


def test_broken_videos_are_said_not_raised(processor: Any, tmp_path: Path) -> None:
    from longvila.media.synthetic import clip

    path = truncate(clip(tmp_path / "cut.mp4", 24), 0.3)
    for source in (path, tmp_path / "missing.mp4"):
        result = Encoder(processor, 4096)(video_sample(source))
        assert isinstance(result, Rejected) and result.cause == "broken"
        assert source.name in result.reason
