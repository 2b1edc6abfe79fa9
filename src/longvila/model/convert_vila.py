"""Checkpoints of the original implementation to ours, and back.

`convert_to_longvila` plans from headers alone (see `longvila.model.vila.plan`), then streams tensor
by tensor into one sharded Hugging Face folder. Beside the weights it writes what a user needs to
run the model (configuration, generation settings, tokenizer, processor, chat template), the licence
files of the source with a notice, and ``vila_original/``: the source's JSON and tokenizer files,
from which `convert_to_vila` restores what our files do not say.

`convert_to_vila` writes the three folders. Weights are bit for bit those that came in. A model that
was saved by transformers since has lost the layers of the tower that it does not use; its tower is
then written at the depth it has, and the settings say which output to take, so that the result is
the same.

Cost: every byte is read and written once. Memory: the largest tensor. A destination appears under
its name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.vila.layout import PARTS, find_root, read_json
from longvila.model.vila.loading import generation_config, make_processor
from longvila.model.vila.names import vila_name
from longvila.model.vila.plan import Plan, plan_conversion
from longvila.model.vila.settings import write_part, write_settings
from longvila.model.vila.tokens import bare_frame_end, write_tokenizer
from longvila.model.vila.weights import Entry, WeightFiles, read_entries, write_shards

ORIGIN = "vila_original"
DEFAULT_SHARD_BYTES = 5 * 1000**3
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README*")
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_CARRIED = {
    "llm": ("config.json", "generation_config.json", *_TOKENIZER),
    "vision_tower": ("config.json", "preprocessor_config.json"),
    "mm_projector": ("config.json",),
}
_NOTICE = """\
These weights were converted from a checkpoint of the original implementation ({name}).
Converting changes names and file layout only: the terms of the source still hold.

* The official LongVILA and VILA weights are published under CC-BY-NC-SA-4.0 (no commercial use,
  share alike, give credit).
* The language model inside ({text}) keeps the terms of its own publisher as well: the Qwen2
  licence for Qwen2 models, Meta's community licence for Llama models.
* The vision tower ({vision}) keeps the terms of its publisher.

