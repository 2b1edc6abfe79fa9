"""Conversations as token ids, with media that are decoded when they are read.

`LongVILAPrompts` writes a conversation as LongVILA's processor does, but from sizes alone: what a
video becomes in the text follows from the number of its frames, so that a prompt can be counted,
refused or planned before a frame is decoded. `longvila.inference.family_prompts` hands decoded
frames to the processor of another family, which says itself what they become.

Either way a conversation becomes a `Rendered`: ids, and the items of each kind of medium with the
source of their pixels. `Rendered.behind` gives what is left to read behind a prefix: items whose
placeholders the prefix holds are left out, and a cut inside an item moves to its beginning.

Letters: S tokens, F frames.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from longvila.errors import LongVILAError, VideoError
from longvila.inference.frames import (
    FrameSource,
    JoinedFrames,
    Ranges,
    TensorFrames,
    VideoFrames,
)
from longvila.media.video import choose_indices, open_video
from longvila.model.pieces import CUT, tokenize_pieces
from longvila.parallel.families import Family

Kind = Literal["image", "video"]
Progress = Callable[[str, int, int], None]
Message = dict[str, Any]


@dataclass
class Medium:
    """One image or video of a conversation.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        name: What the user called it.
        text: What its placeholder becomes in the prompt, marks of its pieces in it; empty where the
            processor says it.
        frames: Frames of a video, tiles of an image.
        tokens: Tokens that it adds to the prompt.
        timestamps_s: When each frame of a video appears.
        missing: Frames of a video that are known not to be decodable; they are left out.
        pixels: Where its pixels come from; decoded pictures for the processor of another family.
        sampling: How it was sampled, for whoever must sample it alike.
    """

    kind: Kind
    name: str
    text: str
    frames: int
    tokens: int
    timestamps_s: list[float] = field(default_factory=list)
    missing: tuple[int, ...] = ()
    pixels: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One item of a kind, as its family counts it.

    Attributes:
        shape: What describes it to the family: its frames, or a grid.
        rows: Placeholders it has in the prompt.
        pixels: Their source.
    """

    shape: Any
    rows: int
    pixels: FrameSource


@dataclass(frozen=True)
class Rendered:
    """A conversation to read.

    Attributes:
        ids: S token ids.
        items: Of each kind, in the order of the prompt.
        positions: ``(3, S)`` positions, for families that have them in 3-D.
    """

    ids: list[int]
    items: Mapping[str, Sequence[Item]]
    positions: Tensor | None = None

    def spans(self, family: Family, config: Any) -> dict[str, list[tuple[int, int]]]:
        """Return where each item of each kind begins and ends in the prompt.

        Args:
            family: Names the placeholders.
            config: The model's configuration.

        Raises:
            ValueError: If placeholders and rows differ in number.
        """
        ids = torch.tensor(self.ids)
        spans: dict[str, list[tuple[int, int]]] = {}
        for kind in family.media:
            items = self.items.get(kind.name, ())
            places = (ids == kind.token_id(config)).nonzero().flatten()
            edges = [0, *accumulate(item.rows for item in items)]
            if edges[-1] != len(places):
                raise ValueError(
                    f"the prompt has {len(places)} {kind.name} placeholders but the media give "
                    f"{edges[-1]} rows"
                )
            spans[kind.name] = [
                (int(places[a]), int(places[b - 1]) + 1) for a, b in pairwise(edges)
            ]
        return spans

    def behind(
        self, kept: int, stop: int, family: Family, config: Any
    ) -> tuple[int, dict[str, Any]]:
        """Return what is to be read of the prompt behind a prefix of it.

        Args:
            kept: Tokens of the prefix.
            stop: One past the last token to be read.
            family: Names the inputs and the placeholders.
            config: The model's configuration.

        Returns:
            The tokens of the prefix that stay, and inputs for `longvila.inference.engine.Engine`'s
            ``read``; the stop must not be inside an item.
        """
        ids = torch.tensor(self.ids)
        left: dict[str, list[Item]] = {}
        spans = self.spans(family, config)
        for start, end in sorted(span for each in spans.values() for span in each):
            if start < kept < end:
                kept = start
        batch: dict[str, Any] = {"input_ids": ids[None, kept:stop]}
        for kind in family.media:
            left[kind.name] = [
                item
                for item, (start, _) in zip(
                    self.items.get(kind.name, ()), spans[kind.name], strict=True
                )
                if kept <= start < stop
            ]
            if left[kind.name]:
                batch[kind.pixels] = JoinedFrames([item.pixels for item in left[kind.name]])
                batch[kind.counts] = torch.tensor([item.shape for item in left[kind.name]])
        if self.positions is not None:
            batch["position_ids"] = self.positions[:, None, kept:stop]
        return kept, batch


