"""Write the tables of README and docs from ``benchmarks/results/*.json``, and check them.

A table stands between two comment lines::

    <!-- bench:attention -->
    ...
    <!-- /bench -->

and is written from the newest result of that name: newest date, then last by file name. The name
may carry words after the benchmark that pick among several results, as in ``bench:attention
link=sockets``: each ``key=value`` must match the file's ``hardware`` (as a prefix), or be
``suffix=...`` and match the end of its name, or ``method=...`` and begin the name of a row. No
figure in those places is typed by hand; a benchmark that has no result yet is said to have none.

Drawings of ``benchmarks.smol`` are written beside their page and checked alike.

    python -m benchmarks.render            # rewrite
    python -m benchmarks.render --check    # fail if anything would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import smol
from benchmarks._family_table import family_step
from benchmarks._prefill_table import prefill_summary
from benchmarks._results import slug
from benchmarks._train_table import train_step_lines

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- bench:(?P<name>[^>]*?) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.DOTALL)

#: Headings and formats of metrics, in the order in which columns appear.
COLUMNS: dict[str, tuple[str, str]] = {
    "forward_tflops_per_gpu": ("forward TFLOP/s", "{:.0f}"),
    "backward_tflops_per_gpu": ("backward TFLOP/s", "{:.0f}"),
    "total_tflops_per_gpu": ("total TFLOP/s", "{:.0f}"),
    "total_ms": ("ms", "{:.1f}"),
    "step_s": ("step s", "{:.3f}"),
    "first_step_s": ("first step s", "{:.3f}"),
    "tokens_per_s_per_gpu": ("tokens/s/GPU", "{:.0f}"),
    "mfu_percent": ("MFU %", "{:.1f}"),
    "tflops_per_gpu": ("TFLOP/s/GPU", "{:.0f}"),
    "percent_of_ideal": ("% of best kernel", "{:.1f}"),
    "percent_of_own_kernel": ("% of own kernel", "{:.1f}"),
    "speedup": ("speed-up", "{:.2f}"),
    "spread_percent": ("spread %", "{:.1f}"),
    "extra_gib": ("extra GiB", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "planned_peak_gib": ("planned GiB", "{:.2f}"),
    "times_peer": ("times the peer's speed", "{:.2f}"),
    "ttft_s": ("first token s", "{:.3f}"),
    "floor_s": ("floor s", "{:.3f}"),
    "ttft_over_floor": ("times the floor", "{:.2f}"),
    "question_percent_of_first": ("further question, % of first", "{:.1f}"),
    "cache_gib": ("cache GiB", "{:.1f}"),
    "decode_tokens_per_s": ("decode tokens/s", "{:.1f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "frames_per_s": ("frames/s", "{:.0f}"),
    "error_gradient": ("gradient error", "{:.1e}"),
}
KIND_ORDER = {"ideal": 0, "ours": 1, "peer": 2}
#: What a marker may name; anything else is a typing error and not a table to come.
BENCHMARKS = {
    "ask",
    "attention",
    "decode",
    "family_step",
    "loss_curve",
    "memory_ceiling",
    "memory_plan",
    "mmsp_step",
    "needle",
    "parity",
    "prefill",
    "trace",
    "train_step",
    "training",
    "video_decode",
    "vision_balance",
}


def find_result(words: Sequence[str], folder: Path = RESULTS) -> dict[str, Any]:
    """The newest result of a benchmark that matches the other words.

    Raises:
        FileNotFoundError: If there is none.
    """
    name, *conditions = words
    matches = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if content["benchmark"] == name and all(_matches(path, content, c) for c in conditions):
            matches.append((content["date"], path.name, content))
    if not matches:
        raise FileNotFoundError(f"no result of `{' '.join(words)}`")
    return max(matches, key=lambda match: match[:2])[2]


def _matches(path: Path, content: dict[str, Any], condition: str) -> bool:
    key, _, value = condition.partition("=")
    if key == "suffix":
        return path.stem.endswith(f"_{value}")
    if key == "method":
        return any(row["method"].startswith(value) for row in content["rows"])
    if key not in content["hardware"]:
        raise ValueError(f"{condition!r}: a result's hardware has {sorted(content['hardware'])}")
    return str(content["hardware"][key]).startswith(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are figures, to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *rows)]


def tokens_name(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def generic(result: dict[str, Any]) -> list[str]:
    """One table a length: methods down, known metrics across; ours in bold, remarks below."""
    lines: list[str] = []
    for tokens in sorted({row["tokens"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["tokens"] == tokens]
        names = [n for n in COLUMNS if any(n in row["metrics"] for row in rows)]
        names += sorted(
            {n for row in rows for n in row["metrics"]}
            - set(COLUMNS)
            - {n for row in rows for n in row["metrics"] if n.startswith("error_")}
            - {"forward_ms", "backward_ms"}
        )
        header = ["method", *(_heading(n) for n in names)]
        cells = [[_method(row), *(_figure(row, n) for n in names)] for row in rows]
        title = f"**{tokens_name(tokens)} tokens**" if tokens else ""
        lines += [*([title, ""] if title else []), *table(header, cells), ""]
    return lines[:-1]


def attention(result: dict[str, Any]) -> list[str]:
    """The attention table: kernels alone, ours, peers, each group fastest first."""
    ordered = sorted(
        result["rows"],
        key=lambda row: (row["tokens"], KIND_ORDER[row["kind"]], row["metrics"]["total_ms"]),
    )
    names = [
        "forward_tflops_per_gpu",
        "backward_tflops_per_gpu",
        "total_tflops_per_gpu",
        "percent_of_ideal",
        "percent_of_own_kernel",
        "spread_percent",
        "extra_gib",
    ]
    lines: list[str] = []
    for tokens in sorted({row["tokens"] for row in ordered}):
        rows = [row for row in ordered if row["tokens"] == tokens]
        header = ["method", "kernel", *(COLUMNS[n][0] for n in names)]
        cells = [
            [_method(row), row["about"]["kernel"], *(_figure(row, n) for n in names)]
            for row in rows
        ]
        lines += [f"**{tokens_name(tokens)} tokens**", "", *table(header, cells), ""]
    lines += ["\\* over other kernels through a stand-in for `flash_attn`, not as shipped."]
    if comparisons := result.get("notes", {}).get("comparisons"):
        header = ["tokens", "ours", "against", "method", "speed-up", "verdict"]
        cells = [
            [
                tokens_name(c["tokens"]), f"`{c['ours']}`", c["against"], f"`{c['method']}`",
                f"{c['speedup']:.3f}", c["verdict"],
            ]
            for c in comparisons
        ]  # fmt: skip
        lines += ["", *table(header, cells)]
    return lines


def attention_summary(result: dict[str, Any]) -> list[str]:
    """One line a length: the kernel alone, our fastest, the best peer as shipped and at all."""
    rows = result["rows"]
    table_rows = []
    for tokens in sorted({row["tokens"] for row in rows}):
        group = [row for row in rows if row["tokens"] == tokens]
        ideal = _fastest([r for r in group if r["kind"] == "ideal"])
        ours = _fastest([r for r in group if r["kind"] == "ours"])
        if ideal is None or ours is None:
            continue
        peers = [r for r in group if r["kind"] == "peer"]
        shipped = [r for r in peers if r.get("about", {}).get("shipped", True)]
        cells = [tokens_name(tokens), _figure(ideal, "total_tflops_per_gpu")]
        cells += [_figure(ours, "total_tflops_per_gpu"), _figure(ours, "percent_of_ideal")]
        for peer in (_fastest(shipped), _fastest(peers)):
            if peer is None:
                cells += ["", ""]
                continue
            ratio = peer["metrics"]["total_ms"] / ours["metrics"]["total_ms"]
            cells.append(f"{_figure(peer, 'total_tflops_per_gpu')} {_method(peer)}")
            cells.append(f"{ratio:.2f}")
        table_rows.append(cells)
    header = ["tokens", "kernel alone, TFLOP/s a GPU", "LongVILA", "% of kernel",
              "best peer as shipped", "speed-up", "best peer\\*", "speed-up"]  # fmt: skip
    remark = "\\* over our kernel through a stand-in for `flash_attn`, not as shipped."
    return [*table(header, table_rows), "", remark]


def _fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return min(rows, key=lambda row: row["metrics"]["total_ms"], default=None)


def links(result: dict[str, Any]) -> list[str]:
    """Link rates by message size."""
    names = ("all_to_all_gb_per_s", "all_gather_gb_per_s", "ring_gb_per_s")
    header = ["message MiB", "all-to-all GB/s", "all-gather GB/s", "ring GB/s"]
    found = result.get("links", [])
    rows = [[f"{row['message_mib']:.0f}", *(f"{row[n]:.1f}" for n in names)] for row in found]
    if len({row.get("between") for row in found}) > 1:
        header = ["between", *header]
        rows = [[row["between"], *cells] for row, cells in zip(found, rows, strict=True)]
    return table(header, rows)


def factorisations(result: dict[str, Any]) -> list[str]:
    """Milliseconds of every way to deal the ranks to heads and ring, and what the default takes.

    One kernel's rows; beside a time stands how much of the bound that the heads set it reaches.
    """
    rows = [row for row in result["rows"] if row["about"]["kernel"] in ("fa4", "cpu")]
    ours: dict[tuple[int, int, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["kind"] == "ours":
            way = row["method"].removeprefix("longvila_").rpartition("_")[0]
            case = (row["shape"]["heads"], row["shape"]["kv_heads"], row["tokens"])
            ours.setdefault(case, {})[way] = row["metrics"]
    ways = list(dict.fromkeys(way for found in ours.values() for way in sorted(found)))
    times, against = [], []
    for (heads, kv_heads, tokens), found in sorted(ours.items()):
        ms = {way: metrics["total_ms"] for way, metrics in found.items()}
        default = result["notes"]["default_mesh"][f"{heads}/{kv_heads}"]
        fastest = min(ms, key=lambda way: ms[way])
        start = [f"{heads}/{kv_heads}", tokens_name(tokens)]
        cells = [
            f"{ms[way]:.1f} ({found[way]['percent_of_head_bound']:.0f} %)" if way in found else ""
            for way in ways
        ]
        times.append([*start, *cells])
        flat = {way: time for way, time in ms.items() if way in ("ulysses", "ring", "gather")}
        both = min((time for way, time in ms.items() if way.startswith("2d")), default=None)
        ratios = [f"{time / both:.2f}" if both else "" for time in flat.values()]
        chosen = f"{ms[default] / ms[fastest]:.3f}" if default in ms else ""
        against.append([*start, *ratios, f"`{fastest}`", f"`{default}`", chosen])
        headings = [f"2-D ahead of {way} by" for way in flat]
    return [
        *table(["heads", "tokens", *(f"{way}, ms" for way in ways)], times),
        "",
        *table(
            ["heads", "tokens", *headings, "fastest", "default", "default over fastest"], against
        ),
    ]


def hosts(result: dict[str, Any], folder: Path) -> list[str]:
    """Times over emulated hosts beside those of the same methods over NVLink."""
    hardware = result["hardware"]
    near = find_result(["attention", "link=NV", f"suffix={slug(hardware)}"], folder)
    times = {(r["method"], r["tokens"]): r["metrics"]["total_ms"] for r in near["rows"]}
    rows = []
    for row in sorted(result["rows"], key=lambda row: row["metrics"]["total_ms"]):
        known = times.get((row["method"], row["tokens"]))
        ms = row["metrics"]["total_ms"]
        cells = [f"{known:.1f}", f"{ms / known:.2f}"] if known else ["", ""]
        rows.append([_method(row), tokens_name(row["tokens"]), f"{ms:.1f}", *cells])
    return table(["method", "tokens", "ms over sockets", "ms over NVLink", "ratio"], rows)


def trace(result: dict[str, Any]) -> list[str]:
    """Overlap and host waits of a pass."""
    names = {
        "span_ms": "span ms",
        "compute_ms": "compute ms",
        "communication_ms": "communication ms",
        "hidden_ms": "of it hidden",
        "exposed_ms": "exposed",
        "idle_ms": "idle ms",
        "host_synchronizations": "host waits",
        "device_to_host_copies": "copies to host",
        "scalar_reads": "scalar reads",
    }
    rows = [
        [
            _method(row),
            tokens_name(row["tokens"]),
            *(
                f"{row['metrics'][n]:.2f}" if "_ms" in n else f"{row['metrics'][n]:g}"
                for n in names
            ),
        ]
        for row in sorted(result["rows"], key=lambda r: (r["tokens"], KIND_ORDER[r["kind"]]))
    ]
    return table(["method", "tokens", *names.values()], rows)


def vision(result: dict[str, Any]) -> list[str]:
    """One table a question: the tower, the movement of its rows, frames of mixed sizes."""
    wanted = {
        "tower": ["frames_per_s", "speedup", "spread_percent", "extra_gib", "error_gradient"],
        "exchange": ["total_ms", "time_of_all_reduce_percent", "memory_of_all_reduce_percent",
                     "spread_percent", "extra_gib"],
        "mixed": ["total_ms", "speedup", "balance_percent", "spread_percent"],
    }  # fmt: skip
    titles = {
        "tower": "Tower and projector, forward and backward, row exchange included",
        "exchange": "The movement of the rows alone, forward and backward",
        "mixed": "Frames of mixed resolution, the tower on its slowest rank",
    }
    lines: list[str] = []
    for question, names in wanted.items():
        rows = [r for r in result["rows"] if r["method"].startswith(f"{question}/")]
        if not rows:
            continue
        shape = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in rows[0]["shape"].items())
        cells = [
            [_method({**r, "method": r["method"].partition("/")[2]})]
            + [_figure(r, name) for name in names]
            for r in rows
        ]
        header = ["method", *(_heading(name) for name in names)]
        lines += [f"**{titles[question]}** ({shape})", "", *table(header, cells), ""]
    return lines[:-1]


def step(result: dict[str, Any]) -> list[str]:
    """A whole step: its rate, then its parts, then how it was checked."""
    rates = ["step_s", "tokens_per_s_per_gpu", "mfu_percent", "speedup", "spread_percent",
             "peak_gib"]  # fmt: skip
    parts = ["vision_forward_s", "text_forward_s", "loss_forward_s", "text_backward_s",
             "vision_backward_s"]  # fmt: skip
    header = ["method", "tokens", "frames", *map(_heading, rates + parts)]
    cells = [
        [_method(r), tokens_name(r["tokens"]), str(r["shape"]["frames"])]
        + [_figure(r, name) for name in rates + parts]
        for r in result["rows"]
    ]
    lines = table(header, cells)
    for row in result["rows"]:
        checks = {k: v for k, v in row["metrics"].items() if k.startswith("check_")}
        if checks:
            shown = ", ".join(
                f"{k.removeprefix('check_').replace('_', ' ')} {v:.1e}" for k, v in checks.items()
            )
            return [*lines, "", f"Against one process on the same weights, relative: {shown}."]
    return lines


def train_step_summary(folder: Path) -> list[str]:
    """One line a number of GPUs, length and method: rate, MFU, and how they compare."""
    names = ["step_s", "tokens_per_s_per_gpu", "mfu_percent", "peak_gib"]
    lines, files = train_step_lines(folder)
    cells = [
        [_method(row), str(count), tokens_name(row["tokens"])]
        + [_figure(row, name) for name in names]
        + [f"{faster:.2f}" if faster else ""]
        for count, row, faster in lines
    ]
    header = ["method", "GPUs", "tokens", *map(_heading, names), "ours is faster by"]
    return [*table(header, cells), "", sources(files)]


def sources(files: Sequence[str]) -> str:
    """What stands above the caption of a table that several files fill."""
    return f"From {', '.join(f'`{name}`' for name in files)}; one of them is:"


def ask(result: dict[str, Any]) -> list[str]:
    """Where the time of one question goes, run by run."""
    names = ("decode_s", "vision_s", "prefill_s", "generate_s", "tokens_per_s", "wall_s")
    header = ["run", "frames", "prompt tokens", "new tokens", *map(_heading, names)]
    cells = [
        [str(number), str(row["shape"]["frames"]), f"{sample['prompt_tokens']:,}",
         str(sample["new_tokens"]), *(f"{sample[name]:.1f}" for name in names)]
        for row in result["rows"]
        for number, sample in enumerate(row["samples"], 1)
    ]  # fmt: skip
    return table(header, cells)


def train_step(result: dict[str, Any]) -> list[str]:
    """Full fine-tuning steps: one table a length, then our parts, ratios and checks."""
    names = ["step_s", "tokens_per_s_per_gpu", "mfu_percent", "peak_gib", "first_step_s"]
    lines: list[str] = []
    for tokens in sorted({row["tokens"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["tokens"] == tokens]
        rows.sort(key=lambda row: row["metrics"].get("step_s", float("inf")))
        cells = []
        for row in rows:
            if row["metrics"]:
                figures = [_figure(row, name) for name in names]
            else:
                figures = [row["about"]["failed"], *[""] * (len(names) - 1)]
            cells.append([_method(row), *figures, str(len(row["samples"]))])
        header = ["method", *(_heading(name) for name in names), "steps"]
        lines += [f"**{tokens_name(tokens)} tokens**", "", *table(header, cells), ""]
    ours = [row for row in result["rows"] if row["kind"] == "ours" and row["metrics"]]
    for video in (False, True):
        timed = [row for row in ours if ("vision_forward_s" in row["metrics"]) == video]
        parts = ["text_forward", "loss_forward", "norm_clip", "update"]
        parts[:1] = ["vision_forward", "text_forward"] if video else ["embed", "text_forward"]
        parts[3:3] = ["text_backward", "vision_backward"] if video else ["backward"]
        if timed:
            header = ["part of our step, s", *(part.replace("_", " ") for part in parts)]
            cells = [
                [tokens_name(r["tokens"]), *(f"{r['metrics'][f'{part}_s']:.3f}" for part in parts)]
                for r in timed
            ]
            lines += [*table(header, cells), ""]
    planned = [row for row in ours if "planned_gib" in row.get("about", {})]
    if planned:
        header = ["our settings", "tokens a GPU", "layers not recomputed", "MLP tile",
                  "waiting on the host, GiB", "planned peak GiB", "measured"]  # fmt: skip
        cells = [
            [
                tokens_name(row["tokens"]),
                f"{row['tokens'] // row['shape']['sequence_parallel']:,}",
                f"{about['plain_layers'] if about['recompute'] else row['shape']['layers']}",
                f"{about['mlp_tile_rows'] or ''}",
                f"{about.get('offload_used_gib', 0) or ''}",
                f"{about['planned_gib']:.1f}",
                f"{row['metrics']['peak_gib']:.1f}",
            ]
            for row in planned
            for about in [row["about"]]
        ]
        lines += [*table(header, cells), ""]
    if comparisons := result.get("notes", {}).get("comparisons"):
        header = ["tokens", "against", "compared by", "speed-up"]
        cells = [
            [tokens_name(c["tokens"]), f"`{c['peer']}`", f"{c.get('steps', 'median')} steps",
             f"{c['speedup']:.3f}"]
            for c in comparisons
        ]  # fmt: skip
        lines += [*table(header, cells), ""]
    for name in ("samples", "left_out", "cut_off"):
        if name in result.get("notes", {}):
            lines += [result["notes"][name], ""]
    checked = [r for r in result["rows"] if "check_loss_error" in r["metrics"]]
    if checked:
        loss = max(r["metrics"]["check_loss_error"] for r in checked)
        norm = max(r["metrics"]["check_gradient_norm_error"] for r in checked)
        length = tokens_name(checked[0]["shape"]["check_tokens"])
        lines.append(
            f"All methods against one GPU at {length} tokens, relative, at most: loss {loss:.1e}, "
            f"gradient norm {norm:.1e}."
        )
    return lines


def prefill(result: dict[str, Any]) -> list[str]:
    """First token and decoding against their floors, length by length."""
    names = ["ttft_s", "floor_s", "ttft_over_floor", "times_peer", "decode_step_ms",
             "decode_floor_ms", "question_percent_of_first", "cache_gib", "peak_gib",
             "planned_peak_gib"]  # fmt: skip
    measured = {name for row in result["rows"] for name in row["metrics"]}
    names = [name for name in names if name in measured]
    header = ["method", "tokens", "frames", *map(_heading, names)]
    cells, sampled = [], False
    for row in sorted(result["rows"], key=lambda r: (r["tokens"], KIND_ORDER[r["kind"]])):
        name = _method(row)
        if row["metrics"].get("sampled"):
            name, sampled = f"{name}\\*", True
        figures = [_figure(row, each) for each in names]
        if row["metrics"].get("out_of_memory"):
            figures[0] = "out of memory"
        cells.append([name, f"{row['tokens']:,}", str(row["shape"].get("frames", "")), *figures])
    lines = table(header, cells)
    if sampled:
        lines += ["", "\\* added up from a sample of the prompt's chunks, not read whole."]
    if first := result.get("notes", {}).get("first_prompt"):
        lines += ["", (
            f"The process's first prompt of ours, {first['tokens']:,.0f} tokens and all that is "
            f"set up at a first use: {first['first_token_s']:.1f} s to the first token; read "
            f"again: {first['again_s']:.1f} s. Rows come after that."
        )]  # fmt: skip
    if left := result.get("not_measured"):
        reasons = "; ".join(f"{each['method']}, {each['reason']}" for each in left)
        lines += ["", f"Left out: {reasons}."]
    return lines


def decode(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a token in every way, a line a length, against the floor."""
    ways = {
        row["method"].removeprefix("longvila_"): None
        for row in result["rows"]
        if "decode_step_ms" in row["metrics"]
    }
    cells: dict[int, dict[str, dict[str, float]]] = {}
    for row in result["rows"]:
        way = row["method"].removeprefix("longvila_")
        if way in ways:
            cells.setdefault(row["tokens"], {})[way] = row["metrics"]
    lines = []
    for tokens, found in sorted(cells.items()):
        floor = next(iter(found.values()))["decode_floor_ms"]
        line = [tokens_name(tokens), f"{floor:.1f}"]
        for way in ways:
            step = found.get(way, {}).get("decode_step_ms")
            line.append("" if step is None else f"{step:.1f} ({100 * floor / step:.0f} %)")
        stream = next(iter(found.values())).get("stream_step_ms")
        line.append("" if stream is None else f"{stream:.1f} ({100 * floor / stream:.0f} %)")
        lines.append(line)
    header = ["tokens", "floor, ms", *(f"{way}, ms" for way in ways), "in `generate`, ms"]
    return table(header, lines)


