"""The loader: an endless stream of packed rows, the same whatever the mesh, resumed to the bit.

    positions  0 1 2 3 ...            the mixture's order, a pure function of the position
       | look: encode a window, every rank its share, lengths told to all
    packer     best fit               one packing for the whole run, computed alike on all ranks
       | rows  0 1 2 3 ...            row g goes to dp rank g % dp_size, to all ranks of its group
    build      decode own frames      in the background, `prefetch` rows ahead
       | agree, replace               which documents could some rank of the group not decode?
    batch

The packing is global, so a step of accumulation a on dp ranks takes rows ``[k a dp, (k + 1) a dp)``
on every mesh with equal ``a * dp``, and a run may go on with other ranks than it began with.

Broken samples. One that cannot be opened or fits no row is left out when it is looked at, by the
one rank whose share it is, and the next of the order takes its place in the packing. One that turns
out broken while decoding is replaced in its row: ranks tell each other, and all take the same
substitute, a row of the same dataset that follows from seed, position and attempt, and fits; if
none does, the row goes without. Each is counted and listed in the report. A line of a file that is
no record is such a sample; a record that does not fit its adapter is not, and stops the run: it
speaks about the adapter.

State: next position, window (positions and lengths) and report; a few kilobytes, equal on all ranks
but for late replacements. It describes the batches handed out, not those built ahead.

Communication, on the host: one all-gather of objects over all ranks a window, one over the group a
batch. Every rank must ask for batches equally often.

An iteration covers `epochs` epochs (the last set of rows is filled up from the next epoch), or
never ends; the next one goes on where it stopped.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longvila.data.agreement import Agreement
from longvila.data.collate import BrokenMedia, Collator
from longvila.data.encode import Document, Encoder, Rejected
from longvila.data.mixture import Mixture
from longvila.data.packing import Packer
from longvila.data.report import Event, Report
from longvila.data.workers import Workers, encode_at, read_document
from longvila.errors import LongVILAError
from longvila.log import get_logger

_LOG = get_logger(__name__)
_VERSION = 1
#: What else decides how long a document is, as a state calls it; those that wait have lengths.
_OF_SAMPLES = {
    "max_sample_tokens": "max_tokens",
    "style": "style",
    "too_long": "too_long",
    "num_frames": "num_frames",
    "fps": "fps",
}


class DataError(LongVILAError):
    """The data cannot go on: nothing usable is left, or a rank failed in reading it."""


@dataclass
class _Entry:
    """A document of a row: where it stands in the order, and what was tried."""

    position: int
    length: int
    document: Document | None = None
    attempts: int = 0


@dataclass
class _Built:
    """What the background made of a row; failures are names and reasons by slot."""

    batch: dict[str, Any] | None = None
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    fault: Exception | None = None


@dataclass
class _Set:
    """This rank's row of one set of rows, on its way."""

    row: list[_Entry]
    after: dict[str, Any]
    events: list[Event]
    built: Future[_Built]


