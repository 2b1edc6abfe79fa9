"""How close does attention under sequence parallelism come to the bare kernel?

Qwen2-7B's attention (28 query and 4 kv heads of 128, bf16, causal) forward and backward,
communication included, against other projects' methods on the same ranks in the same run, and
against the kernel alone on H/R heads with all devices busy.

    torchrun --nproc-per-node 2 -m benchmarks.attention
    torchrun --nproc-per-node 2 -m benchmarks.attention --emulate-hosts --lengths 131072
    torchrun --nproc-per-node 4 -m benchmarks.attention --shapes 6/2x128 14/2x64 --methods longvila

On the CPU (gloo) it runs with small shapes and writes nothing unless ``--out`` is given.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch

from benchmarks import _cluster
from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks._harness import check, print_rows, race
from benchmarks._links import measure_links
from benchmarks._results import Report, Row, hardware, verdict
from benchmarks.ours import default_placement, our_methods
from benchmarks.peers import ABSENT, peer_methods
from benchmarks.peers._method import Method

STARTED = time.perf_counter()
QUESTION = (
    "What rate does attention forward and backward reach under sequence parallelism, "
    "communication included, against the bare kernel and against other methods?"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=[_shape("28/4x128")],
        help="query heads / kv heads x head dim of each model",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--check-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-repeats", type=int, default=3, help="at 256K tokens and more")
    parser.add_argument("--block-s", type=float, default=0.8, help="seconds a timed block takes")
    parser.add_argument("--min-calls", type=int, default=1)
    parser.add_argument("--methods", default=".", help="regular expression of method names")
    parser.add_argument(
        "--skip-long",
        default="flash$|usp_|chunked_cudnn|exact",
        help="regular expression of methods left out at 256K tokens and more",
    )
    _cluster.add_hosts_option(parser)
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="begin no length")
    parser.add_argument("--links", action="store_true", help="measure the links' rates too")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--suffix", default="")
    return parser.parse_args(argv)


def _shape(text: str) -> tuple[int, int, int]:
    """``28/4x128`` as its three numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected HEADS/KV_HEADSxHEAD_DIM, got {text!r}")
    heads, kv_heads, head_dim = map(int, found.groups())
    return heads, kv_heads, head_dim


def choose(pattern: str) -> list[Method]:
    methods = [m for m in [*our_methods(), *peer_methods()] if re.search(pattern, m.name)]
    if not methods:
        raise ValueError(f"no method's name matches {pattern!r}")
    return methods


def compare(rows: list[Row]) -> list[dict[str, object]]:
    """Our best method at a length against the best peer, as shipped and of any kind."""
    ours = [row for row in rows if row.kind == "ours"]
    found = []
    for kernel in sorted({str(row.about["kernel"]) for row in ours}):
        mine = min(
            (row for row in ours if row.about["kernel"] == kernel),
            key=lambda row: row.metrics["total_ms"],
        )
        pools = {
            "best peer as shipped": [r for r in rows if r.kind == "peer" and r.about["shipped"]],
            "best peer": [r for r in rows if r.kind == "peer"],
            "kernel alone": [r for r in rows if r.kind == "ideal" and r.about["kernel"] == kernel],
        }
        for name, pool in pools.items():
            if not pool:
                continue
            other = min(pool, key=lambda row: row.metrics["total_ms"])
            times = [[s["total_ms"] for s in row.samples] for row in (mine, other)]
            found.append(
                {
                    "heads": mine.shape["heads"],
                    "tokens": mine.tokens,
                    "ours": mine.method,
                    "against": name,
                    "method": other.method,
                    "speedup": round(other.metrics["total_ms"] / mine.metrics["total_ms"], 4),
                    "verdict": verdict(*times),
                }
            )
    return found


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    """Check, then time every shape and length; the report is written after each."""
    report = Report("attention", QUESTION, hardware(cluster))
    report.notes = {"check_tokens": options.check_tokens, "default_mesh": {}, "comparisons": []}
    if options.links:
        report.links = measure_links(cluster, (16, 256) if cluster.is_cuda else (1,))
        for row in report.links:
            cluster.say(f"links {row}")
    for shape in options.shapes:
        run_shape(shape, options, cluster, report)
    report.not_measured += [{"method": name, "reason": why} for name, why in ABSENT.items()]
    if cluster.is_main and options.out is not None:
        cluster.say(f"wrote {report.write(options.out, suffix=options.suffix)}")
    return report


def run_shape(
    shape: tuple[int, int, int], options: argparse.Namespace, cluster: Cluster, report: Report
) -> None:
    """One model's heads: what the default mesh is, who is right, and how long each takes."""
    heads, kv_heads, head_dim = shape

    def case(tokens: int) -> Case:
        return Case(tokens, heads, kv_heads, head_dim, getattr(torch, options.dtype))

    chosen, why = default_placement(case(options.check_tokens), cluster)
    report.notes["default_mesh"][f"{heads}/{kv_heads}"] = chosen
    cluster.say(f"{heads}/{kv_heads} heads of {head_dim}; default mesh is {chosen}\n{why}")
    entrants, rejected = check(choose(options.methods), case(options.check_tokens), cluster)
    named = f" ({heads}/{kv_heads} heads)" if len(options.shapes) > 1 else ""
    report.not_measured += [{"method": r.method + named, "reason": r.reason} for r in rejected]
    for tokens in options.lengths:
        late = cluster.everywhere([time.perf_counter() - STARTED])[0] > options.stop_after_s
        if late:
            cluster.say(f"no time left for {tokens} tokens")
            report.notes["cut_off"] = f"No time was left for {heads} heads at {tokens} tokens."
            return
        running, long = entrants, tokens >= 262144
        if long:
            running = [e for e in entrants if not re.search(options.skip_long, e.method.name)]
        rows = race(
            running,
            case(tokens),
            cluster,
            repeats=options.long_repeats if long else options.repeats,
            block_s=options.block_s,
            min_calls=options.min_calls,
        )
        report.rows += rows
        found = compare(rows)
        report.notes["comparisons"] += found
        print_rows(rows, cluster)
        for line in found:
            cluster.say(
                f"  {line['ours']} is {line['speedup']:.3f} x {line['method']} "
                f"({line['against']}): {line['verdict']}"
            )
        if cluster.is_main and options.out is not None:
            report.write(options.out, suffix=options.suffix)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined(emulate_hosts=options.emulate_hosts) as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
