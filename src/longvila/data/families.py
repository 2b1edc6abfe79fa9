"""Samples to batches for other people's models: their own processor says what text and pixels are.

1. A video is looked at, not decoded: how many frames, how large. From that follows what the
   family's processor would make of it (`longvila.data.codecs`): a grid of patches, or frames.
2. The processor writes what stands in the text for it (timestamps, separators and all), its
   tokenizer makes ids. Answers are exact stretches of the text, found by rendering the conversation
   up to each answer; a template that would then write something else is refused.
3. A rank decodes the frames of the units that it encodes, and the processor turns these into
   pixels. A step of two frames (Qwen) or a frame (LLaVA-OneVision, InternVL) is a unit, so a rank
   decodes no others. Sizes that depend on the whole video are decided from its metadata first. An
   image is decoded by each rank that encodes a part of it.

What a family's processor cannot do (videos without torchvision), this cannot. The ``plain`` style
is LongVILA's. Language models without media take conversations of text and rows of ids.

Cost: images are decoded twice, once to know their shape. Long prompts are tokenised as one text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longvila.data.codecs import CODECS, MediaCodec, Shape
from longvila.data.collate import Collator
from longvila.data.encode import (
    _ONE_AT_A_TIME,
    IGNORE_INDEX,
    Document,
    Encoder,
    PlannedMedia,
    _Video,
    check_placeholders,
)
from longvila.data.sample import Media, Sample
from longvila.errors import LongVILAError, VideoError
from longvila.media.image import ImageError, load_image
from longvila.media.sampling import ShortPolicy
from longvila.model.conversation import build_labels, move_spans
from longvila.model.processing_longvila import LongVILAProcessor


@dataclass
class FamilyEncoder(Encoder):
    """Turns samples into documents as a family's processor would.

    Args:
        codec: What the family makes of media; None for a language model, whose tokenizer is the
            processor.
    """

    codec: MediaCodec | None = None

    @property
    def _sampling(self) -> tuple[int | None, float | None, ShortPolicy]:
        if self.codec is None:
            raise ValueError("a language model sees no video; its data must be text alone")
        part = self.codec.processor.video_processor
        found = getattr(part, "num_frames", None), getattr(part, "fps", None)
        if self.num_frames is None and self.fps is None and found == (None, None):
            raise ValueError("the processor names no number of frames: give num_frames or fps")
        return (*found, "all")

    def _probe(self, media: Media) -> _Video:
        video = super()._probe(media)
        assert self.codec is not None
        facts = video.metadata
        try:
            self.codec.video(len(video.indices), facts.height, facts.width)
        except ValueError as fault:  # sides too unequal, too few frames: the family's own limits
            raise VideoError(f"{facts.name}: {fault}") from fault
        return video

    def _tiles(self, sample: Sample) -> list[Any]:
        sources = [media.source for media in sample.media if media.kind == "image"]
        if not sources:
            return []
        if self.codec is None:
            raise ValueError("a language model sees no picture; its data must be text alone")
        try:
            return self.codec.images([load_image(source) for source in sources])
        except ValueError as fault:
            if isinstance(fault, LongVILAError):
                raise
            names = ", ".join(media.name for media in sample.media if media.kind == "image")
            raise ImageError(f"{names}: {fault}") from fault

    def _build(
        self,
        name: str,
        sample: Sample,
        videos: Sequence[_Video],
        tiles: Sequence[Any],
        cut: int = 0,
    ) -> Document:
        if (sample.style or self.style) == "plain":
            raise ValueError(
                f"{name}: text without a template is LongVILA's; this model needs conversations "
                "(style: chat)"
            )
        processor: Any = self.processor
        prompt, spans = _render(processor, sample)
        moves: list[Any] = []
        planned: list[PlannedMedia] = []
        if self.codec is not None:
            clips = [
                self.codec.video(len(v.indices), v.metadata.height, v.metadata.width)
                for v in videos
            ]
            image_texts = _texts(processor.replace_image_token, "image_idx", tiles)
            video_texts = _texts(
                processor.replace_video_token,
                "video_idx",
                clips,
                video_metadata=[_metadata(video) for video in videos],
            )
            check_placeholders(name, processor, prompt, image_texts, video_texts)
            (prompt,), found = processor.get_text_with_replacements(
                [prompt], image_texts, video_texts
            )
            moves = found[0] if found else []
            planned = self._planned(sample, videos, clips, tiles)
        tokenizer = getattr(processor, "tokenizer", processor)
        with _ONE_AT_A_TIME:
            encoded = tokenizer([prompt], add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"])
        labels = build_labels(
            ids,
            torch.ones_like(ids),
            torch.tensor(encoded["offset_mapping"]),
            [move_spans(spans, moves)],
        )[0]
        labels[0] = IGNORE_INDEX
        return Document(name, ids[0], labels, (ids.numel(),), tuple(planned), cut)

    def _planned(
        self,
        sample: Sample,
        videos: Sequence[_Video],
        clips: Sequence[Shape],
        tiles: Sequence[Shape],
    ) -> list[PlannedMedia]:
        found, moving, still = [], iter(zip(videos, clips, strict=True)), iter(tiles)
        step = getattr(
            getattr(self.processor, "video_processor", None), "temporal_patch_size", None
        )
        for media in sample.media:
            if media.kind == "video":
                video, shape = next(moving)
                # Steps of how many seconds: what Qwen2.5-VL counts positions in time by.
                fps = _metadata(video).sampled_fps
                seconds = None if step is None else step / fps
                found.append(
                    PlannedMedia(media, shape.count, video.indices, shape=shape.shape, more=seconds)
                )
            else:
                shape = next(still)
                found.append(PlannedMedia(media, shape.count, shape=shape.shape))
        return found


def _metadata(video: _Video) -> Any:
    from transformers.video_utils import VideoMetadata

    facts = video.metadata
    return VideoMetadata(
        total_num_frames=facts.num_frames,
        fps=facts.fps,
        width=facts.width,
        height=facts.height,
        duration=facts.duration_s,
        frames_indices=[int(n) for n in video.indices],
    )


def _texts(replace: Any, index: str, shapes: Sequence[Shape], **more: Any) -> list[str]:
    """What the processor writes for each medium."""
    if not shapes:
        return []
    inputs: dict[str, Any] = {key: [s.inputs[key] for s in shapes] for key in shapes[0].inputs}
    if "batch_num_images" in inputs:
        inputs["batch_num_images"] = inputs["batch_num_images"][:1]
    return [replace({**inputs, **more}, **{index: n}) for n in range(len(shapes))]


def _render(processor: Any, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return the text and the stretches that the assistant says."""
    messages = sample.to_chat()
    if not hasattr(processor, "image_processor"):
        # Templates of language models take a text, not a list of parts.
        for message, turn in zip(messages, sample.turns, strict=True):
            message["content"] = turn.text
    render = functools.partial(processor.apply_chat_template, tokenize=False)
    with _ONE_AT_A_TIME:
        whole: str = render(messages)
        spans = []
        for number, turn in enumerate(sample.turns):
            if turn.role != "assistant":
                continue
            start = render(messages[:number], add_generation_prompt=True)
            end = render(messages[: number + 1])
            # Many templates trim what is said.
            shown = (
                text
                for text in (turn.text, turn.text.strip())
                if end[len(start) :].startswith(text)
            )
            said = next(shown, None)
            if said is None or not whole.startswith(end) or not end.startswith(start):
                raise ValueError(
                    f"{sample.dataset}/{sample.id}: the chat template writes a turn otherwise "
                    "when others follow, or changes what the assistant says, so that answers have "
                    "no exact place in the text"
                )
            spans.append((len(start), _end_of_turn(processor, end, len(start) + len(said))))
    return whole, spans


