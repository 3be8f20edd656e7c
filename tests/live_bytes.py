"""Count the bytes of all tensors that live at one time, on any device, as an allocator without rounding would."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes(known) as live: ...`` then ``live.peak``: the most bytes that lived at once in the block.

    Sizes are read again after each operation, since sharded modules free gathered weights by resizing their storage.

    Args:
        known: tensors that live already and count too.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that live at this moment."""
        total = 0
        for reference in list(self._storages.values()):
            if (storage := reference()) is not None:
                total += storage.nbytes()
        return total

    def _note(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return  # a wrapper; what it wraps is noted by itself
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages or self._storages[key]() is None:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))
