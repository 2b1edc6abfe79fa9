"""The benchmarks by name: which task of lmms-eval runs, how many frames, and what a sample means.

A `Preset` is data. It maps a name that users know (the paper's, and the original evaluator's) to a
task, gives the paper's number of frames, and says where a sample keeps its answer, its options, its
video and its length, so that every benchmark is scored by one rule: an answer that chooses nothing
is wrong. Tasks whose own scoring guesses, needs another model or sends answers to a server are
*asked* through lmms-eval and scored here alone (``official`` is False).

Frames are those of the paper: 256 for Video-MME, 128 for VNBench, 32 for the rest. The benchmarks
that the paper does not have get the 256 of its longest setting.

Letters of options follow the order in which the task's own prompt lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from longvila.errors import LongVILAError
from longvila.evaluation.parse import normal_words, parse_choice

Doc = Mapping[str, Any]
Kind = Literal["choice", "words", "open", "submission"]

#: Folder of the tasks that ship with this package, for lmms-eval's ``--include_path``.
TASKS_FOLDER = Path(__file__).parent / "tasks"

#: Edges of the tables by duration where a benchmark names no groups, in seconds.
_EDGES_S = ((0, 60), (60, 180), (180, 600), (600, 1800), (1800, 3600))


class DocumentError(LongVILAError, ValueError):
    """A question of a benchmark is not of its form."""


@dataclass(frozen=True)
class Sample:
    """What a benchmark's document says about one question.

    Attributes:
        answer: The right letter or words; None where the benchmark keeps it to itself.
        letters: Letters to choose from; empty where the answer is free.
        options: The options' texts in the order of the letters.
        video: The video, which is what questions share.
        duration: Group of lengths that the video belongs to, if known.
        category: Kind of question, if the benchmark has kinds; a question may be of several.
        group: Questions that count as one by the benchmark's rule, if it has such a rule.
    """

    answer: str | None
    letters: str = ""
    options: tuple[str, ...] = ()
    video: str = ""
    duration: str | None = None
    category: str | tuple[str, ...] | None = None
    group: str | None = None


@dataclass(frozen=True)
class Grade:
    """What an answer is worth.

    Attributes:
        parsed: The letter or the words that were read out of it; None if there are none.
        correct: Whether it is right; None where that is not for this program to say.
    """

    parsed: str | None
    correct: bool | None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One benchmark.

    Attributes:
        name: Name on the command line.
        task: lmms-eval's task, or ours.
        frames: Frames sampled from each video.
        sample: Reads a document.
        kind: What an answer is: a letter, exact words, free text for a judge, or an entry of a
            file to hand in.
        aliases: Other names, the original evaluator's among them.
        new_tokens: Longest answer where the task itself does not say.
        official: Whether lmms-eval's own metric is computed too.
        ours: Whether the task ships with this package.
        frames_as_video: Whether several pictures of a question are frames of one video.
        data: Patterns of the file of questions in a folder given by the user; the first that is
            there counts. Empty where lmms-eval alone knows where data are.
        axes: What a judge grades answers by, if one must.
        note: What a user should know.
    """

    name: str
    task: str
    frames: int
    sample: Callable[[Doc], Sample]
    kind: Kind = "choice"
    aliases: tuple[str, ...] = ()
    new_tokens: int | None = None
    official: bool = True
    ours: bool = False
    frames_as_video: bool = False
    data: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    note: str = field(default="", compare=False)

    def read(self, doc: Doc) -> Sample:
        """Read a document.

        Args:
            doc: The benchmark's.

        Raises:
            DocumentError: If it is not of the benchmark's form.
        """
        try:
            return self.sample(doc)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as fault:
            raise DocumentError(
                f"{self.name}: a question is not of the benchmark's form "
                f"({type(fault).__name__}: {fault}): {str(dict(doc))[:300]}"
            ) from fault

    def grade(self, sample: Sample, answer: str) -> Grade:
        """Read and judge an answer.

        Args:
            sample: The question.
            answer: What the model wrote.

        Returns:
            The grade; an answer from which nothing can be read is wrong, if it can be wrong.
        """
        if sample.letters:
            parsed = parse_choice(answer, sample.letters, sample.options)
        else:
            parsed = normal_words(answer) or None
        if sample.answer is None or self.kind == "open":
            return Grade(parsed, None)
        right = sample.answer if sample.letters else normal_words(sample.answer)
        return Grade(parsed, parsed == right)


def duration_group(seconds: float) -> str:
    """Return the group of a length, where a benchmark has none of its own.

    Args:
        seconds: Length of the video.
    """
    for low, high in _EDGES_S:
        if seconds < high:
            return f"{low}-{high} s"
    return f"{_EDGES_S[-1][1]} s and more"


