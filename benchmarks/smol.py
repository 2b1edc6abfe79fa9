"""Tables and drawings of the small model's five stages, from the result files of its runs.

Results are ``*_needle_smol_PART_TIER.json`` (one for each part that was measured and tier; with
``_WAY`` behind, where another protocol, other lengths, more questions or the controls were a run of
their own; what two ask alike is added up) and
``*_training_smol.json`` (losses of all parts); the newest by name counts. Another recipe's have
``smol-RECIPE`` for ``smol``, so that no table mixes two; a recipe that went on from parts of
another has those (`SHARED`). ``smol-two`` are losses on one GPU and on two. A block says by
``method=smol-RECIPE`` whose results it draws. Every table leaves out what has not been measured;
nothing stands in for it. Tiers are tables of their own, never averaged.

Drawings are SVG, written as text beside the page, so that a check can compare them:
``loss.svg``, a panel a stage, and ``heat-PART-WAY.svg``, frames across and depths down, both of the
latest recipe (`STORY`).
"""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvila.evaluation.metrics import wilson_interval
from longvila.evaluation.page import colour

#: Where drawings lie, seen from the root; the page is beside the folder.
FOLDER = Path("docs/results/smol")
PAGE_TO_FOLDER = FOLDER.name
SPLITS = Path(__file__).parents[1] / "recipes" / "smol" / "splits"
#: Parts that are measured, in the order of tables, and what tables call them.
PARTS = {
    "sft": "after stage 3: videos of up to 32 frames",
    "extend": "after stage 4: context extended on text (no stage 5)",
    "long": "in stage 5: videos of up to 2,048 frames",
    "longer": "in stage 5: first steps with videos of up to 6,000 frames",
    "longest": "after stage 5: videos of up to 6,000 frames",
    "final": "after a second pass of stage 5: videos of up to 6,000 frames",
    "furthest": "after a third pass of stage 5: videos of up to 6,000 frames",
    "shipped": "as shipped: stored in eight bits",
}
ABLATIONS = {
    "half-long": "stages 3, 4, 5",
    "half-extend": "stages 3, 4: without stage 5",
    "direct-long": "stages 3, 5: without stage 4",
    "last-extend": "stages 3, 5, 4: stage 4 last",
}
TIERS = {
    "a": "pictures seen in training",
    "b": "unseen pictures of trained names",
    "c": "unseen names",
}
STAGES = {
    "align": "stage 1, align", "pretrain": "stage 2, pretrain", "sft": "stage 3, short videos",
    "extend": "stage 4, context", "long": "stage 5, to 2,048 frames",
    "longer": "stage 5, first to 6,000 frames", "longest": "stage 5, to 6,000 frames",
    "again": "second pass, to 2,048 frames", "final": "second pass, to 6,000 frames",
    "further": "third pass, to 2,048 frames", "furthest": "third pass, to 6,000 frames",
}  # fmt: skip
#: Whose drawings there are: the first of these that was run.
STORY = ("smol-fifth", "smol-fourth", "smol-third", "smol")
#: Recipes that went on from another's parts.
_FIRST = ("align", "pretrain", "sft", "shipped")
SHARED = {
    "smol-third": ("smol", _FIRST),
    "smol-fourth": ("smol-third", (*_FIRST, "long", "longer", "longest")),
    "smol-fifth": ("smol-fourth", (*_FIRST, "long", "longer", "longest", "again", "final")),
}
WAYS = {
    ("retrieval", "free"): "what is shown at mm:ss, own words",
    ("retrieval", "choice"): "the same, likeliest of the offered names",
    ("grounding", "free"): "when does it appear, own words",
    ("grounding", "choice"): "the same, likeliest of the offered times",
    ("paper", "forced"): "the paper's protocol: the true answer read in, every token likeliest",
}
#: Part, tier and way behind what all names of a run's results have.
NAME = re.compile(r"(.+?)_([abc])(?:_([a-z]+))?")
#: What "beyond" means in tables: no video of stage 3 comes near.
BEYOND = 1024


@dataclass(frozen=True)
class Count:
    """Right answers among some."""

    right: int
    n: int
    chance: float

    def __add__(self, other: Count) -> Count:
        total = self.n + other.n
        chance = (self.chance * self.n + other.chance * other.n) / total
        return Count(self.right + other.right, total, chance)

    @property
    def share(self) -> float:
        return self.right / self.n

    def __str__(self) -> str:
        low, high = wilson_interval(self.right, self.n, confidence=0.95)
        return f"{100 * self.share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


