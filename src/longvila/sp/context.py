"""What a batch's attention needs to know, computed once and handed down as an argument.

:func:`make_context` turns a mesh and the lengths of the packed documents into an
:class:`SPContext`: a frozen, hashable value that travels through a model's keyword arguments to
the attention function. It holds the layout and derives from it, on first use and once, the block
plan of this rank. Everything is integer work of milliseconds on the host; nothing here
communicates, and nothing in the layers asks for a length again.

Where the mesh says ``zigzag``, a batch gets the better balanced of two layouts: zigzag over the
global order, perfect for one document and nearly free of communication for many short ones, or
zigzag inside each document, perfect for a few of different lengths. The causal work of the busiest
rank decides, from the same integers on every rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from longvila.sp.blocks import RingPlan, plan_ring
from longvila.sp.layout import LayoutKind, SequenceLayout
from longvila.sp.mesh import SPMesh

#: How much less causal work its busiest rank must have before documents are cut one by one.
_WORTH_CUTTING_DOCUMENTS = 0.97


@dataclass(frozen=True, kw_only=True)
class SPContext:
    """A mesh, where this batch's tokens are on it, and how to run attention over them.

    Attributes:
        mesh: The mesh.
        layout: Who holds which token of the packed sequence.
        head_chunks: Parts in which heads are exchanged and computed, so that one part travels
            while another is computed; 1 exchanges all heads at once.
    """

    mesh: SPMesh
    layout: SequenceLayout
    head_chunks: int = 1
    _ring_plans: dict[bool, RingPlan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def is_parallel(self) -> bool:
        """Whether a sample is shared by more than one rank."""
        return self.mesh.sp_size > 1

    @property
    def sp_rank(self) -> int:
        """This rank's place in the sequence-parallel group."""
        return self.mesh.sp_rank

    @property
    def num_tokens(self) -> int:
        """S, tokens of the packed sequence."""
        return self.layout.num_tokens

    @property
    def num_local_tokens(self) -> int:
        """L, tokens this rank holds."""
        return self.layout.local_lengths[self.sp_rank]

    @property
    def ulysses_lengths(self) -> tuple[int, ...]:
        """L of each rank of this rank's Ulysses group."""
        first = self.mesh.ring_rank * self.mesh.ulysses_size
        return self.layout.local_lengths[first : first + self.mesh.ulysses_size]

    def token_indices(self) -> Tensor:
        """Return the global positions of this rank's tokens, int64 ``(L,)`` on the host."""
        return self.layout.token_indices(self.sp_rank)

    def ring_plan(self, causal: bool = True) -> RingPlan:
        """Return this rank's block plan; computed on first use.

        Args:
            causal: Whether queries see only keys up to themselves.
        """
        if causal not in self._ring_plans:
            self._ring_plans[causal] = plan_ring(
                self.layout,
                self.mesh.ring_rank,
                exchange=self.mesh.plan.kv_exchange,
                causal=causal,
            )
        return self._ring_plans[causal]


def _layout(
    lengths: tuple[int, ...], ring_size: int, ulysses_size: int, kind: LayoutKind, choose: bool
) -> SequenceLayout:
    layout = SequenceLayout(lengths, ring_size, ulysses_size, kind)
    if not choose or kind != "zigzag" or ring_size == 1 or len(lengths) == 1:
        return layout
    by_document = SequenceLayout(lengths, ring_size, ulysses_size, "document_zigzag")

    def busiest(candidate: SequenceLayout) -> int:
        return max(candidate.causal_work(rank) for rank in range(ring_size))

    if busiest(by_document) < _WORTH_CUTTING_DOCUMENTS * busiest(layout):
        return by_document
    return layout


def make_context(
    mesh: SPMesh,
    document_lengths: Sequence[int],
    *,
    kind: LayoutKind | None = None,
    head_chunks: int = 1,
) -> SPContext:
    """Return the context of one batch; host-only, the same on every rank of a group.

    Args:
        mesh: The mesh.
        document_lengths: Tokens of each packed document, in order; any lengths.
        kind: Layout to use; None for the mesh's, refined as the module says.
        head_chunks: Parts in which heads are exchanged and computed.

    Raises:
        ValueError: If a length is negative, there is no document, the kind is unknown or
            ``head_chunks`` is below one.

    Comm: None.
    """
    lengths = tuple(operator.index(length) for length in document_lengths)
    return _make_context(mesh, lengths, kind, head_chunks)


# A few: a plan's index tensors live on the device as long as its context is cached.
@functools.lru_cache(maxsize=4)
def _make_context(
    mesh: SPMesh, lengths: tuple[int, ...], kind: LayoutKind | None, head_chunks: int
) -> SPContext:
    if head_chunks < 1:
        raise ValueError(f"head_chunks must be at least 1, got {head_chunks}")
    layout = _layout(
        lengths,
        mesh.ring_size,
        mesh.ulysses_size,
        mesh.plan.layout_kind if kind is None else kind,
        kind is None,
    )
    return SPContext(mesh=mesh, layout=layout, head_chunks=head_chunks)
