"""Time attention methods against each other fairly, and check each before it is timed.

1. ``check``: every method runs one case small enough for the exact answer on one device; the
   relative error of its output and of each input gradient is taken over all ranks. A method
   above the tolerance is reported as wrong and never timed.
2. ``race``: all methods run in interleaved repeats: one block of each, in an order that turns
   with every repeat, so that heat and power limits fall on all alike. A block is a warm-up call
   (none for calls that fill the device) and a run of calls without synchronisation inside; forward
   and backward are separated by events. A call counts as long as its slowest rank.
3. A row's figure is the median over repeats of the median over calls; its spread is the range
   over repeats. Two methods differ when their repeats do not overlap (:func:`verdict`).

What this does not do: end-to-end steps (see ``mmsp_step.py``), nor anything at less than full
load; the first block of a method, with its cold allocator, is thrown away.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import traceback
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks._case import Case, Exact, solve
from benchmarks._cluster import Cluster, Stopwatch
from benchmarks._results import Row, spread_percent
from benchmarks.peers._method import Method, Runner

#: Relative error a method may have, by dtype; twice what the kernels' rounding gives in bf16.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-10}
GIB = 2**30
#: Calls at least this long fill the device and need no warm-up once a method has run before.
LONG_CALL_S = 0.25


@dataclass
class Entrant:
    """A method that passed its check, with what was measured of it."""

    method: Method
    errors: dict[str, float]
    samples: list[dict[str, float]] = field(default_factory=list)
    extra_bytes: int = 0


@dataclass
class Rejected:
    """A method that does not take part, and why."""

    method: str
    reason: str


def check(
    methods: list[Method], case: Case, cluster: Cluster, *, seed: int = 11
) -> tuple[list[Entrant], list[Rejected]]:
    """Run every method once against the exact answer; sort out those that cannot or are wrong."""
    whole = case.inputs(cluster.device, seed)
    exact_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    exact = solve(*whole, dtype=exact_dtype)
    entrants: list[Entrant] = []
    rejected: list[Rejected] = []
    for method in methods:
        reason = method.unavailable(case, cluster)
        errors: dict[str, float] = {}
        if reason is None:
            errors, reason = _attempt(method, case, cluster, whole, exact)
        if reason is None:
            entrants.append(Entrant(method, errors))
            shown = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
            cluster.say(f"  checked {method.name:32s} {shown}")
        else:
            rejected.append(Rejected(method.name, reason))
            cluster.say(f"  left out {method.name:31s} {reason}")
    del whole, exact
    return entrants, rejected


def _attempt(
    method: Method, case: Case, cluster: Cluster, whole: tuple[Tensor, ...], exact: Exact
) -> tuple[dict[str, float], str | None]:
    """Errors of one method, or why it failed; ranks agree on which.

    A rank that raises while another waits in a collective ends in the collective's timeout, which
    stops the run: a method that fails on some ranks only cannot be skipped safely.
    """
    errors: dict[str, float] = {}
    reason = None
    try:
        errors = _errors(method.setup(case, cluster), cluster, whole, exact)
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError, AssertionError) as e:
        reason = f"failed: {type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        cluster.say("".join(traceback.format_exception(e)[-3:]))
    if cluster.everywhere([float(reason is not None)])[0]:
        return errors, reason or "failed on another rank"
    limit = TOLERANCE[case.dtype]
    wrong = [name for name, error in errors.items() if not error <= limit]
    if wrong:
        shown = ", ".join(f"{name} {errors[name]:.2e}" for name in wrong)
        return errors, f"wrong: {shown} above {limit:g}"
    return errors, None


def _errors(
    runner: Runner, cluster: Cluster, whole: tuple[Tensor, ...], exact: Exact
) -> dict[str, float]:
    """Relative errors over all ranks' parts of the output and of the gradients."""
    q_heads, kv_heads = runner.heads()
    held = runner.tokens().to(cluster.device)
    local = [
        x.index_select(1, held)[:, :, heads].contiguous()
        for x, heads in zip(whole, (q_heads, kv_heads, kv_heads, q_heads), strict=True)
    ]
    leaves = [x.requires_grad_() for x in local[:3]]
    with runner.active():
        out = runner.forward(*leaves)
        grads = torch.autograd.grad(out, leaves, local[3])
    pairs = {
        "out": (out.detach(), exact.out, q_heads),
        "dq": (grads[0], exact.dq, q_heads),
        "dk": (grads[1], exact.dk, kv_heads),
        "dv": (grads[2], exact.dv, kv_heads),
    }
    errors = {}
    for name, (got, want, heads) in pairs.items():
        mine = want.index_select(1, held)[:, :, heads]
        if got.shape != mine.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, expected {tuple(mine.shape)}")
        difference = (got.to(mine.dtype) - mine).double().square().sum()
        scale = mine.double().square().sum()
        total, reference = cluster.everywhere([float(difference), float(scale)], op="sum")
        errors[name] = (total / reference) ** 0.5
    return errors


