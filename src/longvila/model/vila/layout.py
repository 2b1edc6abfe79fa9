"""Finds the parts of a checkpoint in the original's folder layout.

    CKPT/config.json          settings; llm_cfg, vision_tower_cfg, mm_projector_cfg name parts
    CKPT/llm/                 a causal language model with its tokenizer
    CKPT/vision_tower/        a vision encoder with its preprocessor_config.json
    CKPT/mm_projector/        the projector

1. ``CKPT/model`` is used instead when it holds such a config.json.
2. A part whose setting is a dict is the folder of that name. A string is a path (relative to the
   checkpoint or not); if nothing is there, the folder of that name. Paths of the machine that wrote
   the file (``_name_or_path``, ``resume_path``) are never followed.
3. A missing ``vision_tower_cfg`` falls back to the older key ``mm_vision_tower``.
4. ``adapter_config.json`` marks an adapter; its base is a checkpoint of its own.

Nothing is downloaded: a name that is no folder is an error that says how to fetch it. Checkpoints
packed with their own Python files (``model_type`` "vila") have the same folders; the files are not
run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvila.errors import CheckpointError

PARTS = ("llm", "vision_tower", "mm_projector")
_TYPES = frozenset({"llava_llama", "vila"})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class VilaCheckpoint:
    """A checkpoint in the original's layout.

    Args:
        root: Folder with config.json.
        config: Its content.
        parts: Folder of each part.
        adapter: Folder of an adapter laid over the parts, if there is one.
        notes: What was decided while looking, for the user.
    """

    root: Path
    config: dict[str, Any]
    parts: dict[str, Path]
    adapter: Path | None = None
    notes: tuple[str, ...] = ()

    def part_config(self, part: str) -> dict[str, Any]:
        """Return the config.json of a part.

        Args:
            part: One of ``PARTS``.

        Returns:
            Its content.

        Raises:
            CheckpointError: If there is none.
        """
        return read_json(self.parts[part] / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: If the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; is the checkpoint complete?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def is_vila_config(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is that of the original's layout."""
    return config.get("model_type") in _TYPES or "llm_cfg" in config


def is_ours(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint of ours."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "longvila"


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder is an adapter rather than a whole checkpoint."""
    return (folder / "adapter_config.json").is_file()


def is_vila(path: Any) -> bool:
    """Tell whether something names a folder in the original's layout.

    Args:
        path: What was given to ``from_pretrained``.

    Returns:
        Whether it is such a folder.
    """
    if path is None or not Path(path).is_dir():
        return False
    return find_root(path) is not None


def find_root(path: str | Path) -> Path | None:
    """Return the folder of a checkpoint in the original's layout.

    Args:
        path: Any string or path.

    Returns:
        The folder itself or its ``model`` sub-folder, None if neither is such a checkpoint.
    """
    if is_ours(Path(path)):  # whatever lies beside it
        return None
    for folder in (Path(path) / "model", Path(path)):
        file = folder / "config.json"
        if file.is_file() and is_vila_config(read_json(file)):
            return folder
    return None


def open_checkpoint(path: str | Path, base: str | Path | None = None) -> VilaCheckpoint:
    """Find the parts of a checkpoint.

    Args:
        path: Folder of the checkpoint.
        base: For an adapter, the folder of the checkpoint it was trained on.

    Returns:
        The parts.

    Raises:
        CheckpointError: If the folder is not such a checkpoint, a part is missing, or an adapter
            comes without its base.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(_not_a_folder(str(path)))
    if is_adapter(folder):
        if base is None:
            raise CheckpointError(
                f"{folder} is an adapter: give the checkpoint it was trained on with --base"
            )
        found = open_checkpoint(base)
        merged = f"adapter from {folder.name} merged into {found.root.name}"
        return VilaCheckpoint(found.root, found.config, found.parts, folder, (*found.notes, merged))
    if base is not None:
        raise CheckpointError(f"{folder} is no adapter (no adapter_config.json), --base is unused")
    root = find_root(folder)
    if root is None:
        if is_ours(folder):
            raise CheckpointError(f"{folder} is in Hugging Face form already; load it as it is")
        raise CheckpointError(
            f"{folder} is not a checkpoint in the original's layout: its config.json must have "
            f"llm_cfg or a model_type of {', '.join(sorted(_TYPES))}"
        )
    config = read_json(root / "config.json")
    parts: dict[str, Path] = {}
    notes: list[str] = []
    if root != folder:
        notes.append("using the sub-folder model/")
    for part in PARTS:
        parts[part], note = _find_part(root, config, part)
        notes += [note] if note else []
    return VilaCheckpoint(root, config, parts, notes=tuple(notes))


def _find_part(root: Path, config: dict[str, Any], part: str) -> tuple[Path, str | None]:
    value = config.get(f"{part}_cfg")
    if value is None and part == "vision_tower":
        value = config.get("mm_vision_tower")
    inside = root / part
    if isinstance(value, str):
        for candidate in (root / value, Path(value)):
            if value and (candidate / "config.json").is_file():
                return candidate.resolve(), f"{part} from {value!r}, as config.json says"
    if (inside / "config.json").is_file():
        stale = isinstance(value, str) and value != part
        note = f"{part} from the sub-folder; {value!r} of config.json is not here"
        return inside, note if stale else None
    message = f"{root} has no {part}/config.json"
    if isinstance(value, str):
        message += f", and its config.json points to {value!r}. {_not_a_folder(value)}"
    raise CheckpointError(message)


def _not_a_folder(path: str) -> str:
    advice = ""
    if _HUB_ID.fullmatch(path):
        advice = (
            f"; if it is the name of a repository, fetch it whole with `hf download {path} "
            "--local-dir DIR` and give DIR (the original's layout is read from a folder)"
        )
    return f"{path!r} is not a folder{advice}"
