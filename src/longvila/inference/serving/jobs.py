"""A request on its way: what it asks, what is known of it, and what it tells.

Events go from the threads that do the work to whoever waits for the answer. They come in order: any
number of `Stage` and `Piece`, then `Done` or `Failed`. One that its client cancelled may end with
neither.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from longvila.inference.cache import ShardedCache
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.media import Wanted
from longvila.inference.serving.prompt import Prompt
from longvila.inference.serving.sampling import Sampler, Sampling, TextStream


@dataclass(frozen=True)
class Question:
    """What a request asks.

    Attributes:
        messages: The conversation, with items of type text, image and video.
        media: The media of those items, in order.
        sampling: How tokens are chosen; no bound on them if ``max_new_tokens`` is 0.
    """

    messages: tuple[dict[str, Any], ...]
    media: tuple[Wanted, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Stage:
    """How far a request is: ``fetch`` in media, ``decode`` in frames, ``read`` in tokens."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Seen:
    """What the model saw of one medium."""

    kind: str
    frames: int
    timestamps_s: list[float]


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    media: tuple[Seen, ...]


@dataclass(frozen=True)
class Failed:
    """Why there is no answer."""

    error: RequestError


Event = Stage | Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A request under way.

    Attributes:
        number: Of arrival.
        client: Who asks.
        question: What.
        emit: Takes events, from any thread.
        state: waiting, preparing, ready, active or done.
    """

    number: int
    client: str
    question: Question
    emit: Callable[[Event], None]
    state: str = "waiting"
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)
    prompt: Prompt | None = None
    most_new: int = 0
    cache: ShardedCache | None = None
    read: int = 0
    reused: int = 0
    new: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    text: TextStream | None = None


def question_of(
    messages: list[dict[str, Any]], media: list[Wanted], sampling: Sampling
) -> Question:
    """Put a question together, saying of each image whether it stands alone."""
    images = sum(wanted.kind == "image" for wanted in media)
    media = [
        dataclasses.replace(wanted, tiled=images == 1) if wanted.kind == "image" else wanted
        for wanted in media
    ]
    return Question(tuple(messages), tuple(media), sampling)
