"""Keys and values on the host, brought to the device a block at a time as layers read them.

    host, pinned   layer 0 [b0][b1][b2]  layer 1 [b0][b1][b2] ...
    side stream     b0 -> slot 0   b1 -> slot 1   b2 -> slot 0   b0 -> slot 1   ...
    main stream              attend slot 0   attend slot 1   attend slot 0   ...

1. A step reads the blocks of all layers in one order that is known when it begins (`Walk`), so the
   next block, of this layer or the next, is on its way while one is attended to.
2. Slots are allocated once and used in turn. A copy into a slot waits, on the device, until
   attention over what was there has ended; the host waits for nothing and may run ahead.
3. Attention over blocks is merged by lse like attention over any other segments: the result is that
   of one pass.

Cost: a step brings all paged bytes over the bus once. Reading a prompt hides that behind arithmetic
(a chunk of 8192 tokens does some thousand operations a byte); a decode step does not, and takes
the bytes over the rate of the bus.

Memory: ``slots`` blocks on the device; what is paged out, pinned, on the host. On a CPU there is no
stream and no pinning, and the same copies happen one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostBlock:
    """Keys and values of some tokens of a layer on the host.

    Attributes:
        keys: ``(tokens, K, D)``.
        values: As ``keys``.
    """

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        return self.keys.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def first(self, tokens: int) -> HostBlock:
        """Return the first tokens, by reference."""
        return HostBlock(self.keys[:tokens], self.values[:tokens])


class Pager:
    """Takes keys and values to the host and back.

    Args:
        device: Where attention runs.
        budget_bytes: Keys and values that stay on the device, tails apart.
        block_tokens: Tokens that travel at once.
        slots: Blocks on the device at a time.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, device: torch.device, budget_bytes: int, *, block_tokens: int = 65536, slots: int = 3
    ) -> None:
        if budget_bytes < 0 or block_tokens < 1 or slots < 2:
            raise ValueError(
                "budget_bytes must not be negative, block_tokens be positive and slots at least 2; "
                f"got {budget_bytes}, {block_tokens} and {slots}"
            )
        self.device, self.budget_bytes, self.block_tokens = device, budget_bytes, block_tokens
        self.is_cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if self.is_cuda else None
        self._slots: list[tuple[Tensor, Tensor]] = []
        self._num_slots = slots
        self._read: list[torch.cuda.Event | None] = [None] * slots
        self._ready: list[torch.cuda.Event | None] = [None] * slots
        self._turn = 0
        self.bytes_out = self.bytes_in = 0

    def take_out(self, keys: Tensor, values: Tensor) -> list[HostBlock]:
        """Copy keys and values to the host, in blocks.

        Args:
            keys: ``(1, tokens, K, D)`` on the device; free to be forgotten when this returns.
            values: As ``keys``.

        Returns:
            The blocks, first tokens first; on a GPU the copies are still under way (`settle`).
        """
        blocks = []
        for k, v in zip(
            keys[0].split(self.block_tokens), values[0].split(self.block_tokens), strict=True
        ):
            block = HostBlock(*(self._to_host(x) for x in (k, v)))
            self.bytes_out += block.num_bytes
            blocks.append(block)
        return blocks

    def _to_host(self, x: Tensor) -> Tensor:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.is_cuda)
        if self.side is None:
            return host.copy_(x)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.side)
        return host

    def settle(self) -> None:
        """Wait until all that was taken out has come; whoever reads it on the host calls this."""
        if self.side is not None:
            self.side.synchronize()

    def bring(self, block: HostBlock) -> int:
        """Start to copy a block into the next slot; return the slot."""
        slot = self._turn % self._num_slots
        self._turn += 1
        if len(self._slots) <= slot or self._slots[slot][0].shape[0] < block.num_tokens:
            shape = (max(block.num_tokens, self.block_tokens), *block.keys.shape[1:])
            own = tuple(block.keys.new_empty(shape, device=self.device) for _ in range(2))
            self._slots[slot : slot + 1] = [(own[0], own[1])]
        keys, values = self._slots[slot]
        self.bytes_in += block.num_bytes
        if self.side is None:
            keys[: block.num_tokens] = block.keys
            values[: block.num_tokens] = block.values
            return slot
        if (read := self._read[slot]) is not None:
            self.side.wait_event(read)
        else:  # the slot's memory may have been someone else's until now
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            keys[: block.num_tokens].copy_(block.keys, non_blocking=True)
            values[: block.num_tokens].copy_(block.values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(self.side)
        self._ready[slot] = ready
        return slot

    @property
    def ahead(self) -> int:
        """Blocks that may be on their way beside the one that is read."""
        return self._num_slots - 1

    def wait(self, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return what was brought into a slot, ``(1, tokens, K, D)``, for the current stream."""
        ready = self._ready[slot]
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        keys, values = self._slots[slot]
        return keys[None, :tokens], values[None, :tokens]

    def release(self, slot: int) -> None:
        """Let a slot be written again when what was queued so far has read it."""
        if self.is_cuda:
            read = torch.cuda.Event()
            read.record(torch.cuda.current_stream(self.device))
            self._read[slot] = read


class Walk:
    """One pass over the paged blocks of all layers.

    Args:
        pager: Brings them.
        layers: Blocks of each layer, in the order of the layers.
    """

    def __init__(self, pager: Pager, layers: Sequence[Sequence[HostBlock]]) -> None:
        self.pager = pager
        self._order = [block for blocks in layers for block in blocks]
        self._edges = [0, *accumulate(map(len, layers))]
        self._slots: list[int] = []
        self._next = 0

    def layer(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give a layer's keys and values; each is valid until the next is asked for.

        Raises:
            RuntimeError: If layers are not read in their order.
        """
        if self._next != self._edges[number]:
            raise RuntimeError(f"layer {number} was read out of turn")
        for index in range(self._edges[number], self._edges[number + 1]):
            while len(self._slots) < min(index + 1 + self.pager.ahead, len(self._order)):
                self._slots.append(self.pager.bring(self._order[len(self._slots)]))
            slot = self._slots[index]
            yield self.pager.wait(slot, self._order[index].num_tokens)
            self.pager.release(slot)
            self._next = index + 1
