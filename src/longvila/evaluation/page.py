"""Heat maps and pages of results.

A heat map has lengths across and depths down, in the paper's colours over 0 to 1, drawn with PIL:
no plotting library is needed. A page is one HTML file without scripts or links to elsewhere: a
table of all groups with intervals, their heat maps as tables that say n and interval when pointed
at, wrong answers word for word, and the settings.

Cost: nothing to speak of.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from longvila.evaluation.columns import aligned
from longvila.evaluation.runner import Record
from longvila.evaluation.summary import Group, Share, cells

#: Of the paper's figure: 0, one half, 1.
COLOURS = ((0xF0, 0x49, 0x6E), (0xEB, 0xB8, 0x39), (0x9A, 0xD5, 0xB3))
_SHOWN = 40
_LEGEND = (
    "Guess: what choosing at random would get. Unread: answers in which nothing could be read, "
    "which count as wrong. Score: with the standard error clustered by video. Controls show no "
    "pictures: what is right there was not seen."
)


def colour(value: float) -> tuple[int, int, int]:
    """Return the colour of a score.

    Args:
        value: 0 to 1.
    """
    first, second, part = (0, 1, value * 2) if value < 0.5 else (1, 2, value * 2 - 1)
    mixed = [
        round(a + (b - a) * part) for a, b in zip(COLOURS[first], COLOURS[second], strict=True)
    ]
    return mixed[0], mixed[1], mixed[2]


def heat_map(grid: Mapping[tuple[int, float], Share], *, title: str) -> Image.Image:
    """Draw a heat map.

    Args:
        grid: For each (frames, depth) its share.
        title: Stands above it.

    Returns:
        The picture.
    """
    lengths = sorted({frames for frames, _ in grid})
    depths = sorted({depth for _, depth in grid})
    side, left, top, bottom, right = 44, 74, 44, 84, 92
    width = max(left + side * len(lengths) + right, 420)
    picture = Image.new("RGB", (width, top + side * len(depths) + bottom), "white")
    draw = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(12), ImageFont.load_default(15)
    draw.text((left, 12), title, "black", font=large)
    for row, depth in enumerate(depths):
        y = top + row * side
        draw.text((left - 8, y + side / 2), f"{depth:.0%}", "black", font=small, anchor="rm")
        for column, frames in enumerate(lengths):
            x = left + column * side
            cell = grid.get((frames, depth))
            if cell is None:
                continue
            draw.rectangle((x, y, x + side - 2, y + side - 2), colour(cell.accuracy))
            text = f"{cell.accuracy:.2f}".removeprefix("0") if cell.accuracy < 1 else "1"
            draw.text((x + side / 2, y + side / 2), text, "black", font=small, anchor="mm")
    under = top + side * len(depths)
    for column, frames in enumerate(lengths):
        middle = left + column * side + side / 2
        draw.text((middle, under + 6), _short(frames), "black", font=small, anchor="ma")
    draw.text((left, under + 26), "frames", "black", font=small)
    draw.text((8, top - 18), "depth", "black", font=small)
    draw.text((left, under + 46), _under_map(list(grid.values())), "black", font=small)
    bar = left + side * len(lengths) + 24
    for step in range(side * len(depths)):
        draw.line(
            (bar, under - 2 - step, bar + 14, under - 2 - step),
            colour(step / max(1, side * len(depths) - 1)),
        )
    draw.text((bar + 20, top), "1", "black", font=small)
    draw.text((bar + 20, under - 14), "0", "black", font=small)
    return picture


def _under_map(parts: Sequence[Share]) -> str:
    asked = sum(part.n for part in parts)
    # Cells of a tier may have more questions than others, and longer films more to guess from.
    least, most = min(part.n for part in parts), max(part.n for part in parts)
    each = f"{most}" if least == most else f"{least} to {most}"
    guess = sum(part.chance * part.n for part in parts) / asked
    right = sum(part.correct for part in parts)
    return f"{right} of {asked} right, {each} a cell; a guess: {guess:.2f}"


def _short(frames: int) -> str:
    return str(frames) if frames < 1000 else f"{frames / 1000:g}k"


def _percent(part: Share) -> str:
    return f"{part.accuracy:.1%} [{part.low:.1%}, {part.high:.1%}]"


def text_table(groups: Sequence[Group]) -> str:
    """Return the groups as a table for a terminal.

    Args:
        groups: What to show.
    """
    rows = [("", "n", "right [95 %]", "guess", "unread", "by frames")]
    for group in groups:
        lengths = "  ".join(
            f"{_short(frames)}: {part.accuracy:.2f}" for frames, part in group.by_frames.items()
        )
        part = group.all
        rows.append(
            (group.name, str(part.n), _percent(part), f"{part.chance:.1%}", str(part.unread),
             lengths)
        )  # fmt: skip
    return aligned(rows)


def write_page(
    path: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    groups: Sequence[Group],
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write a page and the heat maps beside it.

    Args:
        path: The HTML file.
        title: Its heading.
        settings: Of the run.
        records: Of the run.
        groups: What they say.
        notes: Sentences under the heading.

    Returns:
        The files written.
    """
    written = [path]
    parts = [f"<h1>{_e(title)}</h1>", *(f"<p>{_e(note)}</p>" for note in notes)]
    parts += [f"<p class=note>{_LEGEND}</p>", _table(groups)]
    figures = []
    for group in groups:
        grid = cells(records, group)
        if not grid or group.control:
            continue
        name = "-".join(filter(None, (group.task, group.ask, group.tier)))
        # A tier may be called anything, also what cannot stand in a file's name.
        name = re.sub(r"[^\w.+-]+", "-", name)[:100]
        picture = path.parent / f"heat-{name}.png"
        image = heat_map(grid, title=group.name)
        image.save(picture)
        written.append(picture)
        figures.append(f"<figure>{_inline(image, group.name)}{_grid(grid)}</figure>")
    if figures:
        maps = "".join(figures)
        parts.append(f"<h2>By length and depth</h2><div class=maps>{maps}</div>")
    parts.append(_mistakes(records))
    whole = _e(json.dumps(settings, indent=1, sort_keys=True))
    parts.append(f"<h2>Settings</h2><details><summary>all of them</summary><pre>{whole}</pre>")
    parts.append("</details>")
    path.write_text(_PAGE.format(title=_e(title), body="\n".join(parts)), encoding="utf-8")
    return written


