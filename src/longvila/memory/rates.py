"""How fast devices and links are: one table, each number with its source, and what a user measured.

`GPUS` holds what a plan's times rest on. Nothing in it is fitted to a training step. Numbers of
the user's own machine replace them: `with_results` reads the result files that the benchmarks
write (`benchmarks/attention.py`: kernels and links; `benchmarks/memory_plan.py`: matrix products,
device memory, host copies).

It has no rate for a kernel on a device where nobody measured it; a plan then takes the nearest
kernel and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longvila.memory.sizes import PlanError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device and the links inside its node.

    Attributes:
        name: Name.
        memory_bytes: What torch sees of its memory.
        reserved_bytes: Of that, what torch's allocator does not get: context, NCCL, cuBLAS.
        matrices: Operations a second of wide bfloat16 products, forward and backward.
        attention: Operations a second of causal attention at long lengths, head dim 128, forward
            and backward, by back end.
        tower: Operations a second of a vision tower and its projector, all in all.
        memory_rate: Bytes a second of device memory.
        all_to_all: Bytes a second that a GPU sends in an all-to-all inside a node.
        gather: The same in an all-gather or a reduce-scatter.
        ring: The same to one neighbour.
        host_rate: Bytes a second to pinned host memory.
        sources: Where each number comes from.
    """

    name: str
    memory_bytes: float
    matrices: tuple[float, float]
    attention: Mapping[str, tuple[float, float]]
    tower: float
    memory_rate: float
    all_to_all: float
    gather: float
    ring: float
    host_rate: float
    reserved_bytes: float = 1.5 * GIB
    sources: Mapping[str, str] = field(default_factory=dict)

    def attention_rates(self, backend: str) -> tuple[tuple[float, float], str | None]:
        """Return a back end's rates, and a note where another one's stand in.

        Args:
            backend: Name of the back end.
        """
        if backend in self.attention:
            return self.attention[backend], None
        other = max(self.attention, key=lambda name: self.attention[name][1])
        return self.attention[other], (
            f"no rate of {backend} on {self.name} was measured; that of {other} stands in"
        )


_KERNELS = "benchmarks/results/2026-11-22_attention_2xh200.json, ideal_* rows at 131072 tokens"
_OWN = "benchmarks/results/2026-11-22_memory_plan_1xh200.json"
_LINKS = "the same file, links at 256 MiB"
_MAMF = (
    "largest matrix product rate of stas00/ml-engineering, compute/accelerator/README.md "
    "(MAMF table: A100 SXM 271.2, H100 SXM 794.5, H200 the same)"
)
_MAGI = (
    "MagiAttention's kernel benchmark, H100, causal, 32K, head dim 128, read off the chart (+-5): "
    "flash-attention 2 366/330, SDPA (cuDNN) 607/517, flash-attention 3 680/585"
)
_SHEET = "data sheet"
_TOWER = (
    "benchmarks/results/2026-11-22_vision_balance_2xh200.json, tower/longvila_exchange: operations "
    "of 512 frames a GPU, forward, again and backward, over 3.8864 s"
)

H200 = Gpu(
    name="H200",
    memory_bytes=139.8 * GIB,
    matrices=(671.5e12, 677.06e12),
    attention={
        "fa4": (694.51e12, 607.77e12),
        "cudnn": (583.77e12, 531.58e12),
        "flash": (337.31e12, 323.2e12),
    },
    tower=344.27e12,
    memory_rate=4.234e12,
    all_to_all=284.87e9,
    gather=256.49e9,
    ring=302.77e9,
    host_rate=55.287e9,
    sources={
        "matrices": f"{_OWN}, rate/matrices (sustained; best shapes reach 794.5 for a moment)",
        "attention": _KERNELS,
        "tower": _TOWER,
        "memory_rate": f"{_OWN}, rate/device_memory",
        "links": _LINKS,
        "host_rate": f"{_OWN}, rate/host",
    },
)

GPUS: dict[str, Gpu] = {
    "h200": H200,
    "h100": replace(
        H200,
        name="H100",
        memory_bytes=79.1 * GIB,
        matrices=(794.5e12, 794.5e12),
        attention={
            "flash": (366e12, 330e12),
            "cudnn": (607e12, 517e12),
            "fa3": (680e12, 585e12),
        },
        memory_rate=3.35e12,
        sources={
            **H200.sources,
            "matrices": _MAMF,
            "attention": _MAGI,
            "memory_rate": _SHEET,
            "host_rate": f"that of the H200, on the same PCIe 5 x16: {_OWN}",
            "links": f"those of the H200, which has the same NVLink: {_LINKS}",
        },
    ),
    "a100": replace(
        H200,
        name="A100",
        memory_bytes=79.1 * GIB,
        matrices=(271.2e12, 271.2e12),
        attention={"flash": (230e12, 196e12)},
        tower=344.27e12 * 271.2 / 794.5,
        memory_rate=2.04e12,
        all_to_all=284.87e9 * 600 / 900,
        gather=256.49e9 * 600 / 900,
        ring=302.77e9 * 600 / 900,
        host_rate=25e9,
        sources={
            **H200.sources,
            "matrices": _MAMF,
            "tower": f"scaled by the ratio of matrix rates, 271.2 / 794.5: {_TOWER}",
            "memory_rate": _SHEET,
            "attention": "arXiv 2307.08691, section 4.1: at most 73 % of 312 TFLOP/s forward, 63 % "
            "backward",
            "links": "those of the H200 by the data sheets' ratio of NVLink rates, 600 / 900",
            "host_rate": "PCIe 4 x16, about 80 % of 32 GB/s",
        },
    ),
}