@dataclass(frozen=True)
class Measured:
    """One tier after one part."""

    part: str
    tier: str
    rows: list[dict[str, Any]]
    grids: list[dict[str, Any]]

    def counts(self, way: tuple[str, str], control: str | None = None) -> dict[int, Count]:
        """Right answers by frames, over all sets of questions of this kind."""
        out: dict[int, Count] = {}
        for row in self.rows:
            shape, m = row["shape"], row["metrics"]
            same = (shape["task"], shape["ask"]) == way and shape["control"] == control
            if same and shape["frames"] is not None:
                right = round(m["accuracy"] * shape["n"])
                count = Count(right, shape["n"], m["chance"])
                before = out.get(shape["frames"])
                out[shape["frames"]] = before + count if before else count
        return dict(sorted(out.items()))


def read(folder: Path, run: str = "smol") -> dict[tuple[str, str], Measured]:
    """Newest needle results of a run by part and tier, all ways of asking together."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*_needle_{run}_*.json")):
        found = NAME.fullmatch(path.stem.partition(f"_needle_{run}_")[2])
        if found is not None:
            newest[found.groups("")] = json.loads(path.read_text(encoding="utf-8"))
    out: dict[tuple[str, str], Measured] = {}
    for (part, tier, way), result in sorted(newest.items()):
        one = out.setdefault((part, tier), Measured(part, tier, [], []))
        if way == "controls":
            # Their few questions with needles are among the grid's.
            one.rows.extend(row for row in result["rows"] if row["shape"]["control"])
            continue
        one.rows.extend(result["rows"])
        for grid in result.get("grids", []):
            _join(one.grids, grid)
    if run in SHARED:
        other, parts = SHARED[run]
        shared = {key: one for key, one in read(folder, other).items() if key[0] in parts}
        out = {**shared, **out}
    return out


def _join(grids: list[dict[str, Any]], grid: dict[str, Any]) -> None:
    """Add a grid to those of its part and tier; cells of the same question are added up."""
    for one in grids:
        if (one["task"], one["ask"]) == (grid["task"], grid["ask"]):
            here, more = (sum(n for *_, n in each["cells"]) for each in (one, grid))
            one["chance"] = (here * one["chance"] + more * grid["chance"]) / (here + more)
            cells: dict[tuple[int, float], list[int]] = {}
            for frames, depth, right, n in (*one["cells"], *grid["cells"]):
                cell = cells.setdefault((frames, depth), [0, 0])
                cell[0] += right
                cell[1] += n
            one["cells"] = [[*place, *count] for place, count in cells.items()]
            return
    grids.append(grid)


def read_training(folder: Path, run: str = "smol") -> list[dict[str, Any]]:
    """Rows of the newest training result of a run, behind those of parts it shares."""
    files = sorted(folder.glob(f"*_training_{run}.json"))
    if not files:
        return []
    rows: list[dict[str, Any]] = json.loads(files[-1].read_text(encoding="utf-8"))["rows"]
    if run in SHARED:
        other, parts = SHARED[run]
        shared = [row for row in read_training(folder, other) if row["shape"]["part"] in parts]
        rows = [*shared, *rows]
    return rows


def run_of(result: dict[str, Any]) -> str:
    """The run that a result belongs to, as files' names say it."""
    name: str = result["rows"][0]["method"].partition(" ")[0]
    return "smol" if name in ("smol-stages", "smol-shipped") else name


def part_of(result: dict[str, Any]) -> str | None:
    """The part of which a result is, where it is of no stage."""
    return "shipped" if result["rows"][0]["method"] == "smol-shipped" else None


def story(folder: Path) -> str:
    """The run whose drawings there are."""
    runs = (run for run in STORY if any(folder.glob(f"*_{run}_*")) or read_training(folder, run))
    return next(runs, STORY[-1])


def _total(counts: dict[int, Count]) -> Count:
    first, *others = counts.values()
    for other in others:
        first += other
    return first


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *rows)]


def _frames(frames: int) -> str:
    return f"{frames:,}"


