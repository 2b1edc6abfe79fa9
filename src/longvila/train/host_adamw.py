"""AdamW whose moments live on the host and pass through the device piece by piece.

The moments are half of what a full fine-tuning holds, and are looked at once a step. So:

1. They are pinned host memory, shaped and sharded like their parameters.
2. The update cuts every parameter into pieces of a fixed number of elements. A piece's moments are
   copied up, updated by torch's own AdamW kernel together with the parameter, and copied back.
3. Three streams: while a piece is computed, the next one comes up and the one before goes down, in
   a few staging buffers that are reused.

The update is elementwise and the kernel is torch's, so the result is AdamW's bit for bit. Moments
of small parameters stay on the device.

Cost: the moments over the link once up and once down a step, both ways at once; staging buffers
during the update. It does not compute on the host, and does not overlap with the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from longvila.memory.offload import host_memory

#: Elements of a piece, and pieces under way at once.
PIECE = 1 << 26
SLOTS = 3
#: Pieces begin at multiples of this, so that CPU kernels cut them into vectors as they would a
#: whole parameter; what is left beside vectors is rounded differently.
ALIGNMENT = 64
#: Parameters with fewer elements keep their moments on the device.
SMALL = 1 << 16
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter's update; all are flat views."""

    group: dict[str, Any]
    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    step: Tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class HostAdamW(torch.optim.AdamW):
    """AdamW with its moments on the host.

    Args:
        params: As for ``torch.optim.AdamW``.
        fused: Whether torch's fused kernel updates a piece.
        piece: Elements of a piece.
        small: Parameters with fewer elements keep their moments on the device.
        **options: Further arguments of ``torch.optim.AdamW``.

    Raises:
        ValueError: If an option is given that changes what is stored (``amsgrad``), or parameters
            differ in dtype, or a piece has no allowed size.

    Memory:
        8 bytes an element of this rank's float32 shards on the host; ``SLOTS * piece * 8`` bytes
        on the device during the update.
    """

    def __init__(
        self,
        params: Any,
        *,
        fused: bool = True,
        piece: int = PIECE,
        small: int = SMALL,
        **options: Any,
    ) -> None:
        if options.get("amsgrad"):
            raise ValueError("amsgrad stores a third moment, which HostAdamW does not hold")
        super().__init__(params, fused=fused, **options)
        if piece < ALIGNMENT or piece % ALIGNMENT:
            raise ValueError(f"a piece must be a multiple of {ALIGNMENT} elements, got {piece}")
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if len(dtypes) > 1:
            raise ValueError(f"expected parameters of one dtype, as shards are, got {dtypes}")
        self.piece, self.small, self.fused = piece, small, fused
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._make_state(parameter)

    def _make_state(self, parameter: Tensor) -> None:
        device = _local(parameter).device
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in _MOMENTS:
            zeros = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state[name] = self._on_host(zeros)

    def _on_host(self, moment: Tensor) -> Tensor:
        """Return a moment with its local part in host memory."""
        local = _local(moment)
        if local.numel() < max(self.small, 1):
            return moment
        flat = host_memory(local.nbytes, pinned=local.is_cuda).view(local.dtype)
        host = flat.view(local.shape)
        host.copy_(local)
        if isinstance(moment, DTensor):
            # from_local would move it to the mesh's device; FSDP's own host shards are made so.
            return DTensor(host, moment._spec, requires_grad=False)
        return host

    def synchronize(self) -> None:
        """Wait until the moments on the host are those of the last step."""
        for device in self._streams:
            torch.cuda.synchronize(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the states, with moments on the host."""
        self.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take states over; moments go to the host."""
        self.synchronize()
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in _MOMENTS:
                state[name] = self._on_host(state[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: Computes the loss again, as for every optimiser of torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        devices = {_local(p).device for g in self.param_groups for p in g["params"]}
        for device in devices:
            pieces = self._pieces(device)
            if device.type == "cuda":
                self._stream_through(device, pieces)
            else:
                for piece in pieces:
                    self._update(piece, piece.moments)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
        return loss

    def _pieces(self, device: torch.device) -> Iterator[_Piece]:
        for group in self.param_groups:
            for parameter in group["params"]:
                local = _local(parameter)
                if parameter.grad is None or local.device != device or local.numel() == 0:
                    continue
                state = self.state[parameter]
                # A shard is contiguous; its gradient need not be.
                whole = (local, _local(parameter.grad).contiguous())
                moments = (_local(state[name]) for name in _MOMENTS)
                columns = [t.view(-1).split(self.piece) for t in (*whole, *moments)]
                for p, g, first, second in zip(*columns, strict=True):
                    yield _Piece(group, p, g, (first, second), state["step"])

    def _update(self, piece: _Piece, moments: tuple[Tensor, Tensor]) -> None:
        group = piece.group
        beta1, beta2 = group["betas"]
        adamw(
            [piece.parameter],
            [piece.gradient],
            [moments[0]],
            [moments[1]],
            [],
            # The kernel counts a step up; a parameter's pieces share one.
            [piece.step.clone()],
            fused=self.fused,
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _stream_through(self, device: torch.device, pieces: Iterator[_Piece]) -> None:
        compute = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        up, down = self._streams[device]
        # What the last step sent down has arrived; staging memory is free once this stream is here.
        up.wait_stream(down)
        up.wait_stream(compute)
        slots: list[tuple[Tensor, torch.cuda.Event]] = []
        waiting: list[tuple[_Piece, Tensor, torch.cuda.Event]] = []
        used = 0

        def finish() -> None:
            piece, stage, arrived = waiting.pop(0)
            compute.wait_event(arrived)
            self._update(piece, (stage[0], stage[1]))
            down.wait_stream(compute)
            with torch.cuda.stream(down):
                for host, here in zip(piece.moments, stage, strict=True):
                    host.copy_(here, non_blocking=True)
            left = torch.cuda.Event()
            left.record(down)
            slots.append((stage, left))

        for piece in pieces:
            if not _is_on_host(piece.moments[0]):
                self._update(piece, piece.moments)
                continue
            if used == SLOTS:
                if not slots:
                    finish()
                buffer, left = slots.pop(0)
                buffer = _whole(buffer, self.piece)
                up.wait_event(left)
            else:
                buffer = torch.empty(2, self.piece, dtype=piece.moments[0].dtype, device=device)
                up.wait_stream(compute)
                used += 1
            stage = buffer[:, : piece.parameter.numel()]
            with torch.cuda.stream(up):
                for here, host in zip(stage, piece.moments, strict=True):
                    here.copy_(host, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(up)
            waiting.append((piece, stage, arrived))
            if len(waiting) == SLOTS - 1:
                finish()
        while waiting:
            finish()
        # The staging buffers belong to this stream's memory: nothing here may take it before.
        compute.wait_stream(down)


def _whole(stage: Tensor, piece: int) -> Tensor:
    """Return the whole staging buffer of a view of its first columns."""
    return stage.as_strided((2, piece), (piece, 1), 0)


def _is_on_host(moment: Tensor) -> bool:
    return _local(moment).device.type == "cpu"
