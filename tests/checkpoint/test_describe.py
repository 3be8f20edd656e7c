from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_vilg.checkpoint.describe import statistics
from megatron_vilg.checkpoint.tensors import DictSource


def test_statistics_are_json_whatever_the_values(tmp_path: Path) -> None:
    values = {
        "model.some": torch.tensor([float("inf"), -2.0, float("nan"), 3.0]),
        "model.none": torch.full((2,), float("-inf")),
    }
    source = DictSource(values, None, tmp_path)
    some, none = (statistics(source, name) for name in values)
    assert (some["min"], some["max"], some["first"]) == (-2.0, 3.0, ["inf", -2.0, "nan", 3.0])
    assert (none["min"], none["max"], none["mean"], none["first"]) == ("nan", "nan", "nan", ["-inf", "-inf"])
    json.dumps([some, none], allow_nan=False)
