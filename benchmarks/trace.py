"""Does a layer's communication hide behind its arithmetic, and does the host ever wait?

Profiles a few forward and backward passes of attention methods with ``torch.profiler`` and reads
the trace's intervals:

- ``communication``: time in which an NCCL kernel runs, ``hidden`` the part of it in which another
  kernel runs too, ``exposed`` the rest,
- ``idle``: time between the first and the last kernel in which the device runs nothing,
- host waits inside the layer: synchronising runtime calls, copies from device to host, and reads
  of a scalar (``aten::_local_scalar_dense``, what ``.item()`` does).

    torchrun --nproc-per-node 2 -m benchmarks.trace --tokens 131072
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import _cluster
from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks._results import Report, Row, hardware
from benchmarks.attention import choose
from benchmarks.peers._method import Method

QUESTION = "How much of a layer's communication is hidden, and how often does the host wait?"
WINDOW = "layer"
SYNCHRONIZING = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")
COMMUNICATION = re.compile(r"nccl", re.IGNORECASE)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """What one rank's trace says of one pass, times in milliseconds."""

    span_ms: float
    compute_ms: float
    communication_ms: float
    hidden_ms: float
    exposed_ms: float
    idle_ms: float
    host_synchronizations: float
    device_to_host_copies: float
    scalar_reads: float


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint sorted intervals covering the same points."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Length of the intersection of two unions."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total


def summarize(events: Sequence[dict[str, Any]], passes: int) -> Summary:
    """Reduce a Chrome trace's events (microseconds) to figures of one pass.

    Host events count if they fall into a window annotated ``layer`` on the host; device events
    all count, since the profile holds nothing else.
    """
    windows = [
        _interval(event)
        for event in events
        if event.get("name") == WINDOW and event.get("cat") == "user_annotation"
    ]
    if not windows:
        raise ValueError(f"the trace has no {WINDOW!r} annotation; was anything profiled?")
    communication, compute = [], []
    waits = copies = reads = 0
    for event in events:
        category, name = event.get("cat"), str(event.get("name"))
        if "dur" not in event:
            continue
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            is_ours = communication if COMMUNICATION.search(name) else compute
            is_ours.append(_interval(event))
            copies += category == "gpu_memcpy" and "DtoH" in name
        elif any(start <= event["ts"] <= end for start, end in windows):
            waits += category == "cuda_runtime" and bool(SYNCHRONIZING.search(name))
            reads += category == "cpu_op" and name == "aten::_local_scalar_dense"
    communication, compute = union(communication), union(compute)
    everything = union([*communication, *compute])
    span = everything[-1][1] - everything[0][0] if everything else 0.0
    hidden = overlap(communication, compute)
    per_pass = 1e-3 / passes
    return Summary(
        span_ms=span * per_pass,
        compute_ms=length(compute) * per_pass,
        communication_ms=length(communication) * per_pass,
        hidden_ms=hidden * per_pass,
        exposed_ms=(length(communication) - hidden) * per_pass,
        idle_ms=(span - length(everything)) * per_pass,
        host_synchronizations=waits / passes,
        device_to_host_copies=copies / passes,
        scalar_reads=reads / passes,
    )


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def trace_method(method: Method, case: Case, cluster: Cluster, passes: int) -> Summary:
    """Profile a method after a warm-up and summarise this rank's trace."""
    runner = method.setup(case, cluster)
    count = runner.tokens().numel()
    q_heads, kv_heads = (part.stop - part.start for part in runner.heads())

    def draw(heads: int) -> torch.Tensor:
        shape = (1, count, heads, case.head_dim)
        return torch.randn(shape, device=cluster.device).to(case.dtype)

    leaves = [draw(n).requires_grad_() for n in (q_heads, kv_heads, kv_heads)]
    dout = draw(q_heads)
    activities = [ProfilerActivity.CPU]
    if cluster.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with runner.active():
        for _ in range(2):
            torch.autograd.grad(runner.forward(*leaves), leaves, dout)
        cluster.barrier()
        with profile(activities=activities) as profiler:
            with record_function(WINDOW):
                for _ in range(passes):
                    torch.autograd.grad(runner.forward(*leaves), leaves, dout)
            cluster.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarize(events, passes)


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    report = Report("trace", QUESTION, hardware(cluster))
    dtype = getattr(torch, options.dtype)
    for tokens in options.tokens:
        case = Case(tokens, options.heads, options.kv_heads, options.head_dim, dtype)
        for method in choose(options.methods):
            if method.unavailable(case, cluster) is not None:
                continue
            mine = trace_method(method, case, cluster, options.passes)
            ranks = cluster.gather_objects(asdict(mine))
            # The slowest rank's figures, and the most waits of any rank.
            worst = max(ranks, key=lambda r: r["exposed_ms"] + r["idle_ms"])
            metrics = {name: round(value, 4) for name, value in worst.items()}
            for name in ("host_synchronizations", "device_to_host_copies", "scalar_reads"):
                metrics[name] = max(r[name] for r in ranks)
            about = {"kernel": method.about.kernel, "package": method.about.package}
            shape = case.shape(cluster.world_size)
            report.rows.append(Row(method.name, method.kind, tokens, shape, metrics, ranks, about))
            shown = " ".join(f"{name} {value:g}" for name, value in metrics.items())
            cluster.say(f"S={tokens} {method.name}: {shown}")
    if cluster.is_main and options.out is not None:
        cluster.say(f"wrote {report.write(options.out, suffix=options.suffix)}")
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--methods", default="longvila|torch_cp|deepspeed")
    _cluster.add_hosts_option(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined(emulate_hosts=options.emulate_hosts) as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
