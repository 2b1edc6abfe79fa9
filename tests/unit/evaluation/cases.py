"""Scripted engines, needles that are plain colours, and films drawn in code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longvila.evaluation.needle_frames import FrameBook
from longvila.evaluation.needle_sets import Haystack, Needle, open_haystack
from longvila.evaluation.task import Scene
from longvila.model.processing_longvila import clock

COLOURS = {
    "apple": (255, 0, 0),
    "cucumber": (0, 255, 0),
    "ink bottle": (0, 0, 255),
    "lemon": (255, 255, 0),
    "ice": (0, 255, 255),
    "magenta sock": (255, 0, 255),
    "teddy bear": (255, 128, 0),
    "bear": (128, 0, 255),
}


def needles(count: int = 8) -> list[Needle]:
    def opener(colour: tuple[int, int, int]) -> Callable[[], Image.Image]:
        return lambda: Image.new("RGBA", (24, 24), (*colour, 255))

    return [
        Needle(name.replace(" ", "-"), name, opener(colour))
        for name, colour in list(COLOURS.items())[:count]
    ]


def film(processor: Any, frames: int, **options: Any) -> Haystack:
    return open_haystack(
        "synthetic", num_frames=frames, fps=1.0, processor=processor.video_processor, **options
    )


# ---- a model that is a script -----------------------------------------------------------------


@dataclass
class ScriptCache:
    """What a scripted model has read."""

    input_ids: Tensor
    frames: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    target: list[int] | None = None
    at: int = 0

    def get_seq_length(self) -> int:
        return self.input_ids.shape[1]


#: What a script knows when it is asked: the question, what it saw, and whether it may speak freely.
Mind = Callable[[str, list[str | None], bool], str]


class ScriptedEngine:
    """The engine's calls; answers are what a function says about the frames that came in.

    It gets frame numbers, as the real engine does, looks at their pixels, and says its answer token
    by token, so all that is not the model is exercised.
    """

    def __init__(self, processor: Any, book: FrameBook, mind: Mind) -> None:
        self.processor, self.book, self.mind = processor, book, mind
        self.model = SimpleNamespace(generation_config=None)
        self.tokenizer = processor.tokenizer
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.size = len(self.tokenizer)
        self.tokens_read = self.asked = 0
        self._seen: dict[int, str | None] = {}
        self._free = False

    def prefill(self, inputs: Mapping[str, Any], *, onto: Any = None) -> ScriptCache:
        ids = inputs["input_ids"]
        self.tokens_read += ids.shape[1]
        frames = inputs.get("pixel_values_videos", torch.zeros(0)).tolist()
        placeholders = int((ids == self.processor.video_token_id).sum())
        assert placeholders == len(frames) * self.processor.tokens_per_frame
        cache = onto
        if cache is None:
            cache = ScriptCache(ids.new_zeros(1, 0))
        cache.input_ids = torch.cat([cache.input_ids, ids], 1)
        cache.frames = [*cache.frames, *frames]
        cache.logits = self._logits(cache)
        return cache

    def fork(self, cache: ScriptCache) -> ScriptCache:
        return ScriptCache(
            cache.input_ids, list(cache.frames), cache.logits, cache.target, cache.at
        )

    def decode(self, cache: ScriptCache, ids: Tensor) -> Tensor:
        before = cache.input_ids.expand(ids.shape[0], -1)
        cache.input_ids = torch.cat([before, ids], 1)
        cache.logits = self._logits(cache)
        return cache.logits

    def generate(self, prompt: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
        self._free = True
        if isinstance(prompt, ScriptCache):
            assert ids is not None
            cache = prompt
            logits = self.decode(cache, ids)
        else:
            cache = self.prefill(prompt)
            logits = cache.logits
        self._free = False
        config = options["generation_config"]
        for _ in range(config.max_new_tokens):
            best = logits.argmax(-1)[:, None]
            if int(best) in config.eos_token_id:
                return torch.cat([cache.input_ids, best], 1)
            logits = self.decode(cache, best)
        return cache.input_ids

    def look(self, number: int) -> str | None:
        """The name of what is on a frame."""
        if number not in self._seen:
            pixels = self.book.frame(number).astype(int)
            shares = {
                name: (np.abs(pixels - colour).max(-1) < 40).mean()
                for name, colour in COLOURS.items()
            }
            best = max(shares, key=lambda name: shares[name])
            self._seen[number] = best if shares[best] > 0.2 else None
        return self._seen[number]

    def _logits(self, cache: ScriptCache) -> Tensor:
        logits = torch.zeros(cache.input_ids.shape[0], self.size)
        if cache.target is None:
            self._listen(cache)
        if cache.target is not None:
            for row, reply in enumerate(cache.input_ids[:, cache.at :].tolist()):
                right = cache.target[: len(reply)] == reply and len(reply) < len(cache.target)
                logits[row, cache.target[len(reply)] if right else self.end] = 12.0
        return logits

    def _listen(self, cache: ScriptCache) -> None:
        """Think of an answer if the prompt ends with the model's turn."""
        said = self.tokenizer.decode(cache.input_ids[0, -400:])
        before, header, reply = said.rpartition("<|im_end|>\n<|im_start|>assistant\n")
        if not header or reply:
            return
        self.asked += 1
        question = re.split(r"<vila/video>|user\n", before)[-1].strip("\n")
        answer = self.mind(question, [self.look(n) for n in cache.frames], self._free)
        cache.target = [*self.tokenizer(answer)["input_ids"], self.end]
        cache.at = cache.input_ids.shape[1]