def _e(text: object) -> str:
    return html.escape(str(text))


def _table(groups: Sequence[Group]) -> str:
    lengths = sorted({frames for group in groups for frames in group.by_frames})
    head = "".join(f"<th>{_e(_short(frames))} frame{'s' * (frames > 1)}</th>" for frames in lengths)
    rows = []
    for group in groups:
        cells_of = "".join(
            _cell(group.by_frames[frames]) if frames in group.by_frames else "<td></td>"
            for frames in lengths
        )
        part = group.all
        # Where all answers are alike there is no spread to show; the interval says what is known.
        error = f" ± {part.error:.3f}" if part.error > 0 else ""
        rows.append(
            f"<tr><th>{_e(group.name)}</th><td>{part.n}</td><td>{_e(_percent(part))}</td>"
            f"<td>{part.score:.3f}{error}</td><td>{part.chance:.1%}</td><td>{part.unread}</td>"
            f"{cells_of}</tr>"
        )
    return (
        "<table><tr><th></th><th>n</th><th>right [95 % interval]</th><th>score</th><th>guess</th>"
        f"<th>unread</th>{head}</tr>{''.join(rows)}</table>"
    )


def _cell(part: Share) -> str:
    red, green, blue = colour(part.accuracy)
    tip = f"{part.correct} of {part.n}, {part.low:.3f} to {part.high:.3f}"
    return (
        f'<td style="background:rgb({red},{green},{blue})" title="{_e(tip)}">'
        f"{part.accuracy:.2f}</td>"
    )


def _grid(grid: Mapping[tuple[int, float], Share]) -> str:
    lengths = sorted({frames for frames, _ in grid})
    depths = sorted({depth for _, depth in grid})
    rows = ["<tr><th></th>" + "".join(f"<th>{_short(n)}</th>" for n in lengths) + "</tr>"]
    for depth in depths:
        found = [grid.get((frames, depth)) for frames in lengths]
        row = "".join("<td></td>" if cell is None else _cell(cell) for cell in found)
        rows.append(f"<tr><th>{depth:.0%}</th>{row}</tr>")
    return f"<details><summary>cells</summary><table>{''.join(rows)}</table></details>"


def _inline(image: Image.Image, name: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_e(name)}" src="data:image/png;base64,{data}">'


def _mistakes(records: Sequence[Record]) -> str:
    wrong = [row for row in records if not row["correct"] and not row["shape"].get("control")]
    if not wrong:
        return "<h2>Wrong answers</h2><p>None.</p>"
    rows = "".join(
        f"<tr><td>{_e(row['id'])}</td><td>{_e(row['question'])}</td><td>{_e(row['answer'])}</td>"
        f"<td>{_e(row['said'])}</td><td>{'' if row['read'] is None else _e(row['read'])}</td></tr>"
        for row in wrong[:_SHOWN]
    )
    return (
        f"<h2>Wrong answers: {len(wrong)} of {len(records)} (control questions among them), the "
        f"first {min(len(wrong), _SHOWN)}</h2><table><tr><th>id</th><th>question</th>"
        f"<th>truth</th><th>said</th><th>read as</th></tr>{rows}</table>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 13px; }}
th, td {{ border: 1px solid #ddd; padding: 3px 7px; text-align: left; }}
img {{ display: block; max-width: 100%; margin: 1em 0; }}
.note {{ color: #555; }}
.maps {{ display: flex; flex-wrap: wrap; gap: 1em; }} figure {{ margin: 0; }}
pre {{ background: #f6f6f6; padding: 1em; overflow: auto; }}
</style></head><body>
{body}
</body></html>
"""
