"""Pack text into long rows, make instruction data of long videos, and look at training data.

Commands:
    longvila data pack-text BOOKS/ --tokenizer CHECKPOINT/llm --length 64k --output rows-64k
    longvila data inspect clips.jsonl --adapter llava --media-dir videos --model CHECKPOINT
    longvila data inspect data.yaml
    longvila data adapters
    longvila data long-sft VIDEOS/ --output made --captioner.model CHECKPOINT \\
        --writer.endpoint http://127.0.0.1:8000/v1 --writer.model NAME
    longvila data review made

``pack-text`` and ``long-sft`` go on by themselves where an earlier run was ended, however it was.
``inspect`` takes a source and an adapter, a YAML file of datasets, or a folder that ``pack-text``
wrote. ``long-sft`` cuts videos into segments, has each described, has questions and answers written
and filters them; ``review`` serves a page on which they are accepted and rejected.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longvila.cli._options import parse
from longvila.errors import LongVILAError

#: Reasons printed of each dataset.
_SHOWN = 10


@dataclass(frozen=True)
class PackText:
    """Turn text into rows of exactly so many token ids."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files or folders of .txt, .jsonl, .json, .parquet, or hf:NAME#SPLIT."""
    output: Path
    """Folder of the shards."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    length: str = "64k"
    """Tokens of a row: a number, or one with k or M."""
    text_field: str = "text"
    """Field with the text, or with ids of text that is tokenised already."""
    documents: Literal["file", "line"] = "file"
    """What a document is in a .txt file."""
    format: Literal["parquet", "jsonl", "upstream"] = "parquet"
    """Format of the shards; upstream is the original's stage-4 JSON, without boundaries."""
    end_token: str | None = None
    """Token after each document; the tokenizer's end of text if not given."""
    min_tokens: int = 1
    """Shorter documents are left out."""
    keep_tail: bool = False
    """Write the last row although it is not full."""
    rows_per_shard: int | None = None
    """Rows of a shard; about 64 million tokens if not given."""
    processes: int = 1
    """Processes that tokenise."""


@dataclass(frozen=True)
class Inspect:
    """Print what a source holds."""

    source: Annotated[str, tyro.conf.Positional]
    """A file or folder of records, a YAML file of datasets, or a folder of packed rows."""
    adapter: str | None = None
    """How to read records; `longvila data adapters` lists the names."""
    media_dir: Path | None = None
    """Folder that media paths are relative to."""
    model: str | None = None
    """Checkpoint whose processor counts tokens and looks at the media."""
    frames: int | None = None
    """Frames of a video; the processor's if not given."""
    max_tokens: int = 1 << 20
    """Tokens of a row; longer samples are counted as the length policy treats them."""
    samples: int = 1000
    """Samples looked at, spread over the dataset; 0 for all."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Run the verb."""
    commands = {
        "pack-text": _pack_text,
        "inspect": _inspect,
        "adapters": _adapters,
        "long-sft": _long_sft,
        "review": _review,
    }
    if argv and argv[0] in commands:
        try:
            return commands[argv[0]](argv[1:])
        except ValueError as fault:
            # Wrong settings and records: the message says what to do, a traceback does not.
            raise LongVILAError(str(fault)) from fault
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    given = f"there is no command {argv[0]!r}" if argv else "a command is needed"
    print(f"{__doc__}\nlongvila data: {given}; there are {', '.join(commands)}", file=sys.stderr)
    return 2


def _pack_text(argv: list[str]) -> int:
    from longvila.data.pack_text import PackOptions, Progress, pack_text, parse_length

    chosen = parse(PackText, argv, "data pack-text", None)
    values = {**vars(chosen), "length": parse_length(chosen.length)}
    options = PackOptions(**values)

    def report(progress: Progress) -> None:
        print(
            f"{progress.rows:,} rows, {progress.counts['documents']:,} documents, "
            f"{progress.counts['tokens']:,} tokens",
            file=sys.stderr,
        )

    progress = pack_text(options, report=report)
    print(_packed_text(progress.state(), options.length))
    return 0


def _packed_text(progress: dict[str, Any], length: int) -> str:
    counts = Counter(progress["counts"])
    lines = [
        f"rows       {progress['rows']:,} of {length:,} tokens in {len(progress['shards'])} shards",
        f"documents  {counts['documents']:,}, the longest {counts['longest']:,} tokens; "
        f"{counts['short']:,} too short",
        f"tokens     {counts['tokens']:,}; {counts['tail']:,} in the last row",
        f"cuts       {counts['cuts']:,} documents go on in the next row",
        "",
        *_histogram({int(k): v for k, v in progress["histogram"].items()}),
    ]
    return "\n".join(lines)


def _histogram(bins: dict[int, list[int]]) -> list[str]:
    total = sum(tokens for _, tokens in bins.values()) or 1
    lines = [f"{'length from':>12}  {'documents':>11}  {'tokens':>8}"]
    for start, (number, tokens) in sorted(bins.items()):
        lines.append(f"{start:>12,}  {number:>11,}  {tokens / total:>8.1%}")
    return lines


def _adapters(argv: list[str]) -> int:
    from longvila.data.datasets import ADAPTERS

    for adapter in ADAPTERS.values():
        fields = ", ".join(adapter.required) or "(see the guide)"
        checked = "checked" if adapter.verified else "not checked at its source"
        print(f"{adapter.name:<16} {adapter.about}\n{'':<16} needs {fields}; schema {checked}")
    return 0


