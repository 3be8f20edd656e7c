"""Read pickles without running them: a name that the pickle calls becomes a record of the call.

A pickle is a program that may call anything. Here the only things it can call are containers of plain data and what
rebuilds a tensor's description; every other class or function turns into a :class:`Record`, which keeps its
arguments and does nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from megatron_vilg.errors import CheckpointError

_PERSISTENT_FIELDS = 5
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(OverflowError, MemoryError, RecursionError),
)
"""What reading a pickle raises that is none: the last three where a length or a nesting is what was damaged."""


class Record:
    """What a pickle wanted to build: the class's name, its arguments, and the state it was given."""

    origin = ""
    """``module.name`` of the class or function that was called."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.named = named
        self.state: Any = None
        self.items: list[Any] = []

    def __new__(cls, *arguments: Any, **named: Any) -> Record:
        """Pickles may build an object without calling ``__init__``."""
        record = super().__new__(cls)
        record.arguments, record.named, record.state, record.items = arguments, named, None, []
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Lists of other classes are filled this way."""
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Lists of other classes are filled this way."""
        self.items.extend(values)

    def get(self, name: str) -> Any:
        """A field of the object's state; None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Mapped(dict[Any, Any]):
    """An ordered dictionary; attributes that were pickled with it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True, slots=True)
class StorageType:
    """Element type of a storage; None where the tensor brings its own."""

    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers that lie elsewhere in the file, under ``key``."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as its pickle describes it: a window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype = field(default=torch.float32)


def _described(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Described:
    dtypes = [value for value in rest if isinstance(value, torch.dtype)]
    dtype = dtypes[0] if dtypes else storage.dtype
    if dtype is None:
        raise pickle.UnpicklingError("a tensor without an element type")
    return Described(storage, int(offset), tuple(shape), tuple(stride), dtype)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _wrapped(function: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of another class, or with attributes: only its description counts."""
    return function(*arguments)


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": None,
}
_HARMLESS: dict[str, Any] = {
    "collections.OrderedDict": Mapped,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _described,
    "torch._utils._rebuild_tensor_v3": _described,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _wrapped,
}


class InertUnpickler(pickle.Unpickler):
    """Unpickles plain data, descriptions of tensors, and records of everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; nothing is imported."""
        full = f"{module}.{name}"
        if full in _HARMLESS:
            return _HARMLESS[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return StorageType(_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Record,), {"origin": full})

    def persistent_load(self, pid: Any) -> Any:
        """``("storage", type, key, device, number of elements)``, as torch.save writes it."""
        if isinstance(pid, tuple) and len(pid) == _PERSISTENT_FIELDS and pid[0] == "storage":
            _, kind, key, _, numel = pid
            if isinstance(kind, StorageType):
                return Storage(str(key), kind.dtype, int(numel))
        raise pickle.UnpicklingError(f"reference to something else than a storage: {pid!r}")


def read_pickle(file: IO[bytes], name: str) -> Any:
    """The content of a pickle, with records in place of objects.

    Args:
        file: open for reading bytes.
        name: what to call it in messages.

    Raises:
        CheckpointError: it is no pickle, is damaged, or holds what cannot be described.
    """
    try:
        return InertUnpickler(file).load()
    except _DAMAGE as error:
        raise CheckpointError(f"{name}: cannot be read ({type(error).__name__}: {error}); it is damaged") from error
