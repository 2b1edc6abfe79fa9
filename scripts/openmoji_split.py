"""Write which OpenMoji drawings the built-in benchmark shows, with their names and tiers.

    python scripts/openmoji_split.py src/longvila/evaluation/tasks/openmoji.tsv

The training lists of the small model (``recipes/smol/splits``) name its pictures by set and code
point. Four emoji sets are among them; OpenMoji is not, so each of its drawings is unseen:

- ``unseen``: the name was trained, with other drawings;
- ``new-name``: the name was held out from training altogether.

One drawing a name, the lowest code point; code points without a glyph in the font are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from longvila.evaluation.builtin import draw_emoji
from longvila.packaged import fetch

SPLITS = Path(__file__).parents[1] / "recipes" / "smol" / "splits"
SETS = ("fluent", "twitter", "noto", "emojione")


def main(target: str) -> None:
    """Write the file."""
    font = fetch("openmoji-font")
    # Plane 14 is unassigned: what the font draws for what it does not have.
    missing = draw_emoji(font, 0xE1000).tobytes()
    found: dict[str, tuple[int, str]] = {}
    for part, tier in (("train", "unseen"), ("c", "new-name")):
        for line in (SPLITS / f"{part}.tsv").read_text(encoding="utf-8").splitlines():
            name, _, picture = line.partition("\t")
            source, _, code = picture.partition("/")
            if source not in SETS or not re.fullmatch(r"[0-9a-f]{4,6}", code):
                continue
            number = int(code, 16)
            if draw_emoji(font, number).tobytes() != missing:
                found[name] = min(found.get(name, (number, tier)), (number, tier))
    lines = [f"{code:x}\t{name}\t{tier}" for name, (code, tier) in sorted(found.items())]
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} drawings: {target}")


if __name__ == "__main__":
    main(sys.argv[1])
