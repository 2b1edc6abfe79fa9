"""Saves of a run: written beside, renamed when whole, resumed on as many ranks as there are.

    OUTPUT/saves/step-40/         a whole save
                  .metadata, *.distcp   tuned weights and optimiser states, each rank its shards
                  rank-0.pt ...         random generators and data state of each rank
                  run.json              step, counts, settings; written last
    OUTPUT/saves/frozen/          weights that the run never changes, written with its first save
    OUTPUT/saves/.partial-...     being written, or left by a run that was killed

1. Every rank writes into a folder whose name begins with a dot. When all are done, the first
   rank writes ``run.json``, flushes, and renames the folder: a save is whole or is not there,
   whenever the run is killed.
2. Old saves go the same way backwards: renamed first, then deleted.
3. Weights and states are read by `torch.distributed.checkpoint`, which reshards: another number of
   ranks, or another mesh, reads the same save. On as many ranks as wrote it, a run goes on to the
   bit: data order and random generators included. On others, generators are seeded from seed, step
   and rank, and the data go on where they stopped. What is read is compared with its checksums
   (`longvila.train.intact`).

Adapters, frozen parts and buffers are all in the folder, so it does not depend on the model that
the stage began from; what is frozen is there once, however many saves there are. Saves name the
frozen weights that they belong to. Saves of older versions are refused.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from longvila.errors import CheckpointError
from longvila.log import get_logger
from longvila.train.intact import find_damage

_LOG = get_logger(__name__)
_NAME = re.compile(r"step-(\d+)")
_VERSION = 2
_FROZEN = "frozen"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Save:
    """A whole save.

    Attributes:
        path: Its folder.
        step: Steps that were done.
        run: What ``run.json`` says.
    """

    path: Path
    step: int
    run: dict[str, Any]


def find_saves(folder: Path) -> list[Save]:
    """Return the whole saves of a folder, oldest first.

    Raises:
        CheckpointError: If a save is of another version, or damaged.
    """
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or not (path / "run.json").is_file():
            continue
        try:
            run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except ValueError as fault:
            raise _damaged(path, f"run.json: {fault}") from fault
        if not isinstance(run, dict):
            raise _damaged(path, "run.json holds no mapping")
        if run.get("version") != _VERSION:
            raise CheckpointError(
                f"{path} is of version {run.get('version')!r}, this is {_VERSION}; resume with the "
                "release that wrote it, or begin a new output folder"
            )
        found.append(Save(path, int(match[1]), run))
    return sorted(found, key=lambda save: save.step)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({reason}); copy it again, or move it away: the same command then goes "
        "on from the save before it, if there is one, or from the beginning"
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _one_process() -> Iterator[None]:
    """One process without a process group is what is meant, and no reason for a warning."""
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    kind, words, place, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(words).astype(np.int64)), int(place),
                  int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, words, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(*numbers: int) -> None:
    """Seed the generators of torch, numpy and Python from some integers."""
    mixed = int(np.random.SeedSequence([abs(n) for n in numbers]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


@contextmanager
def held(output: Path, *, patience_s: float = 10.0) -> Iterator[None]:
    """Keep other runs out of an output folder until this one ends, however it does.

    Two runs in one folder would delete each other's saves. A run that was killed a moment ago may
    still be ending, so the folder is waited for a little.

    Args:
        output: The folder; made if absent.
        patience_s: How long to wait.

    Raises:
        CheckpointError: On every rank, if another run holds it.

    Comm: One broadcast of an object.
    """
    file, held_by_other = None, [False]
    if _rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
        held_by_other[0] = not _lock(file, patience_s)
    try:
        if dist.is_initialized():
            dist.broadcast_object_list(held_by_other, src=0)
        if held_by_other[0]:
            raise CheckpointError(
                f"another run is at work in {output}; wait for it, stop it, or give this one "
                "another output folder"
            )
        yield
    finally:
        if file is not None:
            file.close()


def _lock(file: IO[str], patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        except OSError as fault:
            if fault.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            _LOG.warning(
                "%s: this file system has no locks (%s); nothing keeps a second run out of the "
                "folder",
                file.name, fault,
            )  # fmt: skip
            return True


def clean(folder: Path) -> None:
    """Delete what a killed run left; the first rank does it, all wait.

    Frozen weights without a save are of a run that never came to one, perhaps of another model.
    """
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)
        saves = find_saves(folder)
        if (folder / _FROZEN).exists() and not saves:
            shutil.rmtree(folder / _FROZEN)
        for path in sorted(folder.glob("step-*")):
            if path not in [save.path for save in saves]:
                _LOG.warning("%s is passed over: without run.json it is no whole save", path)
    _together()


def _split(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's state: what is tuned with all buffers, and what is frozen."""
    whole: dict[str, Any] = get_model_state_dict(model)
    tuned: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(ignore_frozen_params=True)
    )
    return tuned, {name: value for name, value in whole.items() if name not in tuned}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a disk that is full, or of one that fails, what it means for the run.

    Raises:
        CheckpointError: If what is done inside cannot write.
    """
    try:
        yield
    except (dcp.CheckpointException, OSError, RuntimeError, SafetensorError) as fault:
        failures = getattr(fault, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else fault
        reason = str(cause).partition("\n")[0]
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"{path} cannot be written ({reason}); that disk has {free / 2**20:,.0f} MiB "
            "left. Earlier saves are whole: make room, and the same command goes on from the newest"
        ) from fault


def _write(state: dict[str, Any], path: Path) -> None:
    with writing(path), _one_process():
        dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())


def _read(state: dict[str, Any], path: Path) -> None:
    try:
        with _one_process():
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (dcp.CheckpointException, KeyError, RuntimeError, ValueError) as fault:
        failures = getattr(fault, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else fault
        reason = str(cause).strip() or type(cause).__name__
        # What torch says where names or shapes of the model are not those of the save.
        if not any(words in reason for words in ("Missing key", "Size mismatch", "size mismatch")):
            raise _damaged(path, reason.partition("\n")[0][:500]) from fault
        raise CheckpointError(
            f"{path} does not fit the model: {reason[-500:]}. Was it saved by a stage "
            "with other tuned parts or another adapter? Then begin a new output folder"
        ) from fault
    # After reading, so that whatever shows in another way is said in that way.
    _agree(path, find_damage(path, rank=_rank(), ranks=_world()))


def _agree(path: Path, damage: str | None) -> None:
    """Raise on all ranks what one of them found damaged, so that none goes on without it."""
    found = [damage]
    if dist.is_initialized():
        mine, found = found[0], [None] * _world()
        dist.all_gather_object(found, mine)
    for each in found:
        if each is not None:
            raise _damaged(path, each)


def _save_frozen(folder: Path, frozen: dict[str, Any]) -> str | None:
    """Write frozen weights unless they are there; return what saves call them, on rank 0."""
    if not frozen:
        return None
    final, partial = folder / _FROZEN, folder / f"{_PARTIAL}{_FROZEN}"
    there = [final.exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(there, src=0)
    if not there[0]:
        if _rank() == 0:
            partial.mkdir(parents=True)
        _together()
        _write({"model": frozen}, partial)
        if _rank() == 0:
            with writing(partial):
                (partial / "name").write_text(secrets.token_hex(8))
                _flush(partial / "name")
                _flush(partial)
                partial.rename(final)
                _flush(folder)
        _together()
    return (final / "name").read_text() if _rank() == 0 else None


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: dict[str, Any],
    data: dict[str, Any],
    keep: int,
) -> Path:
    """Write a save and drop old ones.

    Args:
        folder: Folder of the saves, on a file system that all ranks share.
        step: Steps that were done.
        model: The model on its mesh.
        optimizer: Its optimiser.
        run: What the run wants back, as plain values; the first rank's counts.
        data: State of this rank's loader, as plain values.
        keep: Saves that are kept, this one included.

    Returns:
        The folder of the save.

    Raises:
        CheckpointError: If it cannot be written, for instance because the disk is full.

    Comm: Barriers, a broadcast, and the plan of torch.distributed.checkpoint.
    """
    partial, final = folder / f"{_PARTIAL}{step}", folder / f"step-{step}"
    if _rank() == 0:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    _together()
    tuned, frozen = _split(model)
    name = _save_frozen(folder, frozen)
    _write({"model": tuned, "optimizer": get_optimizer_state_dict(model, optimizer)}, partial)
    own = partial / f"rank-{_rank()}.pt"
    with writing(partial):
        torch.save({"random": _random_state(), "data": json.dumps(data)}, own)
        _flush(own)
    _together()
    if _rank() == 0:
        written = {
            "version": _VERSION, "step": step, "world_size": _world(), "frozen": name, **run
        }  # fmt: skip
        with writing(partial):
            (partial / "run.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
            _flush(partial / "run.json")
            _flush(partial)
        if final.exists():
            _drop(final)
        partial.rename(final)
        _flush(folder)
        for old in find_saves(folder)[:-keep]:
            _drop(old.path)
    _together()
    return final


def _drop(path: Path) -> None:
    """Delete a save so that no half of it can be taken for a whole."""
    gone = path.with_name(f"{_PARTIAL}old-{path.name}")
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def load(
    chosen: Save, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int
) -> dict[str, Any]:
    """Read a save into a model and its optimiser, and set the generators.

    Args:
        chosen: From `find_saves`.
        model: The model on its mesh, of the shapes that were saved.
        optimizer: Its optimiser, over the same parameters.
        seed: Seed for ranks that were not there.

    Returns:
        The loader's state for this rank.

    Raises:
        CheckpointError: If the save has other parameters than the model, or the frozen weights that
            it belongs to are not beside it.
    """
    tuned, frozen = _split(model)
    state = {"model": tuned, "optimizer": get_optimizer_state_dict(model, optimizer)}
    _read(state, chosen.path)
    if frozen:
        if chosen.run["frozen"] is None:
            raise CheckpointError(
                f"{chosen.path} was saved with nothing frozen, this run freezes {len(frozen)} "
                f"tensors ({next(iter(frozen))}, ...); tune the same parts, or begin a new output "
                "folder"
            )
        beside = chosen.path.parent / _FROZEN
        name = (beside / "name").read_text() if (beside / "name").is_file() else None
        if name is None or name != chosen.run["frozen"]:
            raise CheckpointError(
                f"{chosen.path} has no frozen weights beside it: {beside} is "
                f"{'absent' if name is None else 'of another run'}; copy saves with their folder"
            )
        values = {"model": frozen}
        _read(values, beside)
        frozen = values["model"]
    set_model_state_dict(model, {**state["model"], **frozen})
    # Moments are the save's; rates and decay are this run's, which may have been changed.
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    same = chosen.run["world_size"] == _world()
    beside = chosen.path / f"rank-{_rank() if same else 0}.pt"
    of_rank, damage = {}, None
    try:
        of_rank = torch.load(beside, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as fault:
        damage = f"{beside.name}: {str(fault).partition(chr(10))[0] or type(fault).__name__}"
    _agree(chosen.path, damage)
    if same:
        _set_random_state(of_rank["random"])
    else:
        _LOG.info("saved by %d ranks, resumed on %d", chosen.run["world_size"], _world())
        seed_everything(seed, chosen.step, _rank())
    data: dict[str, Any] = json.loads(of_rank["data"])
    return data
