"""Counts what one rank sends: every collective and message that torch dispatches, with its bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "c10d._allgather_base_": "gather",
    "c10d.allgather_into_tensor_coalesced_": "gather",
    "_c10d_functional.all_gather_into_tensor": "gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional.reduce_scatter_tensor": "reduce-scatter",
    "c10d.allreduce_": "all-reduce",
    "c10d.broadcast_": "broadcast",
    "_c10d_functional.all_reduce": "all-reduce",
    "c10d.send": "send",
    "c10d.recv_": "receive",
}
SILENT = ("_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd")


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic:`` fills ``calls`` and ``bytes`` by (kind, ranks of the group), ``sent`` by group.

    Bytes are those of the whole tensor: a gather's result, a reduce-scatter's input, an all-reduce's tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[str] = Counter()
        """What this rank sends in a ring over n ranks: (n - 1) / n of what is gathered or scattered, twice that of an
        all-reduce, a broadcast and a message as they are; by name of the group."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        if name.startswith(("c10d.", "_c10d")) and name not in SILENT:
            kind = KINDS[name]
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            size = max(x.nbytes for x in tensors)
            if name == "_c10d_functional.all_gather_into_tensor":
                size *= args[1]
            group = _group(name, args)
            ranks = group.size()
            self.calls[kind, ranks] += 1
            self.bytes[kind, ranks] += size
            self.sent[group.group_name] += round(size * _share_sent(kind, ranks))
        return result


def _share_sent(kind: str, ranks: int) -> float:
    if kind in ("send", "receive"):
        return float(kind == "send")
    if kind == "broadcast":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks


def _group(name: str, args: Any) -> Any:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return torch.distributed.ProcessGroup.unbox(arg)
            except RuntimeError:
                continue
    group = next(x for x in args if isinstance(x, str) and x not in ("sum", "avg", "max"))
    return torch._C._distributed_c10d._resolve_process_group(group)
