"""Bring what a run measured into the repository's result files.

    python recipes/smol/collect.py WORK [--run second] [--two-gpus WORK2]

1. Every ``WORK/needle/PART-TIER`` (or ``PART-TIER-WAY``, where another protocol was asked for)
   becomes ``DATE_needle_smol_PART_TIER.json``: the kept copy in ``WORK/results`` if there is one,
   else its ``result.json``, else what its answers say, which is then called cut off.
2. ``WORK/results/PART.metrics.jsonl`` of all parts become one file, ``DATE_training_smol.json``:
   the loss of each step that was logged, and rates. A part that was cut off has its lines in
   ``WORK/stages``.
3. ``--two-gpus`` brings another folder, and the same parts of this one, into a file of their own,
   ``DATE_training_smol-two.json``.
4. Folders of the machine that ran it are written as ``WORK``; nothing else is changed.

``--run NAME`` writes ``smol-NAME`` for ``smol`` in names of files and of methods: the run of
another recipe, which takes no place of this one's.

``python -m benchmarks.render`` draws ``docs/results/smol.md`` from these files.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longvila.evaluation.runner import read_records
from longvila.evaluation.summary import grid_rows, result_rows, summarise

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
STAGE_OF = {
    "align": 1, "pretrain": 2, "sft": 3, "extend": 4, "long": 5, "longer": 5, "longest": 5,
    "again": 5, "final": 5, "further": 5, "furthest": 5,
    "half-extend": 4, "half-long": 5, "direct-long": 5, "last-extend": 4,
}  # fmt: skip
#: A folder of answers: a part, a tier, and another way of asking than the usual.
FOLDER = re.compile(r"(?P<part>.+)-(?P<tier>[abc])(?:-(?P<way>[a-z]+))?")
#: Measures of a step whose median is kept.
RATES = ("step_s", "tokens_per_s_per_gpu", "mfu_percent", "data_wait_share")


def without_folders(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result in which the run's folder is called ``WORK``, and commands begin plainly.

    Args:
        result: As ``run.py`` keeps it.
    """
    text = json.dumps(result)
    found = re.search(r"--model (\S+?)/(?:models|stages)/", result["command"])
    if found is not None:
        text = text.replace(found[1], "WORK")
    clean: dict[str, Any] = json.loads(text)
    clean["command"] = re.sub(r"^\S*__main__\.py", "longvila", clean["command"])
    return clean


def needle_results(work: Path, about: Mapping[str, Any], run: str) -> dict[str, dict[str, Any]]:
    """Return the needle results of a run by file name.

    Args:
        work: The folder of the run.
        about: Date, commit, hardware and versions, where a result does not say.
        run: Begins its methods, and stands in its files' names.
    """
    out: dict[str, dict[str, Any]] = {}
    names = {}
    label = "smol" if run == "smol-stages" else run
    for path in sorted((work / "results").glob("*_needle_smol_*.json")):
        name = path.name.replace("_needle_smol_", f"_needle_{label}_")
        out[name] = without_folders(json.loads(path.read_text(encoding="utf-8")))
        names[path.stem.partition("_needle_smol_")[2].replace("_", "-")] = name
    for folder in sorted((work / "needle").iterdir() if (work / "needle").is_dir() else []):
        found = FOLDER.fullmatch(folder.name)
        if found is None:
            continue
        files = sorted(folder.glob("records*.jsonl"))
        records = [row for path in files for row in read_records(path)]
        groups = summarise(records)
        result = out.get(names.get(folder.name, ""), {})
        if not result and (folder / "result.json").exists():
            text = (folder / "result.json").read_text(encoding="utf-8")
            result = without_folders({**about, **json.loads(text)})
        if not result and records:
            result = {
                "benchmark": "needle",
                "question": "Are pictures found among so many frames, wherever they are?",
                **about,
                "command": f"python recipes/smol/run.py --parts eval-{found['part']}",
                "notes": {"cut_off": f"The run was cut off after {len(records)} answers."},
                "rows": result_rows("", groups),
            }
        if not result:
            continue
        result.setdefault("grids", grid_rows(records, groups))
        method = "smol-shipped" if found["part"] == "shipped" else f"{run} {found['part']}"
        for row in result["rows"]:
            row["method"] = method
        name = "_".join(part for part in found.groups() if part)
        out[names.get(folder.name, f"{about['date']}_needle_{label}_{name}.json")] = result
    return out


