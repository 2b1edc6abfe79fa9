"""A conversation as the model reads it, in slices, and as prompts are compared.

    ids    | system | v v v v v v | \\n | v v v v v v | \\n | question |
    keys   | ids    | frame 0's   | ids | frame 1's   | ids | ids      |    digests are negative
    blocks          [-------------)     [-------------)                     never cut inside

Rendering, expansion and tokenising are the processor's: a prompt here has the very ids that
``processor.apply_chat_template`` gives. Two prompts are the same up to the first place where their
keys differ, whatever their media were called and whoever sent them.

A slice ends where no block is cut: a frame, or a whole video if it is pooled over time, or a whole
image. It carries the pixels of its own media only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray

from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.media import MediaLoader, Medium
from longvila.model.pieces import CUT, tokenize_pieces

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Block:
    """Tokens that are read together.

    Attributes:
        start: The first placeholder.
        stop: One past the last.
        medium: Which medium.
        first: Its first frame or tile in the block.
        last: One past its last.
    """

    start: int
    stop: int
    medium: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        ids: Tokens, shape (S,).
        keys: The same with digests in place of placeholders, shape (S,).
        blocks: Where the media are, in order.
        media: The media in the order of the conversation.
    """

    ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    blocks: tuple[Block, ...]
    media: tuple[Medium, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def cut_before(self, position: int) -> int:
        """Return the last place up to a position where the prompt may be cut."""
        for block in self.blocks:
            if block.start < position < block.stop:
                return block.start
        return position

    def slice_end(self, start: int, tokens: int) -> int:
        """Return where a slice of about so many tokens ends."""
        end = min(start + tokens, len(self))
        before = self.cut_before(end)
        if before > start or before == end:
            return before
        return next(block.stop for block in self.blocks if block.start < end < block.stop)

    def read(
        self, engine: Any, start: int, stop: int, loader: MediaLoader, *, onto: Any = None
    ) -> Any:
        """Read a slice.

        Args:
            engine: The engine.
            start: Its first token.
            stop: One past its last; neither cuts a block.
            loader: Makes pixel values.
            onto: The cache of what comes before it.

        Returns:
            The cache.
        """
        options = {} if onto is None else {"onto": onto}
        return engine.prefill(self.inputs(start, stop, loader), **options)

    def inputs(self, start: int, stop: int, loader: MediaLoader) -> dict[str, Any]:
        """Return what ``Engine.prefill`` takes of a slice."""
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(self.ids[start:stop].copy())[None]}
        found: dict[str, list[tuple[torch.Tensor, int]]] = {"video": [], "image": []}
        runs: dict[int, list[int]] = {}
        for block in self.blocks:
            if block.start >= start and block.stop <= stop:
                run = runs.setdefault(block.medium, [block.first, block.last])
                run[1] = block.last
        for index, (first, last) in runs.items():
            medium = self.media[index]
            if medium.kind == "video":
                pixels = loader.pixels(medium, first, last)
            else:
                assert medium.tiles is not None
                pixels = medium.tiles[first:last]
            found[medium.kind].append((pixels, last - first))
        names = {
            "video": ("pixel_values_videos", "video_num_frames"),
            "image": ("pixel_values", "image_num_tiles"),
        }
        for kind, items in found.items():
            if items:
                pixels_name, counts_name = names[kind]
                inputs[pixels_name] = torch.cat([pixels for pixels, _ in items])
                inputs[counts_name] = torch.tensor([count for _, count in items])
        return inputs


def build_prompt(
    processor: Any, messages: Sequence[dict[str, Any]], media: Sequence[Medium]
) -> Prompt:
    """Render a conversation.

    Args:
        processor: The model's processor.
        messages: Messages with items of type ``text``, ``image`` and ``video``.
        media: The media of those items, in order.

    Returns:
        The prompt.

    Raises:
        RequestError: If the template refuses the conversation.
    """
    separator = processor.frame_separator
    texts: dict[str, list[str]] = {"image": [], "video": []}
    dynamic = processor.image_processor.image_aspect_ratio == "dynamic"
    for medium in media:
        if medium.kind == "image":
            text = processor.image_text(
                medium.count, separator=separator, tiled=dynamic and medium.tiled, cut=CUT
            )
        else:
            times = medium.timestamps_s if processor.timestamps else None
            text = processor.video_text(medium.count, separator=separator, times_s=times, cut=CUT)
        texts[medium.kind].append(text)
    # Tokenizers are changed by some of their calls.
    with _LOCK:
        try:
            rendered = processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as fault:
            raise RequestError(
                f"the model's chat template refuses the conversation: {fault}", param="messages"
            ) from fault
        if CUT in rendered:
            raise RequestError("text must not contain the NUL character", param="messages")
        for kind in ("image", "video"):
            token = getattr(processor, f"{kind}_token")
            if rendered.count(token) != len(texts[kind]):
                raise RequestError(
                    f"text must not contain the model's own placeholder {token}", param="messages"
                )
        (marked,), _ = processor.get_text_with_replacements(
            [rendered], texts["image"], texts["video"]
        )
        marks = (processor.image_token, processor.video_token)
        encoded = tokenize_pieces(
            processor.tokenizer,
            [marked],
            marks[0],
            placeholders=marks,
            # The template writes all special tokens itself.
            add_special_tokens=False,
        )
    return _index(processor, np.asarray(encoded["input_ids"][0], np.int64), tuple(media))


def _index(processor: Any, ids: NDArray[np.int64], media: tuple[Medium, ...]) -> Prompt:
    keys = ids.copy()
    blocks: list[Block] = []
    for kind in ("image", "video"):
        places = np.flatnonzero(ids == getattr(processor, f"{kind}_token_id"))
        taken = 0
        for index, medium in enumerate(media):
            if medium.kind != kind:
                continue
            pooled = kind == "video" and processor.pool_sizes
            if pooled:
                # One digest for all: any frame may be in any of the pooled rows.
                text = processor.video_text(medium.count, separator="")
                tokens = text.count(processor.video_token)
                keys[places[taken : taken + tokens]] = medium.whole
            else:
                each = processor.tokens_per_frame
                tokens = each * medium.count
                keys[places[taken : taken + tokens]] = np.repeat(medium.digests, each)
            own = places[taken : taken + tokens]
            taken += tokens
            if pooled or kind == "image":
                blocks.append(Block(int(own[0]), int(own[-1]) + 1, index, 0, medium.count))
                continue
            for frame, part in enumerate(own.reshape(medium.count, -1)):
                blocks.append(Block(int(part[0]), int(part[-1]) + 1, index, frame, frame + 1))
        assert taken == len(places), f"{taken} of {len(places)} {kind} placeholders are known"
    return Prompt(ids, keys, tuple(sorted(blocks, key=lambda block: block.start)), media)


def common_prefix(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Count the leading keys that two prompts share."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length
