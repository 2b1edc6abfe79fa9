"""The result file of one measurement, and when two methods count as level.

A file is ``{"benchmark", "question", "date", "commit", "command", "hardware", "versions",
"rows": [...]}``; a row is one method at one length with its metrics and the samples they come
from. It is written after every length, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks._cluster import Cluster

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

#: Packages whose version may change a figure.
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "flash-attn-4", "nvidia-cutlass-dsl",
    "axolotl-ringmaster", "deepspeed", "ring-flash-attn", "yunchang",
)  # fmt: skip

Kind = Literal["ours", "peer", "ideal"]


@dataclass
class Row:
    """One method at one size."""

    method: str
    kind: Kind
    tokens: int
    shape: dict[str, Any]
    metrics: dict[str, float]
    samples: list[Any] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Everything one run found; ``write`` may be called again as rows are added."""

    benchmark: str
    question: str
    hardware: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    links: list[dict[str, float]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path | None = None, *, suffix: str = "") -> Path:
        """Write ``DATE_BENCHMARK_HARDWARE[_suffix].json`` and return its path."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        content = {
            "benchmark": self.benchmark,
            "question": self.question,
            "date": today,
            "commit": commit(),
            "command": command(),
            "hardware": self.hardware,
            "versions": versions(),
            "rows": [asdict(row) for row in self.rows],
        }
        for name in ("links", "not_measured", "notes"):
            if getattr(self, name):
                content[name] = getattr(self, name)
        folder = RESULTS if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{today}_{self.benchmark}_{slug(self.hardware)}{'_' + suffix if suffix else ''}"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
        return path


def slug(hardware: dict[str, Any]) -> str:
    """``{"gpu": "NVIDIA H200", "count": 2}`` as ``2xh200``."""
    name = re.sub(r"(?i)nvidia|amd|instinct|\s+", "", str(hardware["gpu"])).lower() or "cpu"
    return f"{hardware['count']}x{re.sub(r'[^a-z0-9.]', '-', name)}"


def hardware(cluster: Cluster) -> dict[str, Any]:
    """What ran this: the device's name, how many, and how they are linked."""
    if not cluster.is_cuda:
        return {"gpu": "cpu", "count": cluster.world_size, "link": "gloo"}
    name = torch.cuda.get_device_name(cluster.device)
    link = _topology()
    if cluster.hosts == cluster.world_size:
        link = "sockets (every rank posing as its own host)"
    elif cluster.hosts > 1:
        posing = f"{cluster.hosts} groups of {cluster.ranks_per_host} posing as hosts"
        link = f"sockets ({posing}, {link} inside)"
    if cluster.world_size == 1:
        link = ""  # one GPU is linked to nothing; the row of the topology goes on with CPUs
    return {"gpu": name, "count": cluster.world_size, "link": link}


def _topology() -> str:
    """The link between GPU 0 and GPU 1 as ``nvidia-smi topo -m`` names it (NV18, PIX, SYS...)."""
    done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        clean = re.sub(r"\x1b\[[0-9;]*m", "", line)
        cells = clean.split()
        if cells[:1] == ["GPU0"] and len(cells) > 2 and cells[1] == "X":
            return cells[2]
    return "unknown"


def commit() -> str:
    """The commit measured; ``LONGVILA_COMMIT`` names it where the tree travels without git."""
    if named := os.environ.get("LONGVILA_COMMIT"):
        return named
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def command() -> str:
    """How to run this again, without the folder that this machine wrote to."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    module = spec.name if spec is not None else Path(sys.argv[0]).name
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    start = f"torchrun --nproc-per-node {ranks} -m" if ranks > 1 else "python -m"
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join([start, module, *words])


def versions() -> dict[str, str]:
    """Versions of whatever of :data:`PACKAGES` is installed, and of the device libraries."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def spread_percent(samples: Sequence[float]) -> float:
    """Largest less smallest sample, in percent of the median."""
    return 100.0 * (max(samples) - min(samples)) / statistics.median(samples)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> Literal["ahead", "level", "behind"]:
    """Compare two sets of repeats of a time: level unless the sets do not overlap.

    Args:
        ours: Times of one method, one an interleaved repeat; less is better.
        theirs: Times of the other, from the same run.

    Returns:
        ``ahead`` if every time of ours is below every one of theirs, ``behind`` the other way
        round, else ``level``.
    """
    if not ours or not theirs:
        raise ValueError("a verdict needs at least one sample of each method")
    if max(ours) < min(theirs):
        return "ahead"
    if min(ours) > max(theirs):
        return "behind"
    return "level"
