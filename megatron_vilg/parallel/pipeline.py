"""Pipeline parallelism by torch's schedules, with ZeRO inside each stage that means what it says.

torch's own stage stops reducing and resharding at the first backward pass, which is ZeRO 1 whatever was asked for. So
the sharded model is hidden from it in a plain module, and ``StrictStage`` sets the switches of ``parallel/zero.py``
around every backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from megatron_vilg.config.schema import LossConfig, ParallelConfig
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.parallel.stage import stages_of_rank
from megatron_vilg.parallel.zero import Zero, before_backward

LossOf = Callable[[Any], tuple[Tensor, Tensor]]
"""From what the last stage's model returns to the loss of a micro-batch and the numbers to report, float32 [n]."""


class StageModule(nn.Module):
    """One stage as the schedule sees it: the loss is computed inside the last one."""

    def __init__(self, model: ViLG, loss_of: LossOf, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self.totals: Tensor | None = None
        """Sum of the numbers to report over the micro-batches of this step; last stage only."""
        self._loss_of = loss_of

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Hidden states, or on the last stage the loss [1]."""
        result = self.model(*inputs, **options, loss=self._loss)
        if self.model.norm is None:
            return result
        loss, numbers = self._loss_of(result)
        self.totals = numbers if self.totals is None else self.totals + numbers
        return loss[None]


class StrictStage(PipelineStage):
    """Reduces, and for ZeRO 3 reshards, after every micro-batch instead of once per step."""

    zero: Zero = 1

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Called by the schedule for each backward pass; the full one is all that 1F1B and interleaved use."""
        assert backward_type == "full", f"backward of kind {backward_type}: not for ZeRO inside a stage"
        assert isinstance(self.submod, StageModule)
        before_backward(self.submod.model, self.zero, is_last=last_backward)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


@dataclass(frozen=True, slots=True)
class HiddenShape:
    """What travels between stages in one micro-batch."""

    shape: tuple[int, int, int]
    """2 m rows, T / tp positions, D."""
    dtype: torch.dtype


class Pipeline:
    """The stages of this rank and the schedule that drives them.

    Args:
        parts: this rank's pieces of the model, as ``stages_of_rank`` lists them; already cut and sharded.
        mesh: the grid.
        parallel: schedule, ZeRO number, micro-batches.
        hidden: what travels between stages.
        loss_of: applied on the last stage.
        loss: options of the sums that the last stage computes.
        num_totals: how many numbers ``loss_of`` reports.
    """

    def __init__(
        self,
        parts: Sequence[ViLG],
        mesh: Mesh,
        parallel: ParallelConfig,
        hidden: HiddenShape,
        loss_of: LossOf,
        loss: LossConfig,
        num_totals: int = 3,
    ) -> None:
        self._num_totals = num_totals
        self._mesh, self._parallel, self._hidden = mesh, parallel, hidden
        self._modules = [StageModule(part, loss_of, loss) for part in parts]
        self._schedules: dict[tuple[int, bool], PipelineScheduleSingle | PipelineScheduleMulti] = {}

    def step(self, inputs: tuple[Tensor, ...], options: dict[str, Any], *, backward: bool) -> Tensor:
        """Run all micro-batches.

        Args:
            inputs: of the first stage, for the whole local batch; cut into micro-batches along dimension 0.
            options: keyword arguments of every stage; tensors are cut the same way.
            backward: whether gradients are wanted.

        Returns:
            The numbers to report, summed over micro-batches: float32 [num_totals], zeros where the last stage is not.
        """
        schedule = self._schedule(inputs, backward=backward)
        for module in self._modules:
            module.totals = None
        is_first, is_last = self._holds(0), self._holds(self._num_stages - 1)
        run: Callable[..., Any] = schedule.step if backward else schedule.eval
        # The loss is inside the last stage; the schedule insists on a target to call its loss function at all.
        target = {"target": torch.zeros(self._parallel.num_microbatches, device=self._mesh.device)} if is_last else {}
        run(*(inputs if is_first else ()), **options, **target)
        totals = self._modules[-1].totals
        return torch.zeros(self._num_totals, device=self._mesh.device) if totals is None else totals

    @property
    def _num_stages(self) -> int:
        return self._parallel.pipeline * self._parallel.stages_per_rank

    def _holds(self, stage: int) -> bool:
        return stage in stages_of_rank(self._parallel, self._mesh.rank("pp"))

    def _schedule(self, inputs: tuple[Tensor, ...], *, backward: bool) -> Any:
        key = (len(inputs[0]), backward)
        if key not in self._schedules:
            self._schedules[key] = self._build(inputs)
        return self._schedules[key]

    def _build(self, inputs: tuple[Tensor, ...]) -> PipelineScheduleSingle | PipelineScheduleMulti:
        parallel, device = self._parallel, self._mesh.device
        pieces = parallel.num_microbatches
        first = tuple(x[: len(x) // pieces] for x in inputs)
        hidden = torch.empty(self._hidden.shape, dtype=self._hidden.dtype, device=device)
        loss = torch.empty(1, device=device)
        stages: list[Any] = []
        for module, index in zip(self._modules, stages_of_rank(parallel, self._mesh.rank("pp")), strict=True):
            stage = StrictStage(
                module,
                index,
                self._num_stages,
                device,
                input_args=first if index == 0 else (hidden.clone().requires_grad_(),),
                output_args=(loss if index == self._num_stages - 1 else hidden).clone().requires_grad_(),
                group=self._mesh.axis("pp").get_group(),
            )
            stage.zero = parallel.zero
            stages.append(stage)

        def loss_fn(output: Tensor, _: Tensor) -> Tensor:
            return output.sum()

        if parallel.schedule == "interleaved":
            return ScheduleInterleaved1F1B(stages, pieces, loss_fn=loss_fn, scale_grads=False)
        return Schedule1F1B(stages[0], pieces, loss_fn=loss_fn, scale_grads=False)