def loss_curve(result: dict[str, Any]) -> list[str]:
    """Losses of some steps on each mesh, and how far from the first mesh's any step is."""
    steps = result["rows"][0]["shape"]["steps"]
    shown = sorted({1, *range(5, steps + 1, 5), steps})
    header = ["mesh", *(f"loss {step}" for step in shown), "loss apart", "gradient norm apart"]
    cells = [
        [
            row["method"],
            *(f"{row['samples'][step - 1]['loss']:.4f}" for step in shown),
            *(f"{row['metrics'][name]:.1e}" for name in ("loss_apart", "gradient_norm_apart")),
        ]
        for row in result["rows"]
    ]
    first = result["rows"][0]
    millions, shape = first["about"]["parameters"] / 1e6, first["shape"]
    remark = (
        f"{millions:.0f} million parameters, {shape['heads']}/{shape['kv_heads']} heads, "
        f"{shape['dtype']}; apart is the greatest difference of any step, relative to the first "
        "line."
    )
    return [*table(header, cells), "", remark]


def parity(result: dict[str, Any]) -> list[str]:
    """Cells of both grids by number of ranks, and how far off the worst of them was."""
    header = ["grid", "meshes (ring, ulysses)", "cells", "ran", "failed",
              "largest error, float64", "float32"]  # fmt: skip
    cells = []
    for row in result["rows"]:
        errors = [row["metrics"].get(f"{dtype}_error") for dtype in ("float64", "float32")]
        cells.append([
            row["method"],
            " ".join(mesh.replace(" ", "") for mesh in row["shape"]["meshes"]),
            *(f"{row['metrics'][name]:,}" for name in ("cells", "ran", "failed")),
            *("" if error is None else f"{error:.1e}" for error in errors),
        ])  # fmt: skip
    total, noted = (
        sum(row["metrics"][name] for row in result["rows"]) for name in ("cells", "errors_of_cells")
    )
    commits = result["notes"]["cells_by_commit"]
    by_commit = ", ".join(f"{number:,} at `{commit}`" for commit, number in commits.items())
    remark = f"{total:,} cells: {by_commit}. Errors are relative, and of {noted:,} cells."
    return [*table(header, cells), "", remark]


