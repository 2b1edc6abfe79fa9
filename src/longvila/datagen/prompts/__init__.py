"""What models are told, one text file each; ``$name`` stands for what is filled in.

A folder of one's own may replace some of them or all: a file that is not there is taken from here.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from longvila.errors import LongVILAError

NAMES = (
    "caption", "compose", "merge", "questions", "blind", "judge", "kinds", "ask_caption",
)  # fmt: skip


class Prompts:
    """The texts.

    Args:
        folder: Folder whose files take precedence; None for none.

    Raises:
        LongVILAError: If the folder is absent, or has a text file of no known name.
    """

    def __init__(self, folder: Path | None = None) -> None:
        own: dict[str, str] = {}
        if folder is not None:
            if not folder.is_dir():
                raise LongVILAError(f"{folder}: no such folder of prompts")
            own = {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.txt")}
            unknown = sorted(set(own) - set(NAMES))
            if unknown:
                raise LongVILAError(f"{folder}: no prompt is called {unknown}; there are {NAMES}")
        packaged = resources.files(__name__)
        self._texts = {
            name: own.get(name) or (packaged / f"{name}.txt").read_text(encoding="utf-8")
            for name in NAMES
        }

    def fill(self, name: str, **values: Any) -> str:
        """Return a text, filled in.

        Raises:
            LongVILAError: If the text asks for something else.
        """
        try:
            return Template(self._texts[name]).substitute(values).strip()
        except (KeyError, ValueError) as fault:
            raise LongVILAError(
                f"the prompt {name!r} cannot be filled in: {fault}; it may use "
                f"{sorted(values)}, and $$ for a dollar"
            ) from fault

    def lines(self, name: str) -> list[str]:
        """Return the lines of a list."""
        return [line.strip() for line in self._texts[name].splitlines() if line.strip()]

    @property
    def fingerprint(self) -> str:
        """What two runs with the same texts share."""
        return hashlib.sha256(repr(sorted(self._texts.items())).encode()).hexdigest()[:16]