def last_part(found: dict[tuple[str, str], Measured]) -> str:
    """The latest measured part of the five stages."""
    there = [part for part in PARTS if part != "shipped" and any(p == part for p, _ in found)]
    if not there:
        raise FileNotFoundError("no result of a stage of `smol-stages`")
    return there[-1]


# ---- tables -------------------------------------------------------------------------------------


def tiers(folder: Path, run: str = "smol", part: str | None = None) -> list[str]:
    """The finished model: a table a tier, with its controls."""
    found = read(folder, run)
    part = part or last_part(found)
    lines = [f"The model {PARTS.get(part, part)}. Right in percent, with 95 % intervals.", ""]
    for tier, what in TIERS.items():
        one = found.get((part, tier))
        if one is None:
            continue
        controls = sorted({row["shape"]["control"] or "" for row in one.rows})
        lengths = sorted({row["shape"]["frames"] for row in one.rows} - {None})
        cells = []
        for way, name in WAYS.items():
            for control in controls:
                counts = one.counts(way, control or None)
                if not counts:
                    continue
                total = _total(counts)
                shown = f"control, {control}: {name}" if control else name
                by_length = [f"{100 * counts[n].share:.0f}" if n in counts else "" for n in lengths]
                cells.append(
                    [shown, str(total.n), str(total), f"{100 * total.chance:.0f}", *by_length]
                )
        header = ["question", "n", "all frames", "a guess", *map(_frames, lengths)]
        lines += [f"**Tier {tier}: {what}**", "", *_table(header, cells), ""]
        lines += _length_costs(one, lengths)
    return lines[:-1]


def summary(folder: Path, run: str = "smol", part: str | None = None) -> list[str]:
    """A line a tier and way of asking: one model in short, by default that of the last part."""
    found = read(folder, run)
    part = part or last_part(found)
    lengths = sorted(
        {row["shape"]["frames"] for (p, _), one in found.items() if p == part for row in one.rows}
        - {None}
    )
    cells = []
    for tier, what in TIERS.items():
        for ask, name in (("free", "own words"), ("choice", "likeliest name")):
            counts = found[part, tier].counts(("retrieval", ask)) if (part, tier) in found else {}
            if counts:
                total = _total(counts)
                shown = [f"{100 * counts[n].share:.0f}" if n in counts else "" for n in lengths]
                cells.append(
                    [f"{what}; {name}", str(total.n), str(total), f"{100 * total.chance:.0f}",
                     *shown]
                )  # fmt: skip
    header = ["pictures pasted into unseen film", "asked", "right % [95 %]", "a guess",
              *(f"{_frames(n)} frames" for n in lengths)]  # fmt: skip
    return _table(header, cells)


def _length_costs(one: Measured, lengths: Sequence[int]) -> list[str]:
    """A sentence on what the longest film costs against the shortest."""
    way = {"a": ("retrieval", "free"), "b": ("retrieval", "choice")}.get(one.tier)
    counts = {} if way is None else one.counts(way)
    if way is None or len(counts) < 2:
        return []
    near, far = counts[lengths[0]], counts[lengths[-1]]
    return [
        f"From {_frames(lengths[0])} to {_frames(lengths[-1])} frames ({WAYS[way]}): "
        f"{near.right} of {near.n} to {far.right} of {far.n} right, "
        f"{100 * (far.share - near.share):+.0f} points.",
        "",
    ]


def _by_length(
    found: dict[tuple[str, str], Measured], names: dict[str, str], tier: str, way: tuple[str, str]
) -> list[str]:
    """Parts down, frames across; and both sides of `BEYOND` pooled."""
    rows, lengths = [], set()
    for part in names:
        if (part, tier) in found:
            lengths |= set(found[part, tier].counts(way))
    order = sorted(lengths)
    for part, name in names.items():
        counts = found[part, tier].counts(way) if (part, tier) in found else {}
        if not counts:
            continue
        sides = [
            {n: c for n, c in counts.items() if (n > BEYOND) == beyond} for beyond in (False, True)
        ]
        pooled = [f"{_total(side)} ({_total(side).n})" if side else "" for side in sides]
        cells = [f"{100 * counts[n].share:.0f}" if n in counts else "" for n in order]
        rows.append([name, *cells, *pooled])
    if not rows:
        return []
    header = ["model", *map(_frames, order), f"to {BEYOND:,} [95 %] (n)", "beyond [95 %] (n)"]
    return _table(header, rows)