def training_rows(work: Path, run: str, label: str = "") -> list[dict[str, Any]]:
    """Return a row for each part that was trained.

    Args:
        work: The folder of the run.
        run: Begins its methods.
        label: Follows the part's name, to tell another run of it.
    """
    rows = []
    files = {path.parent.name: path for path in (work / "stages").glob("*/metrics.jsonl")}
    for path in (work / "results").glob("*.metrics.jsonl"):
        files[path.name.removesuffix(".metrics.jsonl")] = path
    for part, path in sorted(files.items()):
        lines: dict[int, dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            # A run that went on did some steps twice: the last time counts.
            lines[line["step"]] = line
        steps = [lines[step] for step in sorted(lines)]
        losses = [line["loss"] for line in steps]
        few = max(1, len(losses) // 10)
        metrics: dict[str, float] = {
            "loss_first": round(statistics.fmean(losses[:few]), 4),
            "loss_last": round(statistics.fmean(losses[-few:]), 4),
        }
        for name in RATES:
            values = [line[name] for line in steps if name in line]
            if values:
                metrics[name] = round(statistics.median(values), 4)
        for name in ("peak_gib",):
            if values := [line[name] for line in steps if name in line]:
                metrics[name] = round(max(values), 2)
        rows.append(
            {
                "method": f"{run} {part}{label}",
                "kind": "ours",
                "tokens": round(statistics.fmean(line["tokens"] for line in steps)),
                "shape": {
                    "part": part, "stage": STAGE_OF.get(part), "run": label.strip(", "),
                    "steps": steps[-1]["step"], "logged": len(steps),
                    "frames": round(statistics.fmean(line["frames"] for line in steps)),
                },
                "metrics": metrics,
                "samples": [[line["step"], round(line["loss"], 4)] for line in steps],
            }
        )  # fmt: skip
    order = list(STAGE_OF)
    return sorted(rows, key=lambda row: (_place(order, row["shape"]["part"]), row["method"]))


def _place(order: list[str], part: str) -> int:
    return order.index(part) if part in order else len(order)


def collect(
    work: Path,
    out: Path,
    *,
    two_gpus: Path | None,
    about: dict[str, Any],
    run: str | None = None,
    command: str = "",
    gpus: int = 1,
    two_command: str = "",
) -> list[Path]:
    """Write the result files of a run.

    Args:
        work: Its folder.
        out: Folder of result files.
        two_gpus: Folder of the same stages on two GPUs.
        about: Date, commit, hardware and versions; what a needle result says takes their place.
        run: Name of another recipe's run.
        command: What was run to train it.
        gpus: GPUs that it was trained on.
        two_command: What was run on two GPUs.

    Returns:
        The files.
    """
    method, label = (f"smol-{run}",) * 2 if run else ("smol-stages", "smol")
    found = needle_results(work, about, method)
    whole = [each for each in found.values() if "cut_off" not in each.get("notes", {})]
    if whole:
        same = {k: whole[-1][k] for k in ("date", "commit", "hardware", "versions")}
        about = {**about, **{k: v for k, v in same.items() if v}}
    for each in found.values():
        each["commit"] = each["commit"] or about["commit"]
    if rows := training_rows(work, method):
        found[f"{about['date']}_training_{label}.json"] = {
            "benchmark": "training",
            "question": "How does the loss fall in each stage?",
            **about,
            "hardware": {**about["hardware"], "count": gpus},
            "command": command,
            "rows": rows,
        }
    if two_gpus is not None:
        shared = training_rows(two_gpus, "smol-two", ", 2 GPUs")
        parts = {row["shape"]["part"] for row in shared}
        alone = [r for r in training_rows(work, "smol-two") if r["shape"]["part"] in parts]
        found[f"{about['date']}_training_smol-two.json"] = {
            "benchmark": "training",
            "question": "Is the loss of a stage on two GPUs that of one?",
            **about,
            "hardware": {**about["hardware"], "count": 2},
            "command": two_command,
            "rows": alone + shared,
        }
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name, result in found.items():
        path = out / name
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--two-gpus", type=Path)
    parser.add_argument(
        "--two-command", help="what was run there",
        default="python recipes/smol/run.py --prepared PREPARED --work WORK --gpus 2",
    )  # fmt: skip
    parser.add_argument("--run", help="name of another recipe's run")
    parser.add_argument(
        "--command", help="what was run to train it",
        default="python recipes/smol/run.py --prepared PREPARED --work WORK",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that it was trained on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--date", required=True, help="of the run, where its results do not say")
    parser.add_argument("--commit", required=True, help="that the run was made with")
    parser.add_argument("--gpu", required=True, help="that the run was made on")
    parser.add_argument("--torch", required=True, help="version of torch there")
    args = parser.parse_args()
    about = {
        "date": args.date, "commit": args.commit,
        "hardware": {"gpu": args.gpu, "count": 1, "link": None}, "versions": {"torch": args.torch},
    }  # fmt: skip
    written = collect(
        args.work, args.out, two_gpus=args.two_gpus, about=about, run=args.run,
        command=args.command, gpus=args.gpus, two_command=args.two_command,
    )  # fmt: skip
    for path in written:
        print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
