"""Asking models of other families: what differs from LongVILA, and who is to be used for which.

LongVILA's prompts are put together frame by frame, so that scenes of one film share what they begin
with and each frame is encoded once (`longvila.evaluation.needle_read`). Other families' processors
write prompts from all frames together: temporal patches join frames, positions run in three
dimensions, timestamps stand between. Here a video is therefore one piece:

1. `FamilyAnswerer` lets the processor write the prompt once a video, reads it up to where the
   question begins, and asks any number of questions on forks of that.
2. `WholeReader` shows every scene as a video of its own. Nothing is shared between scenes: a grid
   costs each scene's frames through tower and language model.

`open_answerer`, `open_reader`, `open_rows` and `layout_for` are the only places that ask which of
the two a model needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from longvila.evaluation.answerer import Answerer, Watched
from longvila.evaluation.needle_frames import FrameBook, FrameRows
from longvila.evaluation.needle_read import SceneReader
from longvila.evaluation.needle_sets import NeedleError
from longvila.evaluation.task import Scene
from longvila.inference.family_prompts import FamilyPrompts, decoded_medium
from longvila.inference.prompts import Medium, Rendered, said
from longvila.log import log_once
from longvila.media.reader import ReadStats, VideoMetadata
from longvila.media.video import SampledVideo
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.parallel.families import Family, find_family

LayoutName = Literal["needle", "model"]


@dataclass(frozen=True)
class WatchedMedia(Watched):
    """What a model of another family has read.

    Attributes:
        media: What was shown.
        text_only: Whether what follows the media can be tokenised apart from them.
    """

    media: tuple[Medium, ...] = ()
    text_only: bool = True


class FamilyAnswerer(Answerer):
    """Asks a model of another family through an engine; see the module's text.

    Args:
        engine: An engine of the model; every rank has its own.
        processor: The model's processor.
    """

    def __init__(self, engine: Any, processor: Any) -> None:
        self.engine, self.processor = engine, processor
        self.prompts = FamilyPrompts(engine.model, processor, engine.family)
        self.sampler = self.prompts.sampler
        self.frame_separator, self.timestamps = "", False
        self.end_id = self._end_of_turn()

    def watch(self, media: Any) -> Watched:
        """Read media, once; see `Answerer.watch`."""
        items = list(media) if isinstance(media, list | tuple) else [media]
        if not items:
            return Watched(None, 0, ())
        shown = self._media(items)
        kinds = tuple(medium.kind for medium in shown)
        rendered, stop, apart = self._begun(shown)
        return WatchedMedia(
            self._read(rendered, stop), stop, kinds, media=tuple(shown), text_only=apart
        )

    def tokens_of(self, media: Sequence[Any]) -> int:
        """Count the tokens that `watch` would read; the processor prepares all frames for it.

        Args:
            media: As for `watch`, at least one.
        """
        return self._begun(self._media(media))[1]

    def _begun(self, shown: list[Medium]) -> tuple[Rendered, int, bool]:
        """A prompt about media, where its question begins, and whether that is tokenised apart."""
        kinds = [medium.kind for medium in shown]
        rendered = self.prompts.render([said("user", "A", shown)], shown)
        family, config = self.prompts.family, self.prompts.model.config
        behind = self.encode(self._around("A", kinds)[1])
        stop = len(rendered.ids) - len(behind)
        special = set(self.processor.tokenizer.all_special_ids)
        special |= {kind.token_id(config) for kind in family.media}
        apart = rendered.ids[stop:] == behind and rendered.ids[stop - 1] in special
        if not apart:
            # Words of the question may join what the processor writes behind the media.
            spans = rendered.spans(family, config).values()
            stop = max(end for each in spans for _, end in each)
        return rendered, stop, apart

    def answer_turns(
        self, messages: Sequence[Mapping[str, Any]], shown: Sequence[Any], **options: Any
    ) -> str:
        """Answer messages that show media among words; see `Answerer.answer_turns`."""
        turns = []
        for message in messages:
            content = [
                dict(part) if part["type"] == "text" else {"type": part["type"]}
                for part in message["content"]
            ]
            turns.append({"role": message["role"], "content": content})
        rendered = self.prompts.render(turns, self._media(shown))
        cache = self._read(rendered, len(rendered.ids) - 1)
        config, extra = self._generation(options)
        last = torch.tensor([rendered.ids[-1:]])
        out = self.engine.generate(cache, last, generation_config=config, **extra)
        return self._text(out[0, len(rendered.ids) :])

    def _media(self, items: Sequence[Any]) -> list[Medium]:
        return [
            decoded_medium(each if isinstance(each, Image.Image) else self.sampler.sample(each))
            for each in items
        ]

    def _read(self, rendered: Rendered, stop: int) -> Any:
        family, config = self.prompts.family, self.prompts.model.config
        _, batch = rendered.behind(0, stop, family, config)
        engine: Any = self.engine
        return engine.read(batch)

    def _tail(self, watched: Watched, question: str) -> Tensor:
        if not isinstance(watched, WatchedMedia):
            return super()._tail(watched, question)
        if watched.text_only:
            return torch.tensor([self.encode(self._around(question, watched.kinds)[1])])
        shown = list(watched.media)
        rendered = self.prompts.render([said("user", question, shown)], shown)
        return torch.tensor([rendered.ids[watched.tokens :]])

    def _end_of_turn(self) -> int:
        """The first special token that the template writes after what the assistant said."""
        turns = [
            {"role": role, "content": [{"type": "text", "text": "A"}]}
            for role in ("user", "assistant")
        ]
        whole: str = self.processor.apply_chat_template(turns, tokenize=False)
        tokenizer = self.processor.tokenizer
        special = set(tokenizer.all_special_ids)
        after = self.encode(whole[whole.rindex("A") + 1 :])
        found = next((token for token in after if token in special), tokenizer.eos_token_id)
        if found is None:
            raise ValueError(
                "neither the chat template nor the tokenizer says how an answer ends: a special "
                f"token is missing behind the assistant's turn in {whole!r}"
            )
        return int(found)


class WholeReader:
    """Shows every scene as a video of its own.

    Args:
        answerer: Of the model.
        book: The frames that scenes name.
    """

    def __init__(self, answerer: FamilyAnswerer, book: FrameBook) -> None:
        self.answerer, self.book = answerer, book
        self.frames_read = 0

    def watch(self, scene: Scene) -> Watched:
        """Read a scene.

        Args:
            scene: Any of the plan.

        Returns:
            What questions are asked about.

        Raises:
            ContextLengthError: If it does not fit the model's context.
        """
        frames = np.stack([self.book.frame(number) for number in scene.frames])
        self.frames_read += len(frames)
        return self.answerer.watch([self._video(scene, frames)])

    def tokens_of(self, scene: Scene) -> int:
        """Return how many tokens a scene has before its questions; nothing is decoded for it."""
        # How many tokens frames become depends on their size and number, not on what they show.
        blank = np.broadcast_to(np.uint8(0), (len(scene.frames), *self.book.size, 3))
        return self.answerer.tokens_of([self._video(scene, blank)])

    def _video(self, scene: Scene, frames: NDArray[np.uint8]) -> SampledVideo:
        """A scene as a video that was sampled already."""
        step_s = scene.step_s or 1.0
        times = np.arange(len(frames), dtype=np.float64) * np.float64(step_s)
        height, width = frames.shape[1:3]
        metadata = VideoMetadata(
            scene.id, len(frames), 1 / step_s, width, height, len(frames) * step_s, 0, times,
            "pictures", "none",
        )  # fmt: skip
        return SampledVideo(
            frames=frames, indices=np.arange(len(frames)), timestamps_s=times, metadata=metadata,
            missing=(), stats=ReadStats(),
        )  # fmt: skip


@dataclass
class FamilyRows:
    """The frames of a film for a family that has no rows to share.

    Attributes:
        family: The model's family, as it is.
        book: The frames.
    """

    family: Family
    book: FrameBook


# ---- which of the two --------------------------------------------------------------------------


def layout_for(processor: Any, wanted: LayoutName) -> LayoutName:
    """Return the layout of prompts that a model can be asked in.

    Args:
        processor: The model's.
        wanted: ``"needle"`` for frames with nothing between them, ``"model"`` for the processor's.
    """
    if wanted == "needle" and not isinstance(processor, LongVILAProcessor):
        log_once(
            __name__, 20,
            f"{type(processor).__name__} writes prompts itself: its own layout is used",
        )  # fmt: skip
        return "model"
    return wanted


def open_answerer(engine: Any, processor: Any, layout: LayoutName = "model") -> Answerer:
    """Return an answerer that writes prompts in a layout.

    Args:
        engine: The engine.
        processor: The model's processor.
        layout: As for `layout_for`.
    """
    if not isinstance(processor, LongVILAProcessor):
        return FamilyAnswerer(engine, processor)
    if layout == "model":
        return Answerer(engine, processor)
    return Answerer(engine, processor, frame_separator="", timestamps=False)


def open_rows(
    model: Any, processor: Any, book: FrameBook, *, folder: Path | None = None
) -> FrameRows | FamilyRows:
    """Return how a film's frames reach a model.

    Args:
        model: The model.
        processor: Its processor.
        book: The frames.
        folder: Where rows of the film are kept; None for memory alone.

    Raises:
        NeedleError: If rows are to be kept that this family has not.
    """
    family = find_family(model)
    if isinstance(processor, LongVILAProcessor):
        return FrameRows(family, book, processor.video_processor.pixels, folder=folder)
    if folder is not None:
        raise NeedleError(
            f"rows of a film can be kept for LongVILA only; {family.name} reads every scene whole"
        )
    return FamilyRows(family, book)


def open_reader(
    answerer: Answerer, rows: FrameRows | FamilyRows, scenes: Sequence[Scene]
) -> SceneReader | WholeReader:
    """Return what reads scenes.

    Args:
        answerer: From `open_answerer`.
        rows: From `open_rows`.
        scenes: Every scene of the plan, in reading order.
    """
    if isinstance(answerer, FamilyAnswerer):
        return WholeReader(answerer, rows.book)
    assert isinstance(rows, FrameRows)
    return SceneReader(answerer, rows, scenes)
