"""Samples to batches for other people's models: their own processor says what text and pixels are.

1. A video is looked at, not decoded: how many frames, how large. From that follows what the
   family's processor would make of it (`MediaCodec.video`): a grid of patches, or so many frames.
2. The processor writes what stands in the text for it (timestamps, separators and all), its
   tokenizer makes ids. Answers are exact stretches of the text, found by rendering the conversation
   up to each answer; a template that would then write something else is refused.
3. A rank decodes the frames of the units that it encodes, and the processor turns these into
   pixels (`MediaCodec.video_pixels`). A step of two frames (Qwen) or a frame (LLaVA-OneVision,
   InternVL) is a unit, so a rank decodes no others. Sizes that depend on the whole video are
   decided from its metadata first. An image is decoded by each rank that encodes a part of it.

What a family's processor cannot do (videos without torchvision), this cannot. The ``plain`` style
is LongVILA's. Language models without media take conversations of text and rows of ids.

Cost: images are decoded twice, once to know their shape. Long prompts are tokenised as one text.

Dimension legend: F frames, P patches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longvila.data.collate import Collator
from longvila.data.encode import (
    _ONE_AT_A_TIME,
    IGNORE_INDEX,
    Document,
    Encoder,
    PlannedMedia,
    _Video,
)
from longvila.data.sample import Media, Sample
from longvila.errors import LongVILAError, VideoError
from longvila.media.image import ImageError, load_image
from longvila.media.sampling import ShortPolicy
from longvila.media.video import read_frames
from longvila.model.conversation import build_labels, move_spans
from longvila.model.processing_longvila import LongVILAProcessor

#: Frames that are decoded and turned into pixels at once.
_FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class Shape:
    """What a medium will be.

    Attributes:
        count: Entries of the pixels that it takes.
        shape: What the plan is told about it; None for ``count``.
        inputs: What the processor's text is made from.
        more: What else is to be known of it.
    """

    count: int
    shape: Any
    inputs: Mapping[str, Any]
    more: Any = None


class MediaCodec:
    """What a family makes of media; see `GridCodec`, `TileCodec` and `AnyResCodec`.

    Args:
        processor: The family's processor.
    """

    #: Names of pixels and of what describes items, by kind; and the kind of each kind of medium.
    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {}
    kind_of: ClassVar[Mapping[str, str]] = {"image": "image", "video": "video"}

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what the pictures of one sample will be."""
        raise NotImplementedError

    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what so many frames of a size will be."""
        raise NotImplementedError

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return the pixels of a picture."""
        raise NotImplementedError

    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return some entries of a video's pixels."""
        raise NotImplementedError

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return what the model is told about all media beside pixels."""
        return {
            self.kinds[kind][1]: torch.tensor(each, dtype=torch.int64)
            for kind, each in counts.items()
        }

    def _frames(self, planned: PlannedMedia, wanted: Sequence[int]) -> Tensor:
        """``(F, 3, height, width)`` uint8 frames of a video by their place among the chosen."""
        assert planned.indices is not None
        indices = [int(planned.indices[n]) for n in wanted]
        video = read_frames(planned.media.source, indices=indices)
        if len(video.indices) != len(indices):
            raise VideoError(
                f"{planned.media.name}: frames {list(video.missing)[:5]} cannot be decoded"
            )
        return torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2)

    def _whole(self, frames: Tensor, **options: Any) -> Any:
        return self.processor.video_processor(
            videos=[frames], do_sample_frames=False, return_tensors="pt", **options
        )


class GridCodec(MediaCodec):
    """Qwen2.5-VL and Qwen3-VL: patches in a grid of steps, rows and columns."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        found = []
        for picture in pictures:
            out = self.processor.image_processor(images=[picture], return_tensors="pt")
            grid = tuple(out["image_grid_thw"][0].tolist())
            found.append(Shape(int(np.prod(grid)), grid, {"image_grid_thw": torch.tensor(grid)}))
        return found

    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what frames will be: the processor resizes tensors without data."""
        from transformers.image_utils import SizeDict

        part = self.processor.video_processor
        size = part.size if isinstance(part.size, SizeDict) else SizeDict(**part.size)
        step = part.temporal_patch_size
        resized = part.resize(
            torch.empty(1, max(frames, step), 3, height, width, device="meta"),
            size,
            part.resample,
            factor=part.patch_size * part.merge_size,
            temporal_factor=step,
            cap_pixels_per_frame=bool(getattr(part, "cap_pixels_per_frame", None)),
        )
        rows, columns = (n // part.patch_size for n in resized.shape[-2:])
        grid = (-(-frames // step), rows, columns)
        return Shape(int(np.prod(grid)), grid, {"video_grid_thw": torch.tensor(grid)})

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(P, values)``."""
        out = self.processor.image_processor(images=[picture], return_tensors="pt")
        pixels: Tensor = out["pixel_values"]
        return pixels

    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return ``(stop - start, values)``: whole steps, each of its own frames."""
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        assert planned.indices is not None
        part = self.processor.video_processor
        _, rows, columns = planned.shape
        step, per_step = part.temporal_patch_size, rows * columns
        size = SizeDict(height=rows * part.patch_size, width=columns * part.patch_size)
        pieces = []
        for first in range(start // per_step, stop // per_step, _FRAMES_AT_ONCE // step):
            last = min(first + _FRAMES_AT_ONCE // step, stop // per_step)
            wanted = [min(n, len(planned.indices) - 1) for n in range(first * step, last * step)]
            frames = self._frames(planned, wanted)
            # As the whole video would be: its own size may depend on all of its frames.
            frames = BaseVideoProcessor.resize(part, frames, size, part.resample)
            pieces.append(self._whole(frames, do_resize=False)["pixel_values_videos"])
        return torch.cat(pieces)

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return grids, and the seconds between steps of each video where the model wants them."""
        found = super().describe(documents, counts)
        seconds = [
            media.more
            for document in documents
            for media in document.media
            if media.more is not None
        ]
        if seconds and "second_per_grid_ts" in self.processor.model_input_names:
            found["second_per_grid_ts"] = torch.tensor(seconds)
        return found