class Prompts(Protocol):
    """What a conversation needs to know of a model's processor."""

    progress: Progress | None

    def load_video(
        self, source: Any, *, num_frames: int | None, fps: float | None, **options: Any
    ) -> Medium:
        """Open a video and choose its frames."""
        ...

    def load_image(self, source: Any, *, tiled: bool) -> Medium:
        """Load an image."""
        ...

    def leave_out(self, medium: Medium, missing: Sequence[int]) -> None:
        """Leave frames out of a medium."""
        ...

    def render(self, messages: list[Message], media: Sequence[Medium]) -> Rendered:
        """Write a conversation with its media."""
        ...

    def recall(self, described: dict[str, Any]) -> Medium:
        """Return a medium, described before, whose pixels have been read."""
        ...


def describe(medium: Medium) -> dict[str, Any]:
    """Return a medium as plain data, without its pixels."""
    return {
        each.name: getattr(medium, each.name) for each in fields(medium) if each.name != "pixels"
    }


class ForgottenFrames:
    """Frames of a stored prompt, which were read and are not here any more.

    Args:
        name: Of the medium.
        num_frames: How many there were.
    """

    def __init__(self, name: str, num_frames: int) -> None:
        self.name, self.num_frames = name, num_frames

    def stream(self, ranges: Ranges, *, batch: int | None) -> Iterator[Tensor]:
        """Refuse; see `FrameSource.stream`.

        Raises:
            VideoError: Always.
        """
        raise VideoError(
            f"{self.name}: the stored prompt does not begin as this one does, and its frames are "
            "not kept; index the video again"
        )


def said(role: str, text: str, media: Sequence[Medium] = ()) -> Message:
    """Return one message, its media first."""
    content: list[dict[str, Any]] = [{"type": medium.kind} for medium in media]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


# ---- LongVILA --------------------------------------------------------------------------------


def write_turns(processor: Any, messages: list[Message]) -> str:
    """Write a conversation with the model's chat template.

    Args:
        processor: The model's.
        messages: The turns.

    Raises:
        LongVILAError: If the template is damaged, or refuses the conversation.
    """
    try:
        text: str = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, OverflowError) as fault:
        raise LongVILAError(
            f"the model's chat template cannot write this conversation: {fault}; does "
            "chat_template.jinja belong to the model, and is it whole?"
        ) from fault
    return text


