"""What of a checkpoint goes where: made from headers and JSON files, before any weight is read.

1. Settings, tokenizer, media tokens and the rows of the embedding table are read from the files.
2. Every stored tensor is given its place (see `names`) and its shape is compared.
3. Tensors without a place, and places without a tensor, are collected; the plan refuses to go on
   with either unless told that leftovers may be dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.vila.adapter import Adapter, check_places, read_adapter
from longvila.model.vila.layout import PARTS, VilaCheckpoint, open_checkpoint
from longvila.model.vila.names import is_recomputed, our_name, places
from longvila.model.vila.settings import read_settings
from longvila.model.vila.tokens import (
    IMAGE,
    VIDEO,
    Template,
    choose_template,
    frame_end,
    load_tokenizer,
    packed_template,
    stop_token_ids,
)
from longvila.model.vila.weights import Entry, WeightFiles

_TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Move:
    """One tensor and its new name.

    Args:
        part: ``llm``, ``vision_tower`` or ``mm_projector``.
        source: Its name there.
        target: Its name in our model; "" if it is dropped.
        shape: Its shape.
        dtype: Its type.
        fate: ``used``, ``kept`` (written, though our model leaves it out), ``recomputed`` (dropped:
            every model computes it) or ``dropped`` (no place, and the user allowed it).
    """

    part: str
    source: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fate: str


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes ours.

    Args:
        checkpoint: Where it is.
        config: Our configuration.
        tokenizer: Its tokenizer, with media tokens.
        template: Chat template.
        stop_ids: Tokens that end an answer.
        moves: Every stored tensor.
        files: Weights of each part.
        adapter: What an adapter changes.
        notes: Decisions, for the user.
    """

    checkpoint: VilaCheckpoint
    config: LongVILAConfig
    tokenizer: Any
    template: Template
    stop_ids: list[int]
    moves: list[Move]
    files: dict[str, WeightFiles]
    adapter: Adapter | None
    notes: tuple[str, ...]

    def read(self, move: Move) -> Tensor:
        """Return the tensor of a move, with the adapter's change if there is one."""
        tensor = self.files[move.part].read(move.source)
        if self.adapter is not None:
            tensor = self.adapter.apply(move.part, move.source, tensor)
        return tensor

    def entries(self, dtype: torch.dtype | None = None) -> list[Entry]:
        """Return what is to be written.

        Args:
            dtype: Type for floating-point tensors, None to keep what is stored.

        Returns:
            Entries in the order of the parts.
        """

        def cast(read: Callable[[], Tensor], to: torch.dtype) -> Tensor:
            return read().to(to)

        entries = []
        for move in self.moves:
            if not move.target:
                continue
            to = dtype if dtype is not None and move.dtype.is_floating_point else move.dtype
            read: Callable[[], Tensor] = partial(self.read, move)
            if to != move.dtype:
                read = partial(cast, read, to)
            entries.append(Entry(move.target, move.shape, to, read))
        return entries

    def state_dict(self) -> dict[str, Any]:
        """Return what our model uses, for transformers' loader; data is read when it is asked
        for."""
        changed = self.adapter.names if self.adapter else set()
        return {
            move.target: self.read(move)
            if (move.part, move.source) in changed
            else self.files[move.part].lazy(move.source)
            for move in self.moves
            if move.fate == "used"
        }


