"""Ask a model about videos and images.

Examples:
    longvila ask film.mp4 "What is shown at 00:12?"
    longvila ask film.mp4 "What happens at the end?" --model CHECKPOINT --frames 256
    longvila ask a.mp4 b.mp4 chart.png "Which video does the chart describe?" --model CHECKPOINT
    longvila ask film.mp4 --chat --model CHECKPOINT
    longvila ask film.mp4 "What happens at the end?" --model CHECKPOINT --frames 6000 --gpus 8
    longvila index film.mp4 --output film.index --model CHECKPOINT
    longvila ask film.index "Who arrives first?" --model CHECKPOINT
    longvila ask film.index --questions questions.txt --json

The answer streams to standard output; progress, timings and warnings go to standard error. A path
that ends like a picture is an image, anything else (files, addresses, folders of frames) a video.
In a chat, a video is encoded and read once and asked about any number of times. Questions of a file
have nothing to do with one another: several are answered together behind what was read once. With
several GPUs each decodes, encodes and reads its part; the answer is that of one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from longvila.cli._options import ReadingOptions, parse
from longvila.errors import LongVILAError
from longvila.packaged import default_model

if TYPE_CHECKING:
    from longvila.inference.engine import Engine
    from longvila.inference.session import Answer, Medium, Session
    from longvila.inference.workers import Ranks

#: Questions of a file that are answered together.
_TOGETHER = 16
#: Endings that make a last argument a file which is missing rather than a question.
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")
_HELP = """\
  /video PATH [FRAMES]   add a video to the next question
  /image PATH            add an image to the next question
  /clear                 forget the conversation
  /quit                  leave"""


@dataclass(frozen=True)
class Options(ReadingOptions):
    """Ask a model about videos and images."""

    inputs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MEDIUM... QUESTION")
    ]
    """Videos and images in the order they are shown, then the question."""
    max_new_tokens: int = 512
    """Longest answer."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Probability mass sampled from."""
    json: bool = False
    """Print one JSON object (a line a question) instead of streaming text."""
    questions: Path | None = None
    """File of questions, one a line; all arguments are media then."""
    chat: bool = False
    """Go on asking; /help lists the commands."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "ask", __doc__, flag_pairs=False)
    # Refused before processes are started; and once, since questions may come through a pipe.
    sources, asked = split_inputs(options)
    check_numbers(options)
    if options.max_new_tokens < 1:
        raise LongVILAError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not options.temperature >= 0:
        raise LongVILAError(f"--temperature must be 0 or more, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise LongVILAError(f"--top-p must be above 0 and at most 1, got {options.top_p}")
    return run_over_ranks(
        functools.partial(run, sources=sources, asked=asked),
        options,
        size=options.gpus,
        device=find_device(options.device, gpus=options.gpus),
    )


def check_numbers(options: Any) -> None:
    """Refuse numbers that mean nothing before anything is loaded.

    Args:
        options: With ``frames``, ``fps``, ``gpus`` and ``kv_offload``.

    Raises:
        LongVILAError: If one is out of range; the message names its option.
    """
    if options.frames is not None and options.frames < 1:
        raise LongVILAError(f"--frames must be at least 1, got {options.frames}")
    if options.fps is not None and not 0 < options.fps < float("inf"):
        raise LongVILAError(f"--fps must be a number above 0, got {options.fps}")
    if options.gpus < 1:
        raise LongVILAError(f"--gpus must be at least 1, got {options.gpus}")
    if options.kv_offload is not None and not 0 <= options.kv_offload < float("inf"):
        raise LongVILAError(f"--kv-offload must be 0 GiB or more, got {options.kv_offload}")


def find_device(name: str, *, gpus: int = 1) -> str:
    """Return the device that ``--device`` names.

    Args:
        name: As on the command line.
        gpus: How many of it share the work.

    Raises:
        LongVILAError: If torch knows no such device or has none here, or if several GPUs are asked
            for and there are none.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if gpus > 1:
            raise LongVILAError(
                f"--gpus {gpus}: torch sees no GPU on this machine; --device cpu takes as many "
                "processes instead"
            )
        return "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise LongVILAError(
            f"--device {name}: torch knows no such device; expected auto, cpu, cuda, cuda:1, ..."
        ) from fault
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LongVILAError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs on this machine"
        )
    return name


