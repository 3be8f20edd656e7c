"""Train the restyler: each step draws things, shows some of their pictures, and has it draw the others.

All pictures of a thing are shifted, zoomed, mirrored and turned in colour alike, anew in every step, and then turned
into codes: what one picture says of another does not depend on any of that. A batch is a function of (seed, step), so
that a resumed run repeats a straight one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.sources import RESTYLER
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import CheckpointConfig, LogConfig, OptimConfig
from megatron_vilg.data.library import Library
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError, ConfigError, TrainingError
from megatron_vilg.log import get_logger
from megatron_vilg.models.restyler import Restyler
from megatron_vilg.train.metrics import Column, MetricWriter
from megatron_vilg.train.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from megatron_vilg.train.pixel_source import seeded
from megatron_vilg.train.restyler_batches import Batches, Rows, held_out
from megatron_vilg.train.signals import StopSignals

log = get_logger(__name__)

WORK_NAME = "restyler_training"
"""Folder of checkpoints and metrics beside the finished restyler."""
COLUMNS = (
    Column("loss/code(nats)", "nats"),
    Column("grad_norm", "norm", ".2f"),
    Column("lr", "lr", ".2e"),
    Column("throughput(pictures/s)", "pictures/s", ".1f"),
)
_WARMUP = 0.03
_MOST_SKIPPED = 20
"""Steps in a row that may be left out because their gradients are not finite."""


class Engine:
    """A restyler and its optimizer; every step is a function of (seed, step, weights)."""

    def __init__(self, config: RestylerConfig, model: Restyler, *, in_bf16: bool) -> None:
        self.config, self.model, self.in_bf16 = config, model, in_bf16
        self.device = model.codebook.device
        self.skipped_in_row = 0
        self._rates = OptimConfig(
            name="muon",
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            warmup_steps=round(_WARMUP * config.num_steps),
            min_lr_share=0.02,
        )
        self.optimizer = build_optimizer(model.named_parameters(), self._rates, self.device, in_bf16=in_bf16)

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of the very tensors a checkpoint fills and saves."""
        parameters = dict(self.model.named_parameters())
        return {"model": parameters, "optimizer": optimizer_state(self.optimizer, self.model.named_parameters())}

    def train_step(self, step: int, rows: Rows) -> dict[str, float | Tensor]:
        """Learn from the rows of a step."""
        config = self.config
        draws = seeded(config.seed, "restyler noise", step)
        noise = config.input_noise + (config.last_input_noise - config.input_noise) * step / config.num_steps
        noised = torch.rand(rows.pictures.shape, generator=draws) < noise
        wrong = torch.randint(self.model.hidden_code, rows.pictures.shape, generator=draws)
        read = torch.where(noised.to(self.device), wrong.to(self.device), rows.pictures)
        self.model.train()
        loss = self.loss(rows, read)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        rate = learning_rate(step, self._rates, config.num_steps)
        if torch.isfinite(norm):
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self.skipped_in_row += 1
            if self.skipped_in_row >= _MOST_SKIPPED:
                raise TrainingError(
                    f"{_MOST_SKIPPED} steps in a row, up to step {step + 1}, were not finite. Lower restyler.lr="
                    f"{config.lr:g}."
                )
        return {"loss/code(nats)": loss.detach(), "grad_norm": norm, "lr": rate}

    def loss(self, rows: Rows, read: Tensor) -> Tensor:
        """Nats per code of what is drawn, when ``read`` is what is read of it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            logits = self.model(rows.pictures, rows.shown_in, read, rows.wanted_in)
        return F.cross_entropy(logits[rows.drawn].flatten(0, 1), rows.pictures[rows.drawn].flatten())


def train_restyler(
    config: RestylerConfig,
    batches: Batches,
    cache: TokenCache,
    *,
    out: Path,
    log_options: LogConfig,
    require_ours: Callable[[], None] = lambda: None,
) -> tuple[Restyler, dict[str, float]] | None:
    """Train until ``num_steps``, from the newest checkpoint beside ``out`` if there is one.

    Args:
        config: what to build and how to train it.
        batches: what to learn from; its image tokenizer is on the device where everything is computed.
        cache: the run's pairs; splits that are not trained are measured.
        out: folder of the finished restyler; checkpoints and metrics go to ``restyler_training`` beside it.
        log_options: tensorboard or not.
        require_ours: called before a checkpoint is written; raises CheckpointError if another job works there.

    Returns:
        the model and nats per code of each split's pairs whose thing it knows; None when a signal stopped it (the
        step is saved).

    Raises:
        CheckpointError: the checkpoints beside ``out`` belong to another model or other pictures.
        ConfigError: they have more steps.
        TrainingError: too many steps in a row were not finite.
    """
    tokenizer = batches.image_tokenizer
    device = batches.device
    codes = torch.arange(tokenizer.config.codebook_size, device=device)
    side = tokenizer.config.grid_side
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed % 2**64)
        vectors = tokenizer.lookup(codes[:, None]).flatten(1)
        model = Restyler(config, vectors.cpu(), side, len(batches.source.library.manners)).to(device)
    engine = Engine(config, model, in_bf16=batches.in_bf16)
    work = out.with_name(WORK_NAME)
    saving = CheckpointConfig(every=config.checkpoint_every)
    checkpointer = Checkpointer(work / "checkpoints", saving, require_ours=require_ours)
    if _loop(engine, batches, cache, checkpointer, work, log_options) < config.num_steps:
        return None
    model.requires_grad_(False).eval()
    return model, measure(engine, batches.source.library, cache)


@torch.no_grad()
def measure(engine: Engine, library: Library, cache: TokenCache) -> dict[str, float]:
    """Nats per code, by split but the trained one, of pairs whose thing and manner the library knows."""
    engine.model.eval()
    found = {}
    for name in _measured(cache):
        rows = held_out(engine.config, library, cache.split(name), engine.model.hidden_code)
        if rows is not None:
            rows = rows.to(engine.device)
            found[name] = engine.loss(rows, rows.pictures).item()
    return found


def _measured(cache: TokenCache) -> list[str]:
    """Splits that are not learnt from."""
    return [name for name, count in cache.splits.items() if count and name != "train"]


def _loop(
    engine: Engine, batches: Batches, cache: TokenCache, checkpointer: Checkpointer, work: Path, log_options: LogConfig
) -> int:
    """Resume, train until the end or a signal; return the finished steps, which are saved."""
    config = engine.config
    identity = _identity(engine.model, batches, cache)
    step = _resume(engine, checkpointer, identity)
    must_stop = False
    options = dataclasses.replace(log_options, every=config.log_every)
    columns = (*COLUMNS, *(Column(f"{split}/code(nats)", split) for split in _measured(cache)))
    with (
        StopSignals() as stop,
        MetricWriter(
            work, options, num_steps=config.num_steps, start_step=step, columns=columns, items="pictures"
        ) as writer,
    ):
        while step < config.num_steps and not must_stop:
            with writer.loading():
                rows = batches.rows(step)
            metrics = engine.train_step(step, rows)
            step += 1
            items = int(rows.drawn.sum())
            writer.count(items=items, tokens=items * engine.model.num_codes)
            must_stop = stop.requested
            saves = step % config.checkpoint_every == 0 or step == config.num_steps or must_stop
            if saves:
                found = measure(engine, batches.source.library, cache)
                metrics |= {f"{split}/code(nats)": value for split, value in found.items()}
                checkpointer.save(step, engine.state_dict(), dataclasses.replace(identity, step=step))
            if writer.due(step) or saves:
                writer.log(step, metrics)
    if must_stop:
        log.info("stopped by %s after step %d; the same command goes on from there", stop.name, step)
    return step


def _identity(model: Restyler, batches: Batches, cache: TokenCache) -> Manifest:
    """What a checkpoint must agree with, and what a difference is only reported for."""
    config = dataclasses.asdict(model.config)
    sizes = ("num_layers", "width", "num_heads")
    library = batches.source.library
    pictures = hashlib.sha256(library.codes.tobytes() + library.thing.tobytes() + library.manner.tobytes())
    return Manifest(
        kind=RESTYLER,
        model={name: config.pop(name) for name in sizes} | {"num_manners": model.num_manners},
        tokenizers={"image_tokenizer": cache.settings["image_tokenizer_sha256"]},
        image_vocab_size=model.hidden_code,
        counters={"pictures": pictures.hexdigest(), "options": json.dumps(config, sort_keys=True)},
    )


def _resume(engine: Engine, checkpointer: Checkpointer, identity: Manifest) -> int:
    """Fill the engine from the newest sound checkpoint, if there is any; return the finished steps."""
    path = checkpointer.latest()
    if path is None:
        return 0
    found = read_manifest(path)
    found.compare(identity, where=path)
    if found.counters["pictures"] != identity.counters["pictures"]:
        raise CheckpointError(
            f"{path}: was trained on other pictures. Works: the same data, or another output folder (--out)"
        )
    if found.step > engine.config.num_steps:
        rule = f"{path} has more steps behind it, so that nothing would be trained"
        works = f"{found.step}, to keep it as it is, or more to go on"
        raise ConfigError([f"restyler.num_steps={engine.config.num_steps}: {rule}. Works: {works}."])
    before, now = (json.loads(str(m.counters["options"])) for m in (found, identity))
    for name in sorted(name for name in now if before.get(name) != now[name]):
        log.warning("going on with restyler.%s=%s; the run so far used %s", name, now[name], before.get(name))
    checkpointer.load(path, engine.state_dict())
    log.info("resumed from %s: step %d", path, found.step)
    return found.step
