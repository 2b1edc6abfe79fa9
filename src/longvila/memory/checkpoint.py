"""Activation checkpointing that recomputes matrix products and norms, but not attention.

A drop-in for ``torch.utils.checkpoint.checkpoint`` (non-reentrant), which it calls:

1. Forward: the layer runs; its saved tensors are dropped. What operations wrap in
   :func:`longvila.keep.keep` (attention's ``out`` and ``lse``, a ring's merged result) is stored
   in the order of the calls.
2. Backward: the layer runs again; each ``keep`` hands out its stored result. No attention kernel
   and no collective inside such a region runs a second time.
3. With an :class:`~longvila.memory.offload.Offload`, layer inputs and kept results wait on the
   host, and come back while the layer after them is in its backward pass.

At long lengths attention is most of a layer, so this removes most of the price of checkpointing
for one more tensor a layer. It works wherever ``torch.utils.checkpoint`` does, in particular as
the ``gradient_checkpointing_func`` of a transformers model, and under FSDP2.

A layer must call ``keep`` the same number of times in both runs; more is an error.

:func:`store` is the other way round: a layer that is not recomputed, and whose saved tensors wait
on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from longvila.keep import Results, keeping
from longvila.memory.offload import Offload, Region, Stored


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    keep_results: bool = True,
    offload: Offload | None = None,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """Run a layer so that its backward pass recomputes it, except what it keeps.

    Args:
        function: The layer.
        *args: Its arguments; tensors among them are what is stored of the layer.
        keep_results: Whether results wrapped in ``keep`` are stored; otherwise they are computed
            twice like the rest.
        offload: Where stored tensors wait; None leaves them on the device.
        preserve_rng_state: Whether the second run sees the random numbers of the first.
        **kwargs: Further arguments of the layer.

    Returns:
        What the layer returns.

    Memory:
        The tensor arguments, and the kept results: for attention ``B * S * H * (D * itemsize + 4)``
        a layer. The rest of a layer exists for one layer at a time.

    Source:
        The idea of keeping attention's output is DistFlashAttn's; the store by call order, which
        leaves collectives out of the second run, is ours.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    region = None if offload is None else offload.region()
    kept = KeptResults(region)
    inputs: AbstractContextManager[Any] = nullcontext()
    if region is not None:
        # These hooks see the layer's inputs only: inside, torch's checkpoint installs its own.
        inputs = torch.autograd.graph.saved_tensors_hooks(region.put, Stored.fetch)
    with inputs:
        return torch.utils.checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
            context_fn=kept.contexts if keep_results else torch.utils.checkpoint.noop_context_fn,
            **kwargs,
        )


def store(
    function: Callable[..., Any],
    *args: Any,
    offload: Offload,
    parameters: Callable[[], Iterable[Tensor]],
    **kwargs: Any,
) -> Any:
    """Run a layer as it is; what its backward pass needs waits on the host.

    Args:
        function: The layer.
        *args: Its arguments.
        offload: Where saved tensors wait, as far as its budget goes.
        parameters: Gives the layer's parameters as they are when it runs (a sharding wrapper swaps
            them); they and views of them stay where they are.
        **kwargs: Further arguments of the layer.

    Returns:
        What the layer returns.

    Memory:
        On the device the saved tensors of the layers that the offload does not move, and of the one
        that runs.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    region = offload.region()

    def put(tensor: Tensor) -> tuple[Stored | Tensor, torch.Size]:
        address = tensor.untyped_storage().data_ptr()
        own = (p for p in parameters() if type(p) in (Tensor, torch.nn.Parameter))
        if any(p.untyped_storage().data_ptr() == address for p in own):
            return tensor, tensor.shape
        # Flat, so that a tensor and a reshaped view of it are known as one.
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor
        return region.put(flat), tensor.shape

    def fetch(saved: tuple[Stored | Tensor, torch.Size]) -> Tensor:
        stored, shape = saved
        tensor = stored.fetch() if isinstance(stored, Stored) else stored
        return tensor if tensor.shape == shape else tensor.view(shape)

    with torch.autograd.graph.saved_tensors_hooks(put, fetch):
        return function(*args, **kwargs)


class KeptResults:
    """The results kept of one run of one layer, in the order of the calls.

    Args:
        region: Where they wait; None for the device.
    """

    def __init__(self, region: Region | None = None) -> None:
        self._region = region
        self._results: list[tuple[Stored | Tensor, ...]] = []

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts for the first run and for each later one."""
        return _Run(self._record), _Run(self._replay_from_start)

    def _record(self) -> Callable[[Callable[[], Results]], Results]:
        self._results.clear()

        def record(compute: Callable[[], Results]) -> Results:
            results = compute()
            # Detached: the tensors themselves become outputs of a graph node after this call.
            self._results.append(
                tuple(
                    tensor.detach() if self._region is None else self._region.put(tensor.detach())
                    for tensor in results
                )
            )
            return results

        return record

    def _replay_from_start(self) -> Callable[[Callable[[], Results]], Results]:
        calls = iter(range(len(self._results)))

        def replay(compute: Callable[[], Results]) -> Results:
            call = next(calls, None)
            if call is None:
                raise RuntimeError(
                    f"the layer kept {len(self._results)} results in its first run and asks for "
                    "more in its second: it must do the same both times"
                )
            handed_out: Any = tuple(
                stored.fetch() if isinstance(stored, Stored) else stored.detach()
                for stored in self._results[call]
            )
            return handed_out

        return replay


class _Run(AbstractContextManager[None]):
    """Installs a keeper, made anew each time the context is entered."""

    def __init__(self, make_keeper: Callable[[], Any]) -> None:
        self._make_keeper = make_keeper
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = keeping(self._make_keeper())
        context.__enter__()
        self._entered.append(context)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The inner context only restores a value; torch ends a second run early by an exception
        # of its own, which must pass through unchanged.
        self._entered.pop().__exit__(None, None, None)
