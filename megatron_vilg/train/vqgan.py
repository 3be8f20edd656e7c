"""Stage one: training the image tokenizer, from pictures to a folder that ``load_image_tokenizer`` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.files import PARTIAL, with_suffix
from megatron_vilg.checkpoint.image_tokenizer import KIND, WORK_NAME, load_image_tokenizer, save_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.config.schema import CheckpointConfig, RunConfig
from megatron_vilg.data.images import to_image
from megatron_vilg.errors import CheckpointError, ConfigError, TrainingError
from megatron_vilg.log import get_logger
from megatron_vilg.models.features import find_feature_network
from megatron_vilg.models.quantizer import codebook_use
from megatron_vilg.models.tokenizers import AnyTokenizer
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.train.codebook_watch import CodebookWatch, replaced_though_used
from megatron_vilg.train.dvae_engine import DVAEEngine
from megatron_vilg.train.metrics import Column, MetricWriter, SilentWriter
from megatron_vilg.train.pixel_source import PixelsInMemory, PixelSource
from megatron_vilg.train.signals import StopSignals
from megatron_vilg.train.tokenizer_engine import TokenizerEngine, TokenizerStep
from megatron_vilg.train.vqgan_engine import VQGANEngine

log = get_logger(__name__)

MAX_EVALUATED = 256
"""Held-out pictures that are measured; training pictures where none is held out."""
PICTURES_SHOWN = 8
"""Pictures per row of a sample sheet."""
EVALUATION_BATCH = 32

COLUMNS = (
    Column("loss/pixel(l1)", "l1"),
    Column("loss/edge(l1)", "edge"),
    Column("loss/perceptual", "perc"),
    Column("loss/logit_laplace(nats)", "nll"),
    Column("loss/kl(nats/token)", "kl"),
    Column("gumbel/temperature", "tau"),
    Column("codebook/used(share)", "used", ".2f"),
    Column("codebook/perplexity", "perplexity", ".0f"),
    Column("codebook/revived", "revived", ".0f"),
    Column("critic/open(0-1)", "critic", ".0f"),
    Column("reconstruction/psnr(dB)", "dB", ".2f"),
    Column("throughput(images/s)", "images/s", ".1f"),
)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well a tokenizer gives pictures back."""

    l1: float
    """Mean absolute pixel error, pixels in [0, 1]."""
    psnr: float
    """Peak signal-to-noise ratio in dB, mean over pictures."""
    used: int
    """Codes that occur at all."""

    def __str__(self) -> str:
        return f"l1 {self.l1:.4f}, {self.psnr:.2f} dB, {self.used} codes in use"


@torch.no_grad()
def measure_reconstruction(tokenizer: AnyTokenizer, pixels: Tensor) -> Reconstruction:
    """Encode and decode uint8 pictures [n, 3, S, S] in full precision."""
    device = tokenizer.codebook.device
    errors, ratios = [], []
    counts = torch.zeros(len(tokenizer.codebook), dtype=torch.int64, device=device)
    for part in pixels.split(EVALUATION_BATCH):
        target = part.to(device).float() / 127.5 - 1.0
        ids = tokenizer.encode(target)
        difference = 0.5 * (tokenizer.decode(tokenizer.lookup(ids)).clamp(-1.0, 1.0) - target)
        errors.append(difference.abs().mean(dim=(1, 2, 3)))
        ratios.append(-10.0 * difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10())
        counts += torch.bincount(ids.flatten(), minlength=len(counts))
    return Reconstruction(
        l1=float(torch.cat(errors).mean()),
        psnr=float(torch.cat(ratios).mean()),
        used=int((counts > 0).sum()),
    )


@torch.no_grad()
def sample_sheet(tokenizer: AnyTokenizer, pixels: Tensor) -> Tensor:
    """Pictures above their reconstructions: uint8 [n, 3, S, S] to float32 [3, 2 S, n S] in [-1, 1]."""
    target = pixels.to(tokenizer.codebook.device).float() / 127.5 - 1.0
    output = tokenizer.decode(tokenizer.lookup(tokenizer.encode(target))).clamp(-1.0, 1.0)
    return torch.cat([torch.cat(list(row), dim=2) for row in (target, output)], dim=1).cpu()