class PackedLoader:
    """Hands out packed batches.

    Args:
        mixture: The order.
        encoder: Makes documents; its ``max_tokens`` is a row's budget, unless ``row_tokens`` is.
        collator: Makes batches of documents.
        agreement: Where this rank stands.
        window: Documents that wait to be packed; more pack tighter and are looked at further ahead.
        max_documents: Most documents of a row.
        row_tokens: Most tokens of a row, at least those of a document; None for those.
        epochs: Epochs of an iteration, counted from the one in which it goes on; None never ends.
        prefetch: Rows built ahead.
        threads: Samples looked at at once.
        workers: Processes that look at samples and decode media in place of threads; zero for none.
        attempts: Substitutes tried for a document that cannot be decoded.
        report: JSON file in which what was left out is listed; one rank of each group writes it,
            and with several groups the group's number is put into its name. None only counts.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: Encoder,
        collator: Collator,
        *,
        agreement: Agreement | None = None,
        window: int = 64,
        max_documents: int | None = None,
        row_tokens: int | None = None,
        epochs: int | None = None,
        prefetch: int = 2,
        threads: int = 2,
        workers: int = 0,
        attempts: int = 8,
        report: str | Path | None = None,
    ) -> None:
        self.agreement = agreement or Agreement()
        mine = (self.agreement.sp_rank, self.agreement.sp_size)
        if (collator.sp_rank, collator.sp_size) != mine:
            raise ValueError(
                f"the collator works as sp rank {collator.sp_rank} of {collator.sp_size}, the "
                f"loader as {mine[0]} of {mine[1]}"
            )
        if window < 1 or prefetch < 0 or threads < 1 or attempts < 0:
            raise ValueError(
                "window and threads must be positive, prefetch and attempts not below 0"
            )
        if workers < 0:
            raise ValueError(f"workers must not be below 0, got {workers}")
        if workers and type(collator)._decode is not Collator._decode:
            raise ValueError(
                f"{type(collator).__name__} decodes in threads only; set workers to 0 (and threads "
                "to as many as there are cores)"
            )
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}; None never ends")
        self.mixture, self.encoder, self.collator = mixture, encoder, collator
        self.window, self.epochs, self.prefetch = window, epochs, prefetch
        self.threads, self.workers, self.attempts = threads, workers, attempts
        self.report = Report(self._report_path(report))
        self._max_documents = max_documents
        self.row_tokens = encoder.max_tokens if row_tokens is None else row_tokens
        if self.row_tokens < encoder.max_tokens:
            raise ValueError(
                f"rows of {self.row_tokens} tokens do not hold documents of {encoder.max_tokens}"
            )
        self._resume: dict[str, Any] = {"next_position": 0, "rows": 0, "waiting": []}

    def _report_path(self, path: str | Path | None) -> Path | None:
        if path is None or self.agreement.sp_rank > 0:
            return None
        path = Path(path)
        if self.agreement.dp_size == 1:
            return path
        return path.with_name(f"{path.stem}.dp{self.agreement.dp_rank}{path.suffix}")

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches handed out so far end, as plain values."""
        return {
            "version": _VERSION,
            "mixture": self.mixture.fingerprint,
            "order": self.mixture.order,
            "max_tokens": self.row_tokens,
            "window": self.window,
            **{name: getattr(self.encoder, key) for name, key in _OF_SAMPLES.items()},
            **self._resume,
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken; affects iterations begun afterwards.

        Raises:
            ValueError: If the state is of another mixture, budget, window or version, or samples
                were encoded in another way.
        """
        mine = self.state_dict()
        # States of older releases have the mixture's fingerprint alone.
        if state.get("mixture") != mine["mixture"] and "order" in state:
            raise ValueError(
                "the data are not those of the save, so the order of samples would not be the one "
                f"that was interrupted: {self.mixture.changes(state['order'])}. Restore them, or "
                "begin a new run"
            )
        # States of older releases do not say how samples were encoded.
        encoded = [name for name in _OF_SAMPLES if name in state]
        for key in ("version", "mixture", "max_tokens", "window", *encoded):
            if state.get(key) != mine[key]:
                what = key
                if key == "mixture":
                    what = "the mixture (seed, datasets, their rows and weights)"
                raise ValueError(
                    f"the saved data state has {what} {state.get(key)!r}, this run {mine[key]!r}; "
                    "the order of samples would not be the one that was interrupted. Use the same "
                    "data and settings, or begin a new run"
                )
        self._resume = {key: state[key] for key in ("next_position", "rows", "waiting")}
        self.report.load_state_dict(state["report"])

    @property
    def epoch(self) -> float:
        """Epochs of the mixture that were handed out, as far as whole rows tell."""
        seen = self._resume["next_position"] - len(self._resume["waiting"])
        return seen / len(self.mixture)

    def finish(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Make pixels on the device of what workers decoded; see `Collator.finish`."""
        return self.collator.finish(batch, device)

    # ---- iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches from the current state on."""
        walk = _Walk(self)
        try:
            yield from walk.batches()
        finally:
            walk.close()
            self._write_report()

    def _write_report(self) -> None:
        """Write the report; a disk that is full is said, and must not hide what else went wrong."""
        try:
            self.report.write()
        except OSError as fault:
            _LOG.warning("the list of what was left out cannot be written: %s", fault)


class _Walk:
    """One iteration: the packer, what is built ahead, and the pools."""

    def __init__(self, loader: PackedLoader) -> None:
        self.loader = loader
        self.agreement = loader.agreement
        self.packer = Packer(loader.row_tokens, max_documents=loader._max_documents)
        resume = loader._resume
        self.packer.restore(resume["waiting"])
        self.next_position: int = resume["next_position"]
        self.rows: int = resume["rows"]
        self.lengths: dict[int, int] = dict(resume["waiting"])
        self.limit: int | None = None
        self.size = 0
        if loader.epochs is not None:
            oldest = min([self.next_position, *self.lengths])
            epoch = len(loader.mixture)
            self.size = loader.epochs * epoch
            self.limit = oldest // epoch * epoch + self.size
        self.events: list[Event] = []
        self.workers: Workers | None = None
        if loader.workers:
            self.workers = Workers(
                loader.mixture,
                loader.encoder,
                loader.collator.processor,
                processes=loader.workers,
                options=loader.collator.options,
            )
        self.collator = replace(loader.collator, workers=self.workers)
        self.lookers = ThreadPoolExecutor(loader.threads, thread_name_prefix="look")
        self.builders = ThreadPoolExecutor(max(loader.prefetch, 1), thread_name_prefix="build")
        self.looking: dict[int, Future[Any]] = {}
        self.documents: OrderedDict[int, Document] = OrderedDict()

    def close(self) -> None:
        """End the pools; what was begun and not wanted is dropped."""
        self.lookers.shutdown(cancel_futures=True)
        self.builders.shutdown(cancel_futures=True)
        if self.workers is not None:
            self.workers.close()

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches, building ahead."""
        ahead: deque[_Set] = deque()
        ended = False
        while True:
            while not ended and len(ahead) <= self.loader.prefetch:
                following = self._next_set()
                if following is None:
                    ended = True
                else:
                    ahead.append(following)
            if not ahead:
                return
            ready = ahead.popleft()
            batch = self._settle(ready)
            self.loader._resume = ready.after
            yield batch

    # ---- looking and packing

    def _next_set(self) -> _Set | None:
        """Pack a row for every dp rank and begin to build this rank's."""
        packed: list[list[int]] = []
        limit = self.limit
        self._fill(limit)
        if limit is not None and min(self.lengths, default=self.next_position) >= limit:
            return None
        for _ in range(self.agreement.dp_size):
            self._fill(limit)
            while limit is not None and not len(self.packer):
                # As the next iteration would begin, so that rows are the same on any mesh.
                limit += self.size
                self._fill(limit)
            packed.append(self.packer.pop())
        if not len(self.packer):
            # What is left out at the end of an epoch belongs to its last row: none comes after it.
            self._fill(limit)
        self.rows += len(packed)
        row = [_Entry(p, self.lengths[p]) for p in packed[self.agreement.dp_rank]]
        for positions in packed:
            for position in positions:
                del self.lengths[position]
                document = self.documents.pop(position, None)
                for entry in row:
                    if entry.position == position:
                        entry.document = document
        events, self.events = self.events, []
        after = {
            "next_position": self.next_position,
            "rows": self.rows,
            "waiting": [list(each) for each in self.packer.waiting],
        }
        return _Set(row, after, events, self.builders.submit(self._build, row))

    def _fill(self, limit: int | None) -> None:
        """Look at samples until the window is full."""
        rejected = 0
        while len(self.packer) < self.loader.window:
            number = self.loader.window
            if limit is not None:
                number = min(number, limit - self.next_position)
            if number <= 0:
                return
            before = len(self.packer)
            self._look(range(self.next_position, self.next_position + number), limit)
            self.next_position += number
            rejected = 0 if len(self.packer) > before else rejected + number
            if rejected >= len(self.loader.mixture):
                last = "; ".join(event.reason for event in self.events[-3:])
                raise DataError(
                    f"the last {rejected} samples, a whole epoch, gave no document: {last}"
                )

    def _begin(self, positions: range) -> None:
        """Look at this rank's share of some positions in the background."""
        ranks, rank = self.agreement.world_size, self.agreement.world_rank
        for position in positions:
            if position % ranks == rank and position not in self.looking:
                if self.workers is not None:
                    self.looking[position] = self.workers.encode(position)
                else:
                    self.looking[position] = self.lookers.submit(self._encode, position)

    def _encode(self, position: int) -> Document | Rejected:
        mixture = self.loader.mixture
        return encode_at(mixture, self.loader.encoder, mixture.place(position))

    def _look(self, positions: range, limit: int | None) -> None:
        """Let ranks look at their shares, and tell each other what they found."""
        self._begin(positions)
        found: dict[int, int | Rejected] = {}
        fault: Exception | None = None
        for position in positions:
            future = self.looking.pop(position, None)
            if future is None:
                continue
            try:
                result = future.result()
                if self.workers is not None:
                    result = read_document(result)
            except Exception as error:
                fault = fault or error
                continue
            if isinstance(result, Rejected):
                found[position] = result
            else:
                found[position] = result.length
                self.documents[position] = result
        following = range(positions.stop, positions.stop + self.loader.window)
        if limit is None or following.stop <= limit:
            self._begin(following)
        said = self.agreement.over_world((found, None if fault is None else repr(fault)))
        self._raise_fault(fault, [each[1] for each in said])
        for each, _ in said:
            found.update(each)
        for position in positions:
            result_or_length = found[position]
            if isinstance(result_or_length, Rejected):
                self.events.append(
                    Event(
                        position,
                        result_or_length.id,
                        result_or_length.cause,
                        result_or_length.reason,
                        "looking",
                    )
                )
            else:
                self.lengths[position] = result_or_length
                self.packer.add(position, result_or_length)

    @staticmethod
    def _raise_fault(mine: Exception | None, said: list[str | None]) -> None:
        """Raise on every rank what any rank ran into, so that none waits for the others."""
        if isinstance(mine, BrokenExecutor):
            raise DataError(
                "a worker process was ended from outside, perhaps for want of memory; set "
                "data.workers lower, or to 0 to decode in threads"
            ) from mine
        if mine is not None:
            raise mine
        for rank, fault in enumerate(said):
            if fault is not None:
                raise DataError(f"rank {rank} could not read its share of the data: {fault}")

    # ---- building and replacing

    def _build(self, row: list[_Entry]) -> _Built:
        """Encode what is not encoded yet, decode, collate; never raises."""
        failures: dict[int, tuple[str, str]] = {}
        try:
            for slot, entry in enumerate(row):
                if entry.document is None:
                    result = self._encode(entry.position)
                    if isinstance(result, Rejected):
                        failures[slot] = (result.id, result.reason)
                    elif result.length != entry.length:
                        failures[slot] = (
                            result.id,
                            f"{result.length} tokens here, {entry.length} when it was looked at; "
                            "did its files change, or differ between nodes?",
                        )
                    else:
                        entry.document = result
            if failures:
                return _Built(failures=failures)
            documents = [entry.document for entry in row if entry.document is not None]
            return _Built(batch=self.collator(documents))
        except BrokenMedia as broken:
            for slot, reason in broken.failures.items():
                document = row[slot].document
                failures[slot] = ("" if document is None else document.id, reason)
            return _Built(failures=failures)
        except Exception as fault:
            return _Built(fault=fault)

    def _settle(self, ready: _Set) -> dict[str, Any]:
        """Wait for a row, replace with the group what cannot be decoded, and report."""
        built, row = ready.built.result(), ready.row
        while True:
            told = (built.failures, None if built.fault is None else repr(built.fault))
            said = self.agreement.over_group(told)
            self._raise_fault(built.fault, [each[1] for each in said])
            failures: dict[int, tuple[str, str]] = {}
            for each, _ in said:
                failures = {**each, **failures}
            if not failures:
                break
            for slot, (name, reason) in sorted(failures.items()):
                position = row[slot].position
                substitute = self._substitute(row, slot)
                ready.events.append(Event(position, name, "broken", reason, "decoding", substitute))
            row[:] = [entry for entry in row if entry.length > 0]
            if not row:
                reasons = "; ".join(reason for _, reason in failures.values())
                raise DataError(f"no document of a row can be decoded: {reasons}")
            built = self._build(row)
        assert built.batch is not None
        report = self.loader.report
        for event in ready.events:
            # All ranks know of what was looked at, those of a group of what they decode.
            ours = self.agreement
            if (ours.sp_rank if event.found == "decoding" else ours.world_rank) == 0:
                _LOG.warning("left out %s (%s): %s", event.id, event.cause, event.reason)
            report.add(event)
        if ready.events:
            self.loader._write_report()
        documents = [entry.document for entry in row if entry.document is not None]
        cut = [document.frames_cut for document in documents]
        report.used(
            len(documents),
            sum(document.length for document in documents),
            sum(cut),
            sum(1 for each in cut if each),
        )
        return built.batch

    def _substitute(self, row: list[_Entry], slot: int) -> str | None:
        """Put another sample of the same dataset in a slot, the same on all ranks of the group.

        Returns:
            Its name, or None if none fits and the slot is empty now.
        """
        entry = row[slot]
        room = self.loader.row_tokens - sum(e.length for e in row if e is not entry)
        mixture = self.loader.mixture
        while entry.attempts < self.loader.attempts:
            place = mixture.substitute(entry.position, entry.attempts)
            entry.attempts += 1
            fault: Exception | None = None
            result: Document | Rejected | None = None
            try:
                result = encode_at(mixture, self.loader.encoder, place)
            except Exception as error:
                fault = error
            length = result.length if isinstance(result, Document) else 0
            said = self.agreement.over_group((length, None if fault is None else repr(fault)))
            self._raise_fault(fault, [each[1] for each in said])
            # Ranks that see different files agree on none of them.
            if isinstance(result, Document) and all(0 < n == length <= room for n, _ in said):
                entry.document, entry.length = result, length
                return result.id
        entry.document, entry.length = None, 0
        return None