def lengths(folder: Path, run: str = "smol") -> list[str]:
    """What each stage does to accuracy by frames, tier by tier."""
    return _compared(read(folder, run), PARTS)


def ablations(folder: Path, run: str = "smol") -> list[str]:
    """The same for runs of half the steps in stages 4 and 5, and their losses."""
    lines = _compared(read(folder, run), ABLATIONS)
    return [*lines, "", *_losses(folder, run)] if read_training(folder, run) else lines


def _compared(found: dict[tuple[str, str], Measured], names: dict[str, str]) -> list[str]:
    if not any(part in names for part, _ in found):
        raise FileNotFoundError(f"no result of {', '.join(names)}")
    lines = []
    for tier, what in TIERS.items():
        for way in (("retrieval", "free"), ("retrieval", "choice"), ("grounding", "free")):
            drawn = _by_length(found, names, tier, way)
            if drawn and not (tier == "c" and way[0] == "grounding"):
                lines += [f"**Tier {tier}, {what}**: {WAYS[way]}; right in percent", "", *drawn, ""]
    lines += _beyond_sentence(found, names)
    return lines[:-1]


def _beyond_sentence(found: dict[tuple[str, str], Measured], names: dict[str, str]) -> list[str]:
    """How far tier a falls beyond `BEYOND` frames against the best-trained of these parts."""
    sides = {}
    for part in names:
        if (part, "a") in found and part != "shipped":
            counts = found[part, "a"].counts(("retrieval", "free"))
            far = {n: c for n, c in counts.items() if n > BEYOND}
            if far:
                sides[part] = _total(far)
    whole = "half-long" if "half-long" in sides else next(reversed(sides), None)
    if whole is None or len(sides) < 2:
        return []
    parts = [
        f"{names[part].partition(':')[0]}: {100 * (count.share - sides[whole].share):+.0f} points"
        for part, count in sides.items()
        if part != whole
    ]
    base = names[whole].partition(":")[0]
    return [
        f"Tier a beyond {BEYOND:,} frames, own words, against the model {base} "
        f"({sides[whole].right} of {sides[whole].n} right): {'; '.join(parts)}.",
        "",
    ]


def losses(folder: Path, run: str = "smol") -> list[str]:
    """What each part of the training began and ended with, and the drawing."""
    lines = [f"![Loss by step, a panel a part]({PAGE_TO_FOLDER}/loss.svg)", ""]
    return [*lines, *_losses(folder, run), "", "At first and at last: means over a tenth of it."]


def _losses(folder: Path, run: str) -> list[str]:
    rows = read_training(folder, run)
    if not rows:
        raise FileNotFoundError(f"no result of `training` called {run}")
    cells = []
    for row in rows:
        shape, m = row["shape"], row["metrics"]
        cells.append(
            [_part(shape["part"]), f"{shape['steps']:,}",
             f"{row['tokens']:,}", f"{shape['frames']:,}", f"{m['loss_first']:.3f}",
             f"{m['loss_last']:.3f}", f"{m['step_s']:.2f}", _maybe(m, "mfu_percent", "{:.1f}"),
             _maybe(m, "data_wait_share", "{:.0%}"), _maybe(m, "peak_gib", "{:.1f}")]
        )  # fmt: skip
    header = ["part", "steps", "tokens a step", "frames a step", "loss at first", "loss at last",
              "step s", "MFU %", "waiting for data", "peak GiB"]  # fmt: skip
    return _table(header, cells)


def _part(name: str) -> str:
    """What tables of losses call a part, those of half the steps among them."""
    how, _, stage = name.partition("-")
    rest = {"half": "half", "direct": "half, without stage 4", "last": "half, after stage 5"}
    return STAGES.get(name) or (f"{STAGES[stage]}, {rest[how]}" if how in rest else name)


