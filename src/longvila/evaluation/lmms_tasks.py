"""What the task files of ``tasks/`` call: where a video is, how a question reads, what it scores.

lmms-eval names these functions in its task files (``!function longvila.evaluation.lmms_tasks.X``)
and calls them with a document and the task's ``lmms_eval_specific_kwargs``:

- ``media``: folder of the benchmark's files; relative ones are under ``$HF_HOME``;
- ``frames``: how many frames the model samples, where the prompt depends on it.

Prompts are those with which the paper's numbers were made, word for word, since a benchmark's
prompt is part of its definition. Scores follow one rule for all (`longvila.evaluation.presets`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from longvila.errors import VideoError
from longvila.evaluation.presets import Preset, find_preset
from longvila.evaluation.subtitles import on_screen, read_srt
from longvila.media.sampling import uniform_indices
from longvila.media.video import open_video

_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")
_ENDINGS = {*_SUFFIXES, ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".gif"}
_LETTER_ONLY = "Answer with the option's letter from the given choices directly."


def media_folder(kwargs: Mapping[str, Any] | None) -> Path:
    """Return the folder of a benchmark's files.

    Args:
        kwargs: The task's options, with ``media``.
    """
    folder = Path(os.path.expanduser(os.path.expandvars(str((kwargs or {})["media"]))))
    home = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))
    return folder if folder.is_absolute() else home / folder


def find_video(folder: Path, name: str) -> str:
    """Return the path of a video.

    Args:
        folder: Where to look, itself and its folders ``data``, ``videos`` and ``video``.
        name: Path of the video, in one of them even if it begins with a slash; its ending may
            differ or be missing.

    Raises:
        FileNotFoundError: If it is in none; the message names the first place.
    """
    for part in ("", "data", "videos", "video"):
        for path in (folder / part / name, folder / part / name.lstrip("/")):
            # What stands behind another dot is part of the name: clip.1 is not clip.mp4.
            ended = path.suffix.lower() in _ENDINGS
            stem = path.with_suffix("") if ended else path
            for candidate in (path, *(Path(f"{stem}{suffix}") for suffix in _SUFFIXES)):
                if candidate.suffix and candidate.is_file():
                    return str(candidate)
    raise FileNotFoundError(
        f"there is no video {name} in {folder} or its folders data, videos and video; set the "
        "task's folder (longvila eval --data TASK=FOLDER, or media: in the task file)"
    )


def lettered(options: Sequence[Any]) -> str:
    """Return options one a line, behind their letters."""
    return "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


# ---- Video-MME


def videomme_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """Return the video of a question."""
    return [find_video(media_folder(kwargs), f"{doc['videoID']}.mp4")]


def videomme_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a question without subtitles."""
    return _videomme(doc, "based on the video")


def videomme_subtitle_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a question below the subtitles that are on screen with the sampled frames.

    Args:
        doc: The document.
        kwargs: With ``media`` and ``frames``.
    """
    folder = media_folder(kwargs)
    file = folder / "subtitle" / f"{doc['videoID']}.srt"
    if not file.exists():
        return videomme_text(doc, kwargs)
    try:
        video = find_video(folder, f"{doc['videoID']}.mp4")
        times = frame_times(video, int((kwargs or {})["frames"]))
    except (FileNotFoundError, VideoError):
        # The question fails when its video is asked for, and is counted then.
        return videomme_text(doc, kwargs)
    lines = "\n".join(line.text for line in on_screen(read_srt(file), times))
    question = _videomme(doc, "based on the video and the subtitles")
    return f"This video's subtitles are listed below:\n{lines}\n{question}"


@lru_cache(maxsize=4096)
def frame_times(video: str, frames: int) -> tuple[float, ...]:
    """Return the times of the frames that are sampled evenly from a video.

    Args:
        video: A path.
        frames: How many.
    """
    with open_video(video) as reader:
        chosen = uniform_indices(reader.metadata.num_frames, frames)
        return tuple(float(t) for t in reader.metadata.timestamps_s[chosen])


def _videomme(doc: Mapping[str, Any], basis: str) -> str:
    options = "\n".join(doc["options"])
    return (
        f"Select the best answer to the following multiple-choice question {basis}. Respond with "
        f"only the letter (A, B, C, or D) of the correct option.\n{doc['question']}\n{options}\n"
        "The best answer is:"
    )


# ---- VNBench, Event-Bench


def vnbench_visual(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """Return the video of a question."""
    return [find_video(media_folder(kwargs), str(doc["video"]))]


def vnbench_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a question."""
    return f"{doc['question']}\n{lettered(doc['options'])}\n{_LETTER_ONLY}"


def eventbench_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a question."""
    return f"{doc['question']}\n{lettered(doc['candidates'])}\n{_LETTER_ONLY}"


# ---- needles


def needle_visual(
    doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return a haystack with its needle put in, to be read when the question is asked.

    Args:
        doc: With ``haystack`` (a video, or a folder of pictures), ``needle`` (a picture),
            ``frames`` and ``depth`` (0 the beginning, 1 the end).
        kwargs: With ``media``, under which both are.
    """
    folder = media_folder(kwargs)
    # As it is written: 0.29 * 100 is less than 29 in floating point.
    frames, depth = int(doc["frames"]), Fraction(str(doc["depth"]))
    splice = {
        "haystack": str(folder / doc["haystack"]),
        "frames": frames,
        "pictures": [[int(depth * frames), str(folder / doc["needle"])]],
    }
    return [{"type": "video", "url": {"splice": splice}}]


def needle_text(doc: Mapping[str, Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a needle's question, with its options if it has some."""
    options = list(doc.get("options") or ())
    if not options:
        return f"{doc['question']}\nAnswer the question using a single word or phrase."
    return f"{doc['question']}\n{lettered(options)}\n{_LETTER_ONLY}"


# ---- scores


def target(name: str, doc: Mapping[str, Any]) -> str:
    """Return the right answer of a document."""
    return find_preset(name).read(doc).answer or ""


def results(name: str, doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Score an answer as lmms-eval wants it: a value a metric, each with what clusters it.

    Args:
        name: The benchmark.
        doc: The document.
        answers: The model's, one.
    """
    preset = find_preset(name)
    sample = preset.read(doc)
    grade = preset.grade(sample, answers[0])
    entry = {
        "score": float(bool(grade.correct)),
        "parsed": grade.parsed,
        "video": sample.video,
        "duration": sample.duration,
        "category": sample.category,
        "group": sample.group,
    }
    unparsable = {**entry, "score": float(grade.parsed is None)}
    return {"accuracy": entry, "unparsable": unparsable, "all_rotations": entry}


def mean_score(entries: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean score of entries."""
    return sum(entry["score"] for entry in entries) / len(entries)


def group_score(entries: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of groups in which every question is right."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for entry in entries:
        groups[entry["group"]].append(entry["score"])
    return sum(all(scores) for scores in groups.values()) / len(groups)


def _bind(name: str) -> tuple[Any, Any]:
    """Return the two functions of a benchmark that a task file names."""
    preset: Preset = find_preset(name)

    def results_of(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
        """Score one answer."""
        return results(preset.name, doc, answers)

    def target_of(doc: Mapping[str, Any]) -> str:
        """Return the right answer."""
        return target(preset.name, doc)

    return results_of, target_of


videomme_results, videomme_target = _bind("videomme")
vnbench_results, vnbench_target = _bind("vnbench")
eventbench_results, eventbench_target = _bind("eventbench")
needle_results, needle_target = _bind("needle")