def run_over_ranks(work: Any, options: Any, *, size: int, device: str) -> int:
    """Run a function on this process and those that share its work."""
    from longvila.inference import workers

    return workers.run_over_ranks(work, options, size=size, device=device)


def run(ranks: Ranks, options: Options, *, sources: list[str], asked: list[str]) -> int:
    """Ask on one rank; the first one talks.

    Args:
        ranks: This process among those that share the work.
        options: The options.
        sources: The media.
        asked: The questions, those of the first rank counting.

    Returns:
        The exit status.
    """
    from longvila.inference.session import Session

    asked = ranks.share(asked)
    index = find_index(sources)
    sampling = options.frames is not None or options.fps is not None
    if index is not None and sampling and len(sources) == 1 and not options.chat:
        raise LongVILAError(
            f"{index} holds the frames that longvila index took: leave --frames and --fps out"
        )
    if index is not None and options.model is None:
        options = replace(options, model=read_note(index).get("model"))
    with progress_bars(quiet=not ranks.is_first) as progress:
        session = Session(*open_engine(options, ranks), progress=progress)
        if index is not None:
            ranks.together(lambda: session.load(index))
            sources = sources[1:]
        media = ranks.together(lambda: load(session, sources, options))
    if options.questions is not None:
        answer_each(session, asked, media, options, ranks)
        return 0
    if options.chat:
        return chat(session, asked, media, options, ranks)
    turn(session, asked[0], media, options, ranks)
    return 0


def split_inputs(options: Options) -> tuple[list[str], list[str]]:
    """Tell the media from what is asked.

    Args:
        options: The command line.

    Returns:
        The media and the questions: one, those of a file, or none at the beginning of a chat.

    Raises:
        LongVILAError: If the question is missing, or is a medium that is not there.
    """
    inputs = options.inputs
    if options.questions is not None:
        if options.chat:
            raise LongVILAError("--questions and --chat exclude each other")
        for source in inputs:
            if not names_medium(source):
                raise LongVILAError(f"{source}: no such file (with --questions all are media)")
        return list(inputs), read_questions(options.questions)
    if not inputs or names_medium(inputs[-1]):
        if options.chat:
            return list(inputs), []
        raise LongVILAError(
            'the question is missing: longvila ask VIDEO "question" --model CHECKPOINT'
        )
    last = inputs[-1]
    if not re.search(r"\s", last) and (last.lower().endswith(_VIDEO_SUFFIXES) or is_image(last)):
        raise LongVILAError(f"{last}: no such file, and no question follows it")
    return list(inputs[:-1]), [last]