def memory_plan(result: dict[str, Any]) -> list[str]:
    """Planned against measured peaks, case by case."""
    rows = [row for row in result["rows"] if row["method"].startswith("step/")]
    names = ["peak_gib", "planned_gib", "error_percent"]
    cells = [
        [row["method"].partition("/")[2], *(f"{row['metrics'][name]:.1f}" for name in names)]
        for row in rows
    ]
    return table(["step", "measured peak GiB", "planned GiB", "error %"], cells)


RENDERERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "ask": ask,
    "attention": attention,
    "family_step": family_step,
    "memory_plan": memory_plan,
    "mmsp_step": step,
    "decode": decode,
    "loss_curve": loss_curve,
    "parity": parity,
    "prefill": prefill,
    "trace": trace,
    "train_step": train_step,
    "vision_balance": vision,
}


def _of_a_run(
    draw: Callable[[Path, str], list[str]],
) -> Callable[[dict[str, Any], Path], list[str]]:
    """What draws a table of the small model's run that a result file belongs to."""
    return lambda result, folder: draw(folder, smol.run_of(result))


#: Tables drawn from another benchmark's file: its name and conditions, and what draws it.
VIEWS: dict[str, tuple[list[str], Callable[[dict[str, Any], Path], list[str]]]] = {
    "links": (["attention"], lambda result, folder: links(result)),
    "factorisations": (["attention"], lambda result, folder: factorisations(result)),
    **{
        f"smol_{draw.__name__}": ([kind, "method=smol-stages"], _of_a_run(draw))
        for kind, draw in (
            ("needle", smol.tiers),
            ("needle", smol.lengths),
            ("needle", smol.heat),
            ("needle", smol.ablations),
            ("training", smol.losses),
            ("training", smol.right),
        )
    },
    "smol_summary": (
        ["needle", "method=smol-shipped"],
        lambda result, folder: smol.summary(folder, smol.run_of(result), smol.part_of(result)),
    ),
    "smol_shipped": (
        ["needle", "method=smol-shipped"],
        lambda result, folder: smol.tiers(folder, part="shipped"),
    ),
    "smol_views": (
        ["training", "method=smol-stages"],
        lambda result, folder: smol.views(folder),
    ),
    "smol_two_gpus": (
        ["training", "method=smol-two"],
        lambda result, folder: smol.two_gpus(folder),
    ),
    "prefill_summary": (
        ["prefill", "suffix=whole"],
        lambda result, folder: _prefill_summary(folder),
    ),
    "attention_summary": (["attention"], lambda result, folder: attention_summary(result)),
    "train_step_summary": (["train_step"], lambda result, folder: train_step_summary(folder)),
    "attention_hosts": (["attention", "link=sockets"], hosts),
}