def _length(doc: Doc, *keys: str) -> str | None:
    for key in keys:
        value = doc.get(key)
        if isinstance(value, int | float) and value > 0:
            return duration_group(float(value))
        if isinstance(value, str) and value:
            return value
    return None


def _choices(
    options: Sequence[Any],
    *,
    index: int | None = None,
    letter: str | None = None,
    video: str,
    **rest: Any,
) -> Sample:
    texts = tuple(str(option) for option in options)
    letters = ascii_uppercase[: len(texts)]
    answer = letter if index is None else letters[index]
    if answer is not None and answer not in letters:
        raise ValueError(f"{video}: the answer {answer!r} is none of the letters {letters}")
    return Sample(answer, letters, texts, str(video), **rest)


def _videomme(doc: Doc) -> Sample:
    return _choices(
        doc["options"],
        letter=doc["answer"],
        video=doc["videoID"],
        duration=doc["duration"],
        category=doc.get("task_type"),
    )


def _vnbench(doc: Doc) -> Sample:
    kind = str(doc.get("type") or "")
    return _choices(
        doc["options"],
        letter=doc["gt_option"],
        video=doc["video"],
        duration=_length(doc, "length"),
        category=kind or None,
        # Four rotations of the options of one question about one video.
        group=f"{doc['video']}\n{doc['question']}",
    )


def _eventbench(doc: Doc) -> Sample:
    candidates = list(doc["candidates"])
    return _choices(
        candidates,
        index=candidates.index(doc["answer"]),
        video=doc["video"],
        duration=_length(doc, "duration"),
        category=doc.get("task") or doc.get("type"),
    )


def _needle(doc: Doc) -> Sample:
    video = f"{doc['haystack']} {doc['needle']} {doc['frames']} {doc['depth']}"
    frames, depth = f"{int(doc['frames'])} frames", f"depth {doc['depth']:g}"
    options = doc.get("options") or ()
    if options:
        return _choices(options, letter=doc["answer"], video=video, duration=frames, category=depth)
    return Sample(str(doc["answer"]), video=video, duration=frames, category=depth)


def _activitynetqa(doc: Doc) -> Sample:
    return Sample(str(doc["answer"]), video=str(doc["video_name"]), category=_text(doc.get("type")))


def _videochatgpt(doc: Doc) -> Sample:
    # The consistency part asks the same twice; what pairs the two is video and answer.
    paired = "question_1" in doc
    return Sample(
        str(doc["answer"]),
        video=str(doc["video_name"]),
        group=f"{doc['video_name']}\n{doc['answer']}" if paired else None,
    )


def _egoschema(doc: Doc) -> Sample:
    raw = str(doc.get("answer") if doc.get("answer") is not None else "")
    index = int(raw) if raw.isdecimal() else None
    return _choices(doc["option"], index=index, video=doc["video_idx"])


def _egoschema_test(doc: Doc) -> Sample:
    return _choices(doc["option"], video=doc["video_idx"])


def _longvideobench(doc: Doc) -> Sample:
    options = [doc.get(f"option{i}") for i in range(5)]
    options = [option for option in options if option not in (None, "N/A")]
    return _choices(
        options,
        index=int(doc["correct_choice"]),
        video=doc["video_path"],
        duration=f"up to {doc['duration_group']} s" if doc.get("duration_group") else None,
        category=doc.get("question_category"),
    )


def _perceptiontest(doc: Doc) -> Sample:
    return _choices(
        doc["options"],
        index=int(doc["answer_id"]),
        video=doc["video_name"],
        category=_text(doc.get("area")),
    )


def _mvbench(doc: Doc) -> Sample:
    candidates = list(doc["candidates"])
    return _choices(candidates, index=candidates.index(doc["answer"]), video=doc["video"])


def _nextqa(doc: Doc) -> Sample:
    return _choices(
        [doc[f"a{i}"] for i in range(5)],
        index=int(doc["answer"]),
        video=str(doc["video"]),
        category=_text(doc.get("type")),
    )


def _mlvu(doc: Doc) -> Sample:
    # Its questions carry their options as text; how many there are, nobody counts.
    return Sample(
        str(doc["answer"]),
        "ABCD",
        video=str(doc["video_name"]),
        duration=_length(doc, "duration"),
        category=_text(doc.get("task_type")),
    )