def _end_of_turn(processor: Any, text: str, position: int) -> int:
    """Where the token that ends a turn ends; where the answer does, if there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tail = text[position:]
    special = [token for token in tokenizer.all_special_tokens if tail.startswith(token)]
    return position + max((len(token) for token in special), default=0)


@dataclass
class FamilyCollator(Collator):
    """Makes batches as a family's model takes them.

    Args:
        codec: What the family makes of media; None for a language model.
    """

    codec: MediaCodec | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread is not None:
            raise ValueError(
                "data.spread_positions is for LongVILA models; this family's model makes its own "
                "positions (set it to null)"
            )

    def __call__(self, items: Sequence[Document | Sample]) -> dict[str, Any]:
        """Make one batch; see `Collator`. Positions are the model's to make."""
        batch = super().__call__(items)
        # Documents are told apart by their lengths; families with positions in 3-D take no others.
        del batch["position_ids"]
        return batch

    @property
    def _kinds(self) -> Mapping[str, tuple[str, str]]:
        return {} if self.codec is None else self.codec.kinds

    def _kind_of(self, media: PlannedMedia) -> str:
        assert self.codec is not None
        return self.codec.kind_of[media.media.kind]

    def _describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        return {} if self.codec is None else self.codec.describe(documents, counts)

    def _empty(self, kind: str, decoded: Sequence[Tensor]) -> Tensor:
        return decoded[0][:0] if decoded else torch.empty(0, 1)

    def _decode(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        assert self.codec is not None
        if planned.indices is not None:
            pixels = self.codec.video_pixels(planned, start, stop)
        else:
            whole = self.codec.image_pixels(load_image(planned.media.source))
            if len(whole) < planned.count:
                raise VideoError(
                    f"{planned.media.name}: {len(whole)} entries, {planned.count} were announced; "
                    "did the file change?"
                )
            pixels = whole[start:stop]
        if len(pixels) != stop - start:
            raise VideoError(
                f"{planned.media.name}: {len(pixels)} entries of pixels, {stop - start} were "
                "announced; did the file change?"
            )
        return pixels


class UnknownFamily(LongVILAError, TypeError):
    """There is no way to read media for a model; the message names what is missing."""


def coders(
    processor: Any, config: Any, *, encoder: Mapping[str, Any], collator: Mapping[str, Any]
) -> tuple[Encoder, Collator]:
    """Make the encoder and the collator of a model.

    Args:
        processor: The model's processor, or a language model's tokenizer.
        config: The model's configuration; None where only a processor is at hand, and the ids of
            token rows cannot be checked.
        encoder: Further arguments of `Encoder`.
        collator: Further arguments of `Collator`.

    Raises:
        UnknownFamily: If media of such a model cannot be read.
    """
    if config is not None:
        encoder = {"vocabulary": config.get_text_config().vocab_size, **encoder}
    if isinstance(processor, LongVILAProcessor):
        return Encoder(processor, **encoder), Collator(processor, **collator)
    codec = None
    if hasattr(processor, "image_processor"):
        if config.model_type not in CODECS:
            raise UnknownFamily(
                f"media of {config.model_type!r} cannot be read ({', '.join(CODECS)} can); missing "
                "is a MediaCodec in longvila.data.codecs.CODECS"
            )
        if getattr(processor, "video_processor", None) is None:
            raise UnknownFamily(f"{type(processor).__name__} has no video processor")
        codec = CODECS[config.model_type](processor)
    return (
        FamilyEncoder(processor, codec=codec, **encoder),
        FamilyCollator(processor, codec=codec, **collator),
    )