def right(folder: Path, run: str) -> list[str]:
    """A run in short: right answers of all that it measured, and its losses."""
    found = {key: one for key, one in read(folder, run).items() if key[0] != "shipped"}
    if not found:
        raise FileNotFoundError(f"no result of `needle` called {run}")
    names = {part: name.partition(":")[0] for part, name in PARTS.items()}
    names |= {part: f"half the steps: {name}" for part, name in ABLATIONS.items()}
    lengths = sorted({n for one in found.values() for way in WAYS for n in one.counts(way)})
    cells = []
    for tier in TIERS:
        for way, asked in WAYS.items():
            for part in (each for each in names if (each, tier) in found):
                counts = found[part, tier].counts(way)
                if counts:
                    right = [f"{counts[n].right} of {counts[n].n}" if n in counts else ""
                             for n in lengths]  # fmt: skip
                    chance = f"{100 * _total(counts).chance:.0f}"
                    cells.append([names[part], tier, asked.partition(": ")[0], chance, *right])
    header = ["model", "tier", "question", "a guess, %", *map(_frames, lengths)]
    return [*_table(header, cells), "", *_losses(folder, run)]


def _maybe(metrics: dict[str, float], name: str, style: str) -> str:
    return style.format(metrics[name]) if name in metrics else ""


def views(folder: Path) -> list[str]:
    """How often a trained picture was shown in the parts that show each alike."""
    rows = [row for row in read_training(folder) if row["shape"]["part"] in ("align", "pretrain")]
    if not rows:
        raise FileNotFoundError("no result of `training` for stages 1 and 2")
    pictures = len((SPLITS / "train.tsv").read_text(encoding="utf-8").splitlines())
    cells = []
    for row in rows:
        shape = row["shape"]
        shown = shape["steps"] * shape["frames"]
        cells.append([STAGES[shape["part"]], f"{shape['steps']:,}", f"{shape['frames']:,}",
                      f"{shown:,}", f"{shown / pictures:.0f}"])  # fmt: skip
    header = ["part", "steps", "pictures a step", "pictures shown",
              f"times each of {pictures:,}"]  # fmt: skip
    return _table(header, cells)


def two_gpus(folder: Path) -> list[str]:
    """Losses of parts that were run on one GPU and on two, step by step."""
    rows = read_training(folder, "smol-two")
    alone = {
        r["shape"]["part"]: dict(map(tuple, r["samples"])) for r in rows if not r["shape"]["run"]
    }
    cells = []
    for row in rows:
        part = row["shape"]["part"]
        if not row["shape"]["run"] or part not in alone:
            continue
        both = [(alone[part][s], loss) for s, loss in row["samples"] if s in alone[part]]
        if not both:
            continue
        apart = [abs(b - a) / a for a, b in both]
        cells.append(
            [STAGES.get(part, part), row["shape"]["run"], str(len(both)), f"{apart[0]:.1e}",
             f"{statistics.fmean(apart):.1e}", f"{max(apart):.1e}", f"{both[-1][0]:.4f}",
             f"{both[-1][1]:.4f}"]
        )  # fmt: skip
    if not cells:
        raise FileNotFoundError("no result of `training` on one GPU and on two")
    header = ["part", "run", "steps compared", "first step apart", "on average", "at most",
              "last loss, 1 GPU", "last loss, this run"]  # fmt: skip
    return _table(header, cells)


def heat(folder: Path, run: str = "smol") -> list[str]:
    """Links to the heat maps that there are."""
    drawn = heat_maps(folder, run)
    if not drawn:
        raise FileNotFoundError(f"no grid of tier a of {run}")
    lines = []
    for name in drawn:
        part, way = name.removeprefix("heat-").removesuffix(".svg").rsplit("-", 1)
        words = {"free": "own words", "choice": "a choice of names", "forced": "the paper's test"}
        lines.append(f"![{PARTS[part]}, {words[way]}: frames across, depths down]"
                     f"({PAGE_TO_FOLDER}/{name})")  # fmt: skip
    return lines


# ---- drawings -----------------------------------------------------------------------------------


def figures(folder: Path) -> dict[Path, str]:
    """All drawings by their path from the root."""
    run = story(folder)
    found = {FOLDER / name: text for name, text in heat_maps(folder, run).items()}
    rows = [row for row in read_training(folder, run) if row["shape"]["part"] in STAGES]
    if rows:
        found[FOLDER / "loss.svg"] = loss_panels(rows)
    return found