def plan_conversion(
    path: str | Path,
    *,
    base: str | Path | None = None,
    token_order: str | None = None,
    conversation: str | None = None,
    allow_unused: bool = False,
) -> Plan:
    """Plan how a checkpoint in the original's layout becomes ours.

    Args:
        path: Its folder.
        base: For an adapter, the checkpoint it was trained on.
        token_order: ``row`` or ``column``; None decides by the files.
        conversation: A conversation format, ``auto`` for the tokenizer's; None decides by the
            files.
        allow_unused: Whether tensors without a place may be dropped.

    Returns:
        The plan.

    Raises:
        CheckpointError: If the checkpoint is incomplete, needs what this model does not do, or has
            tensors without a place; they are named.
    """
    checkpoint = open_checkpoint(path, base)
    folder = Path(path).resolve().name
    settings = read_settings(checkpoint, folder=folder, token_order=token_order)
    notes = list(settings.notes)
    files = {part: WeightFiles(checkpoint.parts[part]) for part in PARTS if _has(checkpoint, part)}
    adapter = read_adapter(checkpoint.adapter) if checkpoint.adapter else None
    if adapter is not None:
        check_places(adapter, files)
    tokenizer = load_tokenizer(checkpoint.parts["llm"])
    packed = packed_template(checkpoint.root, checkpoint.config) if conversation is None else None
    if packed is not None:
        tokenizer.chat_template, conversation = packed, "auto"
        notes.append(f"chat template {checkpoint.config['chat_template']}.jinja of the repository")
    template = choose_template(tokenizer, folder, conversation)
    notes.append(template.reason)
    values = dict(settings.values)
    rows, dtype = _table(files["llm"])
    if values["text_config"].get("vocab_size") != rows:
        notes.append(
            f"vocab_size {values['text_config'].get('vocab_size')} of llm/config.json becomes "
            f"{rows}, the rows of the embedding table"
        )
        values["text_config"]["vocab_size"] = rows
    image_id, video_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    text = frame_end(tokenizer, values["frame_separator"], token_order=values["token_order"])
    if text != values["frame_separator"]:
        notes.append(
            f"frames end with {text!r}, as this tokenizer writes {values['frame_separator']!r}"
        )
        values["frame_separator"] = text
    config = LongVILAConfig(image_token_id=image_id, video_token_id=video_id, dtype=dtype, **values)
    notes.append(
        f"{rows} embedding rows, {len(tokenizer)} tokens; {IMAGE} is {image_id}, "
        f"{VIDEO} is {video_id}"
    )
    moves = _moves(config, files, allow_unused)
    stop = stop_token_ids(tokenizer, template)
    return Plan(checkpoint, config, tokenizer, template, stop, moves, files, adapter, tuple(notes))


def _has(checkpoint: VilaCheckpoint, part: str) -> bool:
    """An identity projector has no weights."""
    if part != "mm_projector":
        return True
    return checkpoint.part_config(part).get("mm_projector_type") != "identity"


def _table(files: WeightFiles) -> tuple[int, torch.dtype]:
    table = files.tensors.get(_TABLE)
    if table is None:
        raise CheckpointError(f"{files.folder} has no tensor {_TABLE}: is it a causal LM?")
    return table.shape[0], table.dtype


def _moves(config: LongVILAConfig, files: dict[str, WeightFiles], allow_unused: bool) -> list[Move]:
    room = places(config)
    moves: list[Move] = []
    leftovers, wrong = [], []
    for part in files:
        for name, stored in files[part].tensors.items():
            target = our_name(part, name, room)
            fate = "used" if target in room.used else "kept"
            if target is None:
                fate = "recomputed" if is_recomputed(name) else "dropped"
                if fate == "dropped":
                    leftovers.append(f"{part}: {name} {list(stored.shape)}")
            elif room.shape(target) != stored.shape:
                expected = list(room.shape(target) or ())
                wrong.append(f"{part}: {name} is {list(stored.shape)}, expected {expected}")
            moves.append(Move(part, name, target or "", stored.shape, stored.dtype, fate))
    got = {move.target for move in moves}
    missing = sorted(set(room.used) - got - room.tied)
    for problem, names in (
        ("tensors of another shape than config.json says", wrong),
        ("tensors are missing", missing),
    ):
        if names:
            raise CheckpointError(f"{len(names)} {problem}: {_some(names)}")
    if leftovers and not allow_unused:
        raise CheckpointError(
            f"{len(leftovers)} tensors have no place in the model: {_some(leftovers)}; "
            "--allow-unused drops them"
        )
    return moves


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more