def _lvbench(doc: Doc) -> Sample:
    options = doc.get("options") or ("", "", "", "")
    kinds = doc.get("question_type") or doc.get("type")
    return _choices(
        options,
        letter=doc["answer"],
        video=doc["video_path"],
        category=tuple(map(str, kinds)) if isinstance(kinds, list) else _text(kinds),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="videomme",
        task="longvila_videomme",
        frames=256,
        sample=_videomme,
        aliases=("lmms-videomme-256",),
        ours=True,
        data=("**/*.parquet", "*.json", "*.jsonl"),
        note="without subtitles",
    ),
    Preset(
        name="videomme_w_subtitle",
        task="longvila_videomme_w_subtitle",
        frames=256,
        sample=_videomme,
        aliases=("lmms-videomme_w_subtitle-256",),
        ours=True,
        data=("**/*.parquet", "*.json", "*.jsonl"),
        note="subtitles that are on screen with a sampled frame",
    ),
    Preset(
        name="vnbench",
        task="longvila_vnbench",
        frames=128,
        sample=_vnbench,
        aliases=("vnbench_val", "vnbench_val-128"),
        ours=True,
        data=("VNBench*4try*.json", "*.json", "*.jsonl"),
        note="needs --data vnbench=FOLDER; also by its rule of four rotations",
    ),
    Preset(
        name="activitynetqa",
        task="activitynetqa",
        frames=32,
        sample=_activitynetqa,
        kind="open",
        aliases=("lmms-activitynetqa", "lmms-activitynetqa-32"),
        official=False,
        axes=("match",),
        note="scored by longvila judge",
    ),
    *(
        Preset(
            name=f"videochatgpt_{part}",
            task=f"videochatgpt_{part}",
            frames=32,
            sample=_videochatgpt,
            kind="open",
            official=False,
            axes=axes,
            note="scored by longvila judge",
        )
        for part, axes in (
            ("gen", ("correctness", "detail", "context")),
            ("temporal", ("temporal",)),
            ("consistency", ("consistency",)),
        )
    ),
    Preset(
        name="egoschema_test",
        task="egoschema",
        frames=32,
        sample=_egoschema_test,
        kind="submission",
        aliases=("egoschema_test-32", "egoschema-test"),
        official=False,
        note="writes egoschema_test_submission.csv",
    ),
    Preset(
        name="egoschema",
        task="egoschema_subset",
        frames=32,
        sample=_egoschema,
        aliases=("egoschema_val", "egoschema_val-32"),
        note="the questions with public answers",
    ),
    Preset(
        name="eventbench",
        task="longvila_eventbench",
        frames=32,
        sample=_eventbench,
        aliases=("eventbench_val", "eventbench_val-32"),
        ours=True,
        data=("**/*.parquet", "*.json", "*.jsonl"),
    ),
    Preset(
        name="longvideobench_val_v",
        task="longvideobench_val_v",
        frames=32,
        sample=_longvideobench,
        aliases=("lmms-longvideobench_val_v", "lmms-longvideobench_val_v-32"),
    ),
    Preset(
        name="perceptiontest_val_mc",
        task="perceptiontest_val_mc",
        frames=32,
        sample=_perceptiontest,
        aliases=("lmms-perceptiontest_val_mc", "lmms-perceptiontest_val_mc-32"),
    ),
    Preset(
        name="mvbench",
        task="mvbench",
        frames=32,
        sample=_mvbench,
        aliases=("lmms-mvbench", "lmms-mvbench-32"),
        frames_as_video=True,
    ),
    Preset(
        name="nextqa_mc_test",
        task="nextqa_mc_test",
        frames=32,
        sample=_nextqa,
        aliases=("lmms-nextqa_mc_test", "lmms-nextqa_mc_test-32"),
        new_tokens=16,
    ),
    Preset(name="mlvu", task="mlvu_dev", frames=256, sample=_mlvu, aliases=("mlvu_dev",)),
    Preset(name="lvbench", task="lvbench", frames=256, sample=_lvbench),
    Preset(
        name="needle",
        task="longvila_needle",
        frames=6000,
        sample=_needle,
        kind="words",
        new_tokens=16,
        ours=True,
        data=("needles.jsonl", "*.jsonl", "*.json"),
        note="needs --data needle=FOLDER",
    ),
)

_BY_NAME = {name: preset for preset in PRESETS for name in (preset.name, *preset.aliases)}
_BY_TASK = {preset.task: preset for preset in PRESETS}


def find_preset(name: str) -> Preset:
    """Return a benchmark by one of its names.

    Args:
        name: Its name or an alias.

    Raises:
        KeyError: If there is none of that name.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known = ", ".join(preset.name for preset in PRESETS)
        raise KeyError(f"there is no benchmark {name!r}{hint}; there are {known}")
    return _BY_NAME[name]


def preset_of_task(task: str) -> Preset | None:
    """Return the benchmark that a task of lmms-eval belongs to, or None.

    Args:
        task: A task's name; a part of a group belongs to the group's benchmark.
    """
    if task in _BY_TASK:
        return _BY_TASK[task]
    return _BY_TASK["mvbench"] if task.startswith("mvbench_") else None