Licence files and the model card of the source, where it had any, are beside this file.
"""


def convert_to_longvila(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    token_order: str | None = None,
    conversation: str | None = None,
    allow_unused: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Plan:
    """Convert a checkpoint of the original layout.

    Args:
        source: Its folder.
        destination: Folder to make; must not exist or be empty.
        base: For an adapter, the checkpoint it was trained on.
        token_order: ``row`` or ``column``; None decides by the files.
        conversation: A conversation format, ``auto`` for the tokenizer's; None decides by the
            files.
        allow_unused: Whether tensors without a place may be dropped.
        dtype: Type of the weights, None to keep what is stored.
        max_shard_bytes: Limit of a weight file.

    Returns:
        The plan that was carried out.

    Raises:
        CheckpointError: If the source cannot be converted or the destination is in use.

    Memory:
        The largest tensor.
    """
    plan = plan_conversion(
        source,
        base=base,
        token_order=token_order,
        conversation=conversation,
        allow_unused=allow_unused,
    )
    if dtype is not None:
        plan.config.dtype = dtype
    with _new_folder(destination) as folder:
        write_shards(folder, plan.entries(dtype), max_shard_bytes)
        config = plan.config
        config.architectures = ["LongVILAForConditionalGeneration"]
        config.save_pretrained(folder)
        generation_config(plan).save_pretrained(folder)
        make_processor(plan).save_pretrained(folder)
        _carry_origin(plan, folder / ORIGIN)
        _carry_licences(plan, folder, Path(source).resolve().name)
    return plan


@dataclass(frozen=True)
class PlanToVila:
    """How one of our checkpoints becomes three folders.

    Args:
        source: Where it is.
        config: Its configuration, fitted to what the original can say.
        origin: What was carried along from the original, if it is there.
        entries: Tensors of each part under their names there.
        dtype: Type of the weights, as ``bfloat16``.
        notes: Decisions, for the user.
    """

    source: Path
    config: LongVILAConfig
    origin: Path | None
    entries: dict[str, list[Entry]]
    dtype: str
    notes: list[str]


def plan_to_vila(source: str | Path) -> PlanToVila:
    """Plan how one of our checkpoints is written in the original layout.

    Args:
        source: Folder written by `convert_to_longvila` or by ``save_pretrained``.

    Returns:
        The plan.

    Raises:
        CheckpointError: If the source is not ours or the original has no place for what it is.
    """
    source = Path(source)
    config = _read_ours(source)
    weights = WeightFiles(source)
    origin = source / ORIGIN if (source / ORIGIN).is_dir() else None
    notes: list[str] = [] if origin else [f"no {ORIGIN}/: settings are written anew"]
    names: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    for name in weights.tensors:
        part, old = vila_name(name)
        names[part][name] = old
    entries = {part: read_entries(weights, names[part]) for part in PARTS}
    config.frame_separator = bare_frame_end(
        AutoTokenizer.from_pretrained(source), config.frame_separator
    )
    config, extra = _fit_tower(config, entries["vision_tower"], notes)
    entries["vision_tower"] += extra
    dtype = str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
    return PlanToVila(source, config, origin, entries, dtype, notes)


def convert_to_vila(
    source: str | Path,
    destination: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[str]:
    """Convert one of our checkpoints to the original layout.

    Args:
        source: Folder written by `convert_to_longvila` or by ``save_pretrained``.
        destination: Folder to make; must not exist or be empty.
        max_shard_bytes: Limit of a weight file.

    Returns:
        Decisions, for the user.

    Raises:
        CheckpointError: If the source is not ours, the original has no place for what it is, or
            the destination is in use.

    Memory:
        The largest tensor.
    """
    plan = plan_to_vila(source)
    origin = plan.origin
    with _new_folder(destination) as folder:
        for part in PARTS:
            (folder / part).mkdir()
            if plan.entries[part]:
                write_shards(folder / part, plan.entries[part], max_shard_bytes)
        settings = _write_configs(folder, plan.config, origin, plan.dtype)
        _write_json(folder / "config.json", settings)
        _write_preprocessor(folder / "vision_tower", plan.source, plan.config, origin)
        write_tokenizer(plan.source, folder / "llm", origin / "llm" if origin else None)
        _restore(origin, "llm", "generation_config.json", folder)
        _copy_matching(plan.source, folder, ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"))
    return plan.notes


def _read_ours(source: Path) -> LongVILAConfig:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json")
    kind = read_json(source / "config.json").get("model_type")
    if kind != LongVILAConfig.model_type:
        hint = "; it is in the original's layout already" if find_root(source) else ""
        raise CheckpointError(f"{source} is not one of our checkpoints (model_type {kind!r}){hint}")
    config = LongVILAConfig.from_pretrained(source)
    tower = config.vision_config.model_type
    if tower not in ("siglip_vision_model", "clip_vision_model"):
        raise CheckpointError(f"the original cannot read a vision tower of type {tower!r}")
    return config


def _fit_tower(
    config: LongVILAConfig, entries: list[Entry], notes: list[str]
) -> tuple[LongVILAConfig, list[Entry]]:
    """Describe a tower whose unused layers are gone as one of the depth it has."""
    stored = {entry.name for entry in entries}
    if "vision_model.post_layernorm.weight" in stored:
        return config, []
    depth = config.num_vision_layers
    config = LongVILAConfig.from_dict(config.to_dict())
    config.vision_config.num_hidden_layers = depth
    config.vision_config.vision_use_head = False
    config.vision_feature_layer = -1
    notes.append(
        f"the tower's unused layers are not in the source: written with {depth} layers, taking the "
        "output of the last"
    )
    width = (config.vision_config.hidden_size,)
    kind = entries[0].dtype
    extra = [
        Entry(
            "vision_model.post_layernorm.weight", width, kind, lambda: torch.ones(width, dtype=kind)
        ),
        Entry(
            "vision_model.post_layernorm.bias", width, kind, lambda: torch.zeros(width, dtype=kind)
        ),
    ]
    return config, extra


def _write_configs(
    folder: Path, config: LongVILAConfig, origin: Path | None, dtype: str
) -> dict[str, Any]:
    """Write config.json of each part and return that of the whole."""
    first = read_json(origin / "config.json") if origin else None
    settings = write_settings(config, first)
    for part, values in (("llm", config.text_config), ("vision_tower", config.vision_config)):
        before = read_json(origin / part / "config.json") if origin else None
        content = write_part(values, before, dtype)
        _write_json(folder / part / "config.json", content)
        settings[f"{part}_cfg"] = content
    if origin:
        projector = read_json(origin / "mm_projector" / "config.json")
        projector.pop("_name_or_path", None)
    else:
        projector = {
            "architectures": ["MultimodalProjector"],
            "mm_projector_type": config.projector_type,
            "model_type": "v2l_projector",
            "torch_dtype": dtype,
        }
    _write_json(folder / "mm_projector" / "config.json", projector)
    settings["mm_projector_cfg"] = projector
    return settings


def _write_preprocessor(
    folder: Path, source: Path, config: LongVILAConfig, origin: Path | None
) -> None:
    if origin and (origin / "vision_tower" / "preprocessor_config.json").is_file():
        shutil.copyfile(
            origin / "vision_tower" / "preprocessor_config.json",
            folder / "preprocessor_config.json",
        )
        return
    height, width = config.image_size
    file = source / "processor_config.json"
    ours = read_json(file).get("image_processor", {}) if file.is_file() else {}
    content = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": ours.get("image_mean", [0.5, 0.5, 0.5]),
        "image_std": ours.get("image_std", [0.5, 0.5, 0.5]),
        "image_processor_type": "SiglipImageProcessor",
        "resample": 3,
        "rescale_factor": ours.get("rescale_factor", 1 / 255),
        "size": {"height": height, "width": width},
    }
    if config.vision_config.model_type == "clip_vision_model":
        # The original asks a tower of this kind for the size of its crop.
        content |= {
            "crop_size": content["size"],
            "do_center_crop": True,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": min(height, width)},
        }
    _write_json(folder / "preprocessor_config.json", content)


def _carry_origin(plan: Plan, folder: Path) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", _without_paths(plan.checkpoint.config))
    for part, files in _CARRIED.items():
        (folder / part).mkdir()
        for name in files:
            file = plan.checkpoint.parts[part] / name
            if not file.is_file():
                continue
            if name == "config.json":
                _write_json(folder / part / name, _without_paths(read_json(file)))
            else:
                shutil.copyfile(file, folder / part / name)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Drop the paths of the machine that wrote a configuration."""
    kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "resume_path")}
    return {k: _without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _carry_licences(plan: Plan, folder: Path, name: str) -> None:
    for place in (plan.checkpoint.root, plan.checkpoint.parts["llm"], plan.checkpoint.root.parent):
        if place is not plan.checkpoint.root.parent or plan.checkpoint.root.name == "model":
            _copy_matching(place, folder, _LICENCES)
    text = plan.config.text_config.model_type
    vision = plan.config.vision_config.model_type
    notice = _NOTICE.format(name=name, text=text, vision=vision)
    (folder / "WEIGHTS_NOTICE.md").write_text(notice, encoding="utf-8")


def _copy_matching(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copy files by pattern; those that are there already stay."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _restore(origin: Path | None, part: str, name: str, folder: Path) -> None:
    if origin and (origin / part / name).is_file():
        shutil.copyfile(origin / part / name, folder / part / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(destination: str | Path) -> Iterator[Path]:
    """A folder whose content appears when the body is done, and is removed if the body fails.

    One that exists is filled and not replaced: it may be a link, a mount, or where the shell is.
    """
    target = Path(destination)
    exists = target.exists()
    partial = target / ".partial" if exists else target.with_name(f".{target.name}.partial")
    if exists and (not target.is_dir() or any(path != partial for path in target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if not exists:
        partial.rename(target)
        return
    for path in partial.iterdir():
        path.rename(target / path.name)
    partial.rmdir()
