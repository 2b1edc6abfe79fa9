"""Other families' samples: ids, labels and pixels are those that their own processors make."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import text_sample
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))

from family_cases import CASES
from family_files import PROCESSORS, needs_torchvision, tokenizer

from longvila.data.codecs import CODECS
from longvila.data.collate import Collator
from longvila.data.encode import Document, Encoder, Rejected
from longvila.data.families import FamilyCollator, FamilyEncoder, UnknownFamily, coders
from longvila.data.sample import Media, Sample, Turn
from longvila.media.synthetic import clip
from longvila.media.video import read_frames
from longvila.parallel.families import family_of
from longvila.parallel.mmsp import plan_media
from longvila.testing.tiny import tiny_config, tiny_processor

FAMILIES = sorted(PROCESSORS)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for number, frames in enumerate((20, 30)):
        clip(folder / f"clip{number}.mp4", frames, first_number=40 * number, height=32, width=64)
    Image.effect_noise((30, 12), 90).convert("RGB").save(folder / "wide.png")
    Image.effect_noise((16, 25), 90).convert("RGB").save(folder / "tall.png")
    return folder


def made(name: str, *, sp_rank: int = 0, sp_size: int = 1) -> tuple[Any, Any, Any, Any]:
    processor, config = PROCESSORS[name](), CASES[name].config()

    def deal(counts: Any) -> Any:
        return plan_media(config, sp_size, counts)

    encoder, collator = coders(
        processor, config,
        encoder={"max_tokens": 4096, "num_frames": 7},
        collator={"sp_rank": sp_rank, "sp_size": sp_size, "deal": deal},
    )  # fmt: skip
    return processor, config, encoder, collator


def sample(media: Path, *names: str, number: int = 0) -> Sample:
    """Media, then two questions with answers of odd shapes."""
    shown = [Media("video" if n.endswith("mp4") else "image", str(media / n)) for n in names]
    turns = (
        Turn("user", (*shown, "What is it?")),
        Turn("assistant", ("A box.\n\nIt opens.",)),
        Turn("user", ("And then?",)),
        Turn("assistant", ("It closes",)),
    )
    return Sample(f"s{number}", "x", turns)


def whole(processor: Any, given: Sample) -> Any:
    """What the family's own processor makes of a sample, from the frames that were chosen."""
    videos, images, metadata = [], [], []
    for medium in given.media:
        if medium.kind == "image":
            images.append(Image.open(medium.source))
            continue
        video = read_frames(medium.source, num_frames=7)
        videos.append(torch.from_numpy(video.frames).permute(0, 3, 1, 2))
        metadata.append(
            {
                "total_num_frames": video.metadata.num_frames,
                "fps": video.metadata.fps,
                "frames_indices": video.indices.tolist(),
            }
        )
    text = processor.apply_chat_template(given.to_chat(), tokenize=False)
    more: dict[str, Any] = {}
    if videos:
        more = {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    return processor(text=[text], images=images or None, return_tensors="pt", **more)


def encoded(encoder: Encoder, given: Sample) -> Document:
    document = encoder(given)
    assert isinstance(document, Document), document
    return document


# The oldest transformers' own InternVL processor adds up a tensor with numpy.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("names", [("clip0.mp4",), ("wide.png",), ("tall.png", "clip1.mp4"), ()])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_labels_and_pixels_are_the_processors_own(
    name: str, names: tuple[str, ...], media: Path
) -> None:
    needs_torchvision()
    processor, config, encoder, collator = made(name)
    given = sample(media, *names)
    expected = whole(processor, given)
    document = encoded(encoder, given)
    assert torch.equal(document.input_ids, expected["input_ids"][0])
    learned = processor.tokenizer.decode(document.labels[document.labels != -100])
    assert learned == "A box.\n\nIt opens.<|im_end|>It closes<|im_end|>"
    batch = collator([document])
    assert "position_ids" not in batch and batch["document_lengths"] == [document.length]
    prepared = family_of(config).prepare(
        config,
        {k: v for k, v in expected.items() if k not in ("input_ids", "attention_mask")},
    )
    mine = family_of(config).prepare(config, dict(batch))
    assert ("pixel_values" in mine) == ("pixel_values" in prepared)
    for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw",
                "video_num_frames", "image_sizes", "second_per_grid_ts"):  # fmt: skip
        assert (key in mine) == (key in prepared), key
        if key in mine:
            theirs = torch.as_tensor(prepared[key])
            assert torch.equal(torch.as_tensor(mine[key]).to(theirs.dtype), theirs), key


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_decode_their_own_units_and_nothing_else(
    name: str, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_torchvision()
    _, config, encoder, collator = made(name)
    documents = [
        encoded(encoder, sample(media, "clip0.mp4")),
        encoded(encoder, sample(media, "wide.png", number=1)),
        encoded(encoder, text_sample(2)),
        encoded(encoder, sample(media, "clip1.mp4", number=3)),
    ]
    alone = collator(documents)
    decoded: list[int] = []
    read = read_frames

    def counting(source: Any, **options: Any) -> Any:
        decoded[-1] += len(options["indices"])
        return read(source, **options)

    monkeypatch.setattr("longvila.data.codecs.read_frames", counting)
    parts = []
    for rank in range(3):
        decoded.append(0)
        collator = made(name, sp_rank=rank, sp_size=3)[3]
        parts.append(collator(documents))
    for kind in family_of(config).media:
        if kind.pixels in alone:
            own = [part[f"local_{kind.pixels}"] for part in parts]
            assert torch.equal(torch.cat([p for p in own if p.numel()]), alone[kind.pixels])
            assert all(torch.equal(part[kind.counts], alone[kind.counts]) for part in parts)
            assert all(kind.pixels not in part for part in parts)
    # Seven frames of each video; Qwen's last step of two repeats the last frame.
    assert sum(decoded) == 14 + (2 if name.startswith("qwen") else 0) and max(decoded) < 12


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_cut_to_what_fits(name: str, media: Path) -> None:
    needs_torchvision()
    _, _, encoder, collator = made(name)
    given = sample(media, "clip1.mp4")
    full = encoded(encoder, given)
    encoder.max_tokens = full.length - 1
    fewer = encoded(encoder, given)
    assert fewer.length < full.length and fewer.frames_cut > 0
    assert len(fewer.media[0].indices) == 7 - fewer.frames_cut  # type: ignore[arg-type]
    collator([fewer])


def test_media_beyond_a_familys_limits_are_left_out(tmp_path: Path) -> None:
    needs_torchvision()
    clip(tmp_path / "long.mp4", 4, height=32, width=8192)
    Image.new("RGB", (3000, 8)).save(tmp_path / "long.png")
    (tmp_path / "broken.mp4").write_bytes(b"none")
    for name in ("qwen2_5_vl", "qwen3_vl"):
        encoder = made(name)[2]
        for file in ("long.mp4", "long.png", "broken.mp4"):
            rejected = encoder(sample(tmp_path, file))
            assert isinstance(rejected, Rejected) and rejected.cause == "broken"
            assert file in rejected.reason, rejected.reason


def language_model() -> tuple[Any, Any]:
    words = tokenizer("", "")
    return words, coders(words, None, encoder={"max_tokens": 500}, collator={})


def test_language_models_take_text(media: Path) -> None:
    words, (encoder, collator) = language_model()
    document = encoded(encoder, text_sample(1, answer="Yes.\n\nIt is."))
    text = words.apply_chat_template(
        [
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes.\n\nIt is."},
        ],
        tokenize=False,
    )
    assert words.decode(document.input_ids) == text
    assert words.decode(document.labels[document.labels != -100]) == "Yes.\n\nIt is.<|im_end|>"
    batch = collator([document, document])
    assert set(batch) == {"input_ids", "labels", "document_lengths"}
    with pytest.raises(ValueError, match="a language model sees no video"):
        encoder(sample(media, "clip0.mp4"))
    with pytest.raises(ValueError, match="a language model sees no picture"):
        encoder(sample(media, "wide.png"))


def test_an_answer_that_the_template_trims_is_learned_as_it_stands_there() -> None:
    words, (encoder, _) = language_model()
    words.chat_template = "{% for m in messages %}{{ m['content'] | trim }};{% endfor %}"
    document = encoded(encoder, text_sample(1, answer="\n Yes.\n\nNo.\n"))
    assert words.decode(document.input_ids).endswith("Yes.\n\nNo.;")
    assert words.decode(document.labels[document.labels != -100]) == "Yes.\n\nNo."


def test_what_has_no_exact_place_is_refused() -> None:
    words, (encoder, _) = language_model()
    words.chat_template = "{% for m in messages %}{{ m['content'] | upper }};{% endfor %}"
    with pytest.raises(ValueError, match="no exact place in the text"):
        encoder(text_sample(1, answer="Yes."))
    with pytest.raises(ValueError, match="text without a template is LongVILA's"):
        FamilyEncoder(words, 500, style="plain")(text_sample(1))


def test_coders_are_chosen_by_the_model() -> None:
    encoder, collator = coders(
        tiny_processor(), tiny_config(), encoder={"max_tokens": 9}, collator={}
    )
    assert type(encoder) is Encoder and type(collator) is Collator

    class Other:
        image_processor = None

    with pytest.raises(UnknownFamily, match="media of 'longvila' cannot be read"):
        coders(Other(), tiny_config(), encoder={}, collator={})
    assert set(CODECS) == set(PROCESSORS)
    _, (encoder, collator) = language_model()
    assert type(encoder) is FamilyEncoder and type(collator) is FamilyCollator