def _prefill_summary(folder: Path) -> list[str]:
    header, lines, remarks, files = prefill_summary(folder)
    return [*table(header, lines), *remarks, "", sources(files)]


def _method(row: dict[str, Any]) -> str:
    name = f"`{row['method']}`"
    if row["kind"] == "ours":
        return f"**{name}**"
    shipped = row.get("about", {}).get("shipped", True)
    return name if shipped else f"{name}\\*"


def _heading(name: str) -> str:
    if name in COLUMNS:
        return COLUMNS[name][0]
    return name.replace("percent", "%").replace("_", " ")


def _figure(row: dict[str, Any], name: str) -> str:
    value = row["metrics"].get(name)
    if value is None:
        return ""
    return COLUMNS.get(name, ("", "{:.4g}"))[1].format(value)


def caption(result: dict[str, Any]) -> str:
    """What, where and when, under every table."""
    h = result["hardware"]
    versions = result["versions"]
    shown = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "flash-attn-4", "cudnn", "nccl")
        if name in versions
    )
    link = f" ({h['link']})" if h["link"] else ""
    return (
        f"{h['count']} x {h['gpu']}{link}, {shown}; {result['date']}, commit "
        f"`{result['commit']}`. `{result['command']}`"
    )


def render_block(name: str, folder: Path = RESULTS) -> str:
    """The lines that belong between the two comments of ``bench:name``.

    Raises:
        ValueError: If no benchmark has this name.
    """
    words = name.split()
    view = VIEWS.get(words[0])
    if view is not None:
        given = {word.partition("=")[0] for word in words[1:]}
        usual = [word for word in view[0] if word.partition("=")[0] not in given]
        words = [*usual, *words[1:]]
    if words[0] not in BENCHMARKS:
        raise ValueError(f"unknown table {name!r}; there are {sorted(BENCHMARKS | set(VIEWS))}")
    try:
        result = find_result(words, folder)
        draw = RENDERERS.get(words[0], generic)
        lines = draw(result) if view is None else view[1](result, folder)
    except FileNotFoundError as missing:
        return f"*Not measured yet: {missing}.*\n"
    return "\n".join([*lines, "", caption(result), ""])


def render_text(text: str, folder: Path = RESULTS) -> str:
    """A document with all of its tables written anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{render_block(match['name'], folder)}{match[4]}"

    return BLOCK.sub(replace, text)


def documents(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def render(root: Path, folder: Path, *, check: bool) -> list[Path]:
    """Rewrite (or, with ``check``, only compare) every document; return those that differ."""
    stale = []
    for path in documents(root):
        text = path.read_text()
        rendered = render_text(text, folder)
        if rendered != text:
            stale.append(path)
            if not check:
                path.write_text(rendered)
    return stale + render_figures(root, folder, check=check)


def render_figures(root: Path, folder: Path, *, check: bool) -> list[Path]:
    """The same for drawings; one that no result gives any more is deleted."""
    wanted = {root / path: text for path, text in smol.figures(folder).items()}
    stale = [path for path in (root / smol.FOLDER).glob("*.svg") if path not in wanted]
    stale += [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in [] if check else stale:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    return sorted(stale)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    stale = render(options.root, options.results, check=options.check)
    for path in stale:
        state = "is stale: run `python -m benchmarks.render`" if options.check else "rewritten"
        print(f"{path.relative_to(options.root)} {state}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
