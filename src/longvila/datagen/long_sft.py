"""Long videos to instruction data, step by step, each step resumable.

    segments.jsonl    a line a video      where it is cut                    (the decoder)
    captions.jsonl    a line a segment    what it shows                      (the captioner)
    summaries.jsonl   a line a video      the long caption                   (the language model)
    questions.jsonl   a line a video      questions and answers              (the language model)
    kept.jsonl        a line a video      those kept, those dropped and why  (the language model)
    failures.jsonl    a line a failure    what went wrong, each time
    settings.json     what all of it was made with
    dataset.jsonl     the samples: LLaVA's format, the adapter ``longvila-sft``
    report.json       counts, what stands in the way of which video, what models were asked

1. A step does what has no result yet, in `workers` threads, and keeps each result when it is
   there. Killed and begun again, a run goes on; with callers that answer alike it ends in the same
   dataset, to the byte.
2. A failure is logged and leaves its video waiting; the others go on. The next run tries it again.
   When `give_up_after` calls in a row have failed, the endpoint is taken to be down: the run ends.
3. The dataset is written anew at the end of every run, from what is whole: a caption sample and a
   question sample of each video, in the order of the videos. What a reviewer rejected
   (`decisions.json`, `longvila.datagen.review`) is left out.

Steps follow each other over the whole set, so that a captioner and a language model need not be in
memory at once. Other settings than a folder was begun with are refused.

Source: the paper's long-video set (segments of about ten seconds, a caption each, questions written
by a language model from the captions, one caption and one question sample a video). What differs:
scene changes, strict reading, filters, review.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longvila.datagen.caption import CaptionOptions, caption_segment, compose, segment_pictures
from longvila.datagen.dataset import STEPS, Video, captions_of, part_of, write_dataset
from longvila.datagen.journal import (
    Failures,
    Journal,
    JournalError,
    Lock,
    write_whole,
)
from longvila.datagen.prompts import Prompts
from longvila.datagen.qa import (
    Dropped,
    Question,
    QuestionOptions,
    chosen_kinds,
    keep_questions,
    write_questions,
)
from longvila.datagen.segment import SegmentOptions, cut_video
from longvila.errors import LongVILAError
from longvila.inference.caller import Caller, CallError
from longvila.log import get_logger

_LOG = get_logger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LongSFTOptions:
    """All settings of a run.

    Attributes:
        segment: How videos are cut.
        caption: How segments are described.
        question: What is asked, and kept.
        conversation: ``one`` puts all questions of a video into one sample, ``each`` makes a sample
            of every question.
        workers: Calls at once.
        give_up_after: Failed calls in a row after which a run ends.
    """

    segment: SegmentOptions = field(default_factory=SegmentOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    question: QuestionOptions = field(default_factory=QuestionOptions)
    conversation: Literal["one", "each"] = "one"
    workers: int = 4
    give_up_after: int = 20

    def __post_init__(self) -> None:
        if self.workers < 1 or self.give_up_after < 1:
            raise ValueError("workers and give_up_after must be at least 1")


class EndpointDown(LongVILAError):
    """So many calls in a row failed that going on would only make a longer list."""


class LongSFT:
    """A run in its folder.

    Args:
        videos: The videos; later runs may add some.
        output: The folder.
        captioner: Sees segments and describes them.
        writer: Writes the long caption and the questions.
        judge: Of the blind filter; None for the writer.
        options: All settings.
        prompts: What models are told; None for the package's.
        progress: Called with (step, done, total) as things are done.

    Raises:
        JournalError: If the folder is in use, damaged, or was begun with other settings.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        output: Path,
        captioner: Caller,
        writer: Caller,
        *,
        judge: Caller | None = None,
        options: LongSFTOptions | None = None,
        prompts: Prompts | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.videos, self.output = list(videos), output
        self.captioner, self.writer, self.judge = captioner, writer, judge or writer
        self.options = options or LongSFTOptions()
        self.prompts, self.progress = prompts or Prompts(), progress
        chosen_kinds(self.prompts, self.options.question.kinds)
        self.journals: dict[str, Journal] = {}
        self._failed_in_a_row = 0

    # ---- the run

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, and write the dataset.

        Returns:
            The report.

        Raises:
            EndpointDown: If a model cannot be asked any more; what was done is kept.
            JournalError: If the folder is in use, damaged, or was begun with other settings.
        """
        with Lock(self.output):
            self._check_settings()
            self.journals = {name: Journal(self.output / f"{name}.jsonl") for name in STEPS}
            self.failures = Failures(self.output / "failures.jsonl")
            try:
                self._segments()
                self._captions()
                self._summaries()
                self._questions()
                self._kept()
            finally:
                # However it ends, what is whole is there to be used and looked at.
                written = write_dataset(
                    self.output,
                    self.videos,
                    self.journals,
                    self.options.conversation,
                    self.prompts.lines("ask_caption"),
                )
                report = self._report(written)
                write_whole(self.output / "report.json", json.dumps(report, indent=1) + "\n")
                for journal in self.journals.values():
                    journal.close()
                self.failures.close()
        return report

    def _check_settings(self) -> None:
        options = self.options
        made_with = {
            "segment": asdict(options.segment),
            "caption": asdict(options.caption),
            "question": asdict(options.question),
            "prompts": self.prompts.fingerprint,
            "captioner": self.captioner.name,
            "writer": self.writer.name,
            "judge": self.judge.name,
        }
        path = self.output / "settings.json"
        plain = json.loads(json.dumps(made_with))
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))["made_with"]
            changed = [key for key in plain if plain[key] != before.get(key)]
            if changed:
                raise JournalError(
                    f"{self.output} was begun with other settings of {', '.join(changed)}; its "
                    "results would not be of one kind. Use a new folder, or the settings in "
                    f"{path.name}"
                )
        listed = {"made_with": plain, "conversation": options.conversation,
                  "asks": self.prompts.lines("ask_caption"),
                  "videos": [asdict(video) for video in self.videos]}  # fmt: skip
        write_whole(path, json.dumps(listed, indent=1) + "\n")

    # ---- steps

    def _segments(self) -> None:
        journal = self.journals["segments"]

        def work(video: Video) -> None:
            cut = cut_video(video.path, self.options.segment)
            journal.add(video.id, **asdict(cut))

        self._step("segments", [(v.id, v) for v in self.videos if v.id not in journal], work)

    def _captions(self) -> None:
        """Decode in this thread, one pass a video; ask in the others."""
        cuts, journal = self.journals["segments"], self.journals["captions"]
        jobs: list[tuple[Video, Sequence[float], list[int]]] = []
        for video in self.videos:
            if video.id in cuts:
                bounds = cuts[video.id]["bounds_s"]
                missing = [n for n in range(len(bounds) - 1) if part_of(video, n) not in journal]
                if missing:
                    jobs.append((video, bounds, missing))
        options = self.options.caption
        with self._pool("captions", sum(len(missing) for *_, missing in jobs)) as submit:
            for video, bounds, missing in jobs:
                pictures = segment_pictures(
                    video.path, bounds, missing, frames=options.frames, side=options.picture_side
                )
                waiting = list(missing)
                while waiting:
                    try:
                        number, shown = next(pictures)
                    except (LongVILAError, OSError) as fault:
                        for number in waiting:
                            self._fail("captions", part_of(video, number), fault)
                        break
                    waiting.remove(number)
                    submit(part_of(video, number), self._caption, video, number, shown, bounds)

    def _caption(
        self, video: Video, number: int, pictures: tuple[Any, ...], bounds: Sequence[float]
    ) -> None:
        span = bounds[number], bounds[number + 1]
        text = caption_segment(self.captioner, self.prompts, pictures, *span, self.options.caption)
        self.journals["captions"].add(
            part_of(video, number), start_s=span[0], end_s=span[1], caption=text
        )

    def _summaries(self) -> None:
        journal = self.journals["summaries"]

        def work(item: tuple[Video, list[str], Sequence[float]]) -> None:
            video, captions, bounds = item
            text = compose(self.writer, self.prompts, captions, bounds, self.options.caption)
            journal.add(video.id, summary=text)

        self._step("summaries", self._captioned("summaries"), work)

    def _captioned(self, step: str) -> list[tuple[str, tuple[Video, list[str], Sequence[float]]]]:
        """Videos without a result of a step, all of whose segments have a caption."""
        found = []
        for video in self.videos:
            if video.id not in self.journals[step]:
                captions = captions_of(video, self.journals)
                if captions is not None:
                    bounds = self.journals["segments"][video.id]["bounds_s"]
                    found.append((video.id, (video, captions, bounds)))
        return found

    def _questions(self) -> None:
        journal, summaries = self.journals["questions"], self.journals["summaries"]

        def work(item: tuple[Video, list[str], Sequence[float]]) -> None:
            video, captions, bounds = item
            summary = summaries[video.id]["summary"]
            made = write_questions(
                self.writer, self.prompts, captions, bounds, summary, self.options.question
            )
            journal.add(video.id, questions=[each.plain() for each in made])

        ready = [item for item in self._captioned("questions") if item[0] in summaries]
        self._step("questions", ready, work)

    def _kept(self) -> None:
        journal, questions = self.journals["kept"], self.journals["questions"]

        def work(video: Video) -> None:
            made = [Question.of(each) for each in questions[video.id]["questions"]]
            kept, dropped = keep_questions(self.judge, self.prompts, made, self.options.question)
            journal.add(
                video.id,
                kept=[each.plain() for each in kept],
                dropped=[_plain_dropped(each) for each in dropped],
            )

        ready = [v for v in self.videos if v.id in questions and v.id not in journal]
        self._step("kept", [(v.id, v) for v in ready], work)

    # ---- threads and failures

    def _step(
        self, step: str, items: Sequence[tuple[str, Any]], work: Callable[[Any], None]
    ) -> None:
        with self._pool(step, len(items)) as submit:
            for name, item in items:
                submit(name, work, item)

    @contextmanager
    def _pool(self, step: str, total: int) -> Iterator[Callable[..., None]]:
        """Yield a function that has work done in the background, some ahead; wait for all of it."""
        done = 0
        faults: list[BaseException] = []
        # Pictures wait with the work, so little is taken on ahead.
        room = threading.Semaphore(2 * self.options.workers)
        lock = threading.Lock()

        def run(name: str, work: Callable[..., None], *arguments: Any) -> None:
            nonlocal done
            try:
                if not faults:
                    work(*arguments)
                    self._failed_in_a_row = 0
            except JournalError:
                raise
            except (LongVILAError, ValueError, OSError) as fault:
                with lock:
                    self._fail(step, name, fault)
                    if self._failed_in_a_row >= self.options.give_up_after:
                        faults.append(
                            EndpointDown(
                                f"{self._failed_in_a_row} calls in a row failed, the last: "
                                f"{fault}. What was done is kept; begin again when it answers"
                            )
                        )
            with lock:
                done += 1
                if self.progress is not None:
                    self.progress(step, done, total)

        def run_and_say(*arguments: Any) -> None:
            # What goes wrong in noting a failure or in saying how far it is must end the run, too,
            # and nobody may wait for room that never comes.
            try:
                run(*arguments)
            except BaseException as fault:
                faults.append(fault)
            finally:
                room.release()

        with ThreadPoolExecutor(self.options.workers, thread_name_prefix=step) as pool:

            def submit(name: str, work: Callable[..., None], *arguments: Any) -> None:
                if faults:
                    raise faults[0]
                room.acquire()
                pool.submit(run_and_say, name, work, *arguments)

            yield submit
        if faults:
            raise faults[0]

    def _fail(self, step: str, item: str, fault: Exception) -> None:
        _LOG.warning("%s of %s: %s", step, item, fault)
        self.failures.add(step, item, fault)
        if isinstance(fault, CallError):
            self._failed_in_a_row += 1

    # ---- report

    def _report(self, written: Counter[str]) -> dict[str, Any]:
        journals = self.journals
        waiting = []
        for video in self.videos:
            step, items = _stands_at(video, journals)
            if step is not None:
                for item in items:
                    last = self.failures.last.get((step, item))
                    waiting.append(
                        {
                            "video": video.id,
                            "step": step,
                            "item": item,
                            "cause": last["cause"] if last else "not tried",
                            "message": last["message"] if last else "the run ended before",
                            "attempts": self.failures.attempts.get((step, item), 0),
                        }
                    )
        dropped: Counter[str] = Counter()
        for video in self.videos:
            if video.id in journals["kept"]:
                dropped.update(each["reason"] for each in journals["kept"][video.id]["dropped"])
        callers = {id(each): each for each in (self.captioner, self.writer, self.judge)}
        return {
            "videos": len(self.videos),
            "whole": sum(1 for v in self.videos if v.id in journals["kept"]),
            "results": {name: len(journal) for name, journal in journals.items()},
            "written": dict(written),
            "dropped": dict(dropped),
            "failures": sum(self.failures.attempts.values()),
            "waiting": waiting,
            "asked": {each.name: dict(each.used) for each in callers.values()},
        }


def _stands_at(video: Video, journals: Mapping[str, Journal]) -> tuple[str | None, list[str]]:
    """The step whose result a video lacks, and of what; None when it has all."""
    for step in STEPS:
        if step == "captions":
            number = len(journals["segments"][video.id]["bounds_s"]) - 1
            parts = [part_of(video, n) for n in range(number)]
            missing = [part for part in parts if part not in journals["captions"]]
            if missing:
                return step, missing
        elif video.id not in journals[step]:
            return step, [video.id]
    return None, []


def _plain_dropped(each: Dropped) -> dict[str, Any]:
    return {**each.question.plain(), "reason": each.reason, "detail": each.detail}
