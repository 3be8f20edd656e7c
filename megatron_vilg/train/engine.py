"""Who executes a training step. The loop above knows no device, no precision and no ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import IGNORE, PairBatch, build_targets
from megatron_vilg.log import get_logger
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import Implementation, choose_implementation
from megatron_vilg.parallel.clip import clip_gradients
from megatron_vilg.parallel.gather import whole_tensors
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh
from megatron_vilg.parallel.plan import check_plan
from megatron_vilg.parallel.recompute import apply_recompute
from megatron_vilg.parallel.stage import keep_stage, stages_of_rank
from megatron_vilg.parallel.tensor import apply_tensor_parallel
from megatron_vilg.parallel.zero import apply_zero, release_gathered
from megatron_vilg.train.losses import TokenCounts, weighted_loss
from megatron_vilg.train.optim import (
    build_optimizer,
    learning_rate,
    optimizer_state,
    set_learning_rate,
    state_was_filled,
    update,
)
from megatron_vilg.train.passes import Passes
from megatron_vilg.train.precision import settle_precision

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """0-dim tensors on the device, over the whole batch; read them (``.item()``) only where a log line needs them."""

    loss: Tensor
    image_ce: Tensor
    """Text-to-image cross-entropy, nats per token."""
    text_ce: Tensor
    """Image-to-text cross-entropy, nats per token."""
    grad_norm: Tensor
    """Before clipping; 0 for an evaluation step."""
    skipped: Tensor
    """1 if the step was not finite and changed nothing."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What else this engine has to report, by metric name."""


class Engine(Protocol):
    """A model, its optimizer and the step that joins them. All ranks make the same calls."""

    step: int
    run: RunConfig
    """Resolved, its precision settled."""
    mesh: Mesh

    def train_step(self, batch: PairBatch) -> StepResult:
        """One optimizer step on this data rank's share of a batch."""
        ...

    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a whole batch, the same on all ranks, without a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, by parameter name; loading fills these tensors in place."""
        ...

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        ...

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole tensors, one at a time; on other ranks than the main one nothing is yielded."""
        ...

    def whole_model(self) -> ViLG | None:
        """The model in one piece on the main rank, to draw samples with, of the weights that ``export`` gives; None on
        the others."""
        ...


def build_parts(run: RunConfig, mesh: Mesh, codebook: Tensor | None = None) -> list[ViLG]:
    """This rank's pieces of the model, cut, sharded and filled: one, or one per pipeline stage that it holds.

    Nothing is allocated before all cuts are made, so no rank ever holds more than its part.

    Args:
        run: resolved configuration, checked for the number of processes.
        mesh: the grid of ranks.
        codebook: float32 [K, C], vectors of the image tokenizer; needed when ``model.codebook_dim`` is not 0.
    """
    if run.model.codebook_dim and codebook is None:
        raise ValueError("model.codebook_dim is set: the engine needs the tokenizer's codebook")
    implementation, reason = choose_implementation(run.ops.attention, run.model.image_side, mesh.device, training=True)
    log.info("attention: %s (%s)", implementation, reason)
    parts = cut_parts(run, mesh, implementation)
    for model in parts:
        model.to_empty(device="cpu" if run.parallel.cpu_offload else mesh.device)
        init_weights(model, seed=run.train.seed, std=run.model.init_std, num_layers=run.model.num_layers)
        if model.embed is not None and run.model.codebook_dim:
            assert codebook is not None
            model.embed.register_buffer("codebook", codebook.to(mesh.device, torch.float32, copy=True))
    return parts