def race(
    entrants: list[Entrant],
    case: Case,
    cluster: Cluster,
    *,
    repeats: int,
    block_s: float,
    min_calls: int,
    seed: int = 12,
) -> list[Row]:
    """Time all entrants at one length in interleaved repeats.

    Args:
        entrants: Methods that passed :func:`check`.
        case: The length to time.
        cluster: The ranks.
        repeats: Counted blocks of each method.
        block_s: Seconds a block should take, warm-up aside.
        min_calls: Calls a block has at least.
        seed: Of the random inputs.

    Returns:
        One row a method, fastest first.
    """
    generator = torch.Generator(cluster.device).manual_seed(seed + cluster.rank)
    runners = {}
    for entrant in entrants:
        entrant.samples = []
        runners[entrant.method.name] = entrant.method.setup(case, cluster)

    def draw(tokens: int, heads: int) -> Tensor:
        shape = (1, tokens, heads, case.head_dim)
        x = torch.empty(shape, dtype=case.dtype, device=cluster.device)
        return x.normal_(generator=generator)

    def inputs(runner: Runner) -> tuple[list[Tensor], Tensor]:
        tokens = runner.tokens().numel()
        q_heads, kv_heads = (part.stop - part.start for part in runner.heads())
        leaves = [draw(tokens, n).requires_grad_() for n in (q_heads, kv_heads, kv_heads)]
        return leaves, draw(tokens, q_heads)

    calls: dict[str, int] = {}
    call_s: dict[str, float] = {}
    for repeat in range(repeats + 1):
        turn = repeat % max(len(entrants), 1)
        for entrant in entrants[turn:] + entrants[:turn]:
            name = entrant.method.name
            runner = runners[name]
            leaves, dout = inputs(runner)
            if name not in calls:
                # Not counted: warms the allocator and sets the size of the method's blocks. All
                # ranks see the same laps and so decide alike.
                for _ in range(2):
                    laps, extra = _block(runner, leaves, dout, cluster, calls=1, warm=0)
                    call_s[name] = laps[0][2] / 1e3
                    if call_s[name] >= 1.0:
                        break
                wanted = max(min_calls, round(block_s / max(call_s[name], 1e-4)))
                calls[name] = min(wanted, 200)
                entrant.extra_bytes = int(cluster.everywhere([float(extra)])[0])
                continue
            warm = 0 if call_s[name] >= LONG_CALL_S else 1
            laps, _ = _block(runner, leaves, dout, cluster, calls=calls[name], warm=warm)
            columns = zip(
                ("forward_ms", "backward_ms", "total_ms"), zip(*laps, strict=True), strict=True
            )
            entrant.samples.append({key: statistics.median(lap) for key, lap in columns})
    return _rows(entrants, case, cluster)