class TileCodec(MediaCodec):
    """InternVL: tiles of one size; a frame is a tile, and all are images to the model."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {"image": ("pixel_values", "image_num_tiles")}
    kind_of: ClassVar[Mapping[str, str]] = {"image": "image", "video": "image"}

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        counts = [len(self.image_pixels(picture)) for picture in pictures]
        return [Shape(count, None, {"num_patches": count}) for count in counts]

    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what frames will be."""
        blank = torch.empty(frames, 3, 1, 1, device="meta")
        return Shape(frames, None, {"pixel_values_videos": blank})

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(tiles, 3, height, width)``."""
        out = self.processor.image_processor(
            images=[picture], crop_to_patches=True, return_tensors="pt"
        )
        pixels: Tensor = out["pixel_values"]
        return pixels

    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return ``(stop - start, 3, height, width)``."""
        pieces = []
        for first in range(start, stop, _FRAMES_AT_ONCE):
            frames = self._frames(planned, range(first, min(first + _FRAMES_AT_ONCE, stop)))
            pieces.append(self._whole(frames)["pixel_values_videos"][0])
        return torch.cat(pieces)


class AnyResCodec(TileCodec):
    """LLaVA-OneVision: an image that is alone is cut into tiles, frames are not."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "image": ("pixel_values", "image_sizes"),
        "video": ("pixel_values_videos", "video_num_frames"),
    }
    kind_of: ClassVar[Mapping[str, str]] = MediaCodec.kind_of

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        if not pictures:
            return []
        alone = len(pictures) == 1
        found = []
        for picture in pictures:
            out = self.processor.image_processor(images=[picture], return_tensors="pt")
            size = out["image_sizes"][0].tolist()
            tiles = len(out["pixel_values"][0]) if alone else 1
            blank = torch.empty(out["pixel_values"][0].shape, device="meta")
            inputs = {
                "image_sizes": torch.tensor(size), "pixel_values": blank,
                "batch_num_images": len(pictures),
            }  # fmt: skip
            found.append(Shape(tiles, (*size, int(alone)), inputs))
        return found

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(tiles, 3, height, width)``, the whole picture first."""
        out = self.processor.image_processor(images=[picture], return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return sizes and frames, and how many images each document has."""
        found = super().describe(documents, counts)
        if "image" in counts:
            found["image_sizes"] = found["image_sizes"][:, :2]
            numbers = [sum(m.media.kind == "image" for m in d.media) for d in documents]
            found["batch_num_images"] = torch.tensor([n for n in numbers if n])
        return found


#: How media are read, by the model type of a configuration.
CODECS: Mapping[str, type[MediaCodec]] = {
    "qwen2_5_vl": GridCodec,
    "qwen3_vl": GridCodec,
    "internvl": TileCodec,
    "llava_onevision": AnyResCodec,
}


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
            _count_placeholders(name, processor, prompt, image_texts, video_texts)
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


def _count_placeholders(
    name: str, processor: Any, prompt: str, image_texts: Sequence[str], video_texts: Sequence[str]
) -> None:
    for token, texts in (
        (processor.image_token, image_texts),
        (processor.video_token, video_texts),
    ):
        if prompt.count(token) != len(texts):
            raise ValueError(
                f"{name}: {prompt.count(token)} placeholders {token} for {len(texts)} media"
            )


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
            said = turn.text
            if (
                not whole.startswith(end)
                or not end.startswith(start)
                or not (end[len(start) :].startswith(said))
            ):
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
        config: The model's configuration.
        encoder: Further arguments of `Encoder`.
        collator: Further arguments of `Collator`.

    Raises:
        UnknownFamily: If media of such a model cannot be read.
    """
    if isinstance(processor, LongVILAProcessor):
        return Encoder(processor, **encoder), Collator(processor, **collator)
    codec = None
    if hasattr(processor, "image_processor"):
        if config.model_type not in CODECS:
            raise UnknownFamily(
                f"media of {config.model_type!r} cannot be read ({', '.join(CODECS)} can); missing "
                "is a MediaCodec in longvila.data.families.CODECS"
            )
        if getattr(processor, "video_processor", None) is None:
            raise UnknownFamily(f"{type(processor).__name__} has no video processor")
        codec = CODECS[config.model_type](processor)
    return (
        FamilyEncoder(processor, codec=codec, **encoder),
        FamilyCollator(processor, codec=codec, **collator),
    )
