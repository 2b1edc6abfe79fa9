"""What is asked about a video whose pictures and times are known, and the exact answers.

1. A video has frames at ``k * step_s`` seconds and shows some pictures, each in a stretch of
   frames. The same picture may appear more than once.
2. ``conversation`` draws questions of seven kinds and orders them so that an answer does not give
   the next one away: what is asked by its time is not asked for its time, lists come last.
3. Times are written as the prompt writes them; a time that two frames share is never asked for.

Words are those of ``longvila needle`` half of the time, and others for the rest. No pixels here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: What the backgrounds show themselves; never asked about as absent.
IN_THE_FILM = {
    "rabbit", "bunny", "squirrel", "butterfly", "tree", "flower", "apple", "bird", "grass", "hole",
    "rock", "chinchilla", "chipmunk", "man", "woman", "nut", "mouse", "rat", "cloud", "leaf",
    "hand", "forest",
}  # fmt: skip
NOTHING, NEVER = "no picture", "never"
AT = (
    "What is shown at {t}?",
    "What is shown at {t}?",
    "Which picture appears at {t}?",
    "What can be seen at {t}?",
    "What picture is there at {t}?",
)
WHEN = ("When does the {name} appear?", "At what time is the {name} shown?")
THERE = ("Is there {a_name}?", "Does {a_name} appear in the video?")
WHICH = ("Which pictures appear in the video?", "List the pictures that appear.")
COUNT = ("How many pictures appear in the video?",)
TIMES = ("How many times does the {name} appear?",)
ORDER = ("In which order do these appear: {names}?",)
IMAGE = ("What is this?", "What is shown in the picture?", "Name the thing in the picture.")


def clock(time_s: float) -> str:
    """Write a time as the prompts do, "mm:ss"."""
    return f"{int(time_s) // 60:02d}:{int(time_s) % 60:02d}"


def with_article(name: str) -> str:
    """Put "a" or "an" before a name."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Shown:
    """A picture in a stretch of frames.

    Attributes:
        start: Its first frame.
        length: Its frames.
        picture: Its number in the index.
        name: What it is called.
    """

    start: int
    length: int
    picture: int
    name: str


def conversation(
    shown: Sequence[Shown],
    num_frames: int,
    step_s: float,
    rng: np.random.Generator,
    *,
    turns: int,
    absent: Callable[[], str],
    at: float = 0.65,
) -> list[tuple[str, str]]:
    """Draw questions about a video, with their answers.

    Args:
        shown: What appears, in order of time.
        num_frames: Frames of the video.
        step_s: Seconds from a frame to the next.
        rng: Chance.
        turns: Most questions.
        absent: Gives a name; those that appear are passed over here.
        at: Share of the pictures that are asked for by their time; most others for their time.

    Returns:
        Pairs; none twice.
    """
    times = [clock(k * step_s) for k in range(num_frames)]
    # A step below a second gives neighbours one time, which then names no single frame.
    single = (lambda k: True) if step_s >= 1 else (lambda k: times.count(times[k]) == 1)
    names = [each.name for each in shown]
    covered = {k for each in shown for k in range(each.start, each.start + each.length)}
    missing = list(dict.fromkeys(n for n in (absent() for _ in range(8)) if n not in names))
    pairs: list[tuple[str, str]] = []
    last = at + (1 - at) * 5 / 7
    for each in (shown[i] for i in rng.permutation(len(shown))):
        kind = rng.random()
        if kind < at:
            k = each.start + int(rng.integers(each.length))
            if single(k):
                pairs.append((_say(rng, AT, t=times[k]), each.name))
        elif names.count(each.name) == 1:
            if kind < last and single(each.start):
                pairs.append((_say(rng, WHEN, name=each.name), times[each.start]))
            elif kind >= last:
                pairs.append((_say(rng, THERE, a_name=with_article(each.name)), "yes"))
        else:
            pairs.append((_say(rng, TIMES, name=each.name), str(names.count(each.name))))
    extra = max(2, len(pairs) // 6)
    free = [k for k in (int(rng.integers(num_frames)) for _ in range(extra)) if k not in covered]
    pairs += [(_say(rng, AT, t=times[k]), NOTHING) for k in free if single(k)]
    for name in missing[:extra]:
        if not set(name.split()) & IN_THE_FILM:
            pairs.append((_say(rng, THERE, a_name=with_article(name)), "no"))
    if missing and rng.random() < 0.5:
        pairs.append((_say(rng, WHEN, name=missing[-1]), NEVER))
    pairs = [pairs[i] for i in rng.permutation(len(pairs))][:turns]
    pairs += _about_all(names, rng)
    return list(dict(reversed(pairs)).items())[::-1]


def _about_all(names: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions whose answers tell others; they come last."""
    once = [name for name in names if names.count(name) == 1]
    pairs = []
    if len(once) >= 3 and rng.random() < 0.5:
        three = [once[i] for i in sorted(rng.permutation(len(once))[:3])]
        pairs.append((_say(rng, ORDER, names=", ".join(sorted(three))), ", ".join(three)))
    if len(names) <= 8 and rng.random() < 0.3:
        pairs.append((_say(rng, COUNT), str(len(names))))
    if 0 < len(names) <= 6 and rng.random() < 0.3:
        pairs.append((_say(rng, WHICH), ", ".join(dict.fromkeys(names))))
    return pairs


def _say(rng: np.random.Generator, words: Sequence[str], **values: str) -> str:
    return str(words[int(rng.integers(len(words)))]).format(**values)
