"""C8: output layer and cross-entropy in chunks, beside whole logits: time, and the peak of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import OURS, Bench, Goal, Row, time_rows
from megatron_vilg.ops.cross_entropy import linear_cross_entropy

WHOLE = "whole logits"


class PeakBytes(TorchDispatchMode):
    """Counts the bytes that operations allocate and that still live; ``peak`` is their highest sum."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, free)


def loss_head(bench: Bench) -> Iterator[Row]:
    """4 pictures of 1024 codes, width 512, 8192 codes to choose from, forward and backward."""
    rows, width, vocabulary = (64, 16, 128) if bench.tiny else (4096, 512, 8192)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(bench.device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.02).to(bench.device, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), generator=generator).to(bench.device)

    def chunks() -> object:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], (hidden, weight))

    def whole() -> object:
        logits = (hidden @ weight.T).float()
        return torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), (hidden, weight))

    contenders: dict[str, Callable[[], object]] = {OURS: chunks, WHOLE: whole}
    seconds = bench.interleave(contenders, bench.rounds)
    yield from time_rows("C8", "loss head, forward + backward", seconds, {WHOLE: Goal("ratio", ">=", 1 / 1.03)})
    # What both return, the gradients, is not what the head costs.
    results = (hidden.numel() + weight.numel()) * dtype.itemsize
    peaks = {}
    for name, run in contenders.items():
        with PeakBytes(hidden, weight, labels) as count:
            run()
        peaks[name] = (count.peak - results) / 1e6
    bound = Goal("ratio", ">=", 8.0)
    for peer, value in ((WHOLE, peaks[WHOLE]), ("fp32 logits alone", 4e-6 * rows * vocabulary)):
        metric = "loss head, peak bytes besides gradients"
        yield Row("C8", metric, peaks[OURS], "MB", peer, value, bound, less_is_better=True, counted=True)
