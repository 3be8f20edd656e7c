from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_vilg.checkpoint.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter
from megatron_vilg.checkpoint.tensors import TensorInfo
from megatron_vilg.errors import CheckpointError


def test_an_element_type_that_is_not_read_is_no_damage(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="a: w has element type F8_E4M3, which is not read. Works: F64, F32, F16"):
        opened(tmp_path / "a")


def opened(path: Path) -> SafetensorsFile:
    return SafetensorsFile(os.open(path, os.O_RDONLY), path)


def test_the_library_reads_what_is_written_and_the_other_way(tmp_path: Path) -> None:
    values = {name: torch.randint(2, (4, 3)).to(dtype) for name, dtype in DTYPES.items()}
    values |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    writer = SafetensorsWriter(tmp_path / "a", {name: infos[name] for name in order}, {"step": "3"})
    for name in order:
        value = values[name] if values[name].ndim else values[name].reshape(1)
        for start in range(0, len(value), 2):
            writer.write(name, value[start : start + 2])
    writer.close()
    found = load_file(tmp_path / "a")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    save_file(values, tmp_path / "b")
    ours = opened(tmp_path / "b")
    assert ours.tensors == infos
    assert torch.equal(ours.rows("BF16", 1, 3), values["BF16"][1:3])


def test_rows_must_come_in_the_order_of_the_header(tmp_path: Path) -> None:
    infos = {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((2,), torch.float32)}
    writer = SafetensorsWriter(tmp_path / "f", infos, {})
    with pytest.raises(AssertionError, match="b comes out of order"):
        writer.write("b", torch.zeros(2))
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="rows are missing from"):
        writer.close()


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "a has 4 bytes instead of 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "overlap or leave gaps"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 3, "it was cut short"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "its header cannot be read"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path: Path, header, size: int, words: str) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(CheckpointError, match=words):
        opened(tmp_path / "f")
    (tmp_path / "g").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="was cut short inside its header"):
        opened(tmp_path / "g")
