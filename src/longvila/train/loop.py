"""The plain loop: steps until a stage is done, saved and resumed, on any mesh.

    refuse what would not fit
    resume from the newest whole save, if there is one
    until progress is 1
        draw micro-batches until the step has its samples (or rows)
        train_step
        measure, log
        save

Progress is steps over ``max_steps`` or epochs of the loader over ``epochs``, whichever is further;
all ranks see the same, since the loader's order is one for the whole job. Whoever stops the process
with SIGTERM gets a save first: ranks agree at the end of a step.

A loader is anything that yields batches and can say where it stands (`Loader`). It is asked anew
when an iteration of it ends, so an epoch may be an iteration.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from longvila.errors import CheckpointError, LongVILAError
from longvila.log import get_logger
from longvila.sp.mesh import SPMesh
from longvila.train import budget, checkpoint
from longvila.train.metrics import Clock, Metrics, Operations
from longvila.train.schedule import rate_at
from longvila.train.settings import from_plain, leaves, to_plain
from longvila.train.stages import Stage
from longvila.train.step import Counts, build_optimizer, count_batch, over_data_parallel, train_step

_LOG = get_logger(__name__)


class Loader(Protocol):
    """What the loop needs of data."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches from the current state on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches handed out so far end, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken."""
        ...

    @property
    def epoch(self) -> float:
        """Epochs that were handed out, the same on every rank."""
        ...


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        seen: What they saw, over all ranks.
        done: Share of the stage.
        losses: Loss of each step of this process.
        stopped: Whether the run was asked to stop before the end.
        terminated: Whether it was SIGTERM that asked.
    """

    step: int = 0
    seen: Counts = field(default_factory=Counts)
    done: float = 0.0
    losses: list[float] = field(default_factory=list)
    stopped: bool = False
    terminated: bool = False


class _Asked:
    """Whether this process was asked to stop; ranks agree on it once a step."""

    def __init__(self, mesh: SPMesh) -> None:
        self.mesh, self.asked = mesh, False
        # Handlers belong to the main thread; elsewhere whoever runs the loop keeps his own.
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def anywhere(self) -> bool:
        if self.mesh.world_size == 1:
            return self.asked
        assert self.mesh.device_mesh is not None
        flag = torch.tensor(int(self.asked), device=self.mesh.device_mesh.device_type)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.mesh.dp_sp_group)
        return bool(flag.item())

    def close(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


class _Source:
    """Micro-batches without end, and the time spent waiting for them."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader = loader
        # Loaders whose workers decode leave the last step to the device.
        self.finish = getattr(loader, "finish", None)
        self.device = device
        self.iterator: Iterator[dict[str, Any]] | None = None

    def draw(self, clock: Clock) -> dict[str, Any]:
        since = time.perf_counter()
        for _ in range(2):
            if self.iterator is None:
                self.iterator = iter(self.loader)
            batch = next(self.iterator, None)
            if batch is not None:
                clock.waits(since)
                return batch if self.finish is None else self.finish(batch, self.device)
            self.iterator = None
        raise LongVILAError("the loader gave no batch in a whole iteration; is there any data?")

    def close(self) -> None:
        close = getattr(self.iterator, "close", None)
        if close is not None:
            close()


def _progress(stage: Stage, step: int, loader: Loader) -> float:
    settings = stage.optimizer
    shares = [0.0]
    if settings.max_steps is not None:
        shares.append(step / settings.max_steps)
    if settings.epochs is not None:
        shares.append(loader.epoch / settings.epochs)
    # Epochs are counted in floating point; the last row must end the last of them.
    return 1.0 if max(shares) > 1 - 1e-9 else max(shares)


