"""A list of what was left out of training and why, as a JSON file that is always whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from longvila.log import get_logger

_LOG = get_logger(__name__)
Cause = Literal["broken", "too_long"]


@dataclass(frozen=True)
class Event:
    """One sample that was not used as it stands.

    Attributes:
        position: Where it stood in the order.
        id: Dataset and id.
        cause: ``broken`` or ``too_long``.
        reason: What is wrong, naming the file.
        found: ``looking`` (at metadata) or ``decoding``.
        substitute: What took its place in the row; None where the next sample of the order did, or
            nothing could.
    """

    position: int
    id: str
    cause: Cause
    reason: str
    found: Literal["looking", "decoding"]
    substitute: str | None = None


@dataclass
class Report:
    """Counts and lists; whoever adds to them writes them, by rename.

    Args:
        path: Where to; None only counts.
        keep: Most events listed; all are counted.
    """

    path: Path | None = None
    keep: int = 10_000
    counts: Counter[str] = field(default_factory=Counter)
    events: list[Event] = field(default_factory=list)
    _listed: set[Event] = field(default_factory=set)

    def used(self, documents: int, tokens: int, frames_cut: int, shortened: int) -> None:
        """Count what a row used."""
        self.counts.update(
            documents=documents, tokens=tokens, frames_cut=frames_cut, shortened=shortened
        )

    def add(self, event: Event) -> None:
        """Count and list one event, unless the file of an earlier run has brought it."""
        if event in self._listed:
            return
        self.counts[event.cause] += 1
        if len(self.events) < self.keep:
            self.events.append(event)

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        text = json.dumps(
            {"counts": dict(self.counts), "events": [asdict(e) for e in self.events]}, indent=1
        )
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {"counts": dict(self.counts), "events": [asdict(e) for e in self.events]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, and from what is listed in the file.

        What breaks while decoding is known to one group only. With other groups than there were,
        the state may be that of another one, and this group's file must not lose what is in it.
        """
        self.counts = Counter(state["counts"])
        self.events = [Event(**event) for event in state["events"]]
        self._listed = set()
        if self.path is None or not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            listed = [Event(**event) for event in content["events"]]
        except (OSError, LookupError, TypeError, ValueError) as fault:
            _LOG.warning(
                "%s is no list of what was left out, and is begun anew: %s", self.path, fault
            )
            return
        known = set(self.events)
        for event in listed:
            if event.found == "decoding" and event not in known:
                self.add(event)
                self._listed.add(event)