def train_image_tokenizer(
    run: RunConfig,
    source: PixelSource | Tensor,
    held_out: Tensor | None,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    replicas: Replicas | None = None,
    require_ours: Callable[[], None] = lambda: None,
) -> Reconstruction | None:
    """Train until ``image_tokenizer_train.num_steps``, from the newest checkpoint beside ``out`` if there is one.

    Every step is a function of (seed, step) and of the weights before it, so a resumed run repeats a straight one.

    Args:
        run: configuration; image_tokenizer, image_tokenizer_train, data.view_* and log are used.
        source: training pictures: uint8 [n, 3, S, S], which stay in memory, or any :class:`PixelSource`.
        held_out: uint8 [m, 3, S, S], m >= 1; the first 256 are measured, 8 shown; None: of ``source``, a tensor.
        out: folder of the finished tokenizer. Checkpoints (two), metrics.jsonl, tensorboard/ and samples/ go to
            ``image_tokenizer_training`` beside it.
        device: where to train.
        replicas: this process and others that make the same call, each with a part of every batch; the first one
            writes.
        require_ours: called before a checkpoint is written; raises CheckpointError if another job works there.

    Returns:
        Quality on ``held_out``; None when a signal stopped the run (the step is saved).

    Raises:
        ConfigError: the batch does not divide by the number of processes; checkpoints have more steps or other tensors.
        TrainingError: too many steps in a row were not finite.
        CheckpointError: the checkpoints beside ``out`` belong to another model or other pictures.
        MissingPackageError: the perceptual network's package is not installed.
    """
    if run.train.num_threads:
        torch.set_num_threads(run.train.num_threads)
    options, replicas = run.image_tokenizer_train, replicas or Replicas()
    require_trainable(run, replicas.size)
    pixels = PixelsInMemory(source, run) if isinstance(source, Tensor) else source
    measured = _Measured.of(source, held_out)
    work = out.with_name(WORK_NAME)
    saving = CheckpointConfig(every=options.checkpoint_every)
    checkpointer = Checkpointer(work / "checkpoints", saving, require_ours=require_ours)
    identity = _identity(run, pixels)
    done = _finished(out, identity, options.num_steps)
    if replicas.from_main(done is not None):
        log.info("%s is already trained", out)
        return measure_reconstruction((done or load_image_tokenizer(out)).to(device), measured.pixels)
    engine = build_tokenizer_engine(run, device, replicas)
    step = _loop(run, engine, pixels, measured, identity, checkpointer, work)
    if step < options.num_steps:
        return None
    tokenizer = engine.finished()
    quality = measure_reconstruction(tokenizer, measured.pixels)
    if replicas.is_main:
        require_ours()
        save_image_tokenizer(tokenizer, out, step=step, extra=_facts(identity, quality))
    replicas.any(False)  # nobody goes on before the folder is there
    log.info("%s: %s pictures: %s", out, measured.name, quality)
    return quality


@dataclass(frozen=True, slots=True)
class _Measured:
    """Pictures that are measured and shown, and what they are."""

    pixels: Tensor
    name: str

    @classmethod
    def of(cls, source: PixelSource | Tensor, held_out: Tensor | None) -> _Measured:
        if held_out is not None:
            return cls(held_out[:MAX_EVALUATED], "held-out")
        if not isinstance(source, Tensor):
            raise ValueError("held_out=None needs the training pictures as a tensor")
        log.warning(
            "no pair is held out, so the image tokenizer is measured on training pictures; raise data.val_share or "
            "name a val split"
        )
        return cls(source[:MAX_EVALUATED], "training")


def require_trainable(run: RunConfig, num_processes: int = 1) -> None:
    """Refuse image tokenizers that can only be imported, feature networks that are not here, and uneven batches.

    Raises:
        ConfigError: says what works.
        MissingPackageError: the feature network's package is not installed.
    """
    if run.image_tokenizer.code_choice != "nearest":
        rule = "such a tokenizer can be imported (vilg checkpoint convert), not trained here"
        raise ConfigError([f"image_tokenizer.code_choice={run.image_tokenizer.code_choice}: {rule}. Works: nearest."])
    if run.image_tokenizer_train.perceptual_weight:
        find_feature_network(run.image_tokenizer_train.perceptual_network)
    if problem := uneven_parts(run, num_processes):
        raise ConfigError([problem])


def uneven_parts(run: RunConfig, num_processes: int) -> str:
    """What is wrong with training the tokenizer on so many processes; empty: nothing."""
    size = run.image_tokenizer_train.batch_size
    if size % num_processes == 0:
        return ""
    works = ", ".join(str(count) for count in range(1, size + 1) if size % count == 0)
    return (
        f"image_tokenizer_train.batch_size={size}: does not divide by the {num_processes} processes that share each "
        f"batch. Works: a multiple of {num_processes}, or as many processes as {works}."
    )


