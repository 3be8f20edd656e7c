"""What a run reports while it works: ``metrics.jsonl``, tensorboard, one console line per log step, a progress bar.

Names carry their unit. Steps are finished steps: unique and rising in ``metrics.jsonl``, also across resumes.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vilg.config.schema import LogConfig
from megatron_vilg.errors import MissingPackageError, TrainingError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = get_logger(__name__)
FILE_NAME = "metrics.jsonl"
GIB = 1024.0**3


@dataclass(frozen=True, slots=True)
class Column:
    """A metric on the console line."""

    metric: str
    """Full name, with unit."""
    label: str
    """Short name on the line."""
    spec: str = ".3f"
    """Format of the number."""


PRETRAIN_COLUMNS = (
    Column("loss/text_to_image(nats/token)", "t2i"),
    Column("loss/image_to_text(nats/token)", "i2t"),
    Column("grad_norm", "norm", ".2f"),
    Column("lr", "lr", ".2e"),
    Column("throughput(pairs/s)", "pairs/s", ".1f"),
    Column("time/data(%)", "data%", ".0f"),
    Column("memory/peak_rss(GiB)", "GiB", ".2f"),
)


class MetricWriter:
    """Use as a context manager; only the rank that reports builds one.

    Per step: fetch the batch inside ``with writer.loading():``, then :meth:`count` it. Every ``config.every`` steps
    (:meth:`due`): :meth:`log` the step's global means.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        num_steps: int,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        columns: Sequence[Column] = PRETRAIN_COLUMNS,
        items: str = "pairs",
        item_flops: float = 0.0,
    ) -> None:
        """Open the files of a run.

        Args:
            run_dir: the run folder.
            config: log interval and whether to use tensorboard.
            num_steps: length of the run.
            start_step: finished steps at (re)start; what the files say of later steps is dropped.
            device: where memory is measured besides the process itself.
            columns: metrics on the console line, in order.
            items: what a step consumes, as named in ``throughput(<items>/s)``.
            item_flops: what one of them needs; with ``log.peak_tflops`` there is ``mfu(%)``.

        Raises:
            MissingPackageError: ``log.tensorboard`` is on and tensorboard is not installed.
            TrainingError: the file of metrics cannot be written.
        """
        self.config = config
        self.path = run_dir / FILE_NAME
        self._columns = tuple(columns)
        self._num_steps = num_steps
        self._last_step = start_step
        self._meter = Meter(torch.device(device), items, item_flops, config.peak_tflops)
        run_dir.mkdir(parents=True, exist_ok=True)
        with self._written():
            keep_until(self.path, start_step)
            self._file = self.path.open("a", encoding="utf-8")
        self._board_folder = run_dir / "tensorboard"
        self._board: SummaryWriter | None = None
        if config.tensorboard:
            self._open_board(start_step)
        rank = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        logger.info("metrics of %s (process %d on %s) go to %s", rank, os.getpid(), socket.gethostname(), run_dir)
        logger.info("legend: %s", ", ".join(f"{c.label} = {c.metric}" for c in self._columns))
        self._bar = tqdm(
            total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time spent in here counts as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._meter.data_seconds += time.perf_counter() - start

    def count(self, *, items: int, tokens: int) -> None:
        """Note one finished step with its global number of items (pairs) and tokens; moves the progress bar."""
        self._meter.items += items
        self._meter.tokens += tokens
        self._bar.update(1)

    def due(self, step: int) -> bool:
        """Whether ``step`` (finished steps) is a log step; the last one always is."""
        return step % self.config.every == 0 or step == self._num_steps

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Write one line with ``metrics`` and the meters since the line before.

        Args:
            step: finished steps; must be higher than at the call before.
            metrics: name with unit to number or 0-dim tensor.

        Returns:
            Everything written, as floats. In the file a number that is not finite is ``null``.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}; steps must rise")
        self._last_step = step
        values = {name: float(value) for name, value in metrics.items()} | self._meter.read()
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._written():
            self._file.write(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n")
            self._file.flush()

        def scalars(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._show(scalars)
        self._bar.clear()
        logger.info("%s", self._console_line(step, values))
        self._bar.refresh()
        return values

    def rewind(self, step: int) -> None:
        """Forget what was written after ``step``: the run has gone back there."""
        with self._written():
            keep_until(self.path, step)
        self._last_step = step
        self._show(lambda board: board.close())
        if self._board is not None:
            self._open_board(step)
        self._bar.n = step
        self._bar.refresh()

    def images(self, name: str, pixels: Tensor, step: int) -> None:
        """Pictures to tensorboard, as one grid. ``pixels``: float [B, 3, S, S] in [0, 1] or uint8."""
        self._show(lambda board: board.add_images(name, pixels, step))

    def text(self, name: str, text: str, step: int) -> None:
        """A text (Markdown) to tensorboard."""
        self._show(lambda board: board.add_text(name, text, step))

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        with suppress(OSError):  # each line was flushed: what was not written has been reported
            self._file.close()
        self._show(lambda board: board.close())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path}: cannot be written ({error.strerror or error}). Works: space and rights there (`df`, "
                "`quota`); the same command then goes on from the newest checkpoint"
            ) from error

    def _show(self, show: Callable[[SummaryWriter], object]) -> None:
        """Hand something to tensorboard, whose files a run can do without."""
        if self._board is None:
            return
        try:
            show(self._board)
        except OSError as error:
            self._drop_board(error)

    def _open_board(self, start_step: int) -> None:
        try:
            self._board = _open_board(self._board_folder, start_step)
        except OSError as error:
            self._drop_board(error)

    def _drop_board(self, error: OSError) -> None:
        self._board = None
        logger.warning("%s: cannot be written (%s); the run goes on without tensorboard", self._board_folder, error)

    def _console_line(self, step: int, values: Mapping[str, float]) -> str:
        shown = (f"{c.label} {values[c.metric]:{c.spec}}" for c in self._columns if c.metric in values)
        return "  ".join([f"step {step}/{self._num_steps}", *shown])


class SilentWriter:
    """Stands for ``MetricWriter`` on ranks that do not report."""

    def __init__(self, config: LogConfig, *, num_steps: int) -> None:
        self.config = config
        self._num_steps = num_steps

    def __enter__(self) -> SilentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Nothing is measured."""
        yield

    def count(self, *, items: int, tokens: int) -> None:
        """Nothing is counted."""

    def due(self, step: int) -> bool:
        """As on the rank that reports, because all ranks read their losses together."""
        return step % self.config.every == 0 or step == self._num_steps

    def rewind(self, step: int) -> None:
        """Nothing was written."""

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Nothing is written."""
        return {}


class Meter:
    """Counts since the last reading, and what they mean per second."""

    def __init__(self, device: torch.device, item_name: str, item_flops: float = 0.0, peak_tflops: float = 0.0) -> None:
        self.items = 0
        self.tokens = 0
        self.data_seconds = 0.0
        self._device = device
        self._item_name = item_name
        self._mfu_of_rate = 100.0 * item_flops / (1e12 * peak_tflops) if peak_tflops else 0.0
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def read(self) -> dict[str, float]:
        """Rates since the last call and memory peaks; starts the next interval.

        ``tokens/cpu_s`` divides a process's share of the tokens by its processor time, which other load on the machine
        does not change; on a GPU the device's time is what counts, so ``tokens/s/gpu`` stands there instead.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = max(wall - self._wall, 1e-9), max(cpu - self._cpu, 1e-9)
        values = {
            f"throughput({self._item_name}/s)": self.items / seconds,
            "throughput(tokens/s)": self.tokens / seconds,
            "time/data(%)": 100.0 * self.data_seconds / seconds,
            "memory/peak_rss(GiB)": peak_rss() / GIB,
        }
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self._mfu_of_rate:  # waiting, measuring and saving between two lines lower it
            values["mfu(%)"] = self._mfu_of_rate * self.items / seconds / world_size
        if self._device.type == "cuda":
            values["throughput(tokens/s/gpu)"] = self.tokens / seconds / world_size
            values["memory/max_reserved(GiB)"] = torch.cuda.max_memory_reserved(self._device) / GIB
        else:
            values["throughput(tokens/cpu_s)"] = self.tokens / cpu_seconds / world_size
        self.items = self.tokens = 0
        self.data_seconds = 0.0
        self._wall, self._cpu = wall, cpu
        return values


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def keep_until(path: Path, step: int) -> None:
    """Cut ``metrics.jsonl`` behind the last good line that is not later than ``step``.

    After a crash the file may be ahead of the checkpoint and may end in half a line.
    """
    if not path.exists():
        return
    keep, last = 0, -1
    with path.open("rb") as file:
        for line in file:
            found = _step_of(line)
            if found is None or not last < found <= step:
                break
            keep, last = keep + len(line), found
    if keep < path.stat().st_size:
        logger.info("%s: cut behind step %d", path, max(last, 0))
        os.truncate(path, keep)


def _step_of(line: bytes) -> int | None:
    """The step of a complete line, None for a torn one."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None


def _open_board(folder: Path, start_step: int) -> SummaryWriter:
    """Tensorboard's writer; events after ``start_step`` of an earlier one are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError(
            f"log.tensorboard=true needs the package tensorboard ({error}). "
            "Install it with `pip install tensorboard`, or set log.tensorboard=false."
        ) from error
    return SummaryWriter(str(folder), purge_step=start_step + 1)
