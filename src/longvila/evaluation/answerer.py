"""A model that has watched something and is asked about it, once or a thousand times.

    answerer = Answerer(engine, processor)
    film = answerer.watch(video)                                  frames encoded and read, once
    answerer.answer(film, "What happens?", max_new_tokens=32)     greedy words
    answerer.choose(film, "Which is it?", ["a lion", "a bus"])    log-likelihood of each answer
    answerer.predict(film, "Which is it?", "a lion")              what teacher forcing would say

1. A prompt is cut where the last medium ends. Everything before it is read into a cache by
   `watch`; a question is read on a fork of it, so that it costs its own tokens.
2. `answer` is transformers' ``generate`` with greedy search, whatever the checkpoint's own
   generation settings are.
3. `choose` reads the question once, then all options side by side, one token of each a step: rows
   that share the video's keys. An option's score is the sum over its tokens and the token that
   ends a turn, so that "cat" does not profit from being the beginning of "caterpillar".
4. `predict` gives the true answer token by token and notes the likeliest token at each place: the
   original's needle score. It cannot see a model that would have said something else first.

Logits are computed at the positions of answers only. Every rank of a mesh makes the same calls.

The two halves of a prompt are tokenised apart, where the processor cuts it as well (after a
frame's separator, or at a placeholder), so the ids are those of the whole prompt.

Letters: S tokens read, T tokens of a question, V vocabulary, n options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from longvila.inference.cache import ShardedCache
from longvila.inference.sight import sampler_of
from longvila.media.video import SampledVideo
from longvila.model.pieces import CUT, tokenize_pieces
from longvila.model.processing_longvila import clock


class GeneratingEngine(Protocol):
    """The calls of an engine that evaluation uses, and its model for ids and types."""

    model: Any

    def prefill(self, inputs: Mapping[str, Any], *, onto: Any = None) -> Any:
        """Read a prompt."""
        ...

    def fork(self, cache: Any) -> Any:
        """Return a cache that begins alike."""
        ...

    def decode(self, cache: Any, ids: Tensor) -> Tensor:
        """Read further tokens; return the last one's logits."""
        ...

    def generate(self, prompt: Any, ids: Tensor | None = None, **options: Any) -> Any:
        """Generate behind a prefix."""
        ...


@dataclass(frozen=True)
class Watched:
    """What a model has read, up to where a question begins.

    Attributes:
        cache: Keys and values; None where nothing was shown.
        tokens: S, tokens in it.
        kinds: ``"video"`` or ``"image"`` of each medium.
        rest: Text between the last token read and the question's part of the prompt.
    """

    cache: ShardedCache | None
    tokens: int
    kinds: tuple[str, ...]
    rest: str = ""