def find_gpu(name: str) -> Gpu:
    """Return a device of the table by a name that contains one of its keys.

    Args:
        name: ``h200``, ``NVIDIA H100 80GB HBM3``.

    Raises:
        PlanError: If there is none.
    """
    lower = name.lower()
    for key, gpu in GPUS.items():
        if key in lower:
            return gpu
    raise PlanError(
        f"no rates of {name!r}; there are {', '.join(GPUS)} (result files of the benchmarks on "
        "your own machine are laid over one of them: --gpu NEAREST --rates FILE)"
    )


def with_results(gpu: Gpu, files: Iterable[str | Path]) -> Gpu:
    """Replace rates by those that the benchmarks measured.

    Args:
        gpu: Rates to begin from.
        files: Result files of ``benchmarks.attention`` and ``benchmarks.memory_plan``.

    Returns:
        The device; its sources name the files.

    Raises:
        PlanError: If a file is of another benchmark, or holds no rate.
    """
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(
                f"{file}: expected a result file of the benchmarks, in JSON; got {error}"
            ) from error
        kind = content.get("benchmark") if isinstance(content, dict) else None
        if kind == "attention":
            gpu = _with_attention(gpu, content, str(file))
        elif kind == "memory_plan":
            gpu = with_rows(gpu, content["rows"], str(file))
        else:
            raise PlanError(
                f"{file} is a result of {kind!r}; rates are in those of attention and memory_plan"
            )
    return gpu


def _with_attention(gpu: Gpu, content: Mapping[str, Any], file: str) -> Gpu:
    kernels = [row for row in content["rows"] if str(row["method"]).startswith("ideal_")]
    if not kernels:
        raise PlanError(f"{file} has no rows ideal_*: run it with the bare kernels")
    attention = dict(gpu.attention)
    # The longest length at which a kernel ran: plans are about long rows.
    for row in sorted(kernels, key=lambda each: int(each["tokens"])):
        metrics = row["metrics"]
        attention[str(row["method"]).removeprefix("ideal_")] = (
            1e12 * metrics["forward_tflops_per_gpu"],
            1e12 * metrics["backward_tflops_per_gpu"],
        )
    gpu = replace(gpu, attention=attention, sources={**gpu.sources, "attention": file})
    links = content.get("links") or []
    if not links:
        return gpu
    largest = max(links, key=lambda each: float(each["message_mib"]))
    return replace(
        gpu,
        all_to_all=1e9 * largest["all_to_all_gb_per_s"],
        gather=1e9 * largest["all_gather_gb_per_s"],
        ring=1e9 * largest["ring_gb_per_s"],
        sources={**gpu.sources, "links": file},
    )


def with_rows(gpu: Gpu, rows: Sequence[Mapping[str, Any]], file: str) -> Gpu:
    """Replace rates by the ``rate/...`` rows of ``benchmarks.memory_plan``.

    Args:
        gpu: Rates to begin from.
        rows: Rows of a result.
        file: Where they come from.

    Raises:
        PlanError: If there is no such row.
    """
    found = {row["method"]: row["metrics"] for row in rows if row["method"].startswith("rate/")}
    if not found:
        raise PlanError(f"{file} has no rows rate/*: run it without --no-rates")
    sources = dict(gpu.sources)
    if "rate/matrices" in found:
        each = found["rate/matrices"]
        rates = (1e12 * each["forward_tflops_per_gpu"], 1e12 * each["backward_tflops_per_gpu"])
        gpu, sources["matrices"] = replace(gpu, matrices=rates), file
    if "rate/device_memory" in found:
        rate = 1e9 * found["rate/device_memory"]["gb_per_s"]
        gpu, sources["memory_rate"] = replace(gpu, memory_rate=rate), file
    if "rate/host" in found:
        each = found["rate/host"]
        both = 1e9 * min(each["to_host_gb_per_s"], each["from_host_gb_per_s"])
        gpu, sources["host_rate"] = replace(gpu, host_rate=both), file
    return replace(gpu, sources=sources)