def run_stage(
    model: nn.Module,
    mesh: SPMesh,
    loader: Loader,
    stage: Stage,
    output: Path,
    *,
    stop_after: int | None = None,
    fused: bool = True,
    trackers: Sequence[str] | None = None,
) -> Progress:
    """Train a model through a stage.

    Args:
        model: On its mesh, with what the stage tunes tuned.
        mesh: The mesh.
        loader: This rank's batches.
        stage: The stage.
        output: Folder for saves and metrics, shared by all ranks.
        stop_after: Save and return after this many steps of this call; None for the whole stage.
        fused: Whether AdamW's fused kernel is used.
        trackers: Names of trackers instead of the stage's.

    Returns:
        How far the run is.

    Raises:
        OverBudget: If a step of the longest row would not fit the device.
        CheckpointError: If a save in the folder does not fit.
        NotFinite: If a step is not finite; the saves before it stay.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, stage.rates, stage.optimizer, fused=fused)
    # Better refused now, with advice, than out of memory in the first long row.
    budget.check(
        model, mesh, stage.parallel, budget.load_of_stage(stage, model, mesh), device,
        optimizer=optimizer,
    )  # fmt: skip
    folder = output / "saves"
    checkpoint.clean(folder)
    checkpoint.seed_everything(stage.seed, mesh.rank)
    progress = _resume(model, optimizer, loader, stage, folder, mesh.rank)
    metrics = Metrics(
        output if mesh.rank == 0 else None,
        Operations.of(model),
        world_size=mesh.world_size,
        device=device,
        trackers=stage.saving.trackers if trackers is None else trackers,
        settings=to_plain(stage),
    )
    source, asked = _Source(loader, device), _Asked(mesh)
    saved, first = progress.step, progress.step
    progress.done = _progress(stage, progress.step, loader)
    try:
        while progress.done < 1:
            clock, before = Clock(), progress.done
            result = train_step(
                model,
                _micro_batches(source, clock, stage, mesh),
                optimizer,
                mesh,
                rate=functools.partial(_rate, stage, progress, loader),
                clip_norm=stage.optimizer.clip_norm,
            )
            progress.step += 1
            progress.seen += result.counts
            progress.losses.append(result.loss)
            progress.done = _progress(stage, progress.step, loader)
            if progress.step % stage.saving.log_every == 0 or progress.done >= 1:
                rate = rate_at(stage.optimizer, before, progress.done)
                line = metrics.measure(
                    progress.step, result, clock, rate=rate, progress=progress.done
                )
                metrics.write(line)
                if mesh.rank == 0:
                    _LOG.info("%s", _say(line))
            progress.terminated = asked.anywhere()
            progress.stopped = progress.terminated or progress.step - first == stop_after
            every = stage.saving.every
            due = every is not None and progress.step % every == 0
            if due or progress.stopped or progress.done >= 1:
                run = {"stage": to_plain(stage), "seen": progress.seen.values()}
                checkpoint.save(
                    folder,
                    progress.step,
                    model,
                    optimizer,
                    run=run,
                    data=loader.state_dict(),
                    keep=stage.saving.keep,
                )
                saved = progress.step
            if progress.terminated and mesh.rank == 0:
                _LOG.info(
                    "SIGTERM: saved step %d (%.1f %% of the stage) in %s and ending; the same "
                    "command goes on from there",
                    progress.step, 100 * progress.done, folder,
                )  # fmt: skip
            if progress.stopped:
                break
    except Exception as fault:
        # Others may fail for this rank's failing, so each says where it was.
        where = f"{mesh.describe_rank()}, step {progress.step + 1}"
        fault.add_note(f"on {where}")
        _LOG.error("%s failed: %s: %s", where, type(fault).__name__, fault)
        raise
    finally:
        source.close()
        metrics.close()
        asked.close()
    assert saved == progress.step
    return progress


def _rate(stage: Stage, progress: Progress, loader: Loader) -> float:
    """The share of the full rate for a step whose micro-batches are all drawn."""
    after = _progress(stage, progress.step + 1, loader)
    return rate_at(stage.optimizer, progress.done, after)


def _resume(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    stage: Stage,
    folder: Path,
    rank: int,
) -> Progress:
    saves = checkpoint.find_saves(folder)
    if not saves:
        return Progress()
    newest = saves[-1]
    was = from_plain(Stage, newest.run["stage"], where=str(newest.path))
    if was.name != stage.name:
        raise CheckpointError(
            f"{newest.path} is a save of the stage {was.name}, this is {stage.name}; give each "
            "stage an output folder of its own"
        )
    before, now = leaves(was), leaves(stage)
    for name in before | now:
        group = name.partition(".")[0]
        differs = before.get(name) != now.get(name)
        if group in ("rates", "adapter", "context", "data", "optimizer") and differs and rank == 0:
            _LOG.warning(
                "%s was saved with %s %s, this run has %s",
                newest.path, name, before.get(name), now.get(name),
            )  # fmt: skip
    data = checkpoint.load(newest, model, optimizer, seed=stage.seed)
    # A stage whose steps are all done draws nothing more: it ends on whatever data there are.
    if stage.optimizer.max_steps is None or newest.step < stage.optimizer.max_steps:
        try:
            loader.load_state_dict(data)
        except ValueError as fault:
            output = folder.parent
            raise CheckpointError(
                f"{newest.path}: {fault}. A new run may begin from what this one learnt: the same "
                f"command with --set optimizer.max_steps={newest.step} ends it here and writes its "
                f"model to {output}; then give --model {output} and another --output"
            ) from fault
    if rank == 0:
        _LOG.info("resumed from %s", newest.path)
    return Progress(newest.step, Counts(*newest.run["seen"]))


def _micro_batches(
    source: _Source, clock: Clock, stage: Stage, mesh: SPMesh
) -> Iterator[dict[str, Any]]:
    """Draw those of one step as they are needed."""
    data, epochs = stage.data, stage.optimizer.epochs
    if data.rows_per_step is not None:
        for _ in range(max(data.rows_per_step // mesh.dp_size, 1)):
            yield source.draw(clock)
        return
    assert data.samples_per_step is not None
    samples = 0
    while samples < data.samples_per_step:
        batch = source.draw(clock)
        samples += over_data_parallel(count_batch(batch), mesh).documents
        yield batch
        if epochs is not None and source.loader.epoch > epochs - 1e-9:
            return


def _say(line: dict[str, Any]) -> str:
    parts = [
        f"step {line['step']}",
        f"{line['progress']:.1%}",
        f"loss {line['loss']:.4f}",
        f"norm {line['gradient_norm']:.3f}",
        f"rate x{line['rate']:.3f}",
        f"{line['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU",
    ]
    if "mfu_percent" in line:
        parts.append(f"MFU {line['mfu_percent']:.1f} %")
    if "peak_gib" in line:
        parts.append(f"peak {line['peak_gib']:.1f} GiB")
    parts.append(f"waiting for data {line['data_wait_share']:.0%}")
    return ", ".join(parts)
