"""Count the bytes of tensors that are alive while a piece of code runs, on any device.

On a GPU the allocator keeps this number; on the CPU nobody does. `LiveBytes` sees every operator
that torch dispatches, notes the storages of its results, and adds up after each operator what is
still alive. A storage counts once, with the size that it has now (FSDP empties and refills its
buffers in place), for as long as a tensor refers to it: the graph, a hook, or a variable.

What it does not see: scratch memory inside an operator, and tensors made before it began, unless
they are given as a baseline. Cost: one pass over the live storages an operator; for small models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts live bytes while it is entered.

    Args:
        baseline: Tensors that exist already and count too.
        min_bytes: Storages smaller than this are left out.

    Attributes:
        peak_bytes: The most so far.
        peak_operator: The operator after which that was.
    """

    def __init__(self, baseline: Iterable[Tensor] = (), *, min_bytes: int = 0) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.min_bytes = min_bytes
        self.peak_bytes = 0
        self.peak_operator = ""
        self.peak_parts: list[tuple[int, str]] = []
        self._names: dict[int, str] = {}
        for tensor in baseline:
            self._note(tensor, "baseline")
        self._count("baseline")

    def _note(self, tensor: Tensor, name: str) -> bool:
        """Remember a tensor's storage; whether it is a new one."""
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device.type == "meta":
            return False
        storage = local.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = StorageWeakRef(storage)
            self._names[key] = f"{name} {tuple(local.shape)} {local.dtype}"
            return True
        return False

    def _count(self, name: str) -> int:
        total, sizes = 0, {}
        for key, reference in list(self._storages.items()):
            if reference.expired():
                del self._storages[key], self._names[key]
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            size = 0 if storage is None else storage.nbytes()
            del storage
            if size >= self.min_bytes:
                total += size
                sizes[key] = size
        if total > self.peak_bytes:
            self.peak_bytes, self.peak_operator = total, name
            parts = ((size, self._names[key]) for key, size in sizes.items())
            self.peak_parts = sorted(parts, reverse=True)
        return total

    def reset_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak_bytes = 0
        self._count("begin")

    @property
    def now_bytes(self) -> int:
        """Bytes alive now."""
        return self._count("")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count."""
        result = func(*args, **(kwargs or {}))
        name = str(func)
        new = [self._note(leaf, name) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(new):  # views and writes in place add nothing
            self._count(name)
        return result
