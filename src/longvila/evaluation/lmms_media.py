"""What lmms-eval's messages show: their media named, compared and read.

1. `normal_messages` brings a task's messages to one form: turns of texts and media, a medium named
   by a *source* (below). Nothing is decoded, so a million questions cost nothing yet.
2. Sources that are equal are the same medium: questions about one video can be brought together.
3. `read_video` and `read_image` decode when a question is asked.

A source is a path or an address; ``{"pictures": [...]}``, pictures that are a video's frames;
``{"path", "start_s", "end_s"}``, a part of a video; ``{"splice": {"haystack", "frames",
"pictures": [[place, path], ...]}}``, a video with pictures put in before numbered frames; or a PIL
image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longvila.errors import VideoError
from longvila.media.image import load_image
from longvila.media.sampling import ShortPolicy, uniform_indices
from longvila.media.video import SampledVideo, open_video

Message = dict[str, Any]


def normal_messages(messages: Sequence[Any], *, frames_as_video: bool = False) -> list[Message]:
    """Bring a task's messages to one form.

    Args:
        messages: As lmms-eval's ``doc_to_messages`` returns them.
        frames_as_video: Whether several pictures in a row are the frames of one video.

    Returns:
        Messages whose content is a list of ``{"type": "text", "text"}`` and
        ``{"type": "video" | "image", "source"}``.

    Raises:
        ValueError: If something is shown that is neither video nor picture.
    """
    out: list[Message] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, Any]] = []
        for item in content:
            kind = item["type"]
            if kind == "text":
                parts.append({"type": "text", "text": item["text"]})
            elif kind in ("video", "image"):
                parts.append({"type": kind, "source": _source(item)})
            else:
                raise ValueError(f"the model sees videos and pictures, but the task shows {kind}")
        out.append({"role": message["role"], "content": parts})
    return [_join_frames(message) for message in out] if frames_as_video else out


def _source(item: Mapping[str, Any]) -> Any:
    given = item.get("url", item.get(item["type"]))
    start, end = item.get("start_time"), item.get("end_time")
    if isinstance(given, Mapping) and ("video_start" in given or "video_end" in given):
        start, end = given.get("video_start"), given.get("video_end")
        given = given.get("url") or given.get("path") or given.get("video")
    if isinstance(given, Path):
        given = str(given)
    if isinstance(given, list | tuple):
        given = {"pictures": list(given)}
    if start is None and end is None:
        return given
    return {"path": given, "start_s": start, "end_s": end}


def _join_frames(message: Message) -> Message:
    """Replace two or more pictures in a row by one video of them."""
    parts: list[dict[str, Any]] = []
    run: list[Any] = []
    for part in [*message["content"], {"type": "end"}]:
        if part["type"] == "image":
            run.append(part["source"])
            continue
        if len(run) == 1:
            parts.append({"type": "image", "source": run[0]})
        elif run:
            parts.append({"type": "video", "source": {"pictures": run}})
        run = []
        if part["type"] != "end":
            parts.append(part)
    return {**message, "content": parts}


def name_of(source: Any) -> Any:
    """Return a JSON value that is equal for equal media.

    Args:
        source: A source.
    """
    if isinstance(source, Image.Image):
        pixels = hashlib.sha256(source.convert("RGB").tobytes()).hexdigest()[:32]
        return {"image": [*source.size, pixels]}
    if isinstance(source, Mapping):
        return {key: name_of(value) for key, value in source.items()}
    if isinstance(source, list | tuple):
        return [name_of(item) for item in source]
    if source is None or isinstance(source, str | int | float):
        return source
    raise TypeError(f"a medium is a path, a picture or a list of them, not {type(source).__name__}")


def named_messages(messages: Sequence[Message]) -> list[Message]:
    """Return messages as JSON, their media by name.

    Args:
        messages: Normal messages.
    """
    return [
        {
            "role": message["role"],
            "content": [
                part
                if part["type"] == "text"
                else {"type": part["type"], "source": name_of(part["source"])}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def media_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the media of messages in order."""
    return [part for message in messages for part in message["content"] if part["type"] != "text"]


def leads(messages: Sequence[Message]) -> bool:
    """Return whether one turn shows all media before its words, so that they can be read first.

    Args:
        messages: Normal messages.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        return False
    kinds = [part["type"] for part in messages[0]["content"]]
    first = kinds.index("text") if "text" in kinds else len(kinds)
    return "text" in kinds and all(kind == "text" for kind in kinds[first:])


def words_of(message: Message) -> str:
    """Return the words of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_image(source: Any) -> Image.Image:
    """Read a picture.

    Args:
        source: Its source.
    """
    return source if isinstance(source, Image.Image) else load_image(source)


def read_video(sampler: Any, source: Any, frames: int, *, fps: float | None = None) -> SampledVideo:
    """Sample and decode a video.

    Args:
        sampler: A processor's part for videos.
        source: The video.
        frames: Frames to sample; with ``fps``, at most so many.
        fps: Frames a second to sample of a whole video; of other sources ``frames`` are taken.

    Returns:
        The frames.

    Raises:
        VideoError: If it gives no frame.
    """
    sample: SampledVideo
    if isinstance(source, Mapping) and "splice" in source:
        return _splice(sampler, source["splice"])
    if isinstance(source, Mapping) and "pictures" in source:
        sample = sampler.sample(list(source["pictures"]), num_frames=frames)
        return sample
    if isinstance(source, Mapping):
        with open_video(source["path"]) as reader:
            times = reader.metadata.timestamps_s
        chosen = inside(times, source, frames, sampler.short)
        sample = sampler.sample(source["path"], indices=chosen.tolist())
        return sample
    sample = sampler.sample(source, num_frames=frames, fps=fps)
    return sample


def inside(times_s: Any, source: Mapping[str, Any], frames: int, short: ShortPolicy) -> Any:
    """Choose frames of a part of a video.

    Args:
        times_s: When each frame of the video appears.
        source: With ``path``, and ``start_s`` and ``end_s`` or None.
        frames: How many.
        short: What a shorter part gives.

    Returns:
        Frame numbers.

    Raises:
        VideoError: If no frame is in the part.
    """
    start = source["start_s"] or 0.0
    end = source["end_s"] if source["end_s"] is not None else float("inf")
    found = np.flatnonzero((times_s >= start) & (times_s <= end))
    if not len(found):
        raise VideoError(f"{source['path']}: no frame from {start:g} s to {end:g} s")
    return found[uniform_indices(len(found), frames, short=short)]


def _splice(sampler: Any, splice: Mapping[str, Any]) -> SampledVideo:
    """Put pictures into a haystack; each has the time of the frame it is put before."""
    hay: SampledVideo = sampler.sample(splice["haystack"], num_frames=int(splice["frames"]))
    height, width = hay.frames.shape[1:3]
    places, pictures = [], []
    for place, path in splice["pictures"]:
        # As deep in what could be decoded, where that is less than was asked for.
        places.append(int(place) * len(hay.frames) // int(splice["frames"]))
        pictures.append(_fit(load_image(path), height, width))
    times = [*hay.timestamps_s.tolist(), float(hay.timestamps_s[-1])]
    return replace(
        hay,
        frames=np.insert(hay.frames, places, np.stack(pictures), axis=0),
        indices=np.insert(hay.indices, places, -1),
        timestamps_s=np.insert(hay.timestamps_s, places, [times[place] for place in places]),
    )


def _fit(picture: Image.Image, height: int, width: int) -> Any:
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)
