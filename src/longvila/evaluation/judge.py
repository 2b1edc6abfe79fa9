"""Free answers graded by a judge, by the five axes of Video-ChatGPT, and right or wrong.

    correctness, detail, context, temporal     one answer against the right one
    consistency                                answers to two wordings of a question
    match                                      right or wrong, for short answers

1. An axis is a text file with what the judge is told (``prompts/``, or a folder of the user's).
2. A reply counts if it is one JSON object with exactly the wanted keys, the score a whole number
   from 0 to 5. Anything else, 4.8 or "4" or a word around it, is shown to the judge again with a
   request for the form, a bounded number of times; then the answer stays *ungraded*. Replies are
   parsed, never evaluated.
3. Every grade is written as it is given, with all exchanges: a run that stops goes on, and the file
   is what `longvila.evaluation.judge_models.Recording` replays. An answer for which the judge could
   not be reached, or which it refuses, is ungraded too, says why, and is tried again by the next
   run. Where a whole row of them fails, the judge is down and the run ends.
4. Means have standard errors clustered by video. Ungraded answers are counted apart, and the mean
   they could have moved is given as a range: all of them 0, all of them 5.

Cost: one request an answer and axis. Not done: judging with frames in sight.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvila.errors import LongVILAError
from longvila.evaluation.answers import Answers, Record, digest, read_lines
from longvila.evaluation.judge_models import Judge, JudgeError, Message
from longvila.evaluation.metrics import clustered_mean
from longvila.evaluation.presets import find_preset
from longvila.inference.caller import CallError

PROMPTS_FOLDER = Path(__file__).parent / "prompts"
AXES = ("correctness", "detail", "context", "temporal", "consistency")
HIGHEST = 5
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_AGAIN = (
    "That was not in the form asked for. Reply with the JSON object alone: no other words, the "
    "score a whole number from 0 to 5."
)


@dataclass(frozen=True)
class Item:
    """An answer to be graded.

    Attributes:
        id: What tells it apart, and orders it.
        video: What it is about, which clusters it.
        question: What was asked.
        answer: The right answer.
        prediction: The candidate's.
        question_2: The question in other words, where consistency is graded.
        prediction_2: The candidate's answer to that.
        axes: What to grade it by; empty for what the caller asks.
    """

    id: str
    video: str
    question: str
    answer: str
    prediction: str
    question_2: str | None = None
    prediction_2: str | None = None
    axes: tuple[str, ...] = ()


# ---- prompts and replies


@dataclass(frozen=True)
class Prompt:
    """What a judge is told about an axis.

    Attributes:
        axis: Its name.
        system: The first message.
        user: The second, with the names of an `Item` in braces.
    """

    axis: str
    system: str
    user: str

    @classmethod
    def read(cls, axis: str, folder: Path | None = None) -> Prompt:
        """Read an axis.

        Args:
            axis: Its name.
            folder: A folder of files; the packaged ones fill what it does not have.

        Raises:
            LongVILAError: If there is no such axis, or its file has another form.
        """
        for place in (folder, PROMPTS_FOLDER):
            file = None if place is None else place / f"{axis}.txt"
            if file is not None and file.exists():
                break
        else:
            known = ", ".join(sorted(file.stem for file in PROMPTS_FOLDER.glob("*.txt")))
            raise LongVILAError(f"there is no axis {axis!r}; there are {known}")
        assert file is not None
        parts = re.split(r"^\[(system|user)\]\n", file.read_text(encoding="utf-8"), flags=re.M)
        if len(parts) != 5 or parts[0].strip() or parts[1::2] != ["system", "user"]:
            raise LongVILAError(f"{file} must have one part [system] and then one part [user]")
        return cls(axis, parts[2].strip(), parts[4].strip())

    def messages(self, item: Item) -> list[Message]:
        """Return the conversation that asks for a grade.

        Args:
            item: The answer.

        Raises:
            LongVILAError: If the prompt wants something that the answer lacks.
        """
        values = {name: getattr(item, name) for name in _FIELDS if getattr(item, name) is not None}
        try:
            user = self.user.format_map(values)
        except (KeyError, ValueError, IndexError) as fault:
            raise LongVILAError(
                f"the prompt of {self.axis} cannot be filled for {item.id}: {fault!r}; it may name "
                f"{', '.join(values)}, and a brace is written twice"
            ) from fault
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


_FIELDS = ("question", "answer", "prediction", "question_2", "prediction_2")


def parse_grade(reply: str, axis: str) -> dict[str, Any] | None:
    """Read a reply.

    Args:
        reply: What the judge wrote.
        axis: What was graded.

    Returns:
        ``{"score": 0 to 5}``, with ``match`` for that axis; None if the reply has another form.
    """
    text = reply.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    wanted = {"score", "match"} if axis == "match" else {"score"}
    if not isinstance(value, dict) or set(value) != wanted:
        return None
    score = value["score"]
    if type(score) is not int or not 0 <= score <= HIGHEST:
        return None
    if axis == "match":
        if value["match"] not in ("yes", "no"):
            return None
        return {"score": score, "match": value["match"] == "yes"}
    return {"score": score}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that says the same key twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key twice")
    return dict(pairs)


# ---- grading


def grade(item: Item, prompt: Prompt, judge: Judge, *, attempts: int) -> Record:
    """Have an answer graded by one axis.

    Args:
        item: The answer.
        prompt: The axis.
        judge: Who grades.
        attempts: Replies to ask for, at most, until one has the form.

    Returns:
        A record: the grade, or None, and every exchange; ``error`` if the judge gave no answer.
    """
    messages: list[Message] = prompt.messages(item)
    key = _key(judge, prompt, item)
    exchanges = []
    found, error = None, None
    for _ in range(attempts):
        asked = digest([dict(message) for message in messages])
        try:
            reply = judge.reply(messages)
        except CallError as fault:
            error = str(fault)
            break
        exchanges.append({"asked": asked, "reply": reply})
        found = parse_grade(reply, prompt.axis)
        if found is not None:
            break
        again = {"role": "user", "content": _AGAIN}
        messages = [*messages, {"role": "assistant", "content": reply}, again]
    return {
        "key": key,
        "task": prompt.axis,
        "split": "judged",
        "doc_id": item.id,
        "repeat": 0,
        "judge": judge.name,
        "video": item.video,
        "grade": found,
        "exchanges": exchanges,
        **({} if error is None else {"error": error}),
    }


def _key(judge: Judge, prompt: Prompt, item: Item) -> str:
    """What a grade depends on."""
    return digest([judge.name, prompt.axis, item.id, [dict(m) for m in prompt.messages(item)]])


def grade_all(
    items: Sequence[Item],
    axes: Sequence[str],
    judge: Judge,
    answers: Answers,
    *,
    prompts: Path | None = None,
    attempts: int = 3,
    parallel: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Have answers graded; those that were graded before are not asked about again.

    Args:
        items: The answers.
        axes: What to grade them by, where an item does not say itself.
        judge: Who grades.
        answers: Where grades are kept.
        prompts: Folder of the user's prompts.
        attempts: Replies to ask for, at most, until one has the form.
        parallel: Requests at once.
        progress: Called with (done, all) after each grade.

    Returns:
        A record an answer and axis, in the order of the items.

    Raises:
        JudgeError: If the judge cannot be asked any more; what was graded is kept.
        LongVILAError: If two answers have one id, or an axis does not fit an answer.
    """
    if len({item.id for item in items}) != len(items):
        raise LongVILAError("two answers have the same id")
    texts = {axis: Prompt.read(axis, prompts) for item in items for axis in item.axes or axes}
    wanted = [(item, texts[axis]) for item in items for axis in item.axes or axes]
    keys = [_key(judge, prompt, item) for item, prompt in wanted]
    todo = [pair for pair, key in zip(wanted, keys, strict=True) if answers.find(key) is None]
    done = len(wanted) - len(todo)

    def one(pair: tuple[Item, Prompt]) -> Record:
        return grade(pair[0], pair[1], judge, attempts=attempts)

    failed: dict[str, Record] = {}
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        # In small pieces, so that a judge that fails is not asked thousands of times more.
        for start in range(0, len(todo), 4 * parallel):
            piece = todo[start : start + 4 * parallel]
            errors = []
            for record in pool.map(one, piece):
                answers.add(record)
                if "error" in record:
                    failed[record["key"]] = record
                    errors.append(record["error"])
                done += 1
                if progress is not None:
                    progress(done, len(wanted))
            # The last piece may be a single answer that the judge refuses.
            whole = len(piece) == 4 * parallel or len(failed) == done
            if len(errors) == len(piece) and whole:
                raise JudgeError(
                    f"the judge gave no answer {len(errors)} times in a row; the last: {errors[-1]}"
                )
    given = (answers.find(key) or failed.get(key) for key in keys)
    return [each for each in given if each is not None]


