"""Conversations in LLaVA's JSON, and the sets that are published in it.

Two readings of the placeholders, both upstream's:

``prepend``   ``<image>`` and ``<video>`` are removed from all texts, each with the newline after
              it or, where none follows, the one before it, and all media are put before the first
              human text
``in_place``  each placeholder becomes the next medium, where it stands

Source: the original's `LLaVADataset` and `LLaVANextDataset`, and its older loader, which also takes
``video_id``, ``q`` and ``a``. That one keeps the first question of a video only; here all are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from longvila.data.datasets.base import Adapter, Context, conversation
from longvila.data.records import Record
from longvila.data.sample import Kind, Media, Sample

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
#: In this order, so that lines around a placeholder stay apart.
_REMOVED = tuple(
    form.format(f"<{kind}>") for kind in get_args(Kind) for form in ("{}\n", "\n{}", "{}")
)
_PLACEHOLDER = re.compile(r"<(image|video)>")
_FIELDS = (
    "id", "image", "images", "video", "videos", "video_id", "video_path", "fps", "frame_count",
    "model", "width", "height", "q", "a",
)  # fmt: skip


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if several else [value]


def media_of(record: Record, context: Context) -> list[Media]:
    """Return a record's media: images first, then videos, each in their order."""
    images = _list(record.get("image")) or _list(record.get("images"))
    videos = _list(record.get("video")) or _list(record.get("videos"))
    if not videos and record.get("video_path"):
        videos = [record["video_path"]]
    if not videos and record.get("video_id"):
        name = str(record["video_id"])
        videos = [name if "." in name.rpartition("/")[2] else f"{name}.mp4"]
    found = [context.media("image", each) for each in images]
    found += [context.media("video", each) for each in videos]
    return found


def llava_sample(record: Record, context: Context) -> Sample:
    """Make a sample of LLaVA's ``conversations``."""
    messages = record.get("conversations")
    if messages is None and "q" in record and "a" in record:
        messages = [{"from": "human", "value": record["q"]}, {"from": "gpt", "value": record["a"]}]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise context.error(
            "has no conversations, a list of {'from': 'human' or 'gpt', 'value': text}; its fields "
            f"are {sorted(record)}"
        )
    media = media_of(record, context)
    placing = context.options.get("placing", "prepend")
    if placing not in ("prepend", "in_place"):
        raise context.error(f"placing must be prepend or in_place, got {placing!r}")
    turns: list[tuple[str, Any]] = []
    waiting = list(media)
    for message in messages:
        speaker = message.get("from") or message.get("role")
        role = _ROLES.get(speaker)
        if role is None:
            raise context.error(f"has a message from {speaker!r}, not of {list(_ROLES)}")
        text = message["value"] if "value" in message else message.get("content")
        if not isinstance(text, str):
            raise context.error(f"has a message whose text is {text!r}")
        if placing == "prepend":
            for placeholder in _REMOVED:
                text = text.replace(placeholder, "")
            parts: list[Any] = [text.strip()]
            if role == "user" and waiting:
                parts = [*waiting, *parts]
                waiting = []
        else:
            parts = _in_place(text, waiting, context)
        turns.append((role, tuple(part for part in parts if part != "")))
    if waiting:
        want = "a message from human" if placing == "prepend" else "a placeholder"
        raise context.error(f"has {len(waiting)} media without {want} to stand in")
    return conversation(record.get("id", context.index), context, *turns)


def _in_place(text: str, waiting: list[Media], context: Context) -> list[Any]:
    parts: list[Any] = []
    end = 0
    for found in _PLACEHOLDER.finditer(text):
        parts.append(text[end : found.start()])
        kind = found.group(1)
        # Upstream's sets write <image> for videos too; then the next medium is meant.
        at = next((i for i, m in enumerate(waiting) if m.kind == kind), 0 if waiting else None)
        if at is None:
            raise context.error(f"has more placeholders than media in {text[:80]!r}")
        parts.append(waiting.pop(at))
        end = found.end()
    return [*parts, text[end:]]


_OPTIONS = ("placing",)
_NEEDS = ("conversations",)

ADAPTERS = (
    Adapter(
        "llava", "LLaVA's JSON, JSON lines or parquet, images or videos", (), _FIELDS + _NEEDS,
        llava_sample, True, "the original's dataset classes, as described in its loader",
        options=_OPTIONS,
    ),
    Adapter(
        "llava-align", "LLaVA-Pretrain, 558K captions for alignment", ("id", "image", *_NEEDS), (),
        llava_sample, True, "LLaVA's repository, whose training code reads these fields",
        options=_OPTIONS,
    ),
    Adapter(
        "llava-instruct", "LLaVA-Instruct and the 665K mix", ("id", *_NEEDS), ("image", "model"),
        llava_sample, True,
        "LLaVA's repository; text-only rows of the mix have no image, some have 'model'",
        options=_OPTIONS,
    ),
    Adapter(
        "sharegpt4v", "ShareGPT4V captions and its SFT mix", _NEEDS, ("id", "image", "model"),
        llava_sample, False,
        "described as LLaVA's format by its authors; the files themselves were not seen",
        options=_OPTIONS,
    ),
    Adapter(
        "sharegpt4o", "ShareGPT-4o, image and video conversations", _NEEDS,
        ("id", "image", "video", "width", "height"), llava_sample, False,
        "'video' and 'conversations' were seen in a third party's reader of "
        "video_conversations/gpt4o.jsonl; the set's own files were not",
        options=_OPTIONS,
    ),
    Adapter(
        "sharegpt-video", "ShareGPT-Video (LLaVA-Hound), 900K captions, 900K QA",
        ("video", *_NEEDS), ("id",), llava_sample, False,
        "'video' (a folder of frames) was seen in third parties' readers of "
        "chatgpt_qa_900k.jsonl; the set's own files were not",
        options=_OPTIONS,
    ),
    Adapter(
        "longvila-sft", "LongVILA's long-video SFT set, parquet", ("id", "video", *_NEEDS), (),
        llava_sample, False,
        "column names are from a third party's description; the set itself was not seen. Human "
        "texts end with a newline and <video>; videos are got from Shot2Story's sources",
        options=_OPTIONS,
    ),
    Adapter(
        "video-chatgpt", "VideoInstruct-100K", ("video_id", "q", "a"), (), llava_sample, False,
        "the three fields were seen in several third parties' readers and in the original's older "
        "loader; video_id is ActivityNet's, v_ and YouTube's id",
    ),
)  # fmt: skip
