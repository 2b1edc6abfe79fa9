"""Mixtures of datasets by weight, in an order that is a pure function of a position.

    position p  --  epoch e = p // E, slot p % E       E samples an epoch, over all datasets
    slot        --  shuffled slot s                    a permutation of 0..E-1 for each epoch
    s           --  dataset d and offset o in it       cumulative shares
    (d, e, o)   --  e * share + o = (round k, place)   the dataset's own endless stream
    place       --  row                                a permutation of its rows for each round

``a+b*2`` takes a once and b twice an epoch; ``a*0.5`` takes half of a, and the other half in the
next epoch. Nothing is dropped or repeated to fill a batch: after any number of whole rounds of a
dataset every row was seen equally often.

Permutations are Feistel networks with cycle walking: O(1) memory and time a lookup, for any number
of rows, and nothing to store. So the whole state of an order is one integer, the same on every
rank, and resuming needs no replay.

Dimension legend: E samples an epoch, N rows of a dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from longvila.data.sample import Sample

_MASK = (1 << 64) - 1
_ROUNDS = 6
_TERM = re.compile(r"\s*(?P<name>[^\s*+]+)\s*(?:\*\s*(?P<weight>\d+(?:\.\d+)?))?\s*")


class Samples(Protocol):
    """Random access to samples; what a dataset is to a mixture."""

    @property
    def name(self) -> str:
        """Name for mixtures and reports."""
        ...

    def __len__(self) -> int:
        """Return the number of samples, N."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        ...


def mix64(*values: int) -> int:
    """Hash integers to 64 bits, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Return where a permutation of 0..size-1 sends an index.

    Args:
        index: 0 to size - 1.
        size: Numbers permuted.
        key: Which permutation.

    Returns:
        The image of the index; a bijection for every size and key.
    """
    if not 0 <= index < size:
        raise IndexError(f"index must be 0 to {size - 1}, got {index}")
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for step in range(_ROUNDS):
            left, right = right, left ^ (mix64(key, step, right) & low)
        index = (left << half) | right
        # The network permutes a power of four; walking the cycle stays inside 0..size-1.
        if index < size:
            return index


def parse_mixture(text: str, known: Mapping[str, str] | None = None) -> dict[str, Fraction]:
    """Read ``a+b*2`` into weights; named mixtures are expanded, and equal names added up.

    Args:
        text: Names with optional weights, joined by ``+``.
        known: Named mixtures, each in the same notation; may name one another.

    Returns:
        Weight of each dataset, sorted by name so that equal mixtures have one order.

    Raises:
        ValueError: If a term cannot be read, a weight is zero, or names go in a circle.
    """
    weights: dict[str, Fraction] = {}

    def add(part: str, factor: Fraction, path: tuple[str, ...]) -> None:
        for term in part.split("+"):
            found = _TERM.fullmatch(term)
            if found is None:
                raise ValueError(
                    f"cannot read {term!r} in the mixture {part!r}; write name, or name*weight, "
                    "joined by +"
                )
            name, weight = found["name"], Fraction(found["weight"] or 1)
            if weight <= 0:
                raise ValueError(f"the weight of {name} must be above zero; leave it out instead")
            if name in path:
                raise ValueError(f"mixtures name one another in a circle: {' > '.join(path)}")
            if known and name in known:
                add(known[name], factor * weight, (*path, name))
            else:
                weights[name] = weights.get(name, Fraction(0)) + factor * weight

    add(text, Fraction(1), ())
    return dict(sorted(weights.items()))


class Place(NamedTuple):
    """A sample's dataset and its row there."""

    dataset: str
    row: int


@dataclass(frozen=True)
class _Share:
    name: str
    rows: int
    per_epoch: int
    first: int
    key: int


