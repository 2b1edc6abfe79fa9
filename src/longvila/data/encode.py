"""Samples to documents: what a sample will be as tokens, known before a frame is decoded.

1. Media are looked at, not decoded: a video's index says how many frames it has and when each
   appears, and the frames to take are chosen.
2. The processor's template and layout make the text, its tokeniser the ids, and its own label
   building the labels: every token of what the assistant says is a target, newlines inside an
   answer included. In the ``plain`` style of the first stage, a caption follows its media without a
   template, and the caption and one newline are the targets; captions and documents of sets that
   are plain by themselves end with the end of text instead.
3. A document that is longer than the budget meets the length policy:

   ``truncate_frames``  fewer frames, spread evenly again over the same stretch of video; dropped
                        where the text alone is too long
   ``drop``             left out
   ``error``            raised

Everything here follows from the sample, its files and the settings, so any rank that encodes the
same sample gets the same document. What was dropped or shortened is said in the result; nothing is
silent.

Dimension legend: T tokens of a document.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from longvila.data.sample import Media, Sample, Style
from longvila.errors import LongVILAError, VideoError
from longvila.media.image import load_image
from longvila.media.reader import VideoMetadata
from longvila.media.sampling import ShortPolicy, timestamp_indices, uniform_indices
from longvila.media.video import choose_indices, open_video
from longvila.model.conversation import build_labels, move_spans
from longvila.model.pieces import CUT, tokenize_pieces
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.model.vila.tokens import begin_text

IGNORE_INDEX = -100
#: Fast tokenisers and the tracker of answers refuse to be used by two threads at once; looking at
#: media, which takes longer, needs no lock.
_ONE_AT_A_TIME = threading.Lock()
TooLong = Literal["truncate_frames", "drop", "error"]


class SampleTooLong(LongVILAError, ValueError):
    """A sample does not fit into a row, and the length policy is to say so."""


@dataclass(frozen=True, eq=False)
class PlannedMedia:
    """A medium of a document, chosen but not decoded.

    Attributes:
        media: The image or video.
        count: Frames of the video, or tiles of the image.
        indices: ``(count,)`` frames to take; None for an image.
        tiled: Whether an image may be cut into tiles.
        shape: What the plan of who encodes what is told about it; None for ``count``.
        more: What else its family needs to know of it.
    """

    media: Media
    count: int
    indices: np.ndarray[Any, Any] | None = None
    tiled: bool = False
    shape: Any = None
    more: Any = None


@dataclass(frozen=True, eq=False)
class Document:
    """A sample as it will stand in a row.

    Attributes:
        id: Dataset and id of the sample, for reports.
        input_ids: ``(T,)`` int64.
        labels: ``(T,)`` int64, -100 where a token is no target and at each document's start.
        lengths: Tokens of each document inside; one, except for rows packed beforehand.
        media: Images and videos in the order of their placeholders.
        frames_cut: Frames that the length policy took away.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    media: tuple[PlannedMedia, ...] = ()
    frames_cut: int = 0

    @property
    def length(self) -> int:
        """T, the tokens."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class Rejected:
    """Why a sample gives no document.

    Attributes:
        id: Dataset and id of the sample.
        cause: ``broken`` (a medium cannot be read) or ``too_long``.
        reason: What is wrong, naming the file.
    """

    id: str
    cause: Literal["broken", "too_long"]
    reason: str


@dataclass
class Encoder:
    """Turns samples into documents.

    Args:
        processor: The model's processor; for token rows alone it may be None.
        max_tokens: Most tokens of a document.
        style: ``chat``, or ``plain`` for captions without a template; a sample's own goes first.
        too_long: What happens to longer documents.
        num_frames: Frames of a video; None for the processor's, and what a sample says goes first.
        fps: Frames a second of a video, at most ``num_frames``; None as above.
        short: What a video with fewer frames gives; None for the processor's.
        min_frames: Fewest frames that ``truncate_frames`` leaves in a video.
        options: Handed to `longvila.media.video.open_video`.
        vocabulary: Ids that the model has; token rows with others are refused. None checks nothing.
    """

    processor: LongVILAProcessor | None
    max_tokens: int
    style: Style = "chat"
    too_long: TooLong = "truncate_frames"
    num_frames: int | None = None
    fps: float | None = None
    short: ShortPolicy | None = None
    min_frames: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, got {self.max_tokens}")
        if self.too_long not in get_args(TooLong):
            raise ValueError(f"too_long must be one of {get_args(TooLong)}, got {self.too_long!r}")
        if self.style not in get_args(Style):
            raise ValueError(f"style must be chat or plain, got {self.style!r}")

    def __call__(self, sample: Sample) -> Document | Rejected:
        """Encode one sample.

        Returns:
            The document, or why there is none: a medium that cannot be read, a text that names a
            placeholder or that the chat template refuses, or a length that the policy does not
            allow.

        Raises:
            SampleTooLong: If it is too long and the policy is ``error``.
            ValueError: If the processor has no template that marks answers, or a row has ids that
                the model has not.
        """
        name = f"{sample.dataset}/{sample.id}"
        if sample.token_ids is not None:
            return self._fit_tokens(name, sample)
        if any(CUT in turn.text for turn in sample.turns):
            return Rejected(name, "broken", f"{name}: a text with NUL characters")
        try:
            videos = [self._probe(media) for media in sample.media if media.kind == "video"]
            tiles = self._tiles(sample)
            document = self._build(name, sample, videos, tiles)
        except (LongVILAError, OSError) as fault:
            return Rejected(name, "broken", str(fault))
        except TemplateError as fault:
            return Rejected(name, "broken", f"{name}: the chat template refuses it: {fault}")
        counts = [len(video.indices) for video in videos]
        if document.length <= self.max_tokens:
            return document
        whole = document.length
        if self.too_long == "truncate_frames" and videos:
            document = self._truncate(name, sample, videos, tiles, counts)
            if document.length <= self.max_tokens:
                return document
        reason = f"{name}: {whole} tokens, a row holds {self.max_tokens}"
        if videos and self.too_long == "truncate_frames":
            reason += f"; {document.length} with {self.min_frames} frames a video"
        if self.too_long == "error":
            raise SampleTooLong(
                f"{reason}. Raise max_tokens, sample fewer frames (num_frames), or choose "
                "too_long='truncate_frames' or 'drop'"
            )
        return Rejected(name, "too_long", reason)

    # ---- media, by their metadata

    @property
    def _need_processor(self) -> LongVILAProcessor:
        if self.processor is None:
            raise ValueError("this sample has turns; encoding them needs the model's processor")
        return self.processor

    @property
    def _sampling(self) -> tuple[int | None, float | None, ShortPolicy]:
        """The processor's own number of frames, rate and way with short videos."""
        part = self._need_processor.video_processor
        return part.num_frames, part.fps, part.short

    def _probe(self, media: Media) -> _Video:
        default_frames, default_fps, default_short = self._sampling
        fps = media.fps or (None if media.num_frames else self.fps)
        num_frames = media.num_frames or self.num_frames
        if fps is None and num_frames is None:
            num_frames, fps = default_frames, default_fps
        short = self.short or default_short
        with open_video(media.source, **self.options) as reader:
            metadata = reader.metadata
        stretch = _stretch(metadata, media)
        if media.start_s is None and media.end_s is None:
            indices = choose_indices(metadata, num_frames=num_frames, fps=fps, short=short)
        elif fps is not None:
            times = metadata.timestamps_s[stretch]
            end_s = min(media.end_s or metadata.duration_s, metadata.duration_s)
            length_s = end_s - (media.start_s or 0.0)
            number = max(math.ceil((length_s - 1e-6) * fps), 1)
            instants = times[0] + np.arange(number) / fps
            if num_frames is not None and number > num_frames:
                instants = np.linspace(times[0], instants[-1], num_frames)
            indices = stretch[0] + timestamp_indices(times, instants)
        else:
            assert num_frames is not None
            indices = stretch[uniform_indices(len(stretch), num_frames, short=short)]
        return _Video(media, metadata, indices)

    def _tiles(self, sample: Sample) -> list[Any]:
        """Tiles of each image and whether it may be tiled: only one without other images is."""
        images = [media for media in sample.media if media.kind == "image"]
        if not images:
            return []
        processor = self._need_processor
        if processor.image_processor.image_aspect_ratio != "dynamic" or len(images) > 1:
            return [(1, False)] * len(images)
        picture = load_image(images[0].source)
        return [(len(processor.image_processor.tiles(picture, dynamic=True)), True)]

    # ---- text

    def _build(
        self,
        name: str,
        sample: Sample,
        videos: Sequence[_Video],
        tiles: Sequence[Any],
        cut: int = 0,
    ) -> Document:
        processor = self._need_processor
        separator = processor.frame_separator
        dynamic = processor.image_processor.image_aspect_ratio == "dynamic"
        image_texts = [
            processor.image_text(count, separator=separator, tiled=dynamic and may_tile, cut=CUT)
            for count, may_tile in tiles
        ]
        video_texts = [
            processor.video_text(
                len(video.indices),
                separator=separator,
                times_s=video.times_s if processor.timestamps else None,
                cut=CUT,
            )
            for video in videos
        ]
        if (sample.style or self.style) == "plain":
            prompt, spans = self._plain(sample)
        else:
            prompt, spans = self._chat(sample)
        check_placeholders(name, processor, prompt, image_texts, video_texts)
        # As the processor does: ranges move with the text itself, marks only say where it is cut.
        texts = [[text.replace(CUT, "") for text in each] for each in (image_texts, video_texts)]
        moves: Any
        _, moves = processor.get_text_with_replacements([prompt], *texts)
        marked, _ = processor.get_text_with_replacements([prompt], image_texts, video_texts)
        with _ONE_AT_A_TIME:
            encoded = tokenize_pieces(
                processor.tokenizer,
                marked,
                processor.image_token,
                placeholders=(processor.image_token, processor.video_token),
                # The template writes all special tokens itself.
                add_special_tokens=False,
                return_offsets_mapping=True,
            )
        tokens = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
        labels = build_labels(
            tokens["input_ids"],
            tokens["attention_mask"],
            torch.tensor(encoded["offset_mapping"]),
            [move_spans(spans, moves[0])],
        )[0]
        labels[0] = IGNORE_INDEX
        planned: list[PlannedMedia] = []
        clips, pictures = iter(videos), iter(tiles)
        for media in sample.media:
            if media.kind == "video":
                video = next(clips)
                planned.append(PlannedMedia(media, len(video.indices), video.indices))
            else:
                count, may_tile = next(pictures)
                planned.append(PlannedMedia(media, count, tiled=may_tile))
        ids = tokens["input_ids"][0]
        return Document(name, ids, labels, (ids.numel(),), tuple(planned), cut)

    def _chat(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        processor = self._need_processor
        if sample.interleaved:
            raise ValueError(
                f"{sample.dataset}/{sample.id} is a document with media inside, not a "
                "conversation; encode it with style='plain'"
            )
        template = processor.chat_template
        if isinstance(template, dict):
            template = template["default"]
        variables: dict[str, Any] = dict(processor.tokenizer.special_tokens_map)
        if processor.system_prompt is not None:
            variables["system_prompt"] = processor.system_prompt
        render: Any = render_jinja_template
        with _ONE_AT_A_TIME:
            prompts, spans = render(
                conversations=[sample.to_chat()],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **variables,
            )
        if not spans[0]:
            raise ValueError(
                "the chat template marks no answer; it must write assistant turns inside "
                "{% generation %} for exact labels"
            )
        return prompts[0], spans[0]

    def _plain(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Media, and what the assistant says; questions, system and template are left out.

        Source: upstream's conversation version ``plain`` of the alignment stage: an image and its
        caption with a newline. Its readers of COYO and MMC4, which are plain in every stage, end
        with the tokenizer's end token.
        """
        processor = self._need_processor
        end = processor.tokenizer.eos_token if sample.style == "plain" else None
        tokens = {"image": processor.image_token, "video": processor.video_token}
        prompt = ""
        spans: list[tuple[int, int]] = []
        for turn in sample.turns:
            spoken = turn.role == "assistant"
            texts = [part for part in turn.parts if isinstance(part, str)]
            for part in turn.parts:
                if isinstance(part, Media):
                    prompt += tokens[part.kind]
                elif spoken:
                    for token in tokens.values():
                        part = part.replace(token, "")
                    part = part.strip() if len(texts) == 1 else part
                    spans.append((len(prompt), len(prompt) + len(part)))
                    prompt += part
            if spoken:
                spans.append((len(prompt), len(prompt) + len(end or "\n")))
                prompt += end or "\n"
        with _ONE_AT_A_TIME:
            begin = begin_text(processor.tokenizer, prompt)
        moved = len(begin)
        return begin + prompt, [(start + moved, stop + moved) for start, stop in spans]

    # ---- length

    def _truncate(
        self,
        name: str,
        sample: Sample,
        videos: Sequence[_Video],
        tiles: Sequence[Any],
        counts: Sequence[int],
    ) -> Document:
        """Take the same share of every video's frames, the largest that fits."""
        longest = max(counts)

        def build(number: int) -> Document:
            fewer = []
            for video, count in zip(videos, counts, strict=True):
                keep = min(count, max(self.min_frames, count * number // longest))
                pick = uniform_indices(count, keep, short="all")
                fewer.append(_Video(video.media, video.metadata, video.indices[pick]))
            cut = sum(counts) - sum(len(video.indices) for video in fewer)
            return self._build(name, sample, fewer, tiles, cut)

        low, high = 0, longest - 1
        best = build(0)
        if best.length > self.max_tokens:
            return best
        while low < high:
            middle = (low + high + 1) // 2
            document = build(middle)
            if document.length <= self.max_tokens:
                low, best = middle, document
            else:
                high = middle - 1
        return best

    def _fit_tokens(self, name: str, sample: Sample) -> Document | Rejected:
        assert sample.token_ids is not None
        size = int(sample.token_ids.size)
        largest = int(sample.token_ids.max())
        # On a GPU the embedding would end the process, and name no row.
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise ValueError(
                f"{name}: token id {largest}, the model has {self.vocabulary} (0 to "
                f"{self.vocabulary - 1}); was it packed with another model's tokenizer? Pack the "
                "text anew with this one's"
            )
        if size > self.max_tokens:
            reason = f"{name}: a row of {size} token ids, a row holds {self.max_tokens}"
            if self.too_long == "error":
                raise SampleTooLong(f"{reason}. Raise max_tokens, or pack the text anew")
            return Rejected(name, "too_long", reason)
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        lengths = sample.document_lengths or (size,)
        labels = ids.clone()
        labels[[0, *np.cumsum(lengths)[:-1].tolist()]] = IGNORE_INDEX
        return Document(name, ids, labels, tuple(lengths))


def check_placeholders(
    name: str, processor: Any, prompt: str, image_texts: Sequence[str], video_texts: Sequence[str]
) -> None:
    """Find out whether a prompt has a placeholder for each medium, and no others."""
    for token, texts in (
        (processor.image_token, image_texts),
        (processor.video_token, video_texts),
    ):
        if prompt.count(token) != len(texts):
            raise LongVILAError(
                f"{name}: {prompt.count(token)} placeholders {token} for {len(texts)} media"
            )


@dataclass(frozen=True, eq=False)
class _Video:
    """A video whose frames are chosen."""

    media: Media
    metadata: VideoMetadata
    indices: np.ndarray[Any, Any]

    @property
    def times_s(self) -> list[float]:
        times: list[float] = self.metadata.timestamps_s[self.indices].tolist()
        return times


def _stretch(metadata: VideoMetadata, media: Media) -> np.ndarray[Any, Any]:
    """Frames of a clip, at least the one on screen where it begins."""
    times = metadata.timestamps_s
    start, end = media.start_s or 0.0, media.end_s
    if start >= metadata.duration_s and start > 0:
        raise VideoError(
            f"{metadata.name}: the clip begins at {start:g} s, the video ends at "
            f"{metadata.duration_s:g} s"
        )
    first = max(int(np.searchsorted(times, start + 1e-6, side="right")) - 1, 0)
    last = len(times) if end is None else int(np.searchsorted(times, end - 1e-6, side="left"))
    return np.arange(first, max(last, first + 1))