class LongVILAPrompts:
    """Prompts of LongVILA's own processor; nothing is decoded for them.

    Args:
        model: The model, for its configuration, device and type.
        processor: Its processor.
        family: Its family.
        background: Whether videos are decoded in a thread; None for on a GPU.
        context: Tokens that fit the model; a video that alone has more is counted, not written.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        family: Family,
        *,
        background: bool | None = None,
        context: int | None = None,
    ) -> None:
        self.model, self.processor, self.family = model, processor, family
        self.background, self.context = background, context
        self.progress: Progress | None = None

    def load_video(
        self,
        source: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        indices: Sequence[int] | None = None,
        timestamps_s: Sequence[float] | None = None,
        overflow: Any = "spread",
        **options: Any,
    ) -> Medium:
        """Open a video and choose its frames; see `longvila.inference.session.Session.load_video`.

        Args:
            source: The video.
            num_frames: Frames to sample.
            fps: Frames per second to sample.
            indices: Frames to take instead.
            timestamps_s: Frames on screen at these seconds instead.
            overflow: As for `longvila.media.video.choose_indices`.
            **options: Of `longvila.media.video.open_video`.
        """
        part = self.processor.video_processor
        if num_frames is None and fps is None and indices is None and timestamps_s is None:
            num_frames, fps = part.num_frames, part.fps
        with open_video(source, **options) as reader:
            metadata = reader.metadata
        chosen = choose_indices(
            metadata, num_frames=num_frames, fps=fps, indices=indices,
            timestamps_s=timestamps_s, short=part.short, overflow=overflow,
        )  # fmt: skip
        if chosen.size == 0:
            raise ValueError(f"{metadata.name}: no frame was asked for")
        medium = Medium("video", metadata.name, "", 0, 0)
        medium.sampling = {"num_frames": num_frames, "fps": fps}
        medium.pixels = VideoFrames(
            source, metadata.name, chosen, self._pixels,
            size=None if part.image_aspect_ratio == "pad" else part.height_width,
            device=self.model.device, dtype=self._dtype, options=options, on_decoded=self._decoded,
            background=self.background,
        )  # fmt: skip
        medium.timestamps_s = metadata.timestamps_s[chosen].tolist()
        self._describe(medium)
        return medium

    def _decoded(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("decode", done, total)

    def leave_out(self, medium: Medium, missing: Sequence[int]) -> None:
        """Leave frames out of a video.

        Args:
            medium: Changed in place.
            missing: Numbers of frames that cannot be decoded.

        Raises:
            VideoError: If none is left.
        """
        frames: VideoFrames = medium.pixels
        kept = ~np.isin(frames.indices, list(missing))
        if not kept.any():
            raise VideoError(
                f"{medium.name}: none of the {len(set(frames.indices.tolist()))} frames asked for "
                "can be decoded"
            )
        frames.indices = frames.indices[kept]
        times = zip(medium.timestamps_s, kept.tolist(), strict=True)
        medium.timestamps_s = [time for time, keep in times if keep]
        medium.missing = tuple(sorted({*medium.missing, *missing}))
        self._describe(medium)

    def _describe(self, medium: Medium) -> None:
        medium.frames = len(medium.pixels.indices)
        rows = 0 if self.processor.pool_sizes else medium.frames * self.processor.tokens_per_frame
        if self.context is not None and rows > self.context:
            medium.tokens = medium.frames * len(self._tokenise(self._text(medium, 1)))
            return
        medium.text = self._text(medium, medium.frames)
        medium.tokens = len(self._tokenise(medium.text))

    def _text(self, medium: Medium, frames: int) -> str:
        """What the first frames of a video become in the prompt."""
        times = medium.timestamps_s[:frames] if self.processor.timestamps else None
        text: str = self.processor.video_text(
            frames, separator=self.processor.frame_separator, times_s=times, cut=CUT
        )
        return text

    def _pixels(self, frames: Any) -> Tensor:
        part = self.processor.video_processor
        pixels: Tensor = part.pixels(part.sized(frames))
        return pixels

    @property
    def _dtype(self) -> torch.dtype | None:
        """Half types are made while decoding, for half the copying."""
        dtype: torch.dtype = self.model.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else None

    def load_image(self, source: Any, *, tiled: bool = True) -> Medium:
        """Load an image; see `longvila.inference.session.Session.load_image`."""
        part = self.processor.image_processor
        out = part([source], dynamic=[tiled], return_tensors="pt")
        tiles = int(out["image_num_tiles"][0])
        text = self.processor.image_text(
            tiles,
            separator=self.processor.frame_separator,
            tiled=tiled and part.image_aspect_ratio == "dynamic",
            cut=CUT,
        )
        name = str(source) if isinstance(source, str) else f"<{type(source).__name__}>"
        return Medium(
            "image", name, text, tiles, len(self._tokenise(text)),
            pixels=TensorFrames(out["pixel_values"]),
        )  # fmt: skip

    def recall(self, described: dict[str, Any]) -> Medium:
        """Return a medium of a stored prompt; its frames are not needed any more."""
        frames = ForgottenFrames(described["name"], described["frames"])
        return Medium(**{**described, "missing": tuple(described["missing"])}, pixels=frames)

    def render(self, messages: list[Message], media: Sequence[Medium]) -> Rendered:
        """Write a conversation with its media.

        Args:
            messages: Its turns; those of the user name media by their kind.
            media: All media, in order.

        Returns:
            The prompt.
        """
        text = write_turns(self.processor, messages)
        texts: dict[Kind, list[str]] = {"image": [], "video": []}
        for medium in media:
            texts[medium.kind].append(medium.text)
        (expanded,), _ = self.processor.get_text_with_replacements(
            [text], texts["image"], texts["video"]
        )
        items: dict[str, list[Item]] = {}
        config = self.model.config
        for kind in self.family.media:
            items[kind.name] = [
                Item(each.frames, kind.units(config, [each.frames]).slots.numel(), each.pixels)
                for each in media
                if each.kind == kind.name
            ]
        return Rendered(self._tokenise(expanded), items)

    def _tokenise(self, text: str) -> list[int]:
        """Tokenise as the processor does.

        Raises:
            LongVILAError: If it is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            found = text[max(fault.start - 20, 0) : fault.end + 20]
            raise LongVILAError(f"this is no text in UTF-8: {found!a}") from fault
        marks = (self.processor.image_token, self.processor.video_token)
        encoded = tokenize_pieces(
            self.processor.tokenizer, [text], marks[0], placeholders=marks, add_special_tokens=False
        )
        ids: list[int] = encoded["input_ids"][0]
        return ids


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the leading tokens that two sequences share."""
    shared = min(len(first), len(second))
    if list(first[:shared]) == list(second[:shared]):
        return shared
    # A million tokens that mostly agree: find the first difference by halves.
    return bisect_left(range(shared), 1, key=lambda n: first[: n + 1] != second[: n + 1])
