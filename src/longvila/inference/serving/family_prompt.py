"""Prompts of the server for processors of transformers' own.

The processor writes the prompt from decoded frames (`longvila.inference.family_prompts`). What it
makes of a medium is one block, read whole: pixels, grids and positions in time, height and width
belong to the item. Its digest is over what the model reads, pixels and positions alike, so two
prompts share a beginning exactly where the model would compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor

from longvila.inference.family_prompts import FamilyPrompts, decoded_medium
from longvila.inference.prompts import Rendered
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.media import MediaLoader, Medium
from longvila.inference.serving.prompt import Block, Prompt, build_prompt
from longvila.model.processing_longvila import LongVILAProcessor


@dataclass(frozen=True, eq=False)
class FamilyPrompt(Prompt):
    """A conversation as another family's model reads it.

    Attributes:
        rendered: Ids, items and positions.
        family: Names the inputs.
        config: The model's configuration.
    """

    rendered: Rendered
    family: Any
    config: Any

    def read(
        self, engine: Any, start: int, stop: int, loader: MediaLoader, *, onto: Any = None
    ) -> Any:
        """Read a slice; see `Prompt.read`."""
        kept, batch = self.rendered.behind(start, stop, self.family, self.config)
        assert kept == start, f"a slice from {start} cuts a medium that begins at {kept}"
        return engine.read(batch, onto=onto)


def prompt_builder(
    engine: Any, processor: Any, loader: MediaLoader
) -> Callable[[Sequence[dict[str, Any]], Sequence[Medium]], Prompt]:
    """Return what writes prompts for a model: its messages and their media to a `Prompt`.

    Args:
        engine: The model's engine.
        processor: Its processor.
        loader: Loads media.
    """
    if isinstance(processor, LongVILAProcessor):
        return functools.partial(build_prompt, processor)
    prompts = FamilyPrompts(engine.model, processor, engine.family)
    return functools.partial(build_family_prompt, prompts, loader=loader)


def build_family_prompt(
    prompts: FamilyPrompts,
    messages: Sequence[dict[str, Any]],
    media: Sequence[Medium],
    loader: MediaLoader,
) -> FamilyPrompt:
    """Render a conversation.

    Args:
        prompts: Of the model and its processor.
        messages: Messages with items of type ``text``, ``image`` and ``video``.
        media: The media of those items, in order.
        loader: Makes digests.

    Returns:
        The prompt.

    Raises:
        RequestError: If the template or the processor refuses the conversation.
    """
    _check_texts(prompts.processor, messages)
    decoded = [
        decoded_medium(each.picture if each.video is None else each.video, each.kind)
        for each in media
    ]
    try:
        rendered = prompts.render(list(messages), decoded)
    except (TemplateError, ValueError) as fault:
        raise RequestError(
            f"the model's processor refuses the conversation: {fault}", param="messages"
        ) from fault
    ids = np.asarray(rendered.ids, np.int64)
    keys = ids.copy()
    blocks: list[Block] = []
    family, config = prompts.family, prompts.model.config
    spans = rendered.spans(family, config)
    for kind in family.media:
        token = kind.token_id(config)
        pairs = zip(rendered.items.get(kind.name, ()), spans[kind.name], strict=True)
        for number, (item, (start, stop)) in enumerate(pairs):
            own = slice(start, stop)
            positions = None if rendered.positions is None else rendered.positions[:, own]
            digest = loader.number(
                repr((kind.name, item.shape)).encode(), *_bytes(item.pixels), *_bytes(positions)
            )
            keys[own] = np.where(ids[own] == token, digest, ids[own])
            blocks.append(Block(start, stop, number, 0, 1))
    blocks.sort(key=lambda block: block.start)
    return FamilyPrompt(ids, keys, tuple(blocks), tuple(media), rendered, family, config)


def _bytes(what: Any) -> list[NDArray[np.uint8]]:
    if what is None:
        return []
    whole = not isinstance(what, Tensor)
    parts = what.stream([(0, what.num_frames)], batch=None) if whole else [what]
    return [part.contiguous().flatten().view(torch.uint8).cpu().numpy() for part in parts]


def _check_texts(processor: Any, messages: Sequence[dict[str, Any]]) -> None:
    tokens = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        for text in (part.get("text", "") for part in parts):
            for token in tokens:
                if token and token in text:
                    raise RequestError(
                        f"text must not contain the model's own placeholder {token}",
                        param="messages",
                    )