def read_questions(path: Path) -> list[str]:
    """Return the lines of a file that hold something.

    Args:
        path: The file.

    Raises:
        LongVILAError: If it cannot be read, or holds no question.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise LongVILAError(f"--questions {path}: {reason}") from fault
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise LongVILAError(f"--questions {path}: holds no question")
    return found


def find_index(sources: list[str]) -> Path | None:
    """Return the stored prompt among the media, which must come first.

    Raises:
        LongVILAError: If it does not, or there are several.
    """
    from longvila.inference.store import begins_stored, is_stored, read_index

    for source in sources:
        if begins_stored(Path(os.path.expanduser(source))):
            read_index(Path(os.path.expanduser(source)))  # says that it was not written to the end
    found = [source for source in sources if is_stored(Path(os.path.expanduser(source)))]
    if len(found) > 1 or (found and found[0] != sources[0]):
        raise LongVILAError(
            f"{found[-1]} is a stored prompt: there can be one, and it comes before other media"
        )
    return Path(os.path.expanduser(found[0])) if found else None


def read_note(index: Path) -> dict[str, Any]:
    """Return what ``longvila index`` noted beside a stored prompt."""
    from longvila.inference.store import read_index

    note: dict[str, Any] = read_index(index)["extra"].get("note") or {}
    return note


def names_medium(text: str) -> bool:
    """Whether an argument is a file, a folder or an address rather than a question."""
    if text.startswith(("http://", "https://", "file://", "data:")):
        return True
    try:
        return Path(os.path.expanduser(text)).exists()
    except OSError:  # longer than any file name
        return False


def is_image(source: str) -> bool:
    """Whether a source is a picture, by its ending or its data: type."""
    from longvila.media.sources import IMAGE_SUFFIXES  # slow: it loads torch

    if source.startswith("data:"):
        return source.startswith("data:image/")
    return Path(source.partition("?")[0]).suffix.lower() in IMAGE_SUFFIXES


def open_engine(options: Any, ranks: Ranks) -> tuple[Engine, Any]:
    """Load the model on this rank.

    Args:
        options: With ``model``, ``dtype`` and perhaps ``kv_offload``.
        ranks: Where this process computes, and with whom.

    Returns:
        Its engine and its processor.

    Raises:
        CheckpointError: If there is no such checkpoint, or its processor needs what is missing.
    """
    from transformers.utils import logging as transformers_logging

    from longvila.inference.engine import Engine
    from longvila.model.opening import open_checkpoint

    if not sys.stderr.isatty() or not ranks.is_first:
        transformers_logging.disable_progress_bar()
    source = options.model or str(default_model())
    model, processor = ranks.together(
        lambda: open_checkpoint(source, device=ranks.device, dtype=options.dtype, label="--model")
    )
    offload = getattr(options, "kv_offload", None)
    offload = None if offload is None else int(offload * 2**30)
    mesh = ranks.mesh(model.config.get_text_config())
    return Engine(model, mesh, kv_offload=offload), processor


def load(session: Session, sources: list[str], options: Any) -> list[Medium]:
    """Decode the media of a turn, in order."""
    alone = len(sources) == 1 and not session.media and not session.watched
    return [
        session.load_image(source, tiled=alone)
        if is_image(source)
        else session.load_video(source, num_frames=options.frames, fps=options.fps)
        for source in sources
    ]


def turn(
    session: Session, question: str, media: list[Medium], options: Options, ranks: Ranks
) -> None:
    """Ask one question; print the answer and where the time went, on the first rank."""
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        print(piece, end="", flush=True)

    seen = [*session.watched, *media]
    with progress_bars(quiet=not ranks.is_first) as progress:
        session.progress = progress
        answer = session.ask(
            question,
            media,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            on_text=None if options.json or not ranks.is_first else show,
        )
    if not ranks.is_first:
        return
    if options.json:
        print(json.dumps(as_json(question, seen, answer), ensure_ascii=False))
    else:
        print(flush=True)
        print(summary(seen, answer), file=sys.stderr)


def answer_each(
    session: Session, questions: list[str], media: list[Medium], options: Options, ranks: Ranks
) -> None:
    """Answer questions that have nothing to do with one another, some of them at once."""
    with progress_bars(quiet=not ranks.is_first) as progress:
        session.progress = progress
        if media:
            session.watch(media)
    for start in range(0, len(questions), _TOGETHER):
        part = questions[start : start + _TOGETHER]
        answers = session.ask_each(
            part,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        if not ranks.is_first:
            continue
        for question, answer in zip(part, answers, strict=True):
            if options.json:
                line = as_json(question, session.watched, answer)
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                print(f"> {question}\n{answer.text}\n", flush=True)
        if not options.json:
            number = f"{len(part)} question{'s' if len(part) > 1 else ''}"
            spent = f"{answers[0].timings.generate_s:.2f} s"
            print(f"[{number}; generation {spent}]", file=sys.stderr)


def summary(media: list[Medium], answer: Answer) -> str:
    """Return the line that says what was seen and where the time went."""
    timings = answer.timings
    parts = []
    for medium in media:
        unit = "frames" if medium.kind == "video" else "tiles"
        each = medium.tokens / medium.frames
        parts.append(f"{medium.frames} {unit} x {each:g} tokens")
        if medium.missing:
            parts.append(f"{len(medium.missing)} frames missing")
    prompt = f"prompt {timings.prompt_tokens} tokens"
    if timings.cached_tokens:
        prompt += f" ({timings.cached_tokens} read before)"
    parts += [
        prompt,
        f"decode {timings.decode_s:.2f} s",
        f"vision {timings.vision_s:.2f} s",
        f"prefill {timings.prefill_s:.2f} s",
        f"{timings.new_tokens} new tokens, {timings.tokens_per_s:.1f} tokens/s",
    ]
    if not answer.complete:
        parts.append("cut at --max-new-tokens")
    elif not answer.text:
        parts.append("the model ended its answer at once")
    return "[" + "; ".join(parts) + "]"


def as_json(question: str, media: list[Medium], answer: Answer) -> dict[str, Any]:
    """Return everything about a turn as plain data."""
    timings = answer.timings
    return {
        "question": question,
        "answer": answer.text,
        "complete": answer.complete,
        "media": [
            {
                "kind": medium.kind,
                "name": medium.name,
                "frames": medium.frames,
                "tokens": medium.tokens,
                "tokens_per_frame": medium.tokens / medium.frames,
                "timestamps_s": medium.timestamps_s,
                "missing": list(medium.missing),
            }
            for medium in media
        ],
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "new_tokens": timings.new_tokens,
        "decode_s": timings.decode_s,
        "vision_s": timings.vision_s,
        "prefill_s": timings.prefill_s,
        "generate_s": timings.generate_s,
        "tokens_per_s": timings.tokens_per_s,
    }


def chat(
    session: Session, asked: list[str], media: list[Medium], options: Options, ranks: Ranks
) -> int:
    """Ask until the user leaves, first what was asked before; an error ends the turn only."""
    while True:
        line = asked.pop(0) if asked else ranks.share(read_line() if ranks.is_first else None)
        if line is None:
            return 0
        if not line:
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return 0
            if command == "/help":
                say(_HELP, ranks)
            elif command == "/clear":
                session.clear()
                media = []
            elif command in ("/video", "/image"):
                arguments = (session, command, rest.strip(), options, ranks)
                media.append(ranks.together(lambda given=arguments: load_command(*given)))
            elif command.startswith("/"):
                say(f"there is no command {command}\n{_HELP}", ranks)
            else:
                turn(session, line, media, options, ranks)
                media = []
        except LongVILAError as error:
            say(f"longvila ask: {error}", ranks)
        except KeyboardInterrupt:
            if ranks.size > 1:  # The others cannot know where this one stopped.
                raise
            say("\n(stopped)", ranks)


def read_line() -> str | None:
    """Return what the user typed; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def say(text: str, ranks: Ranks) -> None:
    """Tell the user something beside the answer."""
    if ranks.is_first:
        print(text, file=sys.stderr)


def load_command(
    session: Session, command: str, rest: str, options: Options, ranks: Ranks
) -> Medium:
    """Carry out ``/video PATH [FRAMES]`` or ``/image PATH``."""
    with progress_bars(quiet=not ranks.is_first) as progress:
        session.progress = progress
        if command == "/image":
            return session.load_image(rest, tiled=not session.media)
        path, _, last = rest.rpartition(" ")
        frames = options.frames
        if path and last.isdecimal() and not names_medium(rest):
            rest, frames = path, int(last)
        return session.load_video(rest, num_frames=frames, fps=options.fps)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Any]:
    """Show a bar for each stage on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, Any] = {}
    last: dict[str, int] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if done <= last.get(stage, done):  # begins anew
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)
        last[stage] = done

    with bars:
        yield advance