def heat_maps(folder: Path, run: str = "smol") -> dict[str, str]:
    """Tier a after each part, by file name."""
    found, out = read(folder, run), {}
    for part, name in PARTS.items():
        one = found.get((part, "a"))
        for grid in one.grids if one else []:
            if (grid["task"], grid["ask"]) not in (
                ("retrieval", "free"), ("paper", "forced"),
            ):  # fmt: skip
                continue
            title = f"{name[0].upper()}{name[1:]}"
            out[f"heat-{part}-{grid['ask']}.svg"] = heat_map(grid, title)
    return out


def heat_map(grid: dict[str, Any], title: str) -> str:
    """Draw one grid."""
    cells = {(frames, depth): (right, n) for frames, depth, right, n in grid["cells"]}
    columns = sorted({frames for frames, _ in cells})
    depths = sorted({depth for _, depth in cells})
    side, left, top = 64, 70, 54
    width, height = max(left + side * len(columns) + 20, 480), top + 34 * len(depths) + 62
    parts = [_text(left, 22, title, size=14, anchor="start")]
    parts.append(_text(left - 10, top - 10, "depth", anchor="end"))
    for row, depth in enumerate(depths):
        y = top + 34 * row
        parts.append(_text(left - 10, y + 21, f"{100 * depth:.0f} %", anchor="end"))
        for column, frames in enumerate(columns):
            if (frames, depth) not in cells:
                continue
            right, n = cells[frames, depth]
            red, green, blue = colour(right / n)
            x = left + side * column
            parts.append(
                f'<rect x="{x}" y="{y}" width="{side - 2}" height="32" '
                f'fill="rgb({red},{green},{blue})"/>'
            )
            parts.append(_text(x + side / 2 - 1, y + 21, f"{right}/{n}"))
    under = top + 34 * len(depths)
    for column, frames in enumerate(columns):
        parts.append(_text(left + side * column + side / 2 - 1, under + 16, _frames(frames)))
    parts.append(_text(left, under + 34, "frames", anchor="start"))
    right = sum(each[0] for each in cells.values())
    n = sum(each[1] for each in cells.values())
    note = f"{WAYS[grid['task'], grid['ask']]}: {right} of {n} right; a guess: {grid['chance']:.2f}"
    parts.append(_text(left, under + 52, note, anchor="start"))
    return _svg(width, height, parts)


def loss_panels(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the loss of each stage, a panel each; a second run of a part is dashed."""
    parts_there = [part for part in STAGES if any(r["shape"]["part"] == part for r in rows)]
    wide, high, columns = 300, 190, 3
    drawn: list[str] = []
    for number, part in enumerate(parts_there):
        x, y = number % columns * wide + 44, number // columns * high + 34
        mine = [row for row in rows if row["shape"]["part"] == part]
        top = max(loss for row in mine for _, loss in row["samples"])
        last = max(step for row in mine for step, _ in row["samples"])
        first = min(step for row in mine for step, _ in row["samples"])
        w, h = wide - 70, high - 70
        drawn.append(_text(x, y - 12, STAGES[part], anchor="start", size=13))
        drawn.append(f'<path d="M{x} {y}V{y + h}H{x + w}" fill="none" stroke="#999"/>')
        drawn.append(_text(x - 5, y + 8, f"{top:.1f}", anchor="end"))
        drawn.append(_text(x - 5, y + h, "0", anchor="end"))
        drawn.append(_text(x + w, y + h + 14, f"{last} steps", anchor="end"))
        for row in mine:
            points = [
                (x + w * (step - first) / max(1, last - first), y + h - h * loss / top)
                for step, loss in row["samples"]
            ]
            dash = ' stroke-dasharray="4 3"' if row["shape"]["run"] else ""
            dark = "#b3261e" if row["shape"]["run"] else "#1f5fa8"
            if not row["shape"]["run"]:
                drawn.append(f'<polyline points="{_points(points)}" fill="none" stroke="#bcd0e6"/>')
            drawn.append(
                f'<polyline points="{_points(list(_smooth(points)))}" fill="none" stroke="{dark}" '
                f'stroke-width="1.6"{dash}/>'
            )
    lines = -(-len(parts_there) // columns)
    return _svg(min(len(parts_there), columns) * wide, lines * high, drawn)


def _smooth(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Mean over a twentieth of the curve around each point."""
    reach = len(points) // 40
    for k, (x, _) in enumerate(points):
        near = points[max(0, k - reach) : k + reach + 1]
        yield x, statistics.fmean(y for _, y in near)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">'
    )
    return "\n".join(
        [head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""]
    )