def _block(
    runner: Runner,
    leaves: list[Tensor],
    dout: Tensor,
    cluster: Cluster,
    *,
    calls: int,
    warm: int,
) -> tuple[list[list[float]], int]:
    """Untimed calls, then ``calls`` timed ones without any synchronisation between them.

    Returns:
        Milliseconds of each call, (forward, backward, both) each on its slowest rank, and the
        bytes allocated at the peak beyond the inputs.
    """
    watches = []
    with runner.active(), _garbage_held():
        before = cluster.reset_peak()
        for call in range(-warm, calls):
            if call <= 0:
                cluster.barrier()
            watch = Stopwatch(cluster)
            watch.mark()
            out = runner.forward(*leaves)
            watch.mark()
            grads = torch.autograd.grad(out, leaves, dout)
            watch.mark()
            watches.append(watch)
            del out, grads
        share = runner.time_share
        laps = [[share * lap for lap in watch.laps_ms()] for watch in watches[warm:]]
    extra = cluster.peak_bytes() - before
    # Maxima over ranks are taken apart: an unbalanced method has different slowest ranks in
    # forward and backward, and a total below the sum of the two.
    flat = cluster.everywhere([value for f, b in laps for value in (f, b, f + b)])
    return [flat[i : i + 3] for i in range(0, len(flat), 3)], extra


@contextlib.contextmanager
def _garbage_held():
    """No collector pauses inside a block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _rows(entrants: list[Entrant], case: Case, cluster: Cluster) -> list[Row]:
    ranks = cluster.world_size
    forward_tera = case.forward_flops / ranks / 1e9
    backward_tera = case.backward_flops / ranks / 1e9
    medians = {}
    for entrant in entrants:
        columns = {key: [s[key] for s in entrant.samples] for key in entrant.samples[0]}
        medians[entrant.method.name] = {k: statistics.median(v) for k, v in columns.items()}
    ceilings = {
        entrant.method.about.kernel: medians[entrant.method.name]["total_ms"]
        for entrant in entrants
        if entrant.method.kind == "ideal"
    }
    best = min(ceilings.values(), default=None)
    rows = []
    for entrant in entrants:
        method, ms = entrant.method, medians[entrant.method.name]
        totals = [sample["total_ms"] for sample in entrant.samples]
        metrics = {
            "forward_ms": ms["forward_ms"],
            "backward_ms": ms["backward_ms"],
            "total_ms": ms["total_ms"],
            "forward_tflops_per_gpu": forward_tera / ms["forward_ms"],
            "backward_tflops_per_gpu": backward_tera / ms["backward_ms"],
            "total_tflops_per_gpu": (forward_tera + backward_tera) / ms["total_ms"],
            "spread_percent": spread_percent(totals),
            "extra_gib": entrant.extra_bytes / GIB,
            **{f"error_{name}": error for name, error in entrant.errors.items()},
        }
        if best is not None:
            metrics["percent_of_ideal"] = 100.0 * best / ms["total_ms"]
        if own := ceilings.get(method.about.kernel):
            metrics["percent_of_own_kernel"] = 100.0 * own / ms["total_ms"]
            metrics["head_bound"] = method.head_bound(case, cluster)
            metrics["percent_of_head_bound"] = 100.0 * own * metrics["head_bound"] / ms["total_ms"]
        about = {
            "kernel": method.about.kernel,
            "layout": method.about.layout,
            "package": method.about.package,
            "shipped": method.about.shipped,
            "limits": method.about.limits,
        }
        rows.append(
            Row(
                method.name,
                method.kind,
                case.tokens,
                case.shape(ranks),
                {name: float(f"{value:.5g}") for name, value in metrics.items()},
                [{k: round(v, 4) for k, v in s.items()} for s in entrant.samples],
                about,
            )
        )
    rows.sort(key=lambda row: row.metrics["total_ms"])
    return rows


def print_rows(rows: list[Row], cluster: Cluster) -> None:
    """A short table for the end of the log."""
    if not rows:
        return
    cluster.say(
        f"\nS={rows[0].tokens}  {'method':32s} fwd TF  bwd TF  total TF   ms      ideal%  own%  "
        "spread%  extra GiB"
    )
    for row in rows:
        m = row.metrics
        cluster.say(
            f"  {row.kind:5s} {row.method:34s} {m['forward_tflops_per_gpu']:7.1f} "
            f"{m['backward_tflops_per_gpu']:7.1f} {m['total_tflops_per_gpu']:8.1f} "
            f"{m['total_ms']:9.2f} {m.get('percent_of_ideal', float('nan')):7.1f} "
            f"{m.get('percent_of_own_kernel', float('nan')):6.1f} {m['spread_percent']:6.2f} "
            f"{m['extra_gib']:7.2f}"
        )