def knowing(step_s: float = 1.0) -> Mind:
    """A mind that answers from the frames."""

    def mind(question: str, seen: list[str | None], free: bool) -> str:
        shown = [(place, name) for place, name in enumerate(seen) if name is not None]
        first: dict[str, int] = {}
        for place, name in shown:
            first.setdefault(name, place)
        if match := re.fullmatch(r"What is shown at (\d+:\d\d)\?", question):
            at = [name for place, name in shown if clock(place * step_s) == match[1]]
            return at[0] if at else "nothing"
        if match := re.fullmatch(r"Which is the (\w+) picture that was put into .*", question):
            order = ("first", "second", "third", "fourth").index(match[1])
            return shown[order][1] if order < len(shown) else "nothing"
        if question.startswith("Which picture was put into"):
            return shown[0][1] if shown else "nothing"
        if match := re.fullmatch(r"When does the (.*) appear\?", question):
            return clock(first[match[1]] * step_s)
        if match := re.fullmatch(r"Is there an? (.*)\?", question):
            return "yes" if match[1] in first else "no"
        if match := re.fullmatch(r"In which order do these appear: (.*)\?", question):
            names = match[1].split(", ")
            return ", ".join(sorted(names, key=lambda name: first.get(name, 10**9)))
        if match := re.fullmatch(r"How many times does the (.*) appear\?", question):
            return str(sum(name == match[1] for _, name in shown))
        if question.startswith("Which pictures appear"):
            return ", ".join(first)
        raise AssertionError(f"no answer to {question!r}")

    return mind


def guessing(scenes: Sequence[Scene], seed: int = 0) -> Mind:
    """A mind that knows what may be answered, and has seen nothing."""
    rng = np.random.default_rng(seed)
    options: dict[tuple[str, bool], tuple[str, ...]] = {}
    for scene in scenes:
        for question in scene.questions:
            options.setdefault((question.text, question.ask == "free"), question.options)

    def mind(question: str, seen: list[str | None], free: bool) -> str:
        if question.startswith("Which pictures appear"):
            return ", ".join(rng.permutation(list(COLOURS))[:4])
        return str(rng.choice(options[(question, free)]))

    return mind
