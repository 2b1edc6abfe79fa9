"""One conversation about images and videos, on one device or on every rank of a group.

1. ``load_video`` and ``load_image`` choose frames; a video is decoded when it is read.
2. ``ask`` adds a turn, renders the whole conversation and refuses it before anything is computed if
   it does not fit the context.
3. What the cache holds already, up to the first token that differs, is kept. The rest of the prompt
   is read behind it by the engine, a chunk at a time, its frames decoded and encoded as their
   placeholders come (`longvila.inference.frames`).
4. The answer is generated from there, token by token, and handed on as text while it grows.

``watch`` reads media before there is a question. A second question about an hour of video costs
its own tokens only. Every turn works on a fork of the cache, so that a turn that fails leaves the
conversation as it was. Every step is timed apart, on a GPU with the queue drained.

Over ranks, each of them makes the same calls; ``on_text`` may be given on one alone. It holds one
sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from longvila.errors import ContextLengthError
from longvila.inference.cache import ShardedCache
from longvila.inference.decode import gather_equal
from longvila.inference.engine import Engine
from longvila.inference.family_prompts import FamilyPrompts
from longvila.inference.frames import MissingFrames, VideoFrames
from longvila.inference.prefill import ReadTimes
from longvila.inference.prompts import (
    LongVILAPrompts,
    Medium,
    Message,
    Progress,
    Prompts,
    Rendered,
    common_prefix,
    describe,
    said,
)
from longvila.inference.serving.sampling import LEAST_TEMPERATURE, stop_tokens
from longvila.inference.store import file_key, read_index

__all__ = ["Answer", "Medium", "Progress", "Session", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Where the time of an answer went, in seconds.

    Over ranks reading is timed on the one that took longest over its frames, which the others
    waited for; generation on the slowest.

    Attributes:
        decode_s: Opening the media that are new in this turn, and waiting for their frames.
        vision_s: Encoding them.
        prefill_s: Reading the prompt, without its last token, and without both of the above.
        generate_s: Generating the answer.
        prompt_tokens: Tokens of the whole prompt.
        cached_tokens: Those of them that earlier turns had left in the cache.
        new_tokens: Tokens generated.
    """

    decode_s: float
    vision_s: float
    prefill_s: float
    generate_s: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Speed of generation, the prefill apart."""
        return self.new_tokens / self.generate_s if self.generate_s > 0 else 0.0


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: The answer, without special tokens.
        token_ids: Its tokens, with them.
        complete: Whether the model ended it, and not the limit on new tokens.
        timings: Where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    complete: bool
    timings: Timings


class Session:
    """A conversation with one model.

    Args:
        model: A model for generation of a known family, or an engine that holds it; sessions of one
            model share its engine.
        processor: Its processor.
        progress: Called with (stage, done, total) while ``"decode"`` (frames of a video),
            ``"encode"`` (frames of a turn) and ``"read"`` (tokens of a turn) go on.
        background: Whether videos are decoded in a thread; None for on a GPU.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        progress: Progress | None = None,
        background: bool | None = None,
    ) -> None:
        self.engine = model if isinstance(model, Engine) else Engine(model)
        self.model, self.processor = self.engine.model, processor
        family = self.engine.family
        self.prompts: Prompts
        if family.name == "LongVILA":
            self.prompts = LongVILAPrompts(
                self.model, processor, family,
                background=background, context=self.engine.context_length,
            )  # fmt: skip
        else:
            try:
                self.prompts = FamilyPrompts(self.model, processor, family)
            except BaseException:
                if self.engine is not model:
                    self.engine.close()
                raise
        self.progress = progress
        self.clear()

    @property
    def progress(self) -> Progress | None:
        """Who is told how far things are."""
        return self.prompts.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self.prompts.progress = progress

    def close(self) -> None:
        """Give the model back its own forward; the conversation ends."""
        self.clear()
        self.engine.close()

    def clear(self) -> None:
        """Forget the conversation and its media."""
        self.messages: list[Message] = []
        self.media: list[Medium] = []
        self.watched: list[Medium] = []
        self._cache: ShardedCache | None = None
        self._cached: list[int] = []
        self._decode_s = 0.0

    # ---- media

    def load_video(
        self,
        source: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        **options: Any,
    ) -> Medium:
        """Open a video and choose its frames; the model sees it in the turn it is asked with.

        Args:
            source: Whatever `longvila.media.video.open_video` takes.
            num_frames: Frames to sample; with ``fps``, at most so many; None as the processor says.
            fps: Frames per second to sample.
            **options: Further options of sampling and opening, as of
                `longvila.media.video.read_frames`.

        Returns:
            The medium. Its frames are decoded when it is read; one that cannot be decoded is left
            out then, and named in ``missing``.

        Raises:
            VideoError: If the video cannot be opened.
        """
        start = time.perf_counter()
        medium = self.prompts.load_video(source, num_frames=num_frames, fps=fps, **options)
        self._decode_s += time.perf_counter() - start
        return medium

    def load_image(self, source: Any, *, tiled: bool = True) -> Medium:
        """Load an image; the model sees it in the turn it is asked with.

        Args:
            source: Whatever `longvila.media.image.load_image` takes.
            tiled: Whether it may be cut into tiles, where the processor is set to that. The
                original tiles only the image of a prompt that has no other medium.

        Returns:
            The medium.

        Raises:
            ImageError: If it cannot be read.
        """
        start = time.perf_counter()
        medium = self.prompts.load_image(source, tiled=tiled)
        self._decode_s += time.perf_counter() - start
        return medium

    # ---- turns

    def watch(self, media: Sequence[Medium]) -> Timings:
        """Read media before there is a question; they belong to the next turn.

        Args:
            media: In the order of the prompt.

        Returns:
            Where the time went.

        Raises:
            ContextLengthError: If they do not fit the context.
        """
        decode_s, self._decode_s = self._decode_s, 0.0
        watched = [*self.watched, *media]

        def shared() -> tuple[Rendered, int]:
            # What prompts have in common whatever is asked: everything up to the question.
            first, second = (self._render(text, watched) for text in ("A", "b"))
            return first, common_prefix(first.ids, second.ids)

        times, (_, stop), kept, prefill_s = self._read(shared, watched, new=0)
        self.watched = watched
        return Timings(*self._slowest(decode_s, times, prefill_s, 0.0), stop, kept, 0)

    def save(self, path: str | Path, *, note: Any = None, overwrite: bool = False) -> Path:
        """Keep what was watched on disk, for sessions of the same model; see `load`.

        Args:
            path: Folder to write to.
            note: Anything JSON takes, for whoever reads the index.
            overwrite: Whether a stored prompt that is there may be replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If nothing was watched, or a question was asked already.
            StoreError: If the folder holds something.
        """
        if not self.watched or self.messages or self._cache is None:
            raise ValueError("only what was watched, before any question, can be saved")
        media = [describe(medium) for medium in self.watched]
        key = {"media": [_media_key(each) for each in media]}
        extra = {"media": media, "note": note}
        return self.engine.save(self._cache, path, key, extra=extra, overwrite=overwrite)

    def load(self, path: str | Path) -> list[Medium]:
        """Watch what another session saved, by any number of ranks; the conversation is new.

        Args:
            path: Folder of the stored prompt.

        Returns:
            The media; they belong to the next turn.

        Raises:
            StoreError: If it is not whole, or was made with another model, or a file has changed;
                files that are not there any more are not compared.
        """
        self.clear()
        media = read_index(path)["extra"]["media"]
        key = {"media": [_media_key(each) for each in media]}
        self._cache = self.engine.load(path, key)
        assert self._cache.input_ids is not None
        self._cached = self._cache.input_ids[0].tolist()
        self.watched = [self.prompts.recall(each) for each in media]
        return list(self.watched)

    def ask(
        self,
        question: str,
        media: Sequence[Medium] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask a question, about new media or those of earlier turns.

        Args:
            question: The text.
            media: Media new in this turn, which come before the text, in this order, and after
                those watched.
            max_new_tokens: Most tokens of the answer.
            temperature: Of sampling; zero takes the likeliest token.
            top_p: Probability mass sampled from.
            on_text: Called with each piece of the answer as it grows.

        Returns:
            The answer; the conversation now ends with it.

        Raises:
            ContextLengthError: If the conversation and the answer do not fit the context.
        """
        decode_s, self._decode_s = self._decode_s, 0.0
        media = [*self.watched, *media]

        def whole() -> tuple[Rendered, int]:
            rendered = self._render(question, media)
            return rendered, len(rendered.ids) - 1

        before = self._cache, self._cached
        try:
            times, (rendered, _), kept, prefill_s = self._read(whole, media, new=max_new_tokens)
            ids = rendered.ids
            with self._timed() as generate:
                new = self._generate(ids, max_new_tokens, temperature, top_p, on_text)
        except BaseException:
            self._cache, self._cached = before
            raise
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages = [*self.messages, said("user", question, media), _reply(text)]
        self.media, self.watched = [*self.media, *media], []
        # The last token was never fed back.
        self._cached = [*ids, *new[:-1]]
        seconds = self._slowest(decode_s, times, prefill_s, generate[0])
        timings = Timings(*seconds, len(ids), kept, len(new))
        return Answer(text, tuple(new), bool(new) and new[-1] in self._stops(), timings)

    def ask_each(
        self,
        questions: Sequence[str],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """Ask questions that have nothing to do with one another, all at once.

        Each follows what was watched and said so far; the conversation does not go on with any.

        Args:
            questions: Their texts.
            max_new_tokens: Most tokens of an answer.
            temperature: Of sampling; zero takes the likeliest token.
            top_p: Probability mass sampled from.

        Returns:
            An answer each; their timings are those of all together.

        Raises:
            ContextLengthError: If the conversation and an answer do not fit the context.
            ValueError: If there is no question.
        """
        if not questions:
            raise ValueError("ask_each needs at least one question")
        prompts = [self._render(question, self.watched) for question in questions]
        for each in prompts:
            self._check_context(len(each.ids), max_new_tokens, [*self.media, *self.watched])
        shared = min(common_prefix(prompts[0].ids, each.ids) for each in prompts)
        # The last token is read with the question, to be predicted from.
        shared = min(shared, min(len(each.ids) for each in prompts) - 1)

        def render() -> tuple[Rendered, int]:
            return self._render(questions[0], self.watched), shared

        times, _, kept, prefill_s = self._read(render, self.watched, new=max_new_tokens)
        assert self._cache is not None
        rest = [torch.tensor(each.ids[shared:]) for each in prompts]
        with self._timed() as generate:
            found = self.engine.generate_many(
                self._cache,
                rest,
                generation_config=self._config(max_new_tokens, temperature, top_p),
            )
        seconds = self._slowest(0.0, times, prefill_s, generate[0])
        answers = []
        for each, new in zip(prompts, found, strict=True):
            ids = new.tolist()
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            timings = Timings(*seconds, len(each.ids), kept, len(ids))
            answers.append(
                Answer(text, tuple(ids), bool(ids) and ids[-1] in self._stops(), timings)
            )
        return answers

    # ---- steps

    def _render(self, question: str, media: Sequence[Medium]) -> Rendered:
        everything = [*self.media, *media]
        self._check_context(sum(each.tokens for each in everything), 0, everything)
        messages = [*self.messages, said("user", question, media)]
        return self.prompts.render(messages, everything)

    def _check_context(self, length: int, new: int, media: Sequence[Medium]) -> None:
        limit = self.engine.context_length
        if limit is None or length + new <= limit:
            return
        parts = ", ".join(f"{one.name}: {one.tokens}" for one in media) or "text only"
        asked = f" and {new} new ones were asked for" if new else ""
        raise ContextLengthError(
            f"the prompt has {length} tokens ({parts}){asked}, but the model's context is {limit}: "
            "use fewer frames or tokens, or a model whose context was extended"
        )

    def _read(
        self,
        render: Callable[[], tuple[Rendered, int]],
        media: Sequence[Medium],
        *,
        new: int,
    ) -> tuple[ReadTimes, tuple[Rendered, int], int, float]:
        """Read a prompt behind what is known of it, without frames that turn out to be missing.

        Args:
            render: Gives the prompt, and how many of its tokens to read.
            media: Media new in it.
            new: Tokens that must fit behind it.

        Returns:
            Times, what was rendered, how many tokens the cache had, and seconds.
        """
        for _ in range(3):
            rendered, stop = render()
            self._check_context(len(rendered.ids), new, [*self.media, *media])
            times = ReadTimes(self.model.device, self.progress)
            try:
                with self._timed() as spent:
                    kept = self._fill(rendered, stop, times)
            except MissingFrames as fault:
                last = fault
                self._leave_out([*self.media, *media])
                continue
            return times, (rendered, stop), kept, spent[0] - times.decode_s - times.vision_s
        raise last

    def _fill(self, rendered: Rendered, stop: int, times: ReadTimes) -> int:
        """Make the cache hold the first tokens of a prompt; return how many it held before."""
        engine, cache = self.engine, self._cache
        kept = common_prefix(self._cached[:stop], rendered.ids[:stop])
        kept, batch = rendered.behind(kept, stop, engine.family, self.model.config)
        if cache is None or kept == 0:
            cache = None
        else:
            cache = engine.fork(cache)
            if surplus := cache.get_seq_length() - kept:
                cache.crop(-surplus)
        if kept < stop:
            cache = engine.read(batch, onto=cache, times=times)
        self._cache, self._cached = cache, rendered.ids[:stop]
        return kept

    def _leave_out(self, media: Sequence[Medium]) -> None:
        """Find the frames that cannot be decoded, in all videos, and leave them out."""
        for medium in media:
            if isinstance(medium.pixels, VideoFrames) and not medium.missing:
                missing = self.engine.over_ranks(medium.pixels.find_missing)
                if missing:
                    self.prompts.leave_out(medium, missing)

    def _generate(
        self,
        ids: list[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        on_text: Callable[[str], None] | None,
    ) -> list[int]:
        assert self._cache is not None
        out = self.engine.generate(
            self._cache,
            torch.tensor([ids[-1:]]),
            generation_config=self._config(max_new_tokens, temperature, top_p),
            streamer=None if on_text is None else _Pieces(self.processor.tokenizer, on_text),
        )
        return [int(token) for token in out[0, len(ids) :].tolist()]

    def _config(self, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
        tokenizer, stops = self.processor.tokenizer, sorted(self._stops())
        sampled = temperature >= LEAST_TEMPERATURE
        sampling = {"temperature": temperature, "top_p": top_p} if sampled else {}
        # What is left out here is the model's own.
        return GenerationConfig(
            do_sample=sampled,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            **sampling,
        )

    def _stops(self) -> frozenset[int]:
        return stop_tokens(self.model, self.processor.tokenizer)

    @contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Time a block; the list gets the seconds when the block ends."""
        spent: list[float] = []
        self._drain()
        start = time.perf_counter()
        yield spent
        self._drain()
        spent.append(time.perf_counter() - start)

    def _slowest(
        self, opened_s: float, times: ReadTimes, prefill_s: float, generate_s: float
    ) -> tuple[float, float, float, float]:
        """Return the first four of `Timings` from what this rank measured.

        Comm: One all-gather of five numbers a rank.
        """
        if self.engine.num_ranks == 1:
            return opened_s + times.decode_s, times.vision_s, prefill_s, generate_s
        assert self._cache is not None
        own = [opened_s, times.decode_s, times.vision_s, prefill_s, generate_s]
        ranks = gather_equal(torch.tensor(own, device=self.model.device), self._cache)
        opened_s, *_, generate_s = ranks.amax(0).tolist()
        # All three of one rank: they add up to what reading took.
        _, decode_s, vision_s, prefill_s, _ = ranks[ranks[:, 1:3].sum(1).argmax()].tolist()
        return opened_s + decode_s, vision_s, prefill_s, generate_s

    def _drain(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class _Pieces(TextStreamer):
    """A streamer that hands whole words on instead of printing them."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        if text:
            self._emit(text)


def _media_key(described: dict[str, Any]) -> dict[str, Any]:
    """What a stored prompt depends on of one medium; a file is looked at as it is now."""
    names = ("kind", "frames", "sampling", "missing")
    return {**{name: described[name] for name in names}, "file": file_key(described["name"])}


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
