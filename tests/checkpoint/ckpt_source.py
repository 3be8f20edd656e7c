"""Sources of random tensors, and checkpoints written the way several ranks write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.checkpoint.tensors import DictSource, TensorSource, read_whole
from megatron_vilg.config.schema import CheckpointConfig, ModelConfig
from megatron_vilg.models.vilg import ViLG
from tests.tiny import tiny_config

STEP = 7


def random_values(config: ModelConfig, *, optimizer: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Weights and Adam state of a generator by full name; every number is different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = ViLG(config)
    values = {f"model.{n}": torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    for name, parameter in model.named_parameters() if optimizer else ():
        values[f"optimizer.step.{name}"] = torch.tensor(float(STEP))
        for slot in ("exp_avg", "exp_avg_sq"):
            values[f"optimizer.{slot}.{name}"] = torch.randn(parameter.shape, generator=generator)
    return values


def manifest_for(config: ModelConfig) -> Manifest:
    return Manifest(
        kind="pretrain",
        step=STEP,
        samples_seen=70,
        model=dataclasses.asdict(config),
        text_vocab_size=config.text_vocab_size,
        image_vocab_size=config.image_vocab_size,
    )


def memory_source(config: ModelConfig | None = None, *, optimizer: bool = True, seed: int = 0) -> DictSource:
    config = config or tiny_config()
    return DictSource(random_values(config, optimizer=optimizer, seed=seed), manifest_for(config), Path("memory"))


def nested(values: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """Full names to the nested state that the trainer saves."""
    state: dict[str, dict[str, object]] = {"model": {}}
    for name, value in values.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            slot, _, rest = rest.partition(".")
            inner = state.setdefault(part, {}).setdefault(slot, {})
            assert isinstance(inner, dict)
            inner[rest] = value
        else:
            state[part][rest] = value
    return state


def write_checkpoint(folder: Path, source: DictSource) -> Path:
    """``folder/checkpoints/step-00000007`` as the trainer writes it."""
    assert source.manifest is not None
    return Checkpointer(folder / "checkpoints", CheckpointConfig()).save(STEP, nested(source.values), source.manifest)


def assert_same(source: TensorSource, values: Mapping[str, Tensor]) -> None:
    """Names, shapes and bits."""
    assert source.tensors.keys() == values.keys()
    for name, value in values.items():
        found = read_whole(source, name)
        assert found.dtype == value.dtype and found.shape == value.shape, name
        assert torch.equal(found.view(-1).view(torch.uint8), value.contiguous().view(-1).view(torch.uint8)), name
