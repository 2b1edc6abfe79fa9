"""One schema for whatever is trained on: a conversation with media, or a row of token ids.

Every reader ends here and everything after (mixing, packing, decoding) starts here. A sample is
light: media are named, not opened; token rows are arrays.

It does not know tokenizers, models or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

Role = Literal["system", "user", "assistant"]
Kind = Literal["image", "video"]
Style = Literal["chat", "plain"]


@dataclass(frozen=True)
class Media:
    """One image or video, named.

    Attributes:
        kind: ``image`` or ``video``.
        source: Whatever `longvila.media` opens: a path, an address, bytes, a folder of frames.
        start_s: Where a clip of a video begins, in seconds; None for its start.
        end_s: Where the clip ends; None for the video's end.
        num_frames: Frames to sample, where the sample itself says so.
        fps: Frames a second to sample, where the sample itself says so.
    """

    kind: Kind
    source: Any
    start_s: float | None = None
    end_s: float | None = None
    num_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be image or video, got {self.kind!r}")
        if self.kind == "image" and any(
            value is not None for value in (self.start_s, self.end_s, self.num_frames, self.fps)
        ):
            raise ValueError("an image has no time: start_s, end_s, num_frames and fps are None")
        start, end = self.start_s or 0.0, self.end_s
        if start < 0 or (end is not None and end <= start):
            raise ValueError(f"a clip must end after it begins, got {self.start_s} to {end} s")

    @property
    def name(self) -> str:
        """What messages and reports call it."""
        if isinstance(self.source, bytes | bytearray):
            return f"<{len(self.source)} bytes>"
        text = str(self.source)
        return text if len(text) <= 200 else text[:197] + "..."


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and media in order."""

    role: Role
    parts: tuple[str | Media, ...]

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role must be system, user or assistant, got {self.role!r}")

    @property
    def text(self) -> str:
        """The texts behind one another, without the media."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One thing to train on: ``turns``, or ``token_ids``.

    Attributes:
        id: Name within its dataset.
        dataset: Name of the dataset.
        turns: The conversation; a system turn may come first, then a user turn, and there is
            something the assistant says. An interleaved document of texts and media is one
            assistant turn alone.
        token_ids: ``(T,)`` int32 or int64 ids of text that is tokenised already; all are targets.
        document_lengths: Tokens of each document in ``token_ids``; one document if empty.
        style: ``chat``, or ``plain`` for text without a template, where its dataset is always read
            so; None for what the stage says.
    """

    id: str
    dataset: str
    turns: tuple[Turn, ...] = ()
    token_ids: np.ndarray[Any, Any] | None = field(default=None, compare=False)
    document_lengths: tuple[int, ...] = ()
    style: Style | None = None

    def __post_init__(self) -> None:
        where = f"{self.dataset}/{self.id}"
        if (self.token_ids is None) == (not self.turns):
            raise ValueError(f"{where}: a sample has either turns or token_ids")
        if self.token_ids is not None:
            self._check_tokens(where, self.token_ids)
            return
        if self.document_lengths:
            raise ValueError(f"{where}: document_lengths belong to token_ids")
        spoken = [turn.role for turn in self.turns]
        if spoken[0] == "system":
            spoken = spoken[1:]
        if "system" in spoken or (spoken != ["assistant"] and spoken[:1] != ["user"]):
            raise ValueError(
                f"{where}: after an optional system turn a user turn comes first, got {spoken}; "
                "only an interleaved document is one assistant turn alone"
            )
        if not any(turn.role == "assistant" and turn.text.strip() for turn in self.turns):
            raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")

    def _check_tokens(self, where: str, ids: np.ndarray[Any, Any]) -> None:
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{where}: token_ids must be a non-empty row of whole numbers, got "
                f"{ids.dtype} of shape {ids.shape}"
            )
        if int(ids.min()) < 0:
            raise ValueError(f"{where}: token_ids must not be negative, got {int(ids.min())}")
        lengths = self.document_lengths
        if lengths and (sum(lengths) != ids.size or min(lengths) < 1):
            raise ValueError(
                f"{where}: document_lengths must be positive and add up to {ids.size} tokens, got "
                f"{len(lengths)} that add up to {sum(lengths)}"
            )

    @property
    def interleaved(self) -> bool:
        """Whether it is a document with media inside what is learned, not a conversation."""
        return any(
            turn.role == "assistant" and any(isinstance(part, Media) for part in turn.parts)
            for turn in self.turns
        ) or [turn.role for turn in self.turns] == ["assistant"]

    @property
    def media(self) -> tuple[Media, ...]:
        """All media in order."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, Media))

    def to_chat(self) -> list[dict[str, Any]]:
        """Return the conversation as transformers' chat templates take it.

        Raises:
            ValueError: If the sample is a row of tokens.
        """
        if not self.turns:
            raise ValueError(f"{self.dataset}/{self.id} is tokenised already; it has no turns")
        return [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": part.kind, part.kind: part.source}
                    for part in turn.parts
                ],
            }
            for turn in self.turns
        ]
