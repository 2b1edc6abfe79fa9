"""What a run measures, and where it is written.

Tokens a second and GPU, the share of time spent waiting for data, peak memory, and the causal MFU:
the operations that a step needs, over the time it took, over what the devices could have done.
Operations of a step, from what it saw; recomputation and padding do not count:

    language model   w * N_text * tokens           N_text: weights of its linear layers
                     w * N_head * targets          the head where a token has a target
                     a * H * D * layers * pairs    pairs of a token and one it sees, in its document
    vision tower     w * N_tower * patches
                     a * M * layers * patches^2    every patch of a frame sees every patch of it
    projector        w * N_projector * rows        rows: tokens of all frames

where w = 2 forward, + 2 where gradients pass through, + 2 where weights are tuned; and a = 4
forward (two products of 2 operations), + 8 where gradients pass through. An adapter's own weights
are left out, and so are towers of other families, whose frames have no one size. The ceiling is the
published dense bfloat16 rate of the GPU; where that is not known here, no MFU is given.

Lines go to ``metrics.jsonl``, always, and to trackers by name (`longvila.train.trackers`). Only the
first rank writes. Times are of the first rank.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longvila.parallel.families import find_family
from longvila.train.checkpoint import writing
from longvila.train.parts import base_model, named_parts
from longvila.train.step import StepResult
from longvila.train.trackers import Tracker, open_trackers

#: Dense bfloat16 operations a second, in the makers' data sheets.
PEAK_FLOPS = {
    # By name, the longer ones first: cards for PCIe are slower.
    "H200 NVL": 835.5e12, "H100 NVL": 835.5e12, "H100 PCIe": 756.5e12, "H800 PCIe": 756.5e12,
    "H200": 989.4e12, "H100": 989.4e12, "H800": 989.4e12, "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Return the ceiling of a device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)


@dataclass(frozen=True)
class Operations:
    """Operations a step needs, by what it saw; see the module's text.

    Attributes:
        per_token: For a token of the language model.
        per_target: For a token with a loss.
        per_pair: For a pair of tokens in attention.
        per_frame: For a frame in tower and projector.
    """

    per_token: float
    per_target: float
    per_pair: float
    per_frame: float

    @classmethod
    def of(cls, model: nn.Module) -> Operations:
        """Read a model's sizes, and what of it is tuned.

        Args:
            model: The model, sharded or not, or PEFT around it.
        """
        base = base_model(model)
        family = find_family(base)
        text: Any = family.text_model(base)
        config = text.config
        parts = named_parts(model)
        tuned = {part: any(p.requires_grad for _, p in named) for part, named in parts.items()}
        projector_tuned, tower_tuned = tuned["projector"], tuned["vision_tower"]
        through_projector = projector_tuned or tower_tuned
        linear: dict[str, int] = {}
        updated = 0
        for part, named in parts.items():
            matrices = [
                (name, p.numel())
                for name, p in named
                if p.ndim > 1 and ".lora_" not in name and "embed" not in name
                and "lm_head" not in name
            ]  # fmt: skip
            linear[part] = sum(n for _, n in matrices)
            if part == "language_model":
                trained = {name for name, p in named if p.requires_grad}
                updated = sum(n for name, n in matrices if name in trained)
        # A language model passes gradients on where it, an adapter or anything before it is tuned.
        passes = tuned["language_model"] or through_projector
        text_size = linear["language_model"]
        head = base.get_output_embeddings().weight
        head_width = 2.0 + 2.0 * passes + 2.0 * head.requires_grad
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_frame = 0.0
        vision = getattr(base.config, "vision_config", None)
        if linear["vision_tower"] and vision is not None and hasattr(base.config, "patch_grid"):
            height, width = base.config.patch_grid
            patches = height * width
            numbers = (re.search(r"\.layers\.(\d+)\.", name) for name, _ in parts["vision_tower"])
            layers = len({found[1] for found in numbers if found is not None})
            per_frame += (2.0 + 4.0 * tower_tuned) * linear["vision_tower"] * patches
            per_frame += (4.0 + 8.0 * tower_tuned) * vision.hidden_size * layers * patches**2
            weight = 2.0 + 2.0 * tower_tuned + 2.0 * projector_tuned
            per_frame += weight * linear["projector"] * base.config.tokens_per_frame
        return cls(
            per_token=(2.0 + 2.0 * passes) * text_size + 2.0 * updated,
            per_target=head_width * head.numel(),
            per_pair=(4.0 + 8.0 * passes) * heads * head_dim * config.num_hidden_layers,
            per_frame=per_frame,
        )

    def of_step(self, result: StepResult) -> float:
        """Return the operations of a step over all ranks."""
        counts = result.counts
        return (
            self.per_token * counts.tokens
            + self.per_target * counts.targets
            + self.per_pair * counts.pairs
            + self.per_frame * counts.frames
        )


class Clock:
    """Times of one step: all of it, and what of it was spent waiting for data."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited_s = 0.0

    def waits(self, since: float) -> None:
        """Count the time since then as waiting."""
        self.waited_s += time.perf_counter() - since

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.began


def _drop_cut_line(path: Path) -> None:
    """Cut a file behind its last whole line: what comes next must not be glued to half a one."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


class Metrics:
    """Measures steps and writes lines.

    Args:
        folder: Where lines go; None writes nothing (other ranks than the first).
        operations: What a step needs.
        world_size: Ranks.
        device: This rank's device.
        trackers: Names of trackers; None for TensorBoard where it is installed.
        settings: What trackers show as the run's settings.

    Raises:
        TrackerError: If a tracker is unknown or not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        operations: Operations,
        *,
        world_size: int,
        device: torch.device,
        trackers: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.operations, self.world_size, self.device = operations, world_size, device
        self.ceiling = peak_flops(device)
        self.path: Path | None = None
        self.trackers: list[Tracker] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        with writing(self.path):
            _drop_cut_line(self.path)
        self.trackers = open_trackers(trackers, folder, settings or {})

    def measure(self, step: int, result: StepResult, clock: Clock, **more: float) -> dict[str, Any]:
        """Return the measures of a step.

        Args:
            step: Steps done, this one included.
            result: What it gave.
            clock: Its times.
            **more: Further numbers (the rate, the progress).
        """
        seconds, counts = clock.elapsed_s, result.counts
        needed = self.operations.of_step(result)
        line: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            **more,
            "documents": counts.documents,
            "tokens": counts.tokens,
            "targets": counts.targets,
            "frames": counts.frames,
            "step_s": seconds,
            "tokens_per_s_per_gpu": counts.tokens / seconds / self.world_size,
            "tflops_per_gpu": needed / seconds / self.world_size / 1e12,
            "data_wait_share": clock.waited_s / seconds,
        }
        if self.ceiling is not None:
            line["mfu_percent"] = 100 * needed / seconds / self.world_size / self.ceiling
        if self.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        elif sys.platform == "linux":
            import resource

            line["peak_host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; on other ranks than the first, nothing.

        Raises:
            CheckpointError: If the disk is full.
        """
        if self.path is not None:
            # Opened for each line: after a failed write nothing is left to fail again at the end.
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {
            f"train/{name}": value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for tracker in self.trackers:
            tracker.write(line["step"], numbers)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()