@dataclass(frozen=True)
class AxisScore:
    """What a judge gave by one axis.

    Attributes:
        axis: The axis.
        graded: Answers graded.
        ungraded: Answers to which no reply had the form.
        mean: Mean score of those graded; None if there are none.
        error: Its standard error, clustered by video; None where one video is all there is.
        low: The mean if every ungraded answer had 0.
        high: The mean if every ungraded answer had 5.
        counts: How often each score was given.
        accuracy: Share of answers that match, for that axis; the ungraded count as wrong.
    """

    axis: str
    graded: int
    ungraded: int
    mean: float | None
    error: float | None
    low: float
    high: float
    counts: tuple[int, ...]
    accuracy: float | None = None


def axis_scores(records: Iterable[Record]) -> dict[str, AxisScore]:
    """Return what a judge gave.

    Args:
        records: Grades.

    Returns:
        A score an axis, in the order in which axes first come.
    """
    parts: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        parts[record["task"]].append(record)
    out = {}
    for axis, part in parts.items():
        found = [record for record in part if record["grade"] is not None]
        scores = [record["grade"]["score"] for record in found]
        mean, error = (
            clustered_mean(scores, [record["video"] for record in found])
            if found
            else (math.nan, math.nan)
        )
        total, missing = sum(scores), len(part) - len(found)
        out[axis] = AxisScore(
            axis=axis,
            graded=len(found),
            ungraded=missing,
            mean=None if math.isnan(mean) else mean,
            error=None if math.isnan(error) else error,
            low=total / len(part),
            high=(total + HIGHEST * missing) / len(part),
            counts=tuple(scores.count(value) for value in range(HIGHEST + 1)),
            accuracy=(
                sum(record["grade"]["match"] for record in found) / len(part)
                if axis == "match"
                else None
            ),
        )
    return out