def build_tokenizer_engine(
    run: RunConfig, device: torch.device | str = "cpu", replicas: Replicas | None = None
) -> TokenizerEngine:
    """The engine that ``image_tokenizer.kind`` asks for."""
    kind = DVAEEngine if run.image_tokenizer.kind == "dvae" else VQGANEngine
    return kind(run, device, replicas)


def _loop(
    run: RunConfig,
    engine: TokenizerEngine,
    source: PixelSource,
    measured: _Measured,
    identity: Manifest,
    checkpointer: Checkpointer,
    work: Path,
) -> int:
    """Resume, train until the end or a signal; return the finished steps, which are saved."""
    options, replicas = run.image_tokenizer_train, engine.replicas
    if problem := replaced_though_used(run):
        log.warning("%s", problem)
    step = _resume(engine, checkpointer, identity)
    tokens, skipped_in_row = options.batch_size * run.image_tokenizer.grid_side**2, 0
    watch = CodebookWatch(run.image_tokenizer.codebook_size)
    must_stop = False
    with StopSignals() as stop, _open_writer(run, engine, work, step) as writer:
        while step < options.num_steps and not must_stop:
            engine.before_step(step, source)
            with writer.loading():
                batch = replicas.part(source.batch(step))
            result = engine.train_step(step, batch)
            step += 1
            writer.count(items=options.batch_size, tokens=tokens)
            skipped_in_row = 0 if result.finite else skipped_in_row + 1
            if skipped_in_row >= run.train.max_skipped_in_row:
                raise TrainingError(_complaint(run, step))
            shows = step % options.picture_every == 0 or step == options.num_steps
            if writer.due(step) or shows:
                pixels = measured.pixels if shows and replicas.is_main else None
                writer.log(step, _metrics(engine, result, watch, step, pixels))
            if shows and isinstance(writer, MetricWriter):
                _show(engine.finished(), measured, writer, work, step)
            must_stop = replicas.any(stop.requested)
            is_due = step % options.checkpoint_every == 0 or step == options.num_steps or must_stop
            if is_due and replicas.is_main:
                counters = {**identity.counters, **engine.counters(step)}
                manifest = dataclasses.replace(identity, step=step, counters=counters)
                checkpointer.save(step, engine.state_dict(), manifest)
    if must_stop:
        log.info("stopped by %s after step %d; the same command goes on from there", stop.name, step)
    return step


def _open_writer(run: RunConfig, engine: TokenizerEngine, work: Path, start_step: int) -> MetricWriter | SilentWriter:
    """Metrics are the same on all processes; the main one writes them."""
    options = run.image_tokenizer_train
    log_options = dataclasses.replace(run.log, every=options.log_every)
    if not engine.replicas.is_main:
        return SilentWriter(log_options, num_steps=options.num_steps)
    return MetricWriter(
        work, log_options, num_steps=options.num_steps, start_step=start_step, columns=COLUMNS, items="images"
    )


def _identity(run: RunConfig, source: PixelSource) -> Manifest:
    """What a checkpoint must agree with, and what a difference is only reported for."""
    options = dataclasses.asdict(run.image_tokenizer_train)
    views = {name: value for name, value in dataclasses.asdict(run.data).items() if name.startswith("view_")}
    return Manifest(
        kind=KIND,
        model=json.loads(json.dumps(dataclasses.asdict(run.image_tokenizer))),
        image_vocab_size=run.image_tokenizer.codebook_size,
        counters={"pictures": source.fingerprint, "options": json.dumps(options | views, sort_keys=True)},
    )


def _facts(identity: Manifest, quality: Reconstruction) -> dict[str, int | float | str]:
    return {**identity.counters, "l1(0..1)": quality.l1, "psnr(dB)": quality.psnr, "codes_used": quality.used}


def _finished(out: Path, identity: Manifest, num_steps: int) -> AnyTokenizer | None:
    """The tokenizer in ``out`` if it is the one that this run would make."""
    if not (out / "manifest.json").is_file():
        return None
    found = read_manifest(out)
    same = (found.kind, dict(found.model), found.step) == (identity.kind, dict(identity.model), num_steps)
    facts = ("pictures", "options")
    if not same or any(found.counters.get(name) != identity.counters[name] for name in facts):
        return None
    return load_image_tokenizer(out)