class Mixture:
    """An endless, seeded order over several datasets.

    Args:
        datasets: Datasets by name; those that the mixture does not name are ignored.
        spec: Weights, as `parse_mixture` reads them; None takes every dataset once.
        known: Named mixtures.
        seed: Seed of the order.
        shuffle: Whether to shuffle; without, datasets follow each other in their own order.

    Raises:
        ValueError: If a name is unknown or there twice, a dataset is empty, or a share rounds to
            nothing.
    """

    def __init__(
        self,
        datasets: Mapping[str, Samples] | Sequence[Samples],
        spec: str | None = None,
        *,
        known: Mapping[str, str] | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not isinstance(datasets, Mapping):
            names = [dataset.name for dataset in datasets]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(
                        f"two datasets are called {name!r}; give each a name of its own"
                    )
            datasets = dict(zip(names, datasets, strict=True))
        self.spec = "+".join(sorted(datasets)) if spec is None else spec
        self.seed, self.shuffle = seed, shuffle
        self.datasets: dict[str, Samples] = {}
        self._shares: list[_Share] = []
        first = 0
        for name, weight in parse_mixture(self.spec, known).items():
            if name not in datasets:
                raise ValueError(f"the mixture names {name!r}; there are {sorted(datasets)}")
            rows = len(datasets[name])
            if not rows:
                raise ValueError(f"{name} has no samples")
            per_epoch = round(rows * weight)
            if per_epoch < 1:
                raise ValueError(
                    f"{name} has {rows} samples; {float(weight):g} times as many is none at all"
                )
            text = hashlib.sha256(name.encode()).digest()
            key = mix64(seed, int.from_bytes(text[:8], "little"))
            self._shares.append(_Share(name, rows, per_epoch, first, key))
            self.datasets[name] = datasets[name]
            first += per_epoch
        self.epoch_size = first

    def __len__(self) -> int:
        """Return E, the samples of an epoch."""
        return self.epoch_size

    def place(self, position: int) -> Place:
        """Return which row of which dataset stands at a position of the endless order.

        Args:
            position: Any number from 0.
        """
        epoch, slot = divmod(position, self.epoch_size)
        if self.shuffle:
            slot = permute(slot, self.epoch_size, mix64(self.seed, 1, epoch))
        share = next(s for s in reversed(self._shares) if s.first <= slot)
        turn, row = divmod(epoch * share.per_epoch + slot - share.first, share.rows)
        if self.shuffle:
            row = permute(row, share.rows, mix64(share.key, 2, turn))
        return Place(share.name, row)

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a position."""
        place = self.place(position)
        return self.datasets[place.dataset][place.row]

    def substitute(self, position: int, attempt: int) -> Place:
        """Return what may stand in for a broken sample: a row of the same dataset.

        Args:
            position: Where the broken sample stands.
            attempt: 0 for the first substitute, 1 for the next, ...

        Returns:
            The same on every rank, whoever found the sample broken.
        """
        broken = self.place(position)
        rows = len(self.datasets[broken.dataset])
        row = mix64(self.seed, 3, position, attempt) % rows
        return Place(broken.dataset, (row + 1) % rows if row == broken.row else row)

    @property
    def order(self) -> dict[str, Any]:
        """What two runs must share for a position to mean the same sample, as plain values."""
        datasets = {share.name: [share.rows, share.per_epoch] for share in self._shares}
        return {"seed": self.seed, "shuffle": self.shuffle, "datasets": datasets}

    @property
    def fingerprint(self) -> str:
        """`order` in 16 digits."""
        facts: list[Any] = [self.seed, self.shuffle]
        facts += [(s.name, s.rows, s.per_epoch) for s in self._shares]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def changes(self, saved: Mapping[str, Any]) -> str:
        """Say how this order differs from a saved one.

        Args:
            saved: What `order` was.
        """
        mine, said = self.order, []
        was, now = saved["datasets"], mine["datasets"]
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                before, after = (
                    "{:,} rows ({:,} an epoch)".format(*each[name]) if name in each else "not there"
                    for each in (was, now)
                )
                said.append(f"{name}: {before} when saved, {after} now")
        for name in ("seed", "shuffle"):
            if saved[name] != mine[name]:
                said.append(f"{name} of the order: {saved[name]} when saved, {mine[name]} now")
        return "; ".join(said)

    def describe(self) -> str:
        """One line for each dataset: rows, samples an epoch, share."""
        return "\n".join(
            f"{s.name}: {s.rows:,} rows, {s.per_epoch:,} an epoch "
            f"({s.per_epoch / self.epoch_size:.1%})"
            for s in self._shares
        )