class Answerer:
    """Asks a model through an engine.

    Args:
        engine: An engine of the model; every rank has its own.
        processor: The model's processor.
        frame_separator: Text after each frame; None as the processor says.
        timestamps: Whether each frame's time stands before it; None as the processor says.
    """

    def __init__(
        self,
        engine: GeneratingEngine,
        processor: Any,
        *,
        frame_separator: str | None = None,
        timestamps: bool | None = None,
    ) -> None:
        self.engine, self.processor = engine, processor
        given = frame_separator
        self.frame_separator: str = processor.frame_separator if given is None else given
        self.timestamps: bool = processor.timestamps if timestamps is None else timestamps
        self.sampler = sampler_of(processor)
        self._frames: dict[str, list[int]] = {}
        self.end_id = self._end_of_turn()

    # ---- watching

    def watch(self, media: Any) -> Watched:
        """Read media, once.

        Args:
            media: A video (a `SampledVideo`, or what the processor samples), or a list of media in
                the order they are shown: sampled videos, and PIL images. An empty list shows
                nothing, which is what a blind control wants.

        Returns:
            What is asked about; it may be asked any number of times.

        Raises:
            ContextLengthError: If it does not fit the model's context.
        """
        items = list(media) if isinstance(media, list | tuple) else [media]
        if not items:
            return Watched(None, 0, ())
        inputs: dict[str, Any] = {}
        texts: dict[str, list[str]] = {"image": [], "video": []}
        pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
        counts: dict[str, list[int]] = {"image": [], "video": []}
        kinds: list[str] = []
        images = sum(isinstance(item, Image.Image) for item in items)
        for item in items:
            kind = "image" if isinstance(item, Image.Image) else "video"
            kinds.append(kind)
            text, frames = self._image(item, images == 1) if kind == "image" else self._video(item)
            texts[kind].append(text)
            pixels[kind].append(frames)
            counts[kind].append(frames.shape[0])
        for kind, name, number in (
            ("image", "pixel_values", "image_num_tiles"),
            ("video", "pixel_values_videos", "video_num_frames"),
        ):
            if pixels[kind]:
                inputs[name], inputs[number] = torch.cat(pixels[kind]), torch.tensor(counts[kind])
        head, rest = split_medium(texts[kinds[-1]].pop(), self.processor)
        texts[kinds[-1]].append(head)
        before, _ = self._around("", kinds)
        (marked,), _ = self.processor.get_text_with_replacements(
            [before], texts["image"], texts["video"]
        )
        marks = (self.processor.image_token, self.processor.video_token)
        encoded = tokenize_pieces(
            self.processor.tokenizer, [marked], marks[0], placeholders=marks,
            add_special_tokens=False,
        )  # fmt: skip
        inputs["input_ids"] = torch.tensor(encoded["input_ids"])
        cache = self.engine.prefill(inputs)
        return Watched(cache, inputs["input_ids"].shape[1], tuple(kinds), rest)

    def head_ids(self) -> list[int]:
        """Ids of the prompt before the frames of its only video, for readers that build the rest.

        Returns:
            Ids up to the first frame.
        """
        before, _ = self._around("", ["video"])
        return self.encode(before[: -len(self.processor.video_token)])

    def frame_ids(self, time_s: float) -> list[int]:
        """Ids of one frame of a video that is not pooled: its time, placeholders, separator.

        Args:
            time_s: When it appears.
        """
        key = clock(time_s) if self.timestamps else ""
        if key not in self._frames:
            text = self.processor.video_text(
                1, separator=self.frame_separator, times_s=[time_s] if self.timestamps else None
            )
            before = self._behind(text.partition(self.processor.video_token)[0])
            placeholders = [self.processor.video_token_id] * self.processor.tokens_per_frame
            self._frames[key] = [*before, *placeholders, *self._behind(self.frame_separator)]
        return self._frames[key]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without tokens of the tokenizer's own."""
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    # ---- asking

    def answer(
        self, watched: Watched, question: str, *, max_new_tokens: int, **options: Any
    ) -> str:
        """Answer in the model's own words.

        Args:
            watched: What the question is about; not changed.
            question: The text.
            max_new_tokens: Most tokens of the answer.
            **options: Of transformers' generation configuration (``do_sample``, ``temperature``,
                ``num_beams`` ...), and the engine's ``seed``.

        Returns:
            The answer without special tokens and outer spaces.
        """
        config, extra = self._generation({**options, "max_new_tokens": max_new_tokens})
        tail = self._tail(watched, question)
        if watched.cache is None:
            out = self.engine.generate({"input_ids": tail}, generation_config=config, **extra)
        else:
            cache = self.engine.fork(watched.cache)
            out = self.engine.generate(cache, tail, generation_config=config, **extra)
        return self._text(out[0, watched.tokens + tail.shape[1] :])

    def answer_turns(
        self, messages: Sequence[Mapping[str, Any]], shown: Sequence[Any], **options: Any
    ) -> str:
        """Answer messages that show media among words: the whole prompt is read at once.

        Args:
            messages: Turns; a part that shows something has ``type`` image or video.
            shown: What these parts show, decoded, in order.
            **options: As for `answer`.

        Returns:
            The answer without special tokens and outer spaces.
        """
        media = iter(shown)
        turns = [
            {
                "role": message["role"],
                "content": [
                    dict(part)
                    if part["type"] == "text"
                    else {"type": part["type"], part["type"]: next(media)}
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        config, extra = self._generation(options)
        with torch.no_grad():
            out = self.engine.generate(dict(inputs), generation_config=config, **extra)
        return self._text(out[0, inputs["input_ids"].shape[1] :])

    def _generation(self, given: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """Options as a generation configuration, and those of the engine's own."""
        options = dict(given)
        extra = {"seed": options.pop("seed")} if "seed" in options else {}
        pad = self.processor.tokenizer.pad_token_id
        neutral = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        config = GenerationConfig(
            eos_token_id=self.stop_ids(),
            pad_token_id=self.end_id if pad is None else pad,
            **{**neutral, **options},
        )
        return config, extra

    def _text(self, ids: Tensor) -> str:
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def choose(self, watched: Watched, question: str, options: Sequence[str]) -> list[float]:
        """Score answers by their likelihood.

        Args:
            watched: What the question is about; not changed.
            question: The text.
            options: Answers.

        Returns:
            Sum of the log-probabilities of each answer's tokens and of the end of the turn.

        Raises:
            ValueError: If there is no option, or an empty one.
        """
        if not options or not all(options):
            raise ValueError(f"a choice needs options that are not empty, got {list(options)}")
        replies = [[*self.encode(option), self.end_id] for option in options]
        cache, logits = self._ask(watched, question)
        longest = max(len(reply) for reply in replies)
        # A row whose answer has ended reads its end again; nothing looks at it any more.
        padded = torch.tensor([reply + [self.end_id] * (longest - len(reply)) for reply in replies])
        real = torch.tensor([[k < len(reply) for k in range(longest)] for reply in replies])
        totals = torch.zeros(len(replies), dtype=torch.float64)
        for place in range(longest):
            scores = logits.float().log_softmax(-1).expand(len(replies), -1).cpu().double()
            step = scores.gather(1, padded[:, place : place + 1])[:, 0]
            totals += step.where(real[:, place], 0.0)
            if place + 1 < longest:
                logits = self.engine.decode(cache, padded[:, place : place + 1])
        return [float(total) for total in totals]

    def predict(self, watched: Watched, question: str, answer: str) -> str:
        """Return the likeliest token at each place of a given answer, as text.

        Args:
            watched: What the question is about; not changed.
            question: The text.
            answer: The true answer, which is read whatever was predicted.

        Raises:
            ValueError: If the answer has no token.

        Source: NVlabs/VILA ``eval_vision_niah.py``, whose exact match compares this with the
            answer; there every position of the prompt had its logits computed.
        """
        ids = self.encode(answer)
        if not ids:
            raise ValueError(f"the answer {answer!r} has no token")
        cache, logits = self._ask(watched, question)
        said = [int(logits[0].argmax())]
        for token in ids[:-1]:
            logits = self.engine.decode(cache, torch.tensor([[token]]))
            said.append(int(logits[0].argmax()))
        text: str = self.processor.tokenizer.decode(said)
        return text

    # ---- inner

    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        config = getattr(self.engine.model, "generation_config", None)
        given = getattr(config, "eos_token_id", None)
        stops = set(given) if isinstance(given, list | tuple) else {given}
        stops |= {self.processor.tokenizer.eos_token_id, self.end_id}
        return sorted(int(stop) for stop in stops if stop is not None)

    def _ask(self, watched: Watched, question: str) -> tuple[Any, Tensor]:
        """Read a question on a fork; return it with the logits of what comes next, ``(1, V)``."""
        tail = self._tail(watched, question)
        if watched.cache is None:
            cache = self.engine.prefill({"input_ids": tail})
            return cache, cache.logits
        cache = self.engine.fork(watched.cache)
        return cache, self.engine.decode(cache, tail)

    def _tail(self, watched: Watched, question: str) -> Tensor:
        """Ids ``(1, T)`` of what follows the media: the question, and the turn that answers it."""
        before, after = self._around(question, watched.kinds)
        ids = self._behind(watched.rest + after) if watched.kinds else self.encode(before)
        return torch.tensor([ids])

    def _behind(self, text: str) -> list[int]:
        """Token ids of a text behind a medium, where no tokenizer puts a space of its own."""
        return self.encode(self.processor.image_token + text)[1:]

    def _around(self, question: str, kinds: Sequence[str]) -> tuple[str, str]:
        """The prompt up to and with its last placeholder, and what follows."""
        content: list[dict[str, Any]] = [{"type": kind} for kind in kinds]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        text: str = self.processor.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        if not kinds:
            return text, ""
        token = getattr(self.processor, f"{kinds[-1]}_token")
        # The template takes placeholders out of texts, so the last one is the last medium.
        end = text.rindex(token) + len(token)
        return text[:end], text[end:]

    def _end_of_turn(self) -> int:
        """The token that the template writes after what the assistant said."""
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        options = {"tokenize": False}
        whole: str = self.processor.apply_chat_template(turns, **options)
        begun: str = self.processor.apply_chat_template(
            turns[:1], add_generation_prompt=True, **options
        )
        # The invitation to answer may lack the space that stands before an answer.
        said = whole.removeprefix(begun).lstrip(" ")
        after = self.encode(said[1:])
        if not whole.startswith(begun) or said[:1] != "A" or not after:
            raise ValueError(
                "the chat template does not write an answer behind its generation prompt with an "
                f"end after it: {whole!r}"
            )
        return after[0]

    def _video(self, video: Any) -> tuple[str, Tensor]:
        part = self.processor.video_processor
        sampled: SampledVideo = part.sample(video)
        times = sampled.timestamps_s.tolist() if self.timestamps else None
        text = self.processor.video_text(
            len(sampled.frames), separator=self.frame_separator, times_s=times, cut=CUT
        )
        return text, part.frame_pixels(sampled)

    def _image(self, image: Any, alone: bool) -> tuple[str, Tensor]:
        part = self.processor.image_processor
        out = part([image], dynamic=[alone], return_tensors="pt")
        text = self.processor.image_text(
            int(out["image_num_tiles"][0]),
            separator=self.frame_separator,
            tiled=alone and part.image_aspect_ratio == "dynamic",
            cut=CUT,
        )
        return text, out["pixel_values"]


def split_medium(text: str, processor: Any) -> tuple[str, str]:
    """Cut a medium's text where tokenising cuts it last: behind a mark, or a placeholder.

    Args:
        text: What a medium's placeholder becomes, with marks.
        processor: Whose placeholders.

    Returns:
        What can be read before the question is known, and what is tokenised with the question.
    """
    ends = [text.rfind(CUT) + len(CUT) if CUT in text else 0]
    for token in (processor.image_token, processor.video_token):
        if token in text:
            ends.append(text.rindex(token) + len(token))
    return text[: max(ends)], text[max(ends) :]