def cut_parts(run: RunConfig, mesh: Mesh, implementation: Implementation = "dense") -> list[ViLG]:
    """This rank's pieces of the model on the meta device: their shapes are known, no memory is taken."""
    parallel, parts = run.parallel, []
    for stage in stages_of_rank(parallel, mesh.rank("pp")):
        with torch.device("meta"):
            model = ViLG(run.model, implementation)
        if parallel.tensor > 1:
            check_plan({name: p.shape for name, p in model.named_parameters()}, parallel.tensor)
        keep_stage(model, stage, parallel.pipeline * parallel.stages_per_rank)
        if parallel.tensor > 1:
            apply_tensor_parallel(model, mesh.axis("tp"))
        apply_recompute(model, parallel.recompute)
        if run.ops.compile:
            model.compile_blocks()
        if mesh.is_distributed:
            apply_zero(
                model,
                mesh,
                zero=parallel.zero,
                in_bf16=run.train.precision == "bf16",
                reduce_dtype=torch.bfloat16 if parallel.reduce_precision == "bf16" else torch.float32,
                cpu_offload=parallel.cpu_offload,
            )
        parts.append(model)
    return parts


class NativeEngine:
    """Plain PyTorch: one process, or a grid of them with FSDP2, DTensor and torch's pipeline schedules.

    Args:
        run: resolved configuration (``RunConfig.resolve``), checked for the number of processes.
        mesh: the grid of ranks, or the device of a single process.
        codebook: float32 [K, C], vectors of the image tokenizer; needed when ``model.codebook_dim`` is not 0.
    """

    num_totals = 3
    """Numbers that a micro-batch reports: (loss, image_ce, text_ce), and more where more is trained."""

    def __init__(self, run: RunConfig, mesh: Mesh | torch.device | str = "cpu", codebook: Tensor | None = None) -> None:
        self.mesh = mesh if isinstance(mesh, Mesh) else Mesh(torch.device(mesh))
        self.run = run = settle_precision(run, self.mesh.device)
        self.step = 0
        self.parts: Sequence[ViLG] = build_parts(run, self.mesh, codebook)
        self._counts = TokenCounts(1, 1)
        self._passes = Passes(run, self.mesh, self.parts, self._loss_of, self.num_totals)
        self._home = torch.device("cpu") if run.parallel.cpu_offload else self.mesh.device
        in_bf16 = run.train.precision == "bf16"
        self.optimizer = build_optimizer(self.named_parameters(), run.optim, self._home, in_bf16=in_bf16)

    @property
    def model(self) -> ViLG:
        """The only part of a rank that holds one."""
        assert len(self.parts) == 1
        return self.parts[0]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of this rank's parts under their canonical names."""
        return [named for part in self.parts for named in part.named_parameters()]

    def train_step(self, batch: PairBatch) -> StepResult:
        """Accumulate over micro-batches, clip, step; a step that is not finite changes nothing."""
        run = self.run
        self._set_mode(training=True)
        batch = batch.to(self.mesh.device)
        targets = build_targets(batch, run.model.spec)
        self._counts = TokenCounts.of(targets, run.model.spec.num_image_tokens).summed(self.mesh)
        totals = self.mesh.sum(self._run_micro_batches(batch, targets, backward=True), (*DATA_AXES, "pp"))
        norm = clip_gradients((p for _, p in self.named_parameters()), run.optim.grad_clip, self.mesh)
        skipped = (~torch.isfinite(norm + totals[0])).float()
        set_learning_rate(self.optimizer, learning_rate(self.step, run.optim, run.train.num_steps))
        update(self.optimizer, skipped.to(self._home))
        self.optimizer.zero_grad()
        self.step += 1
        return StepResult(totals[0], totals[1], totals[2], norm.detach(), skipped, self._reports(totals))

    @torch.no_grad()
    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a batch with dropout off."""
        self._set_mode(training=False)
        batch = batch.to(self.mesh.device)
        targets = build_targets(batch, self.run.model.spec)
        self._counts = TokenCounts.of(targets, self.run.model.spec.num_image_tokens)
        totals = torch.zeros(self.num_totals, device=self.mesh.device)
        for numbers, is_real in self._eval_rounds(len(batch)):
            labels = targets[numbers].masked_fill(~is_real[:, None], IGNORE)
            totals += self._run_micro_batches(batch.take(numbers), labels, backward=False)
        release_gathered(self.parts)
        totals = self.mesh.sum(totals, (*DATA_AXES, "pp"))
        zero = torch.zeros_like(totals[0])
        return StepResult(totals[0], totals[1], totals[2], zero, zero, self._reports(totals))

    def _eval_rounds(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Which of ``count`` pairs this data rank takes in each round, as many as in training, and which of them are
        no filling: int64 and bool [P]. One process has one round; each is cut into micro-batches (``Passes``)."""
        device, ranks = self.mesh.device, self.mesh.data_size
        size = self.run.train.batch_size // ranks if self.mesh.is_distributed else count
        for start in range(0, count, size * ranks):
            numbers = torch.arange(size, device=device) + start + self.mesh.data_rank * size
            yield numbers.clamp(max=count - 1), numbers < count

    def _run_micro_batches(self, batch: PairBatch, targets: Tensor, *, backward: bool) -> Tensor:
        """This rank's share of (loss, image_ce, text_ce, ...): float32 [num_totals], zeros before the last stage."""
        return self._passes.step(batch, targets, self._more_inputs(batch), backward=backward)

    def _more_inputs(self, batch: PairBatch) -> dict[str, Tensor]:
        """Further inputs of the model, one row per pair; for engines that train more than the generator."""
        return {}

    def _reports(self, totals: Tensor) -> dict[str, Tensor]:
        """What the totals behind the first three mean, by metric name."""
        return {}

    def _loss_of(self, result: Any) -> tuple[Tensor, Tensor]:
        """Sums of a micro-batch to the loss for its backward pass and (loss, image_ce, text_ce), float32 [3].

        Gradients are averaged over data ranks, but the counts are those of all of them: hence the factor.
        """
        image, text = result
        pair = weighted_loss(image, text, self._counts, self.run.loss)
        return pair.loss * self.mesh.data_size, torch.stack([pair.loss.detach(), pair.image_ce, pair.text_ce])

    def _set_mode(self, *, training: bool) -> None:
        for part in self.parts:
            part.train(training)
        if training and self.run.model.dropout > 0.0:
            # Masks depend on step and place alone, so that a resumed run draws the same ones.
            place = self.mesh.data_rank + 1_009 * self.mesh.rank("pp")
            seed = self.run.train.seed * 1_000_003 + self.step + 7_368_787 * place
            torch.manual_seed(seed % 2**64)  # as torch takes negative ones; it refuses longer ones

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optimizer": {slot: {name: tensor}}}``, the live tensors or shards."""
        return {
            "model": {name: tensor for part in self.parts for name, tensor in part.state_dict().items()},
            "optimizer": optimizer_state(self.optimizer, self.named_parameters()),
        }

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        state_was_filled(self.optimizer)
        self.step = step

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names (those of ``ViLG``) and whole tensors, one at a time; yields on the main rank only."""
        names = {name: (tensor.shape, tensor.dtype) for name, tensor in self._empty_model().state_dict().items()}
        yield from whole_tensors(self.state_dict()["model"], names, self.mesh)

    def whole_model(self) -> ViLG | None:
        """The model in one piece on the main rank, to draw samples with, of the weights that ``export`` gives; None on
        the others. One process gives its live model where that has the same weights."""
        if not self.mesh.is_distributed and self._exports_live_weights:
            return self.model
        if not self.mesh.is_main:
            for _ in self.export():
                raise AssertionError("only the main rank is given tensors")
            return None
        model = self._empty_model()
        model.load_state_dict({name: t.to(self.mesh.device) for name, t in self.export()}, assign=True)
        return model.requires_grad_(False)

    @property
    def _exports_live_weights(self) -> bool:
        """Whether ``export`` gives the weights that are trained, not averages of them."""
        return True

    def _empty_model(self) -> ViLG:
        """The whole model on the meta device."""
        with torch.device("meta"):
            return ViLG(self.run.model, self.parts[0].implementation)