# ---- what is graded


def read_items(source: Path) -> list[Item]:
    """Read answers to be graded.

    Args:
        source: The folder of a run of `longvila eval`; or a ``.jsonl`` or ``.json`` file of objects
            with ``question``, ``answer``, ``prediction`` and perhaps ``video``, ``id``,
            ``question_2``, ``prediction_2`` (Video-ChatGPT's ``Q``, ``A``, ``pred``, ``Q1``,
            ``Q2``, ``pred1``, ``pred2`` and ``video_name`` are understood).

    Raises:
        LongVILAError: If there is nothing of that kind.
    """
    if source.is_dir():
        file = source / "samples.jsonl"
        if not file.exists():
            raise LongVILAError(f"{source} holds no finished run: there is no samples.jsonl")
        return _items_of_run(read_lines(file), source)
    if not source.exists():
        raise LongVILAError(f"there is no file {source}")
    try:
        text = source.read_text(encoding="utf-8-sig")
        if source.suffix == ".jsonl":
            # Somebody's own file: unlike ours, its last line counts without an end.
            rows: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as fault:
        raise LongVILAError(f"{source} is no JSON: {fault}") from fault
    if isinstance(rows, Mapping) and all(isinstance(row, Mapping) for row in rows.values()):
        rows = [{"id": key, **row} for key, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise LongVILAError(f"{source} must hold objects with question, answer and prediction")
    if not rows:
        raise LongVILAError(f"{source} holds no answers")
    return [_item(row, f"{number:06d}", source) for number, row in enumerate(rows)]


_NAMES = {
    "video": ("video", "video_name"),
    "question": ("question", "Q", "Q1", "question_1"),
    "answer": ("answer", "A"),
    "prediction": ("prediction", "pred", "pred1", "prediction_1"),
    "question_2": ("question_2", "Q2"),
    "prediction_2": ("prediction_2", "pred2"),
}


def _item(row: Mapping[str, Any], number: str, source: Path) -> Item:
    values: dict[str, Any] = {}
    for name, keys in _NAMES.items():
        found = next((row[key] for key in keys if row.get(key) is not None), None)
        if found is not None:
            values[name] = str(found)
    missing = [name for name in ("question", "answer", "prediction") if name not in values]
    if missing:
        raise LongVILAError(f"{source}, answer {number} has no {', '.join(missing)}")
    values.setdefault("video", number)
    return Item(id=str(row.get("id", number)), **values)


def _items_of_run(records: Sequence[Record], source: Path) -> list[Item]:
    items: list[Item] = []
    pairs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        preset = None if record["benchmark"] is None else find_preset(record["benchmark"])
        if preset is None or not preset.axes:
            continue
        if record["group"] is not None:
            pairs[record["benchmark"], record["group"]].append(record)
            continue
        items.append(_run_item(record, preset.axes))
    for (benchmark, _), pair in pairs.items():
        if len(pair) != 2:
            raise LongVILAError(
                f"{source}: {benchmark} asks everything twice, but {pair[0]['video']} has "
                f"{len(pair)} answers with the same right answer"
            )
        first, second = pair
        items.append(_run_item(first, find_preset(benchmark).axes, second))
    if not items:
        raise LongVILAError(f"{source} has no answers that want a judge")
    return items


def _run_item(record: Record, axes: tuple[str, ...], second: Record | None = None) -> Item:
    return Item(
        id=f"{record['task']}/{record['split']}/{record['doc_id']:06d}/{record['repeat']}",
        video=record["video"],
        question=record["prompt"],
        answer=record["gold"],
        prediction=record["answer"],
        question_2=None if second is None else second["prompt"],
        prediction_2=None if second is None else second["answer"],
        axes=axes,
    )
