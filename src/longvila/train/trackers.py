"""Where numbers of a run are shown: TensorBoard, Weights & Biases, Trackio, by name.

    --set saving.trackers=[wandb]          OUT/wandb (or the service, as WANDB_MODE says)
    --set saving.trackers=[trackio]        Trackio's own folder on this machine, or a Space
    --set saving.trackers=[tensorboard]    OUT/tensorboard

Where each sends what it gets is decided by its own settings (``WANDB_MODE=offline``,
``WANDB_PROJECT``, ``TRACKIO_DIR``); nothing is changed here. Without names, TensorBoard is written
where it is installed. A run that is resumed goes on in the same curve: its name is kept in
``OUT/run-name``.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from longvila.errors import LongVILAError

_PROJECT = "longvila"


class TrackerError(LongVILAError, ValueError):
    """There is no such tracker, or it is not installed."""


class Tracker(Protocol):
    """Shows numbers of steps."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        ...

    def close(self) -> None:
        """Hand over what waits, and end."""
        ...


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        name = _run_name(folder)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), id=name, name=name, resume="allow",
            dir=str(folder), config=dict(settings),
        )  # fmt: skip

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT), name=_run_name(folder),
            resume="allow", config=dict(settings),
        )  # fmt: skip

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _run_name(folder: Path) -> str:
    """The run's name, the same when it is resumed."""
    file = folder / "run-name"
    if not file.exists():
        file.write_text(f"{folder.name}-{secrets.token_hex(4)}", encoding="utf-8")
    return file.read_text(encoding="utf-8")


def open_trackers(
    names: Sequence[str] | None, folder: Path, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Open trackers.

    Args:
        names: Their names; None for TensorBoard where it is installed.
        folder: The run's folder.
        settings: What they show as the run's settings.

    Returns:
        The trackers.

    Raises:
        TrackerError: If one is unknown or not installed.
    """
    if names is None:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    for name in names:
        if name not in _TRACKERS:
            raise TrackerError(f"there is no tracker {name!r}; there are {sorted(_TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise TrackerError(f"the tracker {name} is not installed: pip install {name}")
    folder.mkdir(parents=True, exist_ok=True)
    return [_TRACKERS[name](folder, settings) for name in names]
