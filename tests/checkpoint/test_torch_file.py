from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_vilg.checkpoint.inert import Described, Record
from megatron_vilg.checkpoint.torch_file import TorchFile, named_tensors
from megatron_vilg.errors import CheckpointError


class Anything:
    """Some class that a reader need not have."""

    def __init__(self, value: int) -> None:
        self.value = value


def opened(path: Path, content: Any, **options: Any) -> TorchFile:
    torch.save(content, path, **options)
    return TorchFile(os.open(path, os.O_RDONLY), path)


def whole(file: TorchFile, tensor: Described) -> torch.Tensor:
    return file.rows(tensor, 0, tensor.shape[0] if tensor.shape else 1).reshape(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_type_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randint(2, (5, 3, 2)).to(dtype)
    file = opened(tmp_path / "f.pt", {"x": value, "scalar": value[0, 0, 0].clone(), "none": value[:0].clone()})
    assert torch.equal(whole(file, file.content["x"]), value)
    assert torch.equal(file.rows(file.content["x"], 2, 4), value[2:4])
    assert whole(file, file.content["scalar"]) == value[0, 0, 0]
    assert whole(file, file.content["none"]).shape == (0, 3, 2)


def test_views_and_other_strides_are_read_as_they_are(tmp_path: Path) -> None:
    base = torch.randn(6, 4, 3, 2)
    views = {
        "rows": base[2:5],
        "columns": base[:, 1:3],
        "turned": base.permute(2, 0, 3, 1),
        "parameter": nn.Parameter(base),
    }
    views["last"] = base.to(memory_format=torch.channels_last)
    file = opened(tmp_path / "f.pt", views)
    for name, value in views.items():
        found = file.rows(file.content[name], 1, 3)
        assert found.is_contiguous() and torch.equal(found, value[1:3].detach()), name


def test_objects_become_records_and_modules_are_looked_into(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))
    content = {"model": model, "thing": Anything(4), "ordered": collections.OrderedDict(a=1), "keys": {Anything: 2}}
    file = opened(tmp_path / "f.pt", content)
    thing = file.content["thing"]
    assert isinstance(thing, Record) and thing.origin.endswith("Anything") and thing.get("value") == 4
    assert file.content["ordered"] == {"a": 1}
    found = named_tensors(file.content["model"])
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(whole(file, found["0.weight"]), model[0].weight.detach())


def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    file = opened(path, torch.zeros(1000))
    file.check(file.content)
    content = bytearray(path.read_bytes())
    content[file.place_of(file.content) + 100] ^= 1
    path.write_bytes(content)
    again = TorchFile(os.open(path, os.O_RDONLY), path)
    with pytest.raises(CheckpointError, match=r"f.pt: a tensor does not match its checksum"):
        again.check(again.content)


def test_other_files_are_refused_with_their_name(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save(torch.zeros(3), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"f.pt: is no whole file of torch.save .*before 1.6"):
        TorchFile(os.open(path, os.O_RDONLY), path)
    torch.save(torch.zeros(3000), path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match=r"f.pt: is no whole file of torch.save"):
        TorchFile(os.open(path, os.O_RDONLY), path)


def test_a_name_in_the_archive_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"x": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 9] |= 8  # the flag that says that the name is UTF-8
    content[entry + 46] = 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"f.pt: is no whole file of torch.save .*utf-8"):
        TorchFile(os.open(path, os.O_RDONLY), path)


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path: Path) -> None:
    file = opened(tmp_path / "f.pt", torch.zeros(4))
    storage = file.content.storage
    with pytest.raises(CheckpointError, match="reaches beyond its numbers"):
        file.rows(Described(storage, 2, (4,), (1,)), 0, 4)
    with pytest.raises(CheckpointError, match="reaches beyond its numbers"):
        file.rows(Described(storage, 0, (2, 2), (4, 2)), 0, 2)


class Command:
    """A pickle of this runs a command when it is loaded."""

    target = ""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


def test_nothing_is_executed(tmp_path: Path) -> None:
    Command.target = str(tmp_path / "executed")
    file = opened(tmp_path / "f.pt", {"evil": Command(), "weights": torch.ones(2)})
    assert file.content["evil"].origin.endswith(".system")
    assert torch.equal(whole(file, file.content["weights"]), torch.ones(2))
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Command()))
    assert (tmp_path / "executed").exists(), "the pickle would not have run anything anyway"
