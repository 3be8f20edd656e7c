"""The second engine: DeepSpeed's ZeRO 1, 2 and 3 over data ranks, with offload to main memory or disk.

The only file that imports DeepSpeed; written against version 0.19.8. Checkpoints are the same as everywhere else: what
DeepSpeed has cut is cut anew into rows under canonical names, so that either engine goes on from the other's.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.deepspeed import deepspeed_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import IGNORE, PairBatch, build_targets
from megatron_vilg.errors import CheckpointError, ConfigError, MissingPackageError
from megatron_vilg.log import get_logger
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import choose_implementation
from megatron_vilg.parallel.init import initial_value
from megatron_vilg.parallel.launch import ensure_group
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh
from megatron_vilg.parallel.recompute import apply_recompute
from megatron_vilg.parallel.rows import Rows
from megatron_vilg.train.engine import StepResult
from megatron_vilg.train.losses import TokenCounts, weighted_loss
from megatron_vilg.train.optim import build_optimizer, create_state, learning_rate, set_learning_rate, state_was_filled
from megatron_vilg.train.precision import settle_precision

log = get_logger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state by parameter."""


class DeepSpeedEngine:
    """A model under DeepSpeed; the interface is ``train.engine.Engine``.

    Args:
        run: resolved configuration, checked for the number of processes.
        mesh: the grid of ranks; all of them are data ranks.
        codebook: float32 [K, C], vectors of the image tokenizer; needed when ``model.codebook_dim`` is not 0.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
        ConfigError: ``train.deepspeed_config`` contradicts our options.
    """

    def __init__(self, run: RunConfig, mesh: Mesh | torch.device | str = "cpu", codebook: Tensor | None = None) -> None:
        if run.model.codebook_dim and codebook is None:
            raise ValueError("model.codebook_dim is set: the engine needs the tokenizer's codebook")
        self.mesh = mesh if isinstance(mesh, Mesh) else Mesh(torch.device(mesh))
        self.run = run = settle_precision(run, self.mesh.device)
        self.step = 0
        self._rank, self._size = self.mesh.data_rank, self.mesh.data_size
        self._updates = 0
        self._has_moments = False
        self._handed_out: dict[str, Any] = {}
        self._deepspeed = import_deepspeed(self.mesh.device)
        settings = deepspeed_config(run, self._size)
        log.info("DeepSpeed %s: %s", self._deepspeed.__version__, json.dumps(settings))
        implementation, reason = choose_implementation(
            run.ops.attention, run.model.image_side, self.mesh.device, training=True
        )
        log.info("attention: %s (%s)", implementation, reason)
        with torch.device("meta"):
            self._outline = ViLG(run.model, implementation)
        model = self._build_model(settings)
        if codebook is not None and run.model.codebook_dim:
            assert model.embed is not None
            model.embed.register_buffer("codebook", codebook.to(self.mesh.device, torch.float32, copy=True))
        apply_recompute(model, run.parallel.recompute)
        shapes = {name: p.shape for name, p in self._outline.named_parameters()}
        self.optimizer = build_optimizer(model.named_parameters(), run.optim, self.mesh.device, shapes)
        self._engine, *_ = self._deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if self._zero < 3:
            # At its first update DeepSpeed ties moments to parameters after the first group's step; the second group
            # would be left out, had it no state by then.
            create_state(self.optimizer)
        self._rows = Rows()
        self._parameters: dict[str, nn.Parameter] = dict(self._engine.module.named_parameters())
        for name, outline in self._outline.named_parameters():
            init = run.model.init_std, run.model.num_layers
            self._put_weight(name, initial_value(name, tuple(outline.shape), run.train.seed, *init))

    @property
    def _zero(self) -> int:
        return self.run.parallel.zero

    def _build_model(self, settings: dict[str, Any]) -> ViLG:
        """The modules with memory, not yet filled; at stage 3 each is cut as soon as it exists."""
        implementation = self._outline.implementation
        if self._zero < 3:
            with torch.device("meta"):
                model = ViLG(self.run.model, implementation)
            return model.to_empty(device=self.mesh.device)
        # Its argument ``dtype`` is ignored on processors without fp16; the configuration is not.
        with self._deepspeed.zero.Init(config_dict_or_path=settings):
            return ViLG(self.run.model, implementation)

    def train_step(self, batch: PairBatch) -> StepResult:
        """Accumulate over micro-batches, clip, step; a step that is not finite changes nothing."""
        run = self.run
        self._handed_out = {}  # copies that a checkpoint was written from, as large as all that is trained
        if run.model.dropout > 0.0:  # masks depend on step and place alone, so that a resumed run draws the same ones
            torch.manual_seed((run.train.seed * 1_000_003 + self.step + 7_368_787 * self._rank) % 2**64)
        set_learning_rate(self.optimizer, learning_rate(self.step, run.optim, run.train.num_steps))
        totals = self._accumulate(batch)
        applied = self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm() if applied else float("nan")
        self._updates += applied
        self._has_moments |= applied
        self.step += 1
        device = self.mesh.device
        return StepResult(
            totals[0], totals[1], totals[2], torch.as_tensor(norm, device=device), torch.tensor(float(not applied))
        )

    def _accumulate(self, batch: PairBatch, factor: float = 1.0) -> Tensor:
        """All micro-batches of a step: (loss, image_ce, text_ce) over all ranks, float32 [3]."""
        self._engine.train()
        batch = batch.to(self.mesh.device)
        targets = build_targets(batch, self.run.model.spec)
        counts = TokenCounts.of(targets, self.run.model.spec.num_image_tokens).summed(self.mesh)
        size = len(batch) // self.run.parallel.num_microbatches
        totals = torch.zeros(3, device=self.mesh.device)
        for start in range(0, len(batch), size):
            pairs = slice(start, start + size)
            loss, numbers = self._loss(batch.slice(start, start + size), targets[pairs], counts)
            self._engine.backward(factor * self._size * loss, scale_wrt_gas=False)
            self._engine.step()
            totals += numbers
        return self.mesh.sum(totals, DATA_AXES)

    def _loss(self, batch: PairBatch, targets: Tensor, counts: TokenCounts) -> tuple[Tensor, Tensor]:
        """The part that these pairs have in the loss of the step, and (loss, image_ce, text_ce), float32 [3]."""
        text_ids, image_ids, text_len = batch.rows()
        image, text = self._engine(text_ids, image_ids, text_len=text_len, targets=targets, loss=self.run.loss)
        pair = weighted_loss(image, text, counts, self.run.loss)
        return pair.loss, torch.stack([pair.loss.detach(), pair.image_ce, pair.text_ce])

    @torch.no_grad()
    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a whole batch, the same on all ranks, with dropout off."""
        self._engine.eval()
        batch = batch.to(self.mesh.device)
        targets = build_targets(batch, self.run.model.spec)
        counts = TokenCounts.of(targets, self.run.model.spec.num_image_tokens)
        totals = torch.zeros(3, device=self.mesh.device)
        # As many as in a micro-batch of training, so that measuring takes no more memory.
        each = self.run.train.batch_size // (self._size * self.run.parallel.num_microbatches)
        for start in range(0, len(batch), each * self._size):
            # Every rank must take part in every round, so the last one is filled up with pairs that do not count.
            places = torch.arange(each, device=self.mesh.device) + start + each * self._rank
            labels = targets[places.clamp(max=len(batch) - 1)]
            labels = labels.masked_fill((places >= len(batch))[:, None], IGNORE)
            totals += self._loss(batch.take(places.clamp(max=len(batch) - 1)), labels, counts)[1]
        totals = self.mesh.sum(totals, DATA_AXES)
        zero = torch.zeros_like(totals[0])
        return StepResult(totals[0], totals[1], totals[2], zero, zero)

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optimizer": {slot: {name: tensor}}}``: copies in main memory, cut by rows.

        They are fp32 whatever the precision, named and shaped as those of the native engine. Loading fills them in
        place; :meth:`resume`, which must come before the next step, then gives them to DeepSpeed.
        """
        self._handed_out = {}  # before there are new ones
        self._make_moments()
        names = list(self._parameters)
        updates = torch.tensor(float(self._updates))
        self._handed_out = {
            "model": {name: self._rows.cut(self._whole(name)) for name in names} | self._buffers(),
            "optimizer": {"step": {name: updates.clone() for name in names}}
            | {slot: {name: self._rows.cut(self._whole(name, slot)) for name in names} for slot in MOMENTS},
        }
        return self._handed_out

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, from what the last ``state_dict`` now holds."""
        state, self._handed_out = self._handed_out, {}
        counts = {float(count) for count in state["optimizer"]["step"].values()}
        if len(counts) != 1:
            raise CheckpointError(
                f"the checkpoint's parameters were updated {sorted(counts)} times; DeepSpeed counts for all of them "
                "together. Works: train.engine=native."
            )
        self._updates = int(counts.pop())
        for name in self._parameters:
            self._put_weight(name, self._rows.whole(state["model"][name]))
            for slot in MOMENTS:
                self._put(name, self._rows.whole(state["optimizer"][slot][name]), slot)
        for name, buffer in self._buffers().items():
            buffer.copy_(state["model"][name])
        self._set_update_count()
        self.step = step

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole fp32 tensors, one at a time; all ranks go through, the main one is given them."""
        buffers = self._buffers()
        for name in self._outline.state_dict():
            tensor = buffers[name] if name in buffers else self._whole(name)
            if self.mesh.is_main:
                yield name, tensor

    def whole_model(self) -> ViLG | None:
        """A copy of the model in one piece on the main rank, to draw samples with; None on the others."""
        state = dict(self.export())
        if not self.mesh.is_main:
            return None
        with torch.device("meta"):
            model = ViLG(self.run.model, self._outline.implementation)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)

    def _buffers(self) -> dict[str, Tensor]:
        return {name: self._engine.module.get_buffer(name) for name, _ in self._outline.named_buffers()}

    def _whole(self, name: str, slot: str | None = None) -> Tensor:
        """The fp32 weight, or one of its moments; on all ranks, which must all ask."""
        parameter, tools = self._parameters[name], self._deepspeed.utils
        if slot is None:
            found = tools.safe_get_full_fp32_param(parameter)
        else:
            found = tools.safe_get_full_optimizer_state(parameter, slot)
        return found.detach().view(self._shape(name))

    def _shape(self, name: str) -> torch.Size:
        return self._outline.get_parameter(name).shape

    def _put(self, name: str, whole: Tensor, slot: str | None) -> None:
        """Write this rank's share of the fp32 weight (``slot`` None) or of a moment."""
        parameter, tools = self._parameters[name], self._deepspeed.utils
        whole = whole.to(self.mesh.device)
        if self._zero < 3:
            setter = (tools.safe_set_full_fp32_param, tools.safe_set_full_optimizer_state)[slot is not None]
        else:  # its function for whole tensors fails where the ranks do not divide their size
            setter = (tools.safe_set_local_fp32_param, tools.safe_set_local_optimizer_state)[slot is not None]
            whole = self._share(whole.flatten())
        setter(parameter, whole, *(() if slot is None else (slot,)))

    def _share(self, flat: Tensor) -> Tensor:
        """This rank's piece of a flat tensor as stage 3 cuts it: equal ones, the last padded with zeros."""
        size = -(-flat.numel() // self._size)
        flat = nn.functional.pad(flat, (0, size * self._size - flat.numel()))
        return flat.narrow(0, size * self._rank, size)

    @torch.no_grad()
    def _put_weight(self, name: str, whole: Tensor) -> None:
        """Write the fp32 weight, and the copy of it that forward passes use."""
        self._put(name, whole, None)
        parameter: Any = self._parameters[name]
        if self._zero < 3:
            parameter.copy_(whole)
            return
        if parameter.ds_tensor.status.name == "AVAILABLE":  # this rank's piece is in memory, not on disk
            parameter.ds_tensor.data.copy_(self._share(whole.flatten()))
            if parameter.numel() == whole.numel():  # small ones stay whole between steps
                parameter.copy_(whole)
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.mesh.is_main:
                parameter.copy_(whole)

    def _make_moments(self) -> None:
        """DeepSpeed makes Adam's state in the first update: make one that changes nothing, where there was none."""
        if self._has_moments:
            return
        spec = self.run.model.spec
        pairs = self.run.train.batch_size // self._size
        blank = PairBatch(
            text_ids=torch.zeros(pairs, 2, spec.num_text_slots, dtype=torch.int64),
            text_len=torch.zeros(pairs, 2, dtype=torch.int64),
            image_ids=torch.zeros(pairs, 2, spec.num_image_tokens, dtype=torch.int64),
            target_image_ids=torch.zeros(pairs, spec.num_image_tokens, dtype=torch.int64),
            sample_ids=torch.zeros(pairs, dtype=torch.int64),
        )
        set_learning_rate(self.optimizer, 0.0)
        self._accumulate(blank, factor=0.0)
        if not self._engine.was_step_applied():
            raise CheckpointError("DeepSpeed skipped an update without gradients: the weights are not finite")
        self._has_moments = True
        self._set_update_count()

    def _set_update_count(self) -> None:
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self._updates)
        state_was_filled(self.optimizer)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, joined to our process group, and without the operation that it would compile on a CPU.

    Raises:
        MissingPackageError: it is not installed.
        ConfigError: it was imported for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        deepspeed = importlib.import_module("deepspeed")
        operations = importlib.import_module("deepspeed.ops")
    except ImportError as error:
        raise MissingPackageError(
            f"train.engine=deepspeed: {error}. Works: pip install 'megatron_vilg[deepspeed]', or train.engine=native."
        ) from error
    found = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if found != device.type:
        raise ConfigError([f"DS_ACCELERATOR={found}: training runs on {device.type}. Works: {device.type}, or unset."])
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Version 0.19.8 calls them by names that torch 2.13 gives up; whoever trains can do nothing about that.
    deprecated = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    operations.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    ensure_group(device)
    deepspeed.init_distributed()
    return deepspeed
