"""Convert checkpoints of the original implementation to Hugging Face form, and back.

``longvila convert SRC DST`` reads the three-folder layout (``llm/ vision_tower/ mm_projector/``)
and writes a folder that ``from_pretrained`` loads; ``--to vila`` goes the other way. ``--dry-run``
prints what would go where, with shapes, from the headers alone, and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from longvila.cli._options import parse
from longvila.errors import CheckpointError

if TYPE_CHECKING:
    from longvila.model.vila.plan import Move, Plan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Options:
    """Convert checkpoints of the original implementation to Hugging Face form, and back."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Folder of the checkpoint."""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")] = ""
    """Folder to make; may be left out with --dry-run."""
    to: Literal["longvila", "vila"] = "longvila"
    """Layout to write."""
    base: str | None = None
    """For an adapter (LoRA): the checkpoint it was trained on."""
    token_order: Literal["row", "column"] | None = None
    """Order of a frame's tokens; decided from the files if not given."""
    conversation: str | None = None
    """auto (the tokenizer's template), hermes-2, llama_3, vicuna_v1 or plain; decided if not
    given."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the weights; that of the source if not given."""
    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Limit of a weight file."""
    allow_unused: bool = False
    """Drop tensors that have no place instead of refusing."""
    dry_run: bool = False
    """Print what would go where and write nothing."""


def parse_size(text: str) -> int:
    """Read a size such as ``5GB`` or ``200MB``.

    Args:
        text: A number and a decimal unit.

    Returns:
        Bytes.

    Raises:
        CheckpointError: If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise CheckpointError(f"{text!r} is not a size; write it as 5GB or 200MB")
    return size


def _same_but_for_the_layer(move: Move) -> tuple[str, ...]:
    names = (re.sub(r"\.\d+\.", ".{}.", name) for name in (move.source, move.target))
    return (move.part, *names, str(move.shape), str(move.dtype), move.fate)


def table(moves: Sequence[Move]) -> list[str]:
    """Describe moves, one line for tensors that differ in their layer alone.

    Args:
        moves: What goes where.

    Returns:
        Lines.
    """
    groups: dict[tuple[str, ...], list[Move]] = {}
    for move in moves:
        key = _same_but_for_the_layer(move)
        if move.part == "mm_projector":
            key = (move.source, *key)
        groups.setdefault(key, []).append(move)
    lines = []
    for group in groups.values():
        first = group[0]
        source, target = first.source, first.target
        if len(group) > 1:
            layers = sorted(int(re.findall(r"\.(\d+)\.", m.source)[0]) for m in group)
            span = f".{{{layers[0]}..{layers[-1]}}}."
            source, target = (re.sub(r"\.\d+\.", span, name, count=1) for name in (source, target))
        shape = "x".join(map(str, first.shape)) or "scalar"
        kind = str(first.dtype).removeprefix("torch.")
        fate = {
            "used": target,
            "kept": f"{target}  (kept, not used)",
            "recomputed": "(left out: every model computes it)",
            "dropped": "(DROPPED: no place for it)",
        }[first.fate]
        times = f" x{len(group)}" if len(group) > 1 else ""
        lines.append(f"{first.part}/{source}  [{shape}] {kind}{times}\n    -> {fate}")
    return lines


def summary(plan: Plan) -> list[str]:
    """Describe a plan in a few lines.

    Args:
        plan: The plan.

    Returns:
        Lines.
    """
    config = plan.config
    stop = plan.tokenizer.convert_ids_to_tokens(plan.stop_ids)
    count = sum(move.fate == "used" for move in plan.moves)
    kept = sum(move.fate == "kept" for move in plan.moves)
    dropped = len(plan.moves) - count - kept
    return [
        *plan.notes,
        f"vision: {config.vision_config.model_type}, {config.image_size[0]} pixels, "
        f"{config.patch_grid[0]}x{config.patch_grid[1]} patches; "
        f"projector {config.projector_type}: "
        f"{config.tokens_per_frame} tokens a frame + {config.frame_separator!r}"
        + (f"; pooled by {config.pool_sizes}" if config.pool_sizes else ""),
        f"language model: {config.text_config.model_type}, context {config.context_length}; "
        f"answers end with {', '.join(map(repr, stop))}",
        f"{count} tensors used, {kept} not used but kept for the way back, {dropped} left out",
    ]


def _to_vila(options: Options) -> int:
    from longvila.model.convert_vila import convert_to_vila, plan_to_vila

    refused = [
        name
        for name in ("base", "token_order", "conversation", "dtype", "allow_unused")
        if getattr(options, name)
    ]
    if refused:
        flags = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise CheckpointError(f"{flags} cannot be combined with --to vila")
    if options.dry_run:
        plan = plan_to_vila(options.source)
        for part, entries in plan.entries.items():
            for entry in entries:
                shape = "x".join(map(str, entry.shape)) or "scalar"
                print(f"{part}/{entry.name}  [{shape}] {str(entry.dtype).removeprefix('torch.')}")
        notes = plan.notes
    else:
        notes = convert_to_vila(
            options.source, options.destination, max_shard_bytes=parse_size(options.max_shard_size)
        )
    for note in notes:
        print(note)
    if not options.dry_run:
        print(f"wrote {options.destination}")
    return 0


def main(argv: list[str]) -> int:
    """Run ``longvila convert``.

    Args:
        argv: Arguments.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "convert", __doc__)
    if not options.destination and not options.dry_run:
        raise CheckpointError("where to? give a destination, or --dry-run to look first")
    if options.to == "vila":
        return _to_vila(options)
    import torch

    from longvila.model.convert_vila import convert_to_longvila, plan_conversion

    decisions: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("base", "token_order", "conversation", "allow_unused")
    }
    if options.dry_run:
        plan = plan_conversion(options.source, **decisions)
        print("\n".join([*table(plan.moves), "", *summary(plan)]))
        return 0
    plan = convert_to_longvila(
        options.source,
        options.destination,
        **decisions,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_bytes=parse_size(options.max_shard_size),
    )
    print("\n".join(summary(plan)))
    print(f"wrote {options.destination}")
    return 0
