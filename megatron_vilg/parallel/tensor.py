"""Cut a model over the axis ``tp`` as the plan table says: torch's DTensor styles around plain modules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from megatron_vilg.config.schema import LossConfig
from megatron_vilg.models.vilg import OutputHead, ViLG
from megatron_vilg.parallel.plan import RULES, Cut, PlanError, Rule, rule_of
from megatron_vilg.parallel.vocabulary import parallel_linear_cross_entropy, parallel_logits

POSITIONS, WIDTH = Shard(1), Shard(2)
"""Cuts of hidden states [B, T, D]."""


def apply_tensor_parallel(model: ViLG, tp: DeviceMesh, rules: Sequence[Rule] = RULES) -> None:
    """Make every parameter of this part of the model a DTensor on ``tp``, and set the exchanges between ranks.

    The model's code stays what it is: modules see local tensors, and count heads from them. Hidden states between
    blocks are [2P, T / tp, D]; the last block of the last stage gathers all positions.

    Raises:
        PlanError: a parameter was not cut as the table says.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if own:
            weight = next(key for key in own if key.endswith(".weight"))
            plan[name] = _style(rule_of(weight, rules).cut)
    for name in model.blocks:
        plan[f"blocks.{name}.attention"] = _gathered(inputs=2)
        plan[f"blocks.{name}.mlp"] = _gathered(inputs=1)
    if model.embed is not None:
        plan["embed"] = PrepareModuleOutput(output_layouts=WIDTH, desired_output_layouts=POSITIONS)
    if model.norm is not None:
        last = list(model.blocks)[-1]
        plan[f"blocks.{last}"] = PrepareModuleOutput(output_layouts=POSITIONS, desired_output_layouts=Replicate())
    model.computes_all = True  # a rank's share of the positions, which may have none that is predicted
    parallelize_module(model, tp, plan)
    check_cuts(model, rules)


def _gathered(inputs: int) -> ParallelStyle:
    """All positions of the first input; kept as DTensor, so that its gradient is summed once for all its readers."""
    rest = (None,) * (inputs - 1)
    return PrepareModuleInput(input_layouts=(POSITIONS, *rest), desired_input_layouts=(Replicate(), *rest))


def _style(cut: Cut) -> ParallelStyle:
    if cut in (Cut.TABLE, Cut.COLUMN):
        return ColwiseParallel()
    if cut is Cut.ROW:
        return RowwiseParallel(output_layouts=POSITIONS)
    if cut is Cut.SEQUENCE:
        return SequenceParallel(use_local_output=True)
    if cut is Cut.HEADS:  # [B, T, heads of this rank, H]
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    return _VocabularyHead() if cut is Cut.VOCABULARY else _Copied()


class _Copied(ParallelStyle):
    """A LayerNorm that every rank applies to the same data."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.LayerNorm)
        _distribute(module, device_mesh, Replicate())

        def forward(x: Tensor) -> Tensor:
            weight, bias = _local(module.weight), _local(module.bias)
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)

        module.forward = forward  # type: ignore[method-assign, assignment]
        return module


class _VocabularyHead(ParallelStyle):
    """An output head whose ranks have rows of the vocabulary each."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, OutputHead)
        _distribute(module, device_mesh, Shard(0))
        module.forward = partial(_head, module, device_mesh.get_group())  # type: ignore[method-assign]
        return module


def _head(
    module: OutputHead, group: Any, x: Tensor, labels: Tensor | None = None, loss: LossConfig | None = None
) -> Any:
    """``OutputHead.forward`` over ranks; without labels this rank's logits."""
    weight = _local(module.weight)
    if labels is None:
        return parallel_logits(x, weight, group)
    loss = loss or LossConfig()
    return parallel_linear_cross_entropy(
        x, weight, labels, group, z_loss=loss.z_loss, label_smoothing=loss.label_smoothing
    )


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Replicate | Shard) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        distributed = distribute_tensor(parameter.data, mesh, [placement])
        module.register_parameter(name, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def check_cuts(model: nn.Module, rules: Sequence[Rule] = RULES) -> None:
    """What torch made of the styles is what the table says; torch only warns about names that match nothing.

    Raises:
        PlanError: naming each parameter that is cut otherwise.
    """
    problems = []
    for name, parameter in model.named_parameters():
        dim = rule_of(name, rules).cut.dim
        if parameter.ndim == 1 and dim is not None:
            dim = 0
        wanted = Replicate() if dim is None else Shard(dim)
        found = parameter.placements if isinstance(parameter, DTensor) else "not cut at all"
        if found != (wanted,):
            problems.append(f"{name}: is {found} over tp, parallel/plan.py says {wanted}")
    if problems:
        raise PlanError(problems)
