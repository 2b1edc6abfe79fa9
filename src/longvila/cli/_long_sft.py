"""The commands ``longvila data long-sft`` and ``longvila data review``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longvila.cli._options import parse
from longvila.datagen.caption import CaptionOptions
from longvila.datagen.dataset import find_videos, read_decisions
from longvila.datagen.long_sft import LongSFT, LongSFTOptions
from longvila.datagen.prompts import Prompts
from longvila.datagen.qa import QuestionOptions
from longvila.datagen.review import save_decisions, server, write_page
from longvila.datagen.segment import SegmentOptions
from longvila.inference.caller import EndpointCaller, LocalCaller


@dataclass(frozen=True)
class Asked:
    """A model that is asked: one at an endpoint, or a checkpoint on this machine.

    Attributes:
        model: The model's name at the endpoint; without one, a folder or hub id.
        endpoint: Address of an endpoint of OpenAI's kind, up to /v1.
        key_variable: Environment variable that holds the endpoint's key.
        timeout_s: Longest wait for an answer of the endpoint.
        tries: Times a prompt is sent to the endpoint at most.
        temperature: Of sampling at the endpoint; a model here takes the likeliest token.
        device: Where a model here runs; auto is the first GPU, or the CPU.
    """

    model: str | None = None
    endpoint: str | None = None
    key_variable: str | None = None
    timeout_s: float = 120.0
    tries: int = 5
    temperature: float = 0.0
    device: str = "auto"


@dataclass(frozen=True)
class MakeLongSFT:
    """Make instruction data of long videos."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Videos, folders of them, .txt files with a path a line, .jsonl files with video and id."""
    output: Path
    """Folder of the results; begun again, the command goes on there."""
    captioner: Asked = field(default_factory=Asked)
    """Who sees segments and describes them."""
    writer: Asked = field(default_factory=Asked)
    """Who writes the long caption and the questions; the captioner if no model is given."""
    judge: Asked = field(default_factory=Asked)
    """Who answers questions unseen, to find those that need no video; the writer if not given."""
    segment: SegmentOptions = field(default_factory=SegmentOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    question: QuestionOptions = field(default_factory=QuestionOptions)
    conversation: Literal["one", "each"] = "one"
    """Whether all questions of a video are one sample, or each is."""
    prompts: Path | None = None
    """Folder of prompts that take the place of the package's."""
    workers: int = 4
    """Calls at once; a model on this machine answers one after another."""
    give_up_after: int = 20
    """Failed calls in a row after which the run ends."""
    json: bool = False
    """Print the report as JSON."""


@dataclass(frozen=True)
class Review:
    """Serve a page to accept and reject what `long-sft` made."""

    output: Annotated[Path, tyro.conf.Positional]
    """Folder of the results."""
    port: int = 8017
    """Where the page is served, on this machine only."""
    most_videos: int = 50
    """Videos shown."""
    once: bool = False
    """Write the page and the dataset, and end; decisions are downloaded from the page then."""


def make(argv: list[str]) -> int:
    """Run ``longvila data long-sft``.

    Returns:
        The exit status: 3 while something still stands in the way of a video.
    """
    chosen = parse(MakeLongSFT, argv, "data long-sft", None)
    if chosen.captioner.model is None:
        raise ValueError("say who describes segments: --captioner.model, with --captioner.endpoint")
    captioner = _caller(chosen.captioner)
    writer = captioner if chosen.writer.model is None else _caller(chosen.writer)
    judge = writer if chosen.judge.model is None else _caller(chosen.judge)
    run = LongSFT(
        find_videos(chosen.sources),
        chosen.output,
        captioner,
        writer,
        judge=judge,
        options=LongSFTOptions(
            segment=chosen.segment,
            caption=chosen.caption,
            question=chosen.question,
            conversation=chosen.conversation,
            workers=chosen.workers,
            give_up_after=chosen.give_up_after,
        ),
        prompts=Prompts(chosen.prompts),
        progress=_say_step,
    )
    report = run.run()
    print(json.dumps(report) if chosen.json else _long_sft_text(report, chosen.output))
    return 0 if not report["waiting"] else 3


def _caller(asked: Asked) -> Any:
    assert asked.model is not None
    if asked.endpoint is None:
        return LocalCaller.load(asked.model, device=asked.device)
    return EndpointCaller(
        asked.endpoint,
        asked.model,
        key_variable=asked.key_variable,
        timeout_s=asked.timeout_s,
        tries=asked.tries,
        temperature=asked.temperature,
    )


def _say_step(step: str, done: int, total: int) -> None:
    # About twenty lines a step, however many things it does.
    if done == total or done % max(total // 20, 1) == 0:
        print(f"{step}: {done:,} of {total:,}", file=sys.stderr)


def _long_sft_text(report: dict[str, Any], output: Path) -> str:
    results, written = report["results"], report["written"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in report["dropped"].items())
    lines = [
        f"videos     {report['videos']:,}, {report['whole']:,} of them whole",
        f"captions   {results['captions']:,} of segments, {results['summaries']:,} of videos",
        f"questions  {written['questions']:,} kept; dropped: {dropped or 'none'}; "
        f"{written['rejected']:,} rejected in review",
        f"samples    {written['samples']:,} in {output / 'dataset.jsonl'}",
        f"failures   {report['failures']:,} in all runs; {len(report['waiting']):,} in the way now",
    ]
    for each in report["waiting"][:10]:
        lines.append(f"  {each['step']} of {each['item']}: {each['message']}")
    if len(report["waiting"]) > 10:
        lines.append(f"  and {len(report['waiting']) - 10:,} more in {output / 'report.json'}")
    return "\n".join(lines)


def review(argv: list[str]) -> int:
    """Run ``longvila data review``."""
    chosen = parse(Review, argv, "data review", None)
    if chosen.once:
        counts = save_decisions(chosen.output, read_decisions(chosen.output))
        page = write_page(chosen.output, most_videos=chosen.most_videos)
        print(f"{page}; {counts['samples']:,} samples, {counts['rejected']:,} items rejected")
        return 0
    with server(chosen.output, port=chosen.port, most_videos=chosen.most_videos) as serving:
        print(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)", file=sys.stderr)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
    return 0
