"""Captions: the right frames of each segment, and captions joined in as many rounds as needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longvila.datagen.caption import (
    CaptionOptions,
    caption_segment,
    clock,
    compose,
    cut_words,
    segment_pictures,
    timed,
    usable,
)
from longvila.datagen.prompts import Prompts
from longvila.errors import LongVILAError
from longvila.inference.caller import Prompt, Reply
from longvila.media._frames import FramesReader
from longvila.media.sources import Limits, resolve
from longvila.media.synthetic import clip, numbered_frame, read_number

GOOD = "Someone walks through the rain."


class Scripted:
    """A caller whose answers follow from the prompt."""

    name = "scripted"

    def __init__(self, *texts: str) -> None:
        self.texts, self.prompts = list(texts), []

    def __call__(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        return Reply(self.texts.pop(0) if self.texts else GOOD)


def numbers(path: Path, bounds: list[float], wanted: Any, frames: int) -> dict[int, list[Any]]:
    found = segment_pictures(path, bounds, wanted, frames=frames, side=None)
    return {number: [read_number(p) for p in pictures] for number, pictures in found}


def test_each_segment_gets_its_own_frames(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 24, fps=2)
    bounds = [0, 5, 5.6, 12]
    assert numbers(path, bounds, range(3), 3) == {0: [0, 4, 9], 1: [10, 11], 2: [12, 18, 23]}
    assert numbers(path, bounds, [2], 1) == {2: [12]}
    # Between two frames the one on screen is shown.
    assert numbers(path, [0, 5.1, 5.3, 12], [1], 4) == {1: [10]}


def test_frames_are_made_small(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 4, fps=2, height=96, width=128)
    ((_, pictures),) = segment_pictures(path, [0, 2], [0], frames=2, side=64)
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    ((_, pictures),) = segment_pictures(path, [0, 2], [0], frames=2, side=500)
    assert pictures[0].shape == (96, 128, 3)


class Broken(FramesReader):
    """A reader that cannot decode the second half."""

    def frames(self, indices: Iterable[int], **how: Any) -> Iterator[Any]:
        return (f for f in super().frames(indices, **how) if f.index < self.metadata.num_frames / 2)


def test_a_broken_stretch_leaves_its_segments_without_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [numbered_frame(n) for n in range(12)]
    reader = Broken(resolve(pictures), frame_rate=1, limits=Limits())
    monkeypatch.setattr("longvila.datagen.caption.open_video", lambda source: reader)
    found = segment_pictures("x", [0, 4, 8, 12], range(3), frames=4, side=None)
    numbers = {number: [read_number(p) for p in shown] for number, shown in found}
    assert numbers == {0: [0, 1, 2, 3], 1: [4, 5], 2: []}


def test_times_are_written_as_clocks() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600, 36061)] == [
        "00:00", "01:00", "01:01", "1:00:00", "10:01:01",
    ]  # fmt: skip
    assert timed(["a\n b", "c"], [0, 5, 70], numbered=True) == [
        "1. [00:00 to 00:05] a b",
        "2. [00:05 to 01:10] c",
    ]


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (Reply("Too few words."), "has 3 words, fewer than 5"),
        (Reply("the man and the man and " * 8), "over and over"),
        (Reply("it goes on without any end", complete=False), "cut off before"),
        (Reply("   "), "has 0 words"),
    ],
)
def test_what_is_no_description_is_refused(reply: Reply, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        usable(reply, min_words=5)


def test_whole_sentences_of_a_cut_answer_are_kept() -> None:
    assert (
        usable(Reply("A man walks in. Then he", complete=False), min_words=3) == "A man walks in."
    )


def test_a_segment_is_asked_about_until_it_is_described() -> None:
    ask = Scripted("No.", GOOD)
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 2
    assert caption_segment(ask, Prompts(), pictures, 60, 70, CaptionOptions()) == GOOD
    assert len(ask.prompts) == 2 and len(ask.prompts[1].pictures) == 2
    assert (
        "These 2 pictures" in ask.prompts[0].text and "from 01:00 to 01:10" in ask.prompts[0].text
    )
    with pytest.raises(LongVILAError, match="none of its frames"):
        caption_segment(ask, Prompts(), [], 0, 1, CaptionOptions())
    with pytest.raises(ValueError, match="after 1 answers"):
        caption_segment(Scripted("No."), Prompts(), pictures, 0, 1, CaptionOptions(attempts=1))


def test_one_segment_is_its_own_description() -> None:
    ask = Scripted()
    assert compose(ask, Prompts(), ["Just this."], [0, 5], CaptionOptions()) == "Just this."
    assert not ask.prompts


def test_captions_are_joined_in_rounds() -> None:
    captions = [f"Part {n} shows a thing." for n in range(8)]
    bounds = [10.0 * n for n in range(9)]
    ask = Scripted()
    options = CaptionOptions(words_per_call=20, summary_words=50)
    assert compose(ask, Prompts(), captions, bounds, options) == GOOD
    kinds = ["merge" if p.text.startswith("A long video") else "compose" for p in ask.prompts]
    assert kinds == ["compose"] * 4 + ["merge"] * 3
    assert "A video of 00:20" in ask.prompts[1].text
    assert "[00:20 to 00:30] Part 2 shows" in ask.prompts[1].text
    assert "[00:40 to 01:20]" in ask.prompts[-1].text and "of 01:20" in ask.prompts[-1].text
    everything = "\n".join(p.text for p in ask.prompts[:4])
    assert all(everything.count(caption) == 1 for caption in captions)


def test_captions_that_fill_a_call_each_are_still_joined() -> None:
    ask = Scripted()
    options = CaptionOptions(words_per_call=3)
    assert compose(ask, Prompts(), [GOOD] * 5, [0, 1, 2, 3, 4, 5], options) == GOOD
    assert len(ask.prompts) == 3 + 2 + 1


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="got 0 and 3"):
        CaptionOptions(frames=0)


def test_texts_are_grouped_by_words() -> None:
    assert cut_words(["a b", "c", "d e f", "g"], 3) == [["a b", "c"], ["d e f"], ["g"]]
    assert cut_words(["a b c d"], 3) == [["a b c d"]] and cut_words([], 3) == []
