"""Questions of benchmarks put to a model over any number of ranks, each once, each kept.

1. All ranks tell each other their questions (`longvila.evaluation.lmms_deal`); those that an
   earlier run answered are taken from its files.
2. The rest is brought together by what it shows, and dealt to the groups of ranks. A group reads a
   video once and asks its questions on forks of that prefix (`longvila.evaluation.answerer`), while
   a thread decodes the next one; ranks that share a sequence decode a stretch each
   (`longvila.evaluation.lmms_share`). Messages that show media between words are read whole.
3. Every answer is graded and written before the next question is asked: the frames that were
   sampled, the prompt, the answer as it came, what was read out of it.
4. All ranks tell each other the answers.

A video that is missing or cannot be read fails its questions, and so does a prompt that is longer
than the model's context: their answer is empty, they count as wrong, are reported apart and tried
again by the next run. If every question fails, that is an error, and nothing is written. Nothing
else is forgiven.

Answers depend on the question, the model and the seed, not on the number of ranks that share the
work, except through the order in which floating-point sums are made.

Cost: a prefill a video, a question's own tokens a question. Memory: the frames of two videos.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from longvila.errors import ContextLengthError, VideoError
from longvila.evaluation.answerer import Answerer, Watched
from longvila.evaluation.answers import Answers, Record, digest
from longvila.evaluation.lmms_deal import by_medium, deal, gather
from longvila.evaluation.lmms_media import (
    Message,
    leads,
    media_of,
    named_messages,
    read_image,
    read_video,
    words_of,
)
from longvila.evaluation.lmms_share import Part, Ranks, can_be_shared, own_part
from longvila.evaluation.lmms_share import whole as join_parts
from longvila.evaluation.presets import Preset, Sample, find_preset
from longvila.media.image import ImageError
from longvila.media.video import SampledVideo

Progress = Callable[[int, int], None]

#: What a medium costs beside its frames, in frames: a question's prefill and its answer.
_QUESTION_COST = 2.0


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        task: lmms-eval's task.
        split: Split of its data.
        doc_id: Document in the split.
        repeat: Which of several answers to the same question.
        messages: Normal messages (`longvila.evaluation.lmms_media`).
        frames: Frames to sample from each video.
        options: Of generation: ``max_new_tokens``, ``temperature`` ...
        until: Texts that end an answer.
        benchmark: Name of its preset, if it has one.
        sample: What the document says, if it has a preset.
        fps: Frames a second to sample, ``frames`` at most.
        missing: Why nothing can be shown, if the benchmark could not find the video.
    """

    task: str
    split: str
    doc_id: int
    repeat: int
    messages: tuple[Message, ...]
    frames: int
    options: Mapping[str, Any]
    until: tuple[str, ...] = ()
    benchmark: str | None = None
    sample: Sample | None = None
    fps: float | None = None
    missing: str = ""

    def medium(self) -> Hashable:
        """Return a value that is equal for questions that show the same."""
        shown = media_of(named_messages(self.messages))
        if self.missing:
            return digest(self.missing)
        return digest([shown, self.frames, self.fps]) if shown else ""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks.

    Attributes:
        ranks: Ranks of the job.
        rank: This one.
        groups: Groups of ranks that share a sequence.
        group: This one's.
        leads: Whether it is the first of its group, which writes.
        shares: The ranks that share a sequence with this one, if there are others.
    """

    ranks: int = 1
    rank: int = 0
    groups: int = 1
    group: int = 0
    leads: bool = True
    shares: Ranks | None = None


class Asking:
    """Puts questions to one model.

    Args:
        answerer: The model, behind an engine.
        answers: Where answers are kept.
        settings: What an answer depends on beside the question: the model, its precision.
        seed: Of sampling.
        place: Where this process stands.
        progress: Called with (media done, media to do) on each group's first rank.
    """

    def __init__(
        self,
        answerer: Answerer,
        answers: Answers,
        *,
        settings: Mapping[str, Any],
        seed: int = 0,
        place: Place | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.answerer, self.answers = answerer, answers
        self.settings, self.seed = dict(settings), seed
        self.place = place or Place()
        self.progress = progress
        #: Keys of all questions of all ranks that were asked here or found, each once.
        self.asked: dict[str, None] = {}

    def key(self, question: Question) -> str:
        """Return the key of a question: equal if the answer must be."""
        return digest(
            {
                "settings": self.settings,
                "seed": self.seed if question.options.get("do_sample") else None,
                "task": [question.task, question.split, question.doc_id, question.repeat],
                "messages": named_messages(question.messages),
                "frames": [question.frames, question.fps],
                "options": dict(question.options),
                "until": list(question.until),
            }
        )

    def ask(self, questions: Sequence[Question]) -> list[Record]:
        """Answer questions; every rank of the job makes the same call with its own.

        Args:
            questions: This rank's; may be none.

        Returns:
            Their records, in order.

        Comm: Three gathers of objects over all ranks, and what the engine needs.
        """
        place = self.place
        mine = [self.key(question) for question in questions]
        union: dict[str, Question] = {}
        for part in gather(list(zip(mine, questions, strict=True)), place.ranks):
            union.update((key, question) for key, question in part if key not in union)
        self.asked.update(dict.fromkeys(union))
        found = {key: record for key in union if (record := self.answers.find(key)) is not None}
        known = gather([found], place.ranks)[0][0]
        open_keys = [key for key in union if key not in known]
        media = by_medium([union[key].medium() for key in open_keys])
        costs = {
            medium: _cost([union[open_keys[i]] for i in places]) for medium, places in media.items()
        }
        dealt = deal(costs, place.groups)[place.group]
        fresh: dict[str, Record] = {}
        parts = [[(key, union[key]) for i in media[m] for key in [open_keys[i]]] for m in dealt]
        failed: list[Record] = []
        for done, (asked, shown, error) in enumerate(self._opened(parts), start=1):
            for record in self._answer_medium(asked, shown, error):
                fresh[record["key"]] = record
                if record["error"]:
                    failed.append(record)
                elif place.leads:
                    self.answers.add(record)
            if self.progress is not None and place.leads:
                self.progress(done, len(dealt))
        everywhere = dict(known)
        for answered in gather([fresh if place.leads else {}], place.ranks):
            everywhere.update(answered[0])
        if everywhere and all(record["error"] for record in everywhere.values()):
            first = everywhere[next(iter(union))]["error"]
            raise VideoError(
                f"none of {len(everywhere)} questions can be asked; the first: {first}"
            )
        if place.leads:
            for record in failed:
                self.answers.add(record)
        return [everywhere[key] for key in mine]

    def _opened(
        self, parts: Sequence[Sequence[tuple[str, Question]]]
    ) -> Iterator[tuple[Sequence[tuple[str, Question]], list[Any], str]]:
        """Yield questions with what they show; the next is decoded while one is answered."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead: deque[Future[tuple[list[Any], str]]] = deque()
            for number, part in enumerate(parts):
                while len(ahead) < 2 and number + len(ahead) < len(parts):
                    ahead.append(pool.submit(self._open, parts[number + len(ahead)][0][1]))
                shown, error = self._joined(*ahead.popleft().result())
                yield part, shown, error

    def _joined(self, shown: list[Any], error: str) -> tuple[list[Any], str]:
        """Put stretches that several ranks decoded together; a thread must not talk to ranks."""
        whole: list[Any] = []
        for medium in shown:
            if isinstance(medium, Part):
                assert self.place.shares is not None
                joined = join_parts(medium, self.place.shares)
                if isinstance(joined, str):
                    error = error or joined
                    continue
                medium = joined
            whole.append(medium)
        return ([], error) if error else (whole, "")

    def _open(self, question: Question) -> tuple[list[Any], str]:
        """Decode what a question shows; or say why that cannot be."""
        if question.missing:
            return [], question.missing
        sampler = self.answerer.sampler
        shares, fps = self.place.shares, question.fps
        shown: list[Any] = []
        error = ""
        for part in media_of(question.messages):
            source = part["source"]
            try:
                if part["type"] == "image":
                    shown.append(read_image(source))
                elif shares is not None and can_be_shared(source):
                    shown.append(own_part(sampler, source, question.frames, shares, fps=fps))
                else:
                    shown.append(read_video(sampler, source, question.frames, fps=fps))
            except (VideoError, ImageError, FileNotFoundError) as fault:
                # The other media are read all the same: ranks wait for each other's stretches.
                error = error or f"{type(fault).__name__}: {fault}"
        return shown, error

    def _answer_medium(
        self, questions: Sequence[tuple[str, Question]], shown: list[Any], error: str
    ) -> Iterator[Record]:
        """Yield the records of questions that show the same."""
        watched: Watched | None = None
        for key, question in questions:
            text, long = "", ""
            try:
                if not error and leads(question.messages):
                    watched = watched or self.answerer.watch(shown)
                    text = self._say(key, question, watched)
                elif not error:
                    text = self._say_whole(key, question, shown)
            except ContextLengthError as fault:
                # Every rank counts the same tokens before anything is read, so all come here.
                long = f"{type(fault).__name__}: {fault}"
                if watched is None and leads(question.messages):
                    error = long
            yield self._record(key, question, shown, _cut(text, question.until), error or long)

    def _say(self, key: str, question: Question, watched: Watched) -> str:
        options, more = self._options(key, question)
        return self.answerer.answer(watched, words_of(question.messages[0]), **options, **more)

    def _say_whole(self, key: str, question: Question, shown: Sequence[Any]) -> str:
        options, more = self._options(key, question)
        return self.answerer.answer_turns(question.messages, shown, **options, **more)

    def _options(self, key: str, question: Question) -> tuple[dict[str, Any], dict[str, Any]]:
        options = {"do_sample": False, "num_beams": 1, **question.options}
        # Every question draws from its own seed: its answer does not depend on its neighbours.
        more = {"seed": (int(key[:12], 16) + self.seed) % 2**62} if options["do_sample"] else {}
        return options, more

    def _record(
        self, key: str, question: Question, shown: Sequence[Any], answer: str, error: str
    ) -> Record:
        record: Record = {
            "key": key,
            "task": question.task,
            "benchmark": question.benchmark,
            "split": question.split,
            "doc_id": question.doc_id,
            "repeat": question.repeat,
            "media": [] if error else [_seen(medium) for medium in shown],
            "sources": media_of(named_messages(question.messages)),
            "prompt": "\n".join(words_of(message) for message in question.messages),
            "answer": answer,
            "error": error or None,
        }
        if question.sample is not None and question.benchmark is not None:
            preset: Preset = find_preset(question.benchmark)
            sample = question.sample
            grade = preset.grade(sample, answer)
            record |= {
                "parsed": grade.parsed,
                "gold": sample.answer,
                "correct": False if error and grade.correct is not None else grade.correct,
                "video": sample.video,
                "duration": sample.duration,
                "category": sample.category,
                "group": sample.group,
                "letters": sample.letters,
            }
        return record


def _cost(questions: Sequence[Question]) -> float:
    frames = max(question.frames for question in questions)
    return frames + _QUESTION_COST * len(questions)


def _seen(medium: Any) -> dict[str, Any]:
    if isinstance(medium, SampledVideo):
        return {
            "kind": "video",
            "frames": [int(i) for i in medium.indices],
            "times_s": [round(float(t), 3) for t in medium.timestamps_s],
            "missing": list(medium.missing),
            "length_s": round(float(medium.metadata.duration_s), 3),
        }
    return {"kind": "image", "size": list(medium.size)}


def _cut(text: str, until: Sequence[str]) -> str:
    """Cut an answer where the first of some texts begins."""
    ends = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
