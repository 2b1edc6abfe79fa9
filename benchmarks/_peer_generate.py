"""The peer of `benchmarks.prefill`: transformers' ``generate`` of the same model, the same prompt.

It runs in the first process alone, over all GPUs of the run: on several, accelerate places the
layers as ``device_map="auto"`` does, and a prompt goes through them one GPU after the other. The
other processes wait at the store, in no collective.

Its longest prompt is found from its own peaks: bytes grow in proportion to tokens, so two short
prompts give a line for each GPU, and what the GPU has left gives the length. That length, a little
shortened, is then tried; a second try is shorter still.

What it does not do: chunk the peer's prompt, quantise its cache or move it to the host. Those are
other modes with other speeds.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import prefill
from benchmarks._cluster import Cluster
from benchmarks._results import Report, Row

METHOD = "transformers_generate_auto"
#: Longest a rank waits while the first one runs the peer alone.
WAIT = timedelta(minutes=20)
#: Shares of the predicted longest prompt that are tried: allocators do not fill to the last byte.
SHARES = (0.96, 0.9)
#: A prompt so many times as long as what fits fails in the first layer, within seconds.
HOPELESS, HOPELESS_S = 1.5, 30.0


@dataclass(frozen=True)
class Held:
    """A prompt that the peer held.

    Attributes:
        tokens: Its length.
        seconds: To the first token.
        peaks: Bytes on each GPU.
    """

    tokens: int
    seconds: float
    peaks: tuple[int, ...]


def longest_tokens(short: Held, longer: Held, limits: Sequence[float]) -> int:
    """Return the most tokens that fit every GPU, by a line through two peaks of each."""
    span = longer.tokens - short.tokens
    found = []
    for first, second, limit in zip(short.peaks, longer.peaks, limits, strict=True):
        slope = (second - first) / span
        if slope > 0:
            found.append(longer.tokens + int((limit - second) / slope))
    return min(found)


def predicted_s(short: Held, longer: Held, tokens: int) -> float:
    """Return seconds to the first token: linear and quadratic work, from two prompts."""
    rates = [each.seconds / each.tokens for each in (short, longer)]
    square = max(0.0, (rates[1] - rates[0]) / (longer.tokens - short.tokens))
    return tokens * (rates[0] + square * (tokens - short.tokens))


def run_peer(options: argparse.Namespace, cluster: Cluster, report: Report, add: Any) -> int | None:
    """Measure the peer; the rows are added in the first process.

    Args:
        options: The shapes and lengths.
        cluster: The ranks.
        report: Where to say what was left out.
        add: Takes a row.

    Returns:
        Tokens of the longest prompt that it held, on every rank; None if it held none.
    """
    longest = 0
    if cluster.is_main:
        try:
            longest = _Peer(options, cluster, report, add).run()
        except (RuntimeError, ValueError, ImportError) as fault:
            reason = f"{type(fault).__name__}: {fault}"[:300]
            report.not_measured.append({"method": METHOD, "reason": reason})
            cluster.say(f"  left out {METHOD}: {reason}")
        # Its memory lies on the other ranks' GPUs too: they may go on when it is given back.
        prefill.free(cluster)
    if cluster.world_size > 1:
        store = dist.distributed_c10d._get_default_store()
        if cluster.is_main:
            store.set("longvila-peer-longest", str(longest))
        else:
            store.wait(["longvila-peer-longest"], WAIT)
            longest = int(store.get("longvila-peer-longest"))
    return longest or None


class _Peer:
    """The model, placed over the GPUs, and what it held so far."""

    def __init__(
        self, options: argparse.Namespace, cluster: Cluster, report: Report, add: Any
    ) -> None:
        self.options, self.cluster, self.report, self.add = options, cluster, report, add
        self.devices = list(range(cluster.world_size)) if cluster.is_cuda else []
        self.held: list[Held] = []
        self.model = prefill.build_model(options, cluster.device)
        if len(self.devices) > 1:
            self.model = dispatch(self.model)

    def run(self) -> int:
        """Measure all lengths; return the tokens of the longest prompt held, 0 for none."""
        lengths = list(self.options.peer_lengths or self.options.lengths)
        for number, tokens in enumerate(lengths):
            if self._late(tokens):
                break
            if number == 0:
                self._generate(tokens)  # unmeasured: the first prompt sets up libraries
            self.measure(tokens)
        most = self._predicted_most()
        if self.options.peer_longest and most is not None:
            self.cluster.say(f"  {METHOD} should hold {most} tokens")
            self.report.notes["peer_predicted_longest"] = most
            for share in SHARES:
                tokens = int(most * share)
                if self._late(tokens) or self.measure(tokens):
                    break
        return max((each.tokens for each in self.held), default=0)

    def _predicted_most(self) -> int | None:
        """Tokens that should fit all GPUs; None if two prompts have not been held on GPUs."""
        if len(self.held) < 2 or not self.devices:
            return None
        limits = [
            float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
            for device in self.devices
        ]
        return longest_tokens(*self.held[-2:], limits)

    def _late(self, tokens: int) -> bool:
        """Whether a prompt would end too late; says so."""
        seconds = predicted_s(*self.held[-2:], tokens) if len(self.held) > 1 else 0.0
        most = self._predicted_most()
        if most is not None and tokens > HOPELESS * most:
            seconds = HOPELESS_S
        return prefill.late(
            self.options, self.report, self.cluster, METHOD, tokens, 1.1 * seconds, alone=True
        )

    def measure(self, tokens: int) -> bool:
        """Add a row for a length; return whether it was held."""
        ranks = self.cluster.world_size
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        answer, length, frames = self._generate(tokens)
        peaks = tuple(torch.cuda.max_memory_allocated(device) for device in self.devices)
        metrics = {"out_of_memory": float(answer is None)}
        if answer is not None:
            self.held.append(Held(length, answer.ttft_s, peaks))
            metrics |= {
                "ttft_s": answer.ttft_s,
                "tokens_per_s_per_gpu": length / answer.ttft_s / ranks,
                "decode_tokens_per_s": 1 / answer.step_s,
                "decode_step_ms": 1e3 * answer.step_s,
            }
        metrics["peak_gib"] = max(peaks, default=0) / prefill.GIB
        found: Row = prefill.row(METHOD, "peer", self.options, length, frames, ranks, metrics, [])
        found.about = {"peak_gib_by_gpu": [round(peak / prefill.GIB, 3) for peak in peaks]}
        self.add(found)
        return answer is not None

    def _generate(self, tokens: int) -> tuple[prefill.Answer | None, int, int]:
        """One answer, None if memory did not suffice; the prompt's tokens and frames."""
        device = self.cluster.device
        batch = prefill.prompt(self.options, tokens, device)
        frames = int(batch["video_num_frames"])
        length = batch["input_ids"].shape[1]
        answer = None
        try:
            batch["pixel_values_videos"] = batch["pixel_values_videos"].draw(0, frames)
            batch["input_ids"] = batch["input_ids"].to(device)
            answer = prefill.timed_answer(
                lambda clock: self.model.generate(
                    **batch, streamer=clock, **prefill.greedy(self.options)
                ), self.cluster,
            )  # fmt: skip
        except torch.OutOfMemoryError as fault:
            self.cluster.say(f"    {length} tokens: {str(fault).splitlines()[0][:200]}")
        batch.clear()
        gc.collect()
        if self.devices:
            torch.cuda.empty_cache()
        return answer, length, frames


def dispatch(model: Any) -> Any:
    """Place a model over all GPUs as ``device_map="auto"`` does."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    names = sorted(model._no_split_modules)  # of all models inside
    memory = get_balanced_memory(model, no_split_module_classes=names)
    plan = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=names)
    return dispatch_model(model, plan, skip_keys=model._skip_keys_device_placement)