def _inspect(argv: list[str]) -> int:
    from longvila.data.datasets import Dataset, open_dataset, read_file

    options = parse(Inspect, argv, "data inspect", None)
    if options.samples < 0:
        raise ValueError(f"--samples must not be below 0, got {options.samples}")
    source = Path(options.source)
    if (source / "manifest.json").exists() and options.adapter is None:
        manifest = json.loads((source / "manifest.json").read_text())
        if not isinstance(manifest, dict) or "progress" not in manifest:
            raise ValueError(f"{source}: not made by pack-text; say how to read it with --adapter")
        text = json.dumps(manifest) if options.json else ""
        print(text or _packed_text(manifest["progress"], manifest["length"]))
        return 0
    datasets: dict[str, Dataset]
    if source.suffix in (".yaml", ".yml"):
        datasets = read_file(source).datasets
    elif options.adapter is None:
        raise ValueError(f"say how to read {source} with --adapter; `longvila data adapters` lists")
    else:
        datasets = {
            options.adapter: open_dataset(
                options.adapter, options.source, media_dir=options.media_dir
            )
        }
    encoder = None
    if options.model is not None:
        encoder = _encoder(options)
    found = {name: survey(each, options.samples, encoder) for name, each in datasets.items()}
    if options.json:
        print(json.dumps(found))
        return _refused(found)
    for name, facts in found.items():
        print(f"{name}: {facts['records']:,} records, {facts['looked_at']:,} looked at")
        for key, value in facts.items():
            if key not in ("records", "looked_at", "histogram", "reasons", "misfits"):
                print(f"  {key.replace('_', ' '):<16} {value:,}")
        for line in _histogram(facts["histogram"]) if facts["histogram"] else ():
            print(f"  {line}")
        for title, key in (("left out", "reasons"), ("stops training", "misfits")):
            for reason in facts[key][:_SHOWN]:
                print(f"  {title}: {reason}")
            if len(facts[key]) > _SHOWN:
                print(f"  {title}: {len(facts[key]) - _SHOWN:,} more; --json lists all")
    return _refused(found)


def _refused(found: dict[str, Any]) -> int:
    """Say that training would stop, and return the status of the command."""
    number = sum(len(facts["misfits"]) for facts in found.values())
    if number:
        print(
            f"longvila data: {number:,} records do not fit their adapter, and training would stop "
            "at the first of them; mend or remove them, or choose another adapter",
            file=sys.stderr,
        )
    return 1 if number else 0


def _encoder(options: Inspect) -> Any:
    """What makes documents for a checkpoint of any known family."""
    from transformers import AutoConfig, AutoProcessor

    from longvila.data.families import coders
    from longvila.model.processing_longvila import LongVILAProcessor

    assert options.model is not None
    try:
        config = AutoConfig.from_pretrained(options.model)
    except (OSError, ValueError):
        config = None  # a processor alone, or the original's layout
    if config is None or config.model_type == "longvila":
        processor: Any = LongVILAProcessor.from_pretrained(options.model)
    else:
        processor = AutoProcessor.from_pretrained(options.model)
    settings = {"max_tokens": options.max_tokens, "num_frames": options.frames}
    return coders(processor, config, encoder=settings, collator={})[0]


def survey(dataset: Any, samples: int, encoder: Any = None) -> dict[str, Any]:
    """Count what a dataset holds.

    Args:
        dataset: The samples.
        samples: How many to look at, spread evenly; 0 for all.
        encoder: Makes documents, to count tokens and find broken media; None only reads records.

    Returns:
        Counts by name, documents and tokens by length, the reasons for leaving out, and what is
        wrong with records that do not fit their adapter (misfits).
    """
    from longvila.data.datasets import SchemaError
    from longvila.data.encode import Rejected
    from longvila.data.records import RecordError
    from longvila.media.image import load_image

    total = len(dataset)
    number = total if samples == 0 else min(samples, total)
    counts: Counter[str] = Counter()
    bins: dict[int, list[int]] = {}
    reasons: list[str] = []
    misfits: list[str] = []
    for step in range(number):
        try:
            sample = dataset[step * total // number]
        except RecordError as fault:
            counts["broken"] += 1
            reasons.append(str(fault))
            continue
        except SchemaError as fault:
            counts["do_not_fit"] += 1
            misfits.append(str(fault))
            continue
        counts["turns"] += len(sample.turns)
        counts["characters"] += sum(len(turn.text) for turn in sample.turns)
        for media in sample.media:
            counts[f"{media.kind}s"] += 1
        length = 0 if sample.token_ids is None else int(sample.token_ids.size)
        if encoder is not None:
            document = encoder(sample)
            if isinstance(document, Rejected):
                counts[document.cause] += 1
                reasons.append(document.reason)
                continue
            try:
                # An encoder need not open pictures to know their tokens; whoever decodes them does.
                for planned in document.media:
                    if planned.media.kind == "image":
                        load_image(planned.media.source)
            except (LongVILAError, OSError) as fault:
                counts["broken"] += 1
                reasons.append(str(fault))
                continue
            length = document.length
            counts["frames_cut"] += document.frames_cut
            counts["targets"] += int((document.labels != -100).sum())
        if length:
            counts["tokens"] += length
            entry = bins.setdefault(1 << (length.bit_length() - 1), [0, 0])
            entry[0] += 1
            entry[1] += length
    return {
        "records": total,
        "looked_at": number,
        **counts,
        "histogram": bins,
        "reasons": reasons,
        "misfits": misfits,
    }


def _long_sft(argv: list[str]) -> int:
    from longvila.cli._long_sft import make

    return make(argv)


def _review(argv: list[str]) -> int:
    from longvila.cli._long_sft import review

    return review(argv)
