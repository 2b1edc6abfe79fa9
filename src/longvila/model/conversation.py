"""Conversations: media items in one form, and labels from marked character ranges.

The chat template marks what the assistant says. The marks are character ranges of the prompt; they
are carried through the expansion of placeholders, and a token is a target if it starts inside one
or reaches into it: many tokenizers write a word and the space before it as one token. No text is
searched for, so an answer may contain whatever the template contains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from longvila.model.pieces import CUT


def list_prompts(text: Any) -> list[str]:
    """Return prompts as a list.

    Args:
        text: One prompt or several.

    Returns:
        At least one string.

    Raises:
        TypeError: If something in it is no string.
        ValueError: If there is no prompt, or one contains the NUL character.
    """
    prompts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
    if not isinstance(text, Iterable) or not all(isinstance(each, str) for each in prompts):
        raise TypeError(f"text must be a string or a list of strings, got {str(text)[:80]}")
    if not prompts:
        raise ValueError("text is an empty list: give at least one prompt")
    if any(CUT in prompt for prompt in prompts):
        raise ValueError("prompts must not contain the NUL character")
    return prompts


def build_labels(
    input_ids: Tensor,
    attention_mask: Tensor,
    offset_mapping: Tensor,
    spans: Sequence[Sequence[tuple[int, int]]],
) -> Tensor:
    """Mark the tokens that start inside given spans of the text, or reach into one, as targets.

    Args:
        input_ids: Token ids, shape (B, S).
        attention_mask: 0 at padding, shape (B, S).
        offset_mapping: First and last-plus-one character of each token, shape (B, S, 2).
        spans: For each sample, (start, end) character ranges of the expanded text.

    Returns:
        Labels, shape (B, S), -100 where a token is no target.
    """
    starts, ends = torch.as_tensor(offset_mapping).unbind(-1)
    target = torch.zeros_like(starts, dtype=torch.bool)
    for row, ranges in enumerate(spans):
        if not ranges:
            continue
        # By search, not range by range: a chat of thousands of answers would take minutes. Of the
        # ranges that end behind a token's start, does the first one begin before the token's end?
        ordered = sorted(ranges, key=lambda each: each[1])
        bounds = torch.tensor(ordered, dtype=starts.dtype, device=starts.device)
        first = bounds[:, 0].flip(0).cummin(0).values.flip(0).contiguous()
        found = torch.searchsorted(bounds[:, 1].contiguous(), starts[row].contiguous(), right=True)
        inside = found < len(bounds)
        last = torch.maximum(starts[row], ends[row] - 1)
        target[row] = inside & (first[found.clamp_max(len(bounds) - 1)] <= last)
    target &= torch.as_tensor(attention_mask).bool()
    return torch.as_tensor(input_ids).masked_fill(~target, -100)


def check_targets(labels: Tensor, rows: int, *, ignore_index: int = -100) -> None:
    """Refuse targets that a head has no row for, as placeholders beyond the vocabulary are.

    On a GPU, the loss would end the process or read what is not there.

    Args:
        labels: Targets of any shape.
        rows: Rows of the head.
        ignore_index: What stands where there is no target.

    Raises:
        ValueError: If there are some.
    """
    beyond = int(((labels >= rows) & (labels != ignore_index)).sum())
    if beyond:
        raise ValueError(
            f"labels ask for {beyond} ids that the model has no words for, as placeholders of "
            f"pictures and videos: set labels to {ignore_index} there (labels[labels >= {rows}] = "
            f"{ignore_index}), or let the processor make them (return_labels=True)"
        )


def move_spans(
    spans: Sequence[tuple[int, int]], moves: Sequence[dict[str, Any]]
) -> list[tuple[int, int]]:
    """Carry character ranges through the expansion of placeholders.

    Args:
        spans: Ranges of the text before.
        moves: What ``get_text_with_replacements`` reports of one text: ``span`` before and
            ``new_span`` after, in order.

    Returns:
        The same ranges of the text after. A placeholder inside a range is inside it expanded.
    """

    def move(position: int) -> int:
        shift = 0
        for step in moves:
            if step["span"][1] <= position:
                shift = step["new_span"][1] - step["span"][1]
        return position + shift

    return [(move(start), move(end)) for start, end in spans]


def normalise_conversation(conversation: Any) -> Any:
    """Copy messages with OpenAI's media items in transformers' form and bare strings as text.

    Args:
        conversation: A message, a list of messages, or a list of such lists.

    Returns:
        The same structure; the caller's objects are not changed.

    Raises:
        TypeError: If something in it is no list, message or part of one.
        ValueError: If a message has no role, a part no type or address, or there is no message.
    """
    if isinstance(conversation, dict):
        message = dict(conversation)
        if "role" not in message:
            raise ValueError(f"a message needs a role, this one has {sorted(message)}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            message["content"] = [_normalise_part(part) for part in content]
        elif content is not None and not isinstance(content, str):
            raise TypeError(f"content must be text or a list, got {type(content).__name__}")
        return message
    if isinstance(conversation, str) or not isinstance(conversation, Iterable):
        raise TypeError(
            "a conversation is a list of messages ({'role': ..., 'content': ...}), got "
            f"{type(conversation).__name__}"
        )
    items = [normalise_conversation(item) for item in conversation]
    if not items:
        raise ValueError("the conversation is empty: give at least one message")
    return items


def _normalise_part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or "type" not in part:
        raise ValueError(
            f"a content item is text or a dict with a type (text, image, video), got {part!r:.80}"
        )
    kind = part["type"]
    if kind in ("image_url", "video_url"):
        value = part.get(kind)
        url = value.get("url") if isinstance(value, dict) else value
        if url is None:
            raise ValueError(
                f"a content item of type {kind!r} needs {kind!r}, an address or "
                f"{{'url': address}}; got {part!r:.80}"
            )
        return {"type": kind.removesuffix("_url"), "url": url}
    return copy.copy(part)


def media_of(conversations: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the images and the videos of conversations, in the order of their placeholders.

    Args:
        conversations: Lists of messages.

    Returns:
        Sources of all images, and of all videos.

    Raises:
        ValueError: If an item names no source, or several.
    """
    images: list[Any] = []
    videos: list[Any] = []
    for chat in conversations:
        for message in chat:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                kind = part["type"]
                if kind not in ("image", "video"):
                    continue
                sources = [part[k] for k in (kind, "url", "path", "base64") if k in part]
                if len(sources) != 1:
                    raise ValueError(
                        f"a content item of type {kind!r} needs one of {kind!r}, 'url', 'path' and "
                        f"'base64', got {sorted(part)}"
                    )
                (images if kind == "image" else videos).append(sources[0])
    return images, videos
