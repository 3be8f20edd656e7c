"""The model, the run and the batches that every layout is compared on, and what is compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_vilg.config.schema import LossConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.tiny import tiny_batch, tiny_config

STEPS = 3
BATCH = 8


@dataclass(frozen=True)
class Record:
    """What a run of three steps gave: per step, and weights at the end."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    """Before clipping by name, whole."""
    weights: dict[str, Tensor]


def case_model(**changes: Any) -> ModelConfig:
    """Four layers (row, column, row, conv), four heads, sizes that divide by 4."""
    sizes = {"width": 32, "num_heads": 4, "text_vocab_size": 24, "image_vocab_size": 12, "codebook_dim": 3}
    return tiny_config(**(sizes | changes))


def case_run(parallel: dict[str, Any] | None = None, model: ModelConfig | None = None, **train: Any) -> RunConfig:
    """Three steps in fp32 with every part of the loss in use and clipping active."""
    return RunConfig(
        model=model or case_model(),
        loss=LossConfig(image_to_text_weight=0.7, z_loss=1e-3, label_smoothing=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5),
        train=TrainConfig(**({"num_steps": STEPS, "batch_size": BATCH, "precision": "fp32"} | train)),
        parallel=ParallelConfig(**(parallel or {})),
    )


def codebook(run: RunConfig) -> Tensor | None:
    """The tokenizer's vectors that the model reads."""
    generator = torch.Generator().manual_seed(5)
    size = run.model.codebook_dim
    return torch.randn(run.model.image_vocab_size, size, generator=generator) if size else None


def run_steps(run: RunConfig, steps: int = STEPS) -> Record:
    """Train on the current process group, or on this process alone."""
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    record = Record([], [], [], {})
    names = engine.named_parameters()
    update = engine.optimizer.step

    def noted(*args: Any) -> Any:
        record.gradients.append({name: whole(p.grad) for name, p in names if p.grad is not None})
        return update(*args)

    engine.optimizer.step = noted  # type: ignore[method-assign]
    size = BATCH // mesh.data_size
    for step in range(steps):
        batch = tiny_batch(run.model, BATCH, seed=step)
        result = engine.train_step(batch.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size))
        record.losses.append(result.loss.item())
        record.norms.append(result.grad_norm.item())
    record.weights.update({name: whole(p) for name, p in names})
    return record


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor; all ranks that hold a part must ask."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def merged(records: list[Record]) -> Record:
    """What the ranks of a layout saw, as one; they must agree on everything that two of them have."""
    first = records[0]
    gradients: list[dict[str, Tensor]] = [{} for _ in first.gradients]
    weights: dict[str, Tensor] = {}
    for record in records:
        assert record.losses == first.losses and record.norms == first.norms
        for joint, own in [*zip(gradients, record.gradients, strict=True), (weights, record.weights)]:
            for name, tensor in own.items():
                torch.testing.assert_close(joint.setdefault(name, tensor), tensor, rtol=0, atol=0, msg=name)
    return dataclasses.replace(first, gradients=gradients, weights=weights)
