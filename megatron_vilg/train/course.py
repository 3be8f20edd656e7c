"""Whether a run still is on its course, and the way back when it is not: an older checkpoint, and other pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import TrainConfig
from megatron_vilg.errors import TrainingError
from megatron_vilg.log import get_logger
from megatron_vilg.train.engine import Engine

log = get_logger(__name__)

WATCHED = ("loss/text_to_image(nats/token)", "loss/image_to_text(nats/token)")
"""Cross-entropies, summed: they are positive in every run, and an end-to-end loss need not be."""
_DECAY = 0.9
_SKIPPED, _ROLLBACKS, _MEAN = "batches_skipped", "rollbacks", "healthy_loss"
_LAST_GOOD, _BAD_IN_ROW = "last_healthy_step", "high_lines_in_row"


class Course:
    """The running mean of the watched losses, and how many batches were left behind by going back.

    All ranks see the same losses, so they decide alike. The state is a few plain numbers that are saved in the
    manifest of every checkpoint.
    """

    def __init__(self, options: TrainConfig, counters: Mapping[str, int | float | str] | None = None) -> None:
        saved = counters or {}
        self.options = options
        self.skipped = int(saved.get(_SKIPPED, 0))
        self.rollbacks = int(saved.get(_ROLLBACKS, 0))
        self._mean = float(saved.get(_MEAN, math.nan))
        self.last_good = int(saved.get(_LAST_GOOD, 0))
        """Step of the last healthy log line: what was saved after it may be lost already."""
        self._complaint = ""
        self._bad_in_row = int(saved.get(_BAD_IN_ROW, 0))

    @property
    def counters(self) -> dict[str, int | float | str]:
        """What a checkpoint must keep."""
        found: dict[str, int | float | str] = {_SKIPPED: self.skipped, _ROLLBACKS: self.rollbacks}
        if self.options.rollback_factor:
            found |= {_LAST_GOOD: self.last_good, _BAD_IN_ROW: self._bad_in_row}
        return found | ({} if math.isnan(self._mean) else {_MEAN: self._mean})

    @property
    def keep_from(self) -> int:
        """The newest checkpoint of this step or one before it may be needed; -1 where a run never goes back."""
        return self.last_good if self.options.rollback_factor else -1

    @property
    def metrics(self) -> dict[str, float]:
        """What a log line says; nothing in a run that never goes back."""
        return {"step/rollbacks": float(self.rollbacks)} if self.options.rollback_factor else {}

    def batch_number(self, step: int) -> int:
        """Which batch the step with this number takes: later ones once batches were left behind."""
        return step + self.skipped

    def lost(self, step: int, values: Mapping[str, float], complaint: str = "") -> bool:
        """Note the losses of a log line; whether the run is to go back.

        Args:
            complaint: of ``train.max_skipped_in_row``, which no more lines need to confirm; empty: there is none.

        Raises:
            TrainingError: there is one, and the run never goes back.
        """
        if complaint and not self.options.rollback_factor:
            raise TrainingError(complaint)
        self._complaint = complaint
        if complaint or not self.options.rollback_factor:
            return bool(complaint)
        loss = sum(values[name] for name in WATCHED)
        if math.isnan(self._mean) and math.isfinite(loss):
            self._mean = loss
        if not math.isfinite(loss) or loss > self.options.rollback_factor * self._mean:
            self._bad_in_row += 1
        else:
            self._bad_in_row, self.last_good = 0, step
            self._mean = _DECAY * self._mean + (1.0 - _DECAY) * loss
        return self._bad_in_row >= self.options.rollback_patience

    def go_back(self, engine: Engine, checkpointer: Checkpointer, progress: Manifest) -> None:
        """Take the newest checkpoint from before the losses rose, and leave out the batches since then.

        Before: not after the last healthy log line. Later checkpoints are removed: a run that is killed now must not
        resume from them. One that leads to high losses again, without a healthy line, counts as later next time.
        The checkpoint is given the counters of now, so that a killed run neither takes the same batches nor forgets
        that it went back.

        Args:
            engine: filled from the checkpoint.
            checkpointer: of this run.
            progress: what would be saved with the step that the run is at.

        Raises:
            TrainingError: no such checkpoint, or it happened ``train.max_rollbacks`` times already.
            CheckpointError: it cannot be read or written, or another job has taken over.
        """
        checkpointer.require_ours()
        checkpointer.finish()  # what is still being written counts
        before = checkpointer.latest(self.last_good)
        if self.rollbacks >= self.options.max_rollbacks or before is None:
            why = "there is no checkpoint from before" if before is None else f"after {self.rollbacks} rollbacks"
            if self._complaint:
                going_back = f"Going back (train.rollback_factor={self.options.rollback_factor:g})"
                raise TrainingError(f"{self._complaint} {going_back} is no way out: {why}.")
            raise TrainingError(
                f"train.rollback_factor={self.options.rollback_factor:g}: the losses rose above that multiple of their "
                f"running mean after step {self.last_good}, {why}. Lower optim.lr, set model.qk_norm=true or "
                "loss.z_loss=1e-5, look at log.instruments_every=20, or save checkpoints more often."
            )
        manifest = checkpointer.load(before, engine.state_dict(), expected=progress)
        self.skipped += engine.step - manifest.step
        self.rollbacks += 1
        high = f"losses above {self.options.rollback_factor:g} times their mean"
        log.warning(
            "%s after step %d: back to step %d, past the batches in between (%d in all)",
            *("too many steps in a row not finite" if self._complaint else high, self.last_good),
            *(manifest.step, self.skipped),
        )
        self._bad_in_row, self.last_good = 0, manifest.step - 1
        engine.resume(manifest.step)
        counters = {**progress.counters, **self.counters}
        checkpointer.return_to(dataclasses.replace(manifest, samples_seen=progress.samples_seen, counters=counters))