def _resume(engine: TokenizerEngine, checkpointer: Checkpointer, identity: Manifest) -> int:
    """Fill the engine from the newest sound checkpoint, if there is any; return the finished steps."""
    path = engine.replicas.from_main(checkpointer.latest() if engine.replicas.is_main else None)
    if path is None:
        return 0
    found = read_manifest(path)
    dataclasses.replace(found, model=dict(found.model)).compare(identity, where=path)
    if found.counters["pictures"] != identity.counters["pictures"]:
        raise CheckpointError(
            f"{path}: was trained on other pictures (SHA-256 {found.counters['pictures']}, "
            f"now {identity.counters['pictures']}). Use the same data, or another output folder."
        )
    before, now = (json.loads(str(m.counters["options"])) for m in (found, identity))
    if found.step > now["num_steps"]:
        rule = f"{path} has more steps behind it, so that nothing would be trained"
        works = f"{found.step}, to keep it as it is, or more to go on"
        raise ConfigError([f"image_tokenizer_train.num_steps={now['num_steps']}: {rule}. Works: {works}."])
    if problems := list(_other_parts(before, now, path)):
        raise ConfigError(problems)
    for name in sorted(name for name in now if before.get(name) != now[name]):
        log.warning("going on with %s=%s; the run so far used %s", name, now[name], before.get(name))
    checkpointer.load(path, engine.state_dict())
    engine.resumed(found, before)
    log.info("resumed from %s: step %d", path, found.step)
    return found.step


def _other_parts(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Options that decide which tensors a run saves, where they differ: in one line each, not one for every tensor.

    Args:
        before, now: ``image_tokenizer_train`` of the run so far, and of now. What an older version did not write is
            taken to be what it is now.
    """
    before = {**now, **before}
    whole = ["optimizer", *(["critic_channels"] if before["critic_weight"] and now["critic_weight"] else [])]
    differ = [name for name in whole if before[name] != now[name]]
    differ += [name for name in ("critic_weight", "weights_ema_decay") if bool(before[name]) != bool(now[name])]
    for name in differ:
        rule = f"{path} was trained with {before[name]}, and its tensors do not fit"
        works = f"{before[name]}{'' if name in whole or not before[name] else ' or any other above 0'}"
        yield f"image_tokenizer_train.{name}={now[name]}: {rule}. Works: {works}, or another --out."


def _metrics(
    engine: TokenizerEngine, result: TokenizerStep, watch: CodebookWatch, step: int, pixels: Tensor | None
) -> dict[str, float | Tensor]:
    """One log line: the last step's losses, the codebook since the line before, quality on ``pixels`` if any."""
    values: dict[str, float | Tensor] = dict(result.losses)
    values |= {"lr": engine.rate(step - 1), "step/skipped": engine.skipped}
    values |= engine.state_metrics(step - 1)
    if bool(engine.code_counts.sum()):
        use = codebook_use(engine.code_counts)
        values |= {"codebook/used(share)": use.used, "codebook/perplexity": use.perplexity}
        values |= {"codebook/revived": float(engine.revived)}
        watch.check(step, use, num_vectors=int(engine.code_counts.sum()))
        engine.code_counts.zero_()
        engine.revived.zero_()
    if pixels is not None:
        quality = measure_reconstruction(engine.finished(), pixels)
        values |= {"reconstruction/psnr(dB)": quality.psnr, "reconstruction/l1(0..1)": quality.l1}
        values |= {"reconstruction/codes_used": float(quality.used)}
    return values


def _show(tokenizer: AnyTokenizer, measured: _Measured, writer: MetricWriter, work: Path, step: int) -> None:
    """Pictures above their reconstructions, to tensorboard and to ``samples/``."""
    sheet = sample_sheet(tokenizer, measured.pixels[:PICTURES_SHOWN])
    writer.images(f"reconstruction/{measured.name.replace('-', '_')}", (sheet[None] + 1.0) * 0.5, step)
    path = work / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = with_suffix(path, PARTIAL)
    to_image(sheet).save(partial, format="PNG")
    partial.rename(path)


def _complaint(run: RunConfig, step: int) -> str:
    return (
        f"train.max_skipped_in_row={run.train.max_skipped_in_row}: that many steps in a row, up to step {step}, were "
        f"not finite. Lower image_tokenizer_train.lr={run.image_tokenizer_train.lr:g} or use "
        "image_tokenizer_train.precision=fp32."
    )
