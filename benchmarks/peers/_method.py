"""What every attention method under test looks like to the harness.

A :class:`Method` declares itself (kernel, layout, package, what it cannot do, whether it runs as
its authors ship it) and ``setup`` makes a :class:`Runner` for one case on one set of ranks. A
runner takes this rank's ``q, k, v`` as (1, L, heads, D), the layout projections produce, and
returns the output in the same layout, differentiable. Views are free; copies that a method needs
are part of its time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks._case import Case
from benchmarks._cluster import Cluster

Layout = Literal["contiguous", "zigzag", "heads"]


@dataclass(frozen=True)
class About:
    """What a table says about a method beside its figures."""

    kernel: str
    layout: Layout
    package: str
    shipped: bool
    limits: str = ""


class Method(ABC):
    """One way to compute causal attention over the ranks."""

    name: str
    kind: Literal["ours", "peer", "ideal"]
    about: About

    def unavailable(self, case: Case, cluster: Cluster) -> str | None:
        """Why this method cannot run here, or None."""
        return None

    def head_bound(self, case: Case, cluster: Cluster) -> float:
        """Query heads of the busiest rank over the mean: what no balance of tokens can mend."""
        return 1.0

    @abstractmethod
    def setup(self, case: Case, cluster: Cluster) -> Runner:
        """Prepare for one case; every rank calls it at the same point."""


class Runner(ABC):
    """One method bound to one case and this rank.

    Attributes:
        time_share: What a call's time is multiplied by, where it does more than the rank's part.
    """

    time_share = 1.0

    def __init__(self, case: Case, cluster: Cluster) -> None:
        self.case = case
        self.cluster = cluster

    @abstractmethod
    def tokens(self) -> Tensor:
        """Global positions of the tokens this rank holds, in local order (int64)."""

    def heads(self) -> tuple[slice, slice]:
        """Query and kv heads this rank holds; all of them unless heads are what is split."""
        return slice(0, self.case.heads), slice(0, self.case.kv_heads)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Whatever process-wide state the method needs while it runs."""
        yield

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output of this rank's queries, (1, L, heads, D)."""


def layout_tokens(layout: Layout, tokens: int, rank: int, ranks: int) -> Tensor:
    """Positions of a rank under the layouts that peers use.

    ``contiguous`` is the rank-th part; ``zigzag`` the rank-th part of 2R from the front joined
    with the rank-th from the back; ``heads`` all of them.
    """
    if layout == "heads":
        return torch.arange(tokens)
    parts = 2 * ranks if layout == "zigzag" else ranks
    if tokens % parts:
        raise ValueError(f"{layout} over {ranks} ranks needs a multiple of {parts}, got {tokens}")
    pieces = torch.arange(tokens).chunk(parts)
    if layout == "contiguous":
        return pieces[rank]
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])
