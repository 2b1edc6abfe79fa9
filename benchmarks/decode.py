"""How fast does an answer grow behind a very long cache, and how near is that to reading it once?

A text model of Qwen2-7B's shape, random weights, decodes behind a cache of random keys and values
(nothing is prefilled: a step does not care what they are). On several ranks each holds its shard.

1. *Check.* After a short prompt the logits of captured steps are compared with those of the model's
   own forward. Behind the filled cache greedy tokens of captured steps must be those of uncaptured
   ones (``tokens_equal``).
2. *Ceilings, in the same process.* The rate of a copy, of a sum (which only reads), and of the
   text model's matrix products with one token. ``decode_floor_ms`` is weights and keys over the
   rate of the copy, as in ``benchmarks.prefill``; ``read_floor_ms`` takes the faster of copy and
   sum.
3. *The kernel alone*, one layer's keys of one rank: the split kernel on tensors and by table, in
   several builds at the longest length, and the other back ends' single call on queries folded by
   kv head. Each is compared with the eager one at the shortest length.
4. *A step*, length by length: captured, uncaptured, and the general way; and tokens as a streamer
   of ``generate`` sees them. ``capture_s`` is what the step that captures took beyond an ordinary
   one, ``graph_gib`` the memory that it kept.

    python -m benchmarks.decode
    torchrun --nproc-per-node 2 -m benchmarks.decode

``--tiny`` runs all of it on the CPU in seconds, with shapes that say nothing, and steps uncaptured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _cluster, prefill
from benchmarks._cluster import Cluster, timed_ms
from benchmarks._results import Report, Row, hardware

QUESTION = "How fast do tokens come behind a long cache, against reading weights and cache once?"
GIB = 2**30
#: Limit of relative errors against the eager back end, and of logits, by type.
LIMIT = {"bfloat16": 5e-2, "float32": 1e-4}
#: Builds of the kernel: tokens of a block, warps, stages, programs of a multiprocessor.
TUNINGS = [
    (64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 3, 4), (64, 4, 4, 2), (64, 8, 3, 2), (32, 4, 4, 4),
    (128, 4, 2, 2), (128, 8, 3, 1),
]  # fmt: skip


class Bench:
    """One run: shapes, ranks, model and what was found."""

    def __init__(self, options: argparse.Namespace, cluster: Cluster) -> None:
        self.options, self.cluster = options, cluster
        self.report = Report("decode", QUESTION, hardware(cluster))
        self.started = time.perf_counter()
        self.shape = {
            "layers": options.layers, "heads": options.heads, "kv_heads": options.kv_heads,
            "model_dim": options.model_dim, "sequence_parallel": cluster.world_size,
        }  # fmt: skip

    def late(self, what: str) -> bool:
        """Whether the time is up, on any rank; notes what is left out."""
        spent = time.perf_counter() - self.started
        (spent,) = self.cluster.everywhere([spent])
        if spent <= self.options.stop_after_s:
            return False
        reason = f"stopped after {spent:.0f} s"
        self.report.not_measured.append({"method": what, "reason": reason})
        self.cluster.say(f"  left out {what}: {reason}")
        return True

    def add(self, method: str, kind: Any, tokens: int, metrics: dict[str, float]) -> None:
        rounded = {name: float(f"{value:.5g}") for name, value in metrics.items()}
        self.report.rows.append(Row(method, kind, tokens, self.shape, rounded))
        spent = time.perf_counter() - self.started
        shown = " ".join(f"{name} {value:g}" for name, value in rounded.items())
        self.cluster.say(f"  [{spent:4.0f} s] {method} at {tokens}: {shown}")
        self.save()

    def save(self) -> None:
        if self.cluster.is_main and self.options.out is not None:
            self.report.write(self.options.out, suffix=self.options.suffix)


# ---- ceilings ----------------------------------------------------------------------------------


def measure_ceilings(model: Any, bench: Bench) -> dict[str, float]:
    """GB/s of a copy, of a sum, and of matrix products with one token."""
    options, cluster = bench.options, bench.cluster
    source = torch.zeros(options.copy_bytes // 2, dtype=torch.int16, device=cluster.device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = timed_ms(cluster, lambda: target.copy_(source), calls=options.calls)
    floats = source.view(torch.float32)
    floats.sum()
    sum_ms = timed_ms(cluster, floats.sum, calls=options.calls)
    layers = model.model.language_model.layers
    x = torch.randn(
        1, options.model_dim, dtype=getattr(torch, options.dtype), device=cluster.device
    )

    def products() -> None:
        # All layers, so that none is read from a cache.
        for layer in layers:
            own, mlp = layer.self_attn, layer.mlp
            own.o_proj(own.q_proj(x))
            own.k_proj(x), own.v_proj(x)
            mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))

    products()
    products_ms = captured_ms(products, cluster, options.calls)
    weights = sum(p.numel() * p.element_size() for p in layers.parameters())
    found = {
        "copy_gb_per_s": 4 * source.numel() / copy_ms / 1e6,
        "sum_gb_per_s": 2 * source.numel() / sum_ms / 1e6,
        "products_gb_per_s": weights / products_ms / 1e6,
        "products_ms": products_ms,
    }
    bench.report.notes["ceilings"] = {k: float(f"{v:.5g}") for k, v in found.items()}
    cluster.say(f"  {bench.report.notes['ceilings']}")
    return found


def captured_ms(function: Callable[[], Any], cluster: Cluster, calls: int) -> float:
    """Milliseconds of a call without the host's part: from a graph where there is a GPU."""
    if not cluster.is_cuda:
        return timed_ms(cluster, function, calls=calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    graph.replay()
    return timed_ms(cluster, graph.replay, calls=calls)


# ---- the kernel alone --------------------------------------------------------------------------


def run_kernels(bench: Bench, ceilings: dict[str, float]) -> None:
    """One query over one layer's shard, by everything that can do it."""
    options, cluster = bench.options, bench.cluster
    lengths = sorted(options.lengths)
    held = [-(-n // cluster.world_size) for n in lengths]
    dim = options.model_dim // options.heads
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(cluster.device).manual_seed(3)

    def draw(tokens: int, heads: int) -> Tensor:
        x = torch.empty(1, tokens, heads, dim, dtype=dtype, device=cluster.device)
        return x.normal_(generator=generator)

    q = draw(1, options.heads)
    keys, values = draw(held[-1], options.kv_heads), draw(held[-1], options.kv_heads)
    for number, (tokens, own) in enumerate(zip(lengths, held, strict=True)):
        k, v = keys[:, :own], values[:, :own]
        moved = 2 * k.numel() * k.element_size()
        wanted = reference(q, k, v) if number == 0 else None
        last = number == len(lengths) - 1
        for name, call in kernels(bench, q, k, v, sweep=last).items():
            if bench.late(f"{name} at {tokens}"):
                return
            try:
                out = call()
                cluster.synchronize()
                ms = timed_ms(cluster, call, calls=options.calls)
            except (RuntimeError, ValueError, ImportError) as fault:
                reason = f"{type(fault).__name__}: {str(fault).splitlines()[0]}"[:200]
                bench.report.not_measured.append({"method": name, "reason": reason})
                cluster.say(f"  left out {name} at {tokens}: {reason}")
                continue
            rate = moved / ms / 1e6
            metrics = {
                "kernel_ms": ms, "gb_per_s": rate,
                "percent_of_copy": 100 * rate / ceilings["copy_gb_per_s"],
            }  # fmt: skip
            if wanted is not None:
                flat = out.float().flatten()
                error = float((flat - wanted).norm() / wanted.norm())
                if not error <= LIMIT[options.dtype]:
                    raise RuntimeError(f"{name} is wrong, not timing: {error}")
                metrics["error_out"] = error
            kind = "ours" if name.startswith(("split", "table")) else "peer"
            bench.add(name, kind, tokens, metrics)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from longvila.ops.attention import attention_forward

    out, _ = attention_forward(
        q.float(), k.float(), v.float(), causal=False, backend="eager", needs_backward=False
    )
    return out.float().flatten()


def kernels(
    bench: Bench, q: Tensor, k: Tensor, v: Tensor, *, sweep: bool
) -> dict[str, Callable[[], Tensor]]:
    """Ways to attend with one query; those that cannot be had raise when called."""
    from longvila.inference.decode import attend_segment, chunk_tokens
    from longvila.ops.attention import attention_forward
    from longvila.ops.decode import Tuning, attend_tables, decode_attention
    from longvila.ops.kv_table import KVTable

    table = KVTable(1, 1, k.shape[2], k.shape[3], k.dtype, k.device)
    refused = table.load([[(k, v)]])
    assert refused is None, refused
    table.step(k.shape[1], 0)
    found: dict[str, Callable[[], Tensor]] = {
        "split": lambda: decode_attention(q, k, v)[0],
        "table": lambda: attend_tables(q, [table], 0),
    }
    group = q.shape[2] // k.shape[2]
    folded = q.unflatten(2, (k.shape[2], group)).transpose(2, 3).reshape(1, group, *k.shape[2:])

    def alone(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out, _ = attention_forward(
                folded, k, v, causal=False, backend=name, needs_backward=False
            )
            return out.view(1, 1, group, *k.shape[2:]).transpose(2, 3).flatten()

        return call

    for name in ("fa4", "fa3", "cudnn", "flash", "cpu"):
        found[name] = alone(name)
    chunk = chunk_tokens(k.shape[1], k.shape[2], 132)
    found["chunks"] = lambda: attend_segment(
        q, k, v, causal=False, softmax_scale=None, split_tokens=chunk
    )[0]
    if sweep:
        for each in TUNINGS:
            name = "split_{}x{}w{}s{}p".format(*each)
            found[name] = lambda each=each: decode_attention(q, k, v, tuning=Tuning(*each))[0]
    return found


# ---- steps -------------------------------------------------------------------------------------


def check(model: Any, bench: Bench, mesh: Any) -> float:
    """Relative error of the logits of captured steps behind a short prompt."""
    from longvila.inference.engine import Engine

    options, cluster = bench.options, bench.cluster
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, options.vocab - 2, (1, options.check_tokens), generator=generator)
    ids = ids.to(cluster.device)
    new = 6
    want = model(input_ids=ids, logits_to_keep=new).logits[0].float()
    with Engine(model, mesh, decode_graphs=mode_of(options, cluster)) as engine:
        cache = engine.prefill({"input_ids": ids[:, :-new]})
        steps = range(ids.shape[1] - new, ids.shape[1])
        got = torch.cat([engine.decode(cache, ids[:, n : n + 1]) for n in steps]).float()
    error = float((got - want).norm() / want.norm())
    (error,) = cluster.everywhere([error])
    cluster.say(f"check at {ids.shape[1]} tokens: error {error:.1e}")
    if not error <= LIMIT[options.dtype]:
        raise RuntimeError(f"logits are wrong, not timing: {error} above {LIMIT[options.dtype]}")
    return error


def mode_of(options: argparse.Namespace, cluster: Cluster) -> Any:
    """The mode that is measured as captured."""
    return "auto" if cluster.is_cuda and options.captured else "uncaptured"


def run_steps(
    model: Any, bench: Bench, mesh: Any, ceilings: dict[str, float], error: float
) -> None:
    """Milliseconds a token at every length, in every way."""
    from longvila.inference.engine import Engine

    options, cluster = bench.options, bench.cluster
    lengths = sorted(options.lengths)
    with Engine(model, mesh, decode_graphs="off") as engine:
        film = prefill.filled_cache(engine, options, lengths, cluster)
    rate = prefill.Ceilings(0.0, "", 0.0, 0.0, ceilings["copy_gb_per_s"])
    faster = max(ceilings["copy_gb_per_s"], ceilings["sum_gb_per_s"])
    ways = {"captured": mode_of(options, cluster), "uncaptured": "uncaptured", "general": "off"}
    if not options.captured:
        del ways["captured"]
    said: dict[tuple[str, int], Tensor] = {}
    for way, mode in ways.items():
        cluster.synchronize()
        prefill.free(cluster)
        before = cluster.reset_peak()
        with Engine(model, mesh, decode_graphs=mode) as engine:
            more = {"capture_s": capture_s(engine, film, lengths[0], cluster)}
            if cluster.is_cuda:
                more["graph_gib"] = (torch.cuda.memory_reserved() - before) / GIB
            for tokens in lengths:
                if bench.late(f"steps {way} at {tokens}"):
                    break
                floor = prefill.decode_floor_ms(model, options, rate, tokens, cluster.world_size)
                step_ms = decode_ms(engine, film, tokens, cluster, options)
                out, stream_ms = generate(engine, film, tokens, cluster, options)
                said[way, tokens] = out
                metrics = {
                    "decode_step_ms": step_ms, "decode_floor_ms": floor,
                    "decode_percent_of_floor": 100 * floor / step_ms,
                    "read_floor_ms": floor * ceilings["copy_gb_per_s"] / faster,
                    "stream_step_ms": stream_ms, "decode_tokens_per_s": 1e3 / stream_ms,
                    "stream_percent_of_floor": 100 * floor / stream_ms,
                    "error_logits": error, **more,
                }  # fmt: skip
                if way == "uncaptured" and ("captured", tokens) in said:
                    equal = torch.equal(out, said["captured", tokens])
                    metrics["tokens_equal"] = float(equal)
                bench.add(f"longvila_{way}", "ours", tokens, metrics)


def at(engine: Any, film: Any, tokens: int) -> Any:
    """A fork of the first tokens."""
    fork = engine.fork(film)
    fork.crop(tokens - film.get_seq_length())
    return fork


def capture_s(engine: Any, film: Any, tokens: int, cluster: Cluster) -> float:
    """Seconds of the first steps of a shape beyond the same number of later ones."""
    fork = at(engine, film, tokens)
    token = torch.ones(1, 1, dtype=torch.int64)
    spent = []
    for _ in range(2):
        cluster.barrier()
        start = time.perf_counter()
        for _ in range(4):
            engine.decode(fork, token)
        cluster.synchronize()
        spent.append(time.perf_counter() - start)
    return cluster.everywhere([spent[0] - spent[1]])[0]


def decode_ms(
    engine: Any, film: Any, tokens: int, cluster: Cluster, options: argparse.Namespace
) -> float:
    """Milliseconds of ``Engine.decode``, one call behind the other."""
    fork = at(engine, film, tokens)
    token = torch.ones(1, 1, dtype=torch.int64, device=cluster.device)
    for _ in range(2):
        engine.decode(fork, token)
    return timed_ms(cluster, lambda: engine.decode(fork, token), calls=options.calls)


def generate(
    engine: Any, film: Any, tokens: int, cluster: Cluster, options: argparse.Namespace
) -> tuple[Tensor, float]:
    """New tokens of a greedy answer, and the milliseconds of each after the first."""
    fork = at(engine, film, tokens)
    found: list[Tensor] = []

    def call(clock: prefill.Clock) -> None:
        found.append(engine.generate(fork, streamer=clock, **prefill.greedy(options)))

    answer = prefill.slowest(prefill.timed_answer(call, cluster), cluster)
    return found[0][0, tokens:].cpu(), 1e3 * answer.step_s


# ---- run ---------------------------------------------------------------------------------------


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    from longvila.sp import build_mesh

    bench = Bench(options, cluster)
    with torch.no_grad():
        mesh = None
        if cluster.world_size > 1:
            mesh = build_mesh(
                cluster.world_size, num_heads=options.heads, num_kv_heads=options.kv_heads,
                device_type=cluster.device.type,
            )  # fmt: skip
        model = prefill.build_model(options, cluster.device)
        error = check(model, bench, mesh)
        ceilings = measure_ceilings(model, bench)
        if options.steps:
            run_steps(model, bench, mesh, ceilings, error)
            prefill.free(cluster)
        if options.kernels:
            run_kernels(bench, ceilings)
    bench.save()
    return bench.report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for the CPU")
    parser.add_argument(
        "--lengths", type=prefill._lengths, default=prefill._lengths("64k,192k,512k,1182000")
    )
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--captured", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--calls", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--stop-after-s", type=float, default=130.0, help="begin nothing later")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    own = parser.parse_args(argv)
    shapes = prefill.parse(["--tiny"] if own.tiny else [])
    if own.tiny:
        own.lengths, own.calls, own.new_tokens = [40, 64], 2, 4
    # One layer of the tower is enough for a model that only reads text here.
    shapes.vision_layers = 2
    return argparse.Namespace(**{**vars(shapes), **vars(own)})


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined() as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
