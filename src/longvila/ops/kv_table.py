"""Where the keys and values of a cache lie, as a table that a kernel reads on the device.

A cache is a list of segments a layer, some shared by all rows, the last one still growing. A
captured graph has fixed arguments, so it is given the table, and the table is what changes::

    places (segments + 1, 2 + 2 * layers) int64
        [first token | elements between rows | keys, values of layer 0 | of layer 1 | ... ]
        [2**31 - 1 ...]                                                    ends the last segment
    head   [segments | newest | length of each row | hidden from, to of each row]   int64

1. `load` writes ``places`` when segments came, went, moved or grew into another buffer: one copy to
   the device. Addresses say so: they are compared every time.
2. `step` writes ``head``, a few integers, before every pass of new tokens; it waits for nothing.
3. Kernels (`longvila.ops.decode_kernels`) read both. On a CPU the same table is read by
   `segments`, which makes tensors of the addresses again.

The table holds addresses, not tensors: whoever loads it keeps the tensors until the kernels that
were queued have run, which is what a CUDA stream and its allocator see to.

Letters: B rows, T new tokens, K kv heads, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

#: One past any token.
_END = 2**31 - 1
#: Segments whose copy to the device is a few hundred kilobytes for the deepest models.
MAX_SEGMENTS = 128

#: Keys and values ``(B or 1, tokens, K, D)``.
Segment = tuple[Tensor, Tensor]


class KVTable:
    """The segments of all layers of one cache, for one number of rows.

    Args:
        num_layers: Layers.
        rows: Rows of the segments; 1 for segments that the rows of a batch share.
        kv_heads: K.
        head_dim: D.
        dtype: Of keys and values.
        device: Theirs.

    Memory: ``8 * (MAX_SEGMENTS + 1) * (2 + 2 * num_layers)`` bytes.
    """

    def __init__(
        self, num_layers: int, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.num_layers, self.rows = num_layers, rows
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        options = {"dtype": torch.int64, "device": device}
        self.places = torch.full((MAX_SEGMENTS + 1, 2 + 2 * num_layers), _END, **options)  # type: ignore[call-overload]
        self.head = torch.zeros(2 + 3 * rows, **options)  # type: ignore[call-overload]
        self._known: list[tuple[int, ...]] = []

    def _refusal(self, parts: Sequence[Segment]) -> str | None:
        if len(parts) > MAX_SEGMENTS:
            return f"the cache is in {len(parts)} segments, more than {MAX_SEGMENTS}"
        for pair in parts:
            for x in pair:
                if x.dtype != self.dtype or x.device != self.places.device:
                    return f"a segment is {x.dtype} on {x.device}"
                if x.shape[0] != self.rows or x.shape[2:] != (self.kv_heads, self.head_dim):
                    return f"a segment has the shape {tuple(x.shape)}"
                if x.stride()[1:] != (self.kv_heads * self.head_dim, self.head_dim, 1):
                    return f"a segment has strides {x.stride()}"
            if pair[0].stride(0) != pair[1].stride(0) and self.rows > 1:
                return "keys and values of a segment have different strides"
            if (pair[0].data_ptr() | pair[1].data_ptr()) % 16:
                return "a segment does not begin at a multiple of 16 bytes"
        return None

    def load(self, layers: Sequence[Sequence[Segment]]) -> str | None:
        """Write where the segments are, if that is not what the table says.

        Args:
            layers: Of each layer its segments, oldest first; as many and as long in each. The last
                may have room behind it: its length is the `step`'s.

        Returns:
            Why they cannot be in a table, or None.
        """
        lines: list[tuple[int, ...]] = []
        first = 0
        for number, (keys, _) in enumerate(layers[0]):
            addresses = (x.data_ptr() for parts in layers for x in parts[number])
            apart = keys.stride(0) if self.rows > 1 else 0
            lines.append((first, apart, *addresses))
            first += keys.shape[1]
        if lines == self._known:
            return None
        for parts in layers:
            if (reason := self._refusal(parts)) is not None:
                return reason
        self._known = lines
        end = (_END,) * (2 + 2 * self.num_layers)
        self.places[: len(lines) + 1].copy_(torch.tensor([*lines, end]), non_blocking=True)
        return None

    def clear(self) -> None:
        """Say that there is no segment, and no new token."""
        self._known = []
        self.head.zero_()

    def step(
        self, length: int, newest: int, hidden: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Write what the next pass sees.

        Args:
            length: Tokens of a row, the new ones among them.
            newest: How many of the last tokens are the queries' own, which see each other causally:
                T, or 0 if they were kept elsewhere.
            hidden: For each row a range of tokens that is not seen.
        """
        ranges = [end for each in hidden or [(0, 0)] * self.rows for end in each]
        head = [len(self._known), newest, *[length] * self.rows, *ranges]
        self.head.copy_(torch.tensor(head), non_blocking=True)

    def segments(self, layer: int) -> list[Segment]:
        """Return what the table says of a layer, as tensors over the same memory; on a CPU.

        Args:
            layer: Which layer.

        Returns:
            ``(rows, tokens, K, D)`` pairs, the last as long as the `step` said.
        """
        count, _, length = self.head[:3].tolist()
        lines = self.places[: count + 1].tolist()
        edges = [min(line[0], length) for line in lines]
        edges[count:] = [length]
        found = []
        for number, line in enumerate(lines[:count]):
            tokens = edges[number + 1] - edges[number]
            keys, values = (
                self._at(line[2 + 2 * layer + which], tokens, line[1]) for which in range(2)
            )
            found.append((keys, values))
        return found

    def _at(self, address: int, tokens: int, apart: int) -> Tensor:
        line = self.kv_heads * self.head_dim
        elements = (self.rows - 1) * apart + tokens * line
        shape = (self.rows, tokens, self.kv_heads, self.head_dim)
        if not tokens:
            return torch.empty(shape, dtype=self.dtype)
        memory = (ctypes.c_char * (elements * self.dtype.itemsize)).from_address(address)
        flat = torch.frombuffer(memory, dtype=self.dtype)
        return flat.as_strided(shape, (apart, line, self.head_dim, 1))
