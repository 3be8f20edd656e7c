"""Forward and backward passes over the micro-batches of a batch, in whatever layout."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.parallel.zero import before_backward

if TYPE_CHECKING:
    from megatron_vilg.parallel.pipeline import LossOf, Pipeline


class Passes:
    """Runs this rank's parts of the model on pairs, cut into micro-batches of the size that training has.

    Measurements are cut like training steps, so that they take no more memory.

    Args:
        run: resolved configuration; of it sizes of batches, precision, layout and the loss's options are read.
        mesh: the grid of ranks.
        parts: this rank's parts of the model, cut and sharded.
        loss_of: applied to what the last stage returns for a micro-batch.
        num_totals: how many numbers ``loss_of`` reports.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, parts: Sequence[ViLG], loss_of: LossOf, num_totals: int) -> None:
        self._run, self._mesh, self._parts = run, mesh, parts
        self._loss_of, self._num_totals = loss_of, num_totals
        self._size = -(-run.train.batch_size // (mesh.data_size * run.parallel.num_microbatches))
        self._pipeline = self._build_pipeline() if run.parallel.pipeline > 1 else None

    def step(self, batch: PairBatch, targets: Tensor, more: Mapping[str, Tensor], *, backward: bool) -> Tensor:
        """This rank's share of the numbers to report: float32 [num_totals], zeros before the last stage.

        Args:
            batch: this data rank's pairs, on its device.
            targets: int64 [P, N + L + 1] from ``build_targets``.
            more: further inputs of the model, one row per pair.
            backward: whether gradients are wanted.
        """
        run = self._run
        text_ids, image_ids, text_len = batch.rows()
        if self._pipeline is not None:
            options = {"text_len": text_len, "targets": targets, **more}
            return self._pipeline.step((text_ids, image_ids), options, backward=backward)
        (model,) = self._parts
        size, totals = self._size, torch.zeros(self._num_totals, device=self._mesh.device)
        for start in range(0, len(batch), size):
            pairs, rows = slice(start, start + size), slice(2 * start, 2 * (start + size))
            if backward and self._mesh.is_distributed:
                before_backward(model, run.parallel.zero, is_last=start + size >= len(batch))
            with self._autocast():
                result = model(
                    text_ids[rows],
                    image_ids[rows],
                    text_len=text_len[rows],
                    targets=targets[pairs],
                    loss=run.loss,
                    **{name: tensor[pairs] for name, tensor in more.items()},
                )
            loss, numbers = self._loss_of(result)
            if backward:
                loss.backward()
            totals += numbers
        return totals

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Of one process; elsewhere gathered weights are bfloat16 already.

        Its memory of weights in bfloat16 would hold all blocks until the end of the forward pass, where recomputation
        means to hold one; then nothing but memory is lost by it, because a pass reads each weight once.
        """
        enabled = self._run.train.precision == "bf16" and not self._mesh.is_distributed
        keeps_copies = self._run.parallel.recompute != "block"
        return torch.autocast(self._mesh.device.type, torch.bfloat16, enabled=enabled, cache_enabled=keeps_copies)

    def _build_pipeline(self) -> Pipeline:
        # Here, because torch's schedules import its compiler, which one process and most layouts never need.
        from megatron_vilg.parallel.pipeline import HiddenShape, Pipeline

        run, parallel = self._run, self._run.parallel
        pairs = run.train.batch_size // self._mesh.data_size // parallel.num_microbatches
        shape = (2 * pairs, run.model.spec.length // parallel.tensor, run.model.width)
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        hidden = HiddenShape(shape, dtype)
        return Pipeline(self._parts, self._mesh, parallel, hidden, self._loss_of, run.loss, self._num_totals)
