"""The tables of `family_step`: methods, parts of our step, and how families compare."""

from __future__ import annotations

from typing import Any

#: Parts of a step that are told apart in the table, and what of the file each adds up.
PARTS = {
    "vision": ("vision_forward", "vision_backward"),
    "row exchange": ("exchange_forward", "exchange_backward"),
    "text forward": ("embed", "text_forward"),
    "head and loss": ("loss_forward",),
    "text backward": ("text_backward",),
    "norm, clip": ("norm_clip",),
    "AdamW": ("update",),
}


def family_step(result: dict[str, Any]) -> list[str]:
    """Steps of each family, the parts of ours, ratios and checks."""
    from benchmarks.render import _figure, _heading, table, tokens_name

    names = ["step_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_percent", "peak_gib"]
    cells = []
    for row in result["rows"]:
        family, _, method = row["method"].partition("/")
        shown = f"**`{method}`**" if row["kind"] == "ours" else f"`{method}`"
        if row["metrics"]:
            figures = [_figure(row, name) for name in names]
        else:
            figures = [row["about"]["failed"], *[""] * (len(names) - 1)]
        cells.append([family, shown, tokens_name(row["tokens"]), *figures])
    header = ["shape", "method", "tokens", *(_heading(name) for name in names)]
    lines = [*table(header, cells), ""]
    ours = [row for row in result["rows"] if row["kind"] == "ours" and row["metrics"]]
    if ours:
        cells = [
            [
                row["shape"]["family"],
                *(
                    f"{sum(row['metrics'][f'{name}_s'] for name in each):.3f}"
                    for each in PARTS.values()
                ),
            ]
            for row in ours
        ]
        lines += [*table(["part of our step, s", *PARTS], cells), ""]
    compared = [
        [
            line["family"],
            *(
                _number(line, name)
                for name in ("rate_of_longvila", "speedup_over_replicated_tower")
            ),
            tokens_name(line["stock_trainer_tokens"]) if "stock_trainer_tokens" in line else "",
        ]
        for line in result.get("notes", {}).get("comparisons", ())
        if len(line) > 2
    ]
    if compared:
        header = [
            "shape", "TFLOP/s/GPU over LongVILA-7B's", "speed-up over a replicated tower",
            "longest of the stock Trainer",
        ]  # fmt: skip
        lines += [*table(header, compared), ""]
    checked = [row for row in ours if "check_loss_error" in row["metrics"]]
    if checked:
        loss, norm, part = (
            max(
                value
                for row in checked
                for name, value in row["metrics"].items()
                if name.startswith("check_") and name.endswith(end) and (whole == (name in WHOLE))
            )
            for end, whole in (("loss_error", True), ("norm_error", True), ("norm_error", False))
        )
        length = tokens_name(checked[0]["shape"]["check_tokens"])
        lines.append(
            f"Against one GPU at {length} tokens, relative, at most: loss {loss:.1e}, gradient "
            f"norm {norm:.1e}, norm of a part's gradients {part:.1e}."
        )
    return lines


WHOLE = ("check_loss_error", "check_gradient_norm_error")


def _number(line: dict[str, Any], name: str) -> str:
    return f"{line[name]:.2f}" if name in line else ""
