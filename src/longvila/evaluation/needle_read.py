"""Read scenes that share a film: the part before the first change is read once for all of them.

    trunk    head f0 f1 f2 ... f9 | f10 ... f19 | f20 ...        grows, and is forked at each cut
    scene A  ------------------- N1 f10 ... f29                  cut 10: a needle before frame 10
    scene B  ------------------- N2 f10 ... f29
    scene C  ---------------------------------- N1 f20 ... f29   cut 20

1. A scene's *cut* is how many of its first frames are the haystack's first frames. In a causal
   model their keys and values depend on nothing that follows, so a fork of the trunk at the cut is
   exactly the scene's beginning.
2. **What comes after the first change is read again**, for every scene: each of its tokens sees the
   needle, and its position moved. That is not waste that could be saved; it is the test.
3. Scenes are read in the order of their cuts, so the trunk is read once, whatever the number of
   lengths, depths and needles. Haystacks of all lengths begin alike.
4. Over several ranks both the trunk and what follows a fork are dealt over all of them, so sharing
   saves there what it saves on one.
5. With temporal pooling a video's text is one pooled copy after another and there is no common
   beginning: every scene is read whole. So is, where prompts have times, a scene of another speed
   than the one that shares most.

The trunk is cut where the plan says and not only where open scenes need it, so that sums over its
pieces run in one order in an interrupted and in an unbroken run.

Cost of a scene of F frames with cut p: reading F - p frames; of the trunk, once: the largest cut.
Memory: the trunk's cache and that of one scene's rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from longvila.evaluation.answerer import Answerer, Watched, split_medium
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.task import Scene
from longvila.model.pieces import CUT, tokenize_pieces


def cut_of(frames: Sequence[int], num_frames: int) -> int:
    """Return how many first frames of a scene are the haystack's first frames.

    Args:
        frames: Numbers of the scene's frames.
        num_frames: Frames of the haystack.
    """
    cut = 0
    while cut < min(len(frames), num_frames) and frames[cut] == cut:
        cut += 1
    return cut


def reading_order(scenes: Iterable[Scene], num_frames: int) -> list[Scene]:
    """Return scenes in the order of their cuts; scenes with one cut stay in their order."""
    return sorted(scenes, key=lambda scene: cut_of(scene.frames, num_frames))


class SceneReader:
    """Reads scenes in the order of their cuts.

    Args:
        answerer: Knows the layout, and holds the engine, whose family is that of ``rows``.
        rows: The frames.
        scenes: Every scene of the plan, also those that are answered already.
    """

    def __init__(self, answerer: Answerer, rows: FrameRows, scenes: Sequence[Scene]) -> None:
        self.answerer, self.rows = answerer, rows
        self.engine: Any = answerer.engine
        self.pooled = bool(answerer.processor.pool_sizes)
        total = rows.book.num_frames
        self.cuts = {scene.id: cut_of(scene.frames, total) for scene in scenes}
        # One frame in common is what any sampling of a film has.
        shared = [s for s in scenes if not self.pooled and self.cuts[s.id] > 1]
        longest = max(shared, key=lambda scene: self.cuts[scene.id], default=None)
        self.step_s = 0.0 if longest is None else longest.step_s
        if answerer.timestamps:
            # Scenes of another speed have other times before their frames.
            shared = [scene for scene in shared if scene.step_s == self.step_s]
        self.shared = {scene.id for scene in shared}
        self.stops = sorted({self.cuts[scene.id] for scene in shared})
        self.frames_read = 0
        self._trunk: Any = None
        self._at = 0
        self._head = answerer.head_ids()

    def watch(self, scene: Scene) -> Watched:
        """Read a scene.

        Args:
            scene: One of the plan, not before another one read already.

        Returns:
            What questions are asked about.

        Raises:
            ValueError: If the scenes come out of order.
            ContextLengthError: If it does not fit the model's context.
        """
        if scene.id not in self.shared:
            cache = self._read(scene.frames, 0, scene.step_s)
        else:
            cut = self.cuts[scene.id]
            if self._at > cut:
                raise ValueError(
                    f"scene {scene.id} shares {cut} frames with the film, but {self._at} were read "
                    "already: read scenes in the order of their cuts (reading_order)"
                )
            self._grow(cut)
            cache = self.engine.fork(self._trunk)
            if cut < len(scene.frames):
                cache = self._read(scene.frames[cut:], cut, scene.step_s, onto=cache)
        return Watched(cache, int(cache.get_seq_length()), ("video",), self._rest(scene))

    def tokens_of(self, scene: Scene) -> int:
        """Return how many tokens a scene has before its questions."""
        if self.pooled:
            return len(self._pooled_ids(len(scene.frames), scene.step_s))
        places = range(len(scene.frames))
        frames = sum(len(self.answerer.frame_ids(place * scene.step_s)) for place in places)
        return len(self._head) + frames

    def _grow(self, cut: int) -> None:
        for stop in self.stops:
            if self._at < stop <= cut:
                frames = range(self._at, stop)
                self._trunk = self._read(frames, self._at, self.step_s, onto=self._trunk)
                self._at = stop
                # Whether or not a scene forks here in this run, the tail ends here.
                self.engine.fork(self._trunk)

    def _read(self, frames: Sequence[int], first: int, step_s: float, *, onto: Any = None) -> Any:
        """Read frames, as the ones from number ``first`` on of a video."""
        self.frames_read += len(frames)
        if self.pooled:
            ids = self._pooled_ids(len(frames), step_s)
        else:
            ids = [] if onto is not None else list(self._head)
            for place in range(first, first + len(frames)):
                ids += self.answerer.frame_ids(place * step_s)
        inputs = {"input_ids": torch.tensor([ids]), **self.rows.inputs(frames)}
        return self.engine.prefill(inputs, **({} if onto is None else {"onto": onto}))

    def _pooled_ids(self, frames: int, step_s: float) -> list[int]:
        processor = self.answerer.processor
        head, _ = split_medium(self._pooled_text(frames, step_s), processor)
        marks = (processor.image_token, processor.video_token)
        tokens = tokenize_pieces(
            processor.tokenizer, [head], marks[0], placeholders=marks, add_special_tokens=False
        )
        return [*self._head, *tokens["input_ids"][0]]

    def _pooled_text(self, frames: int, step_s: float) -> str:
        times = [place * step_s for place in range(frames)] if self.answerer.timestamps else None
        text: str = self.answerer.processor.video_text(
            frames, separator=self.answerer.frame_separator, times_s=times, cut=CUT
        )
        return text

    def _rest(self, scene: Scene) -> str:
        if not self.pooled:
            return ""
        text = self._pooled_text(len(scene.frames), scene.step_s)
        return split_medium(text, self.answerer.processor)[1]
