"""Whether a name can be a checkpoint's, found out before anything is loaded.

A folder must hold a configuration, a file is refused, and for anything else the Hub is asked once,
so that a mistyped path is known at once and not after every file was tried again and again.

It costs one look at a folder, or one request. Neither torch nor transformers is imported: a command
that starts other processes asks this first, and they import them anyway.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from longvila.errors import CheckpointError
from longvila.model.vila.layout import is_vila

#: ``name`` or ``owner/name``, as the Hub writes them.
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
#: Seconds that the Hub has to say whether it knows a name.
_ASK_S = 20.0


def check_source(source: str, *, label: str = "checkpoint") -> None:
    """Make sure that a name can be a checkpoint's before anything is loaded.

    Args:
        source: Folder or hub id.
        label: What the source is called in messages.

    Raises:
        CheckpointError: If it is a file, a folder without a configuration, or neither a folder nor
            a repository that the Hub knows.
    """
    path = Path(source)
    if path.is_dir():
        names = ("config.json", "adapter_config.json")
        if not any((path / name).is_file() for name in names) and not is_vila(source):
            raise CheckpointError(
                f"{label} {source}: there is no config.json in this folder; expected a checkpoint, "
                "as save_pretrained writes it or in the original's layout"
            )
        return
    if path.exists():
        raise CheckpointError(f"{label} {source}: is a file; expected the folder of a checkpoint")
    unknown = f"{label} {source}: there is no such folder"
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(unknown)
    try:
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return
    except HFValidationError as fault:  # "runs--1", "x.git": the Hub has further rules for names
        raise CheckpointError(unknown) from fault
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=_ASK_S)
    except (RepositoryNotFoundError, EntryNotFoundError) as fault:
        raise CheckpointError(f"{unknown}, and the Hub has no such model") from fault
    except HfHubHTTPError:
        return  # Forbidden, or busy: loading says which, and tries again where that helps.
    except Exception as fault:  # Each HTTP library has its own; all mean that nobody answered.
        reason = str(fault).partition("\n")[0] or type(fault).__name__
        raise CheckpointError(f"{unknown}, and the Hub cannot be asked: {reason}") from fault
