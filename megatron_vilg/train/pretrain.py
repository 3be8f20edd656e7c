"""Bidirectional pre-training: the loop, from a token cache to an exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.claim import Claim, claimed
from megatron_vilg.checkpoint.export import save_model_folder
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.config.load import RUN_FILE, dump_run_config, read_run_folder_config, write_run_folder_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.data.loader import PairLoader
from megatron_vilg.data.pair_pixels import PixelCache
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError, ConfigError
from megatron_vilg.log import get_logger
from megatron_vilg.models.tokenizers import AnyTokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.estimate import pair_flops
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.train.course import Course
from megatron_vilg.train.deepspeed import DeepSpeedEngine
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.engine import Engine, NativeEngine, StepResult
from megatron_vilg.train.instruments import Instruments
from megatron_vilg.train.metrics import MetricWriter, SilentWriter
from megatron_vilg.train.optim import learning_rate
from megatron_vilg.train.resumed_state import other_state
from megatron_vilg.train.same_pairs import pairs_of, require_same_pairs
from megatron_vilg.train.signals import StopSignals

log = get_logger(__name__)
_STEPS_SKIPPED, _BATCH_SIZE = "steps_skipped", "batch_size"

SampleHook = Callable[[ViLG, int, MetricWriter], None]
"""Called with the model, the finished steps and the writer every ``train.sample_every`` steps."""


def pretrain(
    run: RunConfig,
    cache: TokenCache,
    out: Path,
    *,
    codebook: Tensor | None = None,
    image_tokenizer: AnyTokenizer | None = None,
    pixels: PixelCache | None = None,
    mesh: Mesh | None = None,
    on_sample: SampleHook | None = None,
    claim: Claim | None = None,
) -> bool:
    """Train until ``train.num_steps``, from the newest checkpoint in ``out`` if there is one.

    Every step is a function of (seed, step) and of the weights before it, so a resumed run repeats a straight one. With
    another ``train.batch_size`` it goes on with the next pair that was not drawn yet.

    Args:
        run: resolved configuration.
        cache: encoded pairs; the split ``train`` is learned, the other splits are measured.
        out: run folder, for ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``export/``.
        codebook: float32 [K, C], needed when ``model.codebook_dim`` is not 0.
        image_tokenizer, pixels: needed with ``reconstructor.enabled``.
        mesh: the grid of ranks, which all make this call; None: this process alone, on the CPU.
        on_sample: draws pictures and captions while training.
        claim: on ``out``, if the caller holds it already; None: held for the time of this call.

    Returns:
        Whether the run is complete; False: a signal stopped it, the step is saved.

    Raises:
        CheckpointError: another job trains in ``out``, or its checkpoints cannot be used or belong to another run.
        ConfigError: the newest has more steps than the run is to have.
        TrainingError: the run diverged.
    """
    mesh = mesh or Mesh(torch.device("cpu"))
    with claimed(out, mesh) if claim is None else nullcontext(claim) as held:
        engine = build_engine(run, mesh, codebook, image_tokenizer)
        loader, held_out = loader_of(run, cache, "train", pixels, mesh), held_out_loaders(run, cache, pixels)
        return _loop(run, engine, loader, held_out, out, manifest_of(run, cache, mesh), held, on_sample)


def _loop(
    run: RunConfig,
    engine: Engine,
    loader: PairLoader,
    held_out: Mapping[str, PairLoader],
    out: Path,
    identity: Manifest,
    claim: Claim,
    on_sample: SampleHook | None,
) -> bool:
    """Resume, train until the end or a signal, save; whether the run is complete."""
    mesh = engine.mesh
    checkpointer = Checkpointer(out / "checkpoints", run.checkpoint, mesh, claim.require)
    resumed = resume_latest(engine, checkpointer, identity)
    kept = keep_options(run, out, mesh, engine.step)
    course = Course(run.train, resumed.counters)
    window = StepWindow(run.train.max_skipped_in_row, resumed.counters)
    loader.resume(course.batch_number(engine.step), samples_before(resumed, course, run))

    def progress() -> Manifest:
        seen = loader.samples_consumed(course.batch_number(engine.step))
        return at_step(identity, run, engine.step, seen, course, window)

    instruments, must_stop = instruments_of(engine, run), False
    with StopSignals() as stop, open_writer(run, out, mesh, engine.step) as writer:
        while engine.step < run.train.num_steps and not must_stop:
            number = course.batch_number(engine.step)
            with writer.loading():
                batch = loader.batch(number)
            result, seen = watched_step(engine, batch, instruments)
            step = engine.step
            writer.count(items=run.train.batch_size, tokens=2 * run.train.batch_size * run.model.spec.num_used)
            window.add(torch.from_numpy(loader.sample_ids(number)), result)
            if writer.due(step) or is_measured(run, step) or seen:
                values = window.read() | seen | course.metrics | rate_of(run, step)
                writer.log(step, values | evaluate(engine, held_out if is_measured(run, step) else {}))
                if course.lost(step, values, window.complaint):
                    course.go_back(engine, checkpointer, progress())
                    writer.rewind(engine.step)
                    continue
            draw_samples(engine, run, writer, on_sample)
            must_stop = mesh.any(stop.requested or claim.is_lost)
            if step % run.checkpoint.every == 0 or step == run.train.num_steps or must_stop:
                checkpointer.save(step, engine.state_dict(), progress(), course.keep_from)
        checkpointer.finish()
    return export_if_complete(engine, kept, out, progress(), stop)


def build_engine(
    run: RunConfig,
    mesh: Mesh,
    codebook: Tensor | None = None,
    image_tokenizer: AnyTokenizer | None = None,
) -> Engine:
    """The engine that the configuration asks for, on so many threads; a reconstructor needs the image tokenizer."""
    torch.set_num_threads(run.train.num_threads or torch.get_num_threads())
    if run.train.engine == "deepspeed":
        return DeepSpeedEngine(run, mesh, codebook)
    if not run.reconstructor.enabled:
        return NativeEngine(run, mesh, codebook)
    if image_tokenizer is None:
        raise ValueError("reconstructor.enabled: the engine needs the image tokenizer")
    return EndToEndEngine(run, mesh, image_tokenizer)


def rate_of(run: RunConfig, step: int) -> dict[str, float]:
    """The learning rate of the step with this number, counted from 1, by metric name."""
    return {"lr": learning_rate(step - 1, run.optim, run.train.num_steps)}


def instruments_of(engine: Engine, run: RunConfig) -> Instruments | None:
    """What looks into the steps, if ``log.instruments_every`` asks for it; other engines refuse that beforehand."""
    return Instruments(engine) if run.log.instruments_every and isinstance(engine, NativeEngine) else None


def watched_step(
    engine: Engine, batch: PairBatch, instruments: Instruments | None
) -> tuple[StepResult, dict[str, float]]:
    """A training step, and every ``log.instruments_every`` steps what the instruments show of it."""
    if instruments is None or not instruments.due(engine.step + 1):
        return engine.train_step(batch), {}
    seen = instruments.before(batch)
    result = engine.train_step(batch)
    return result, seen | instruments.after()


def draw_samples(
    engine: Engine, run: RunConfig, writer: MetricWriter | SilentWriter, on_sample: SampleHook | None
) -> None:
    """Every ``train.sample_every`` steps, have the main rank draw with the whole model, which all gather for it."""
    if on_sample is None or not run.train.sample_every or engine.step % run.train.sample_every:
        return
    model = engine.whole_model()

    def draw() -> None:
        if isinstance(writer, MetricWriter) and model is not None:
            on_sample(model, engine.step, writer)

    engine.mesh.main_first("samples", draw)


def open_writer(run: RunConfig, out: Path, mesh: Mesh, start_step: int) -> MetricWriter | SilentWriter:
    """Metrics are the same on all ranks; the main one writes them."""
    if not mesh.is_main:
        return SilentWriter(run.log, num_steps=run.train.num_steps)
    steps, flops = run.train.num_steps, pair_flops(run)
    return MetricWriter(out, run.log, num_steps=steps, start_step=start_step, device=mesh.device, item_flops=flops)


def loader_of(
    run: RunConfig, cache: TokenCache, split: str, pixels: PixelCache | None = None, mesh: Mesh | None = None
) -> PairLoader:
    """Batches of one split, in the order that the run's seed gives; this data rank's share of each."""
    share = (mesh.data_rank, mesh.data_size) if mesh else (0, 1)
    train = run.train
    return PairLoader(
        cache, split, run.data, run.model.spec, train.batch_size, train.seed, pixels, share, num_steps=train.num_steps
    )


def held_out_loaders(run: RunConfig, cache: TokenCache, pixels: PixelCache | None) -> dict[str, PairLoader]:
    """Batches of every other split that has pairs; none if nothing is to be measured."""
    measured = [split for split, pairs in cache.splits.items() if split != "train" and pairs and run.train.eval_every]
    return {split: loader_of(run, cache, split, pixels) for split in measured}


def manifest_of(run: RunConfig, cache: TokenCache, mesh: Mesh) -> Manifest:
    """What a checkpoint of this run must agree with; all ranks make this call."""
    return Manifest(
        kind="pretrain",
        model=dataclasses.asdict(run.model),
        stream=dataclasses.asdict(run.model.spec),
        tokenizers={name: cache.settings[f"{name}_sha256"] for name in ("text_tokenizer", "image_tokenizer")},
        text_vocab_size=run.model.text_vocab_size,
        image_vocab_size=run.model.image_vocab_size,
        layout={name: getattr(run.parallel, name) for name in ("tensor", "pipeline", "replica", "shard", "zero")},
        counters=pairs_of(cache, mesh),
    )


def at_step(
    identity: Manifest, run: RunConfig, step: int, samples_seen: int, course: Course, window: StepWindow
) -> Manifest:
    """``identity`` after ``step`` finished steps, before which the loader drew so many samples, with all counters."""
    counters = {**identity.counters, _BATCH_SIZE: run.train.batch_size, **course.counters, **window.counters}
    return dataclasses.replace(identity, step=step, samples_seen=samples_seen, counters=counters)


def samples_before(resumed: Manifest, course: Course, run: RunConfig) -> int:
    """How many samples the loader drew in the run until ``resumed``, batches that were left behind included."""
    if _BATCH_SIZE in resumed.counters:
        if (before := resumed.counters[_BATCH_SIZE]) != run.train.batch_size:
            log.info("train.batch_size=%d, %s before: pairs not drawn yet come next", run.train.batch_size, before)
        return resumed.samples_seen
    # Checkpoints of earlier versions count finished steps alone, all of the last batch size.
    if not (resumed.step and resumed.samples_seen):
        return course.batch_number(resumed.step) * run.train.batch_size
    return course.batch_number(resumed.step) * resumed.samples_seen // resumed.step


def resume_latest(engine: Engine, checkpointer: Checkpointer, identity: Manifest) -> Manifest:
    """Fill the engine from the newest sound checkpoint; returns its manifest, or ``identity`` if there is none.

    Raises:
        CheckpointError: no checkpoint can be used, or the newest belongs to another configuration, has other parts
            (``train.resumed_state``) or is of other pairs; both sides are printed.
        ConfigError: it has more steps than the run is to have.
    """
    path = checkpointer.latest()
    if path is None:
        return identity
    found, wanted = read_manifest(path), engine.run.train.num_steps
    if found.step > wanted:
        rule = f"{path} has more steps behind it, so that nothing would be trained"
        works = f"{found.step}, to export it as it is, or more to go on"
        raise ConfigError([f"train.num_steps={wanted}: {rule}. Works: {works}."])
    require_same_pairs(path, found, identity, engine.mesh)
    state = engine.state_dict()
    # In one line, where tensors compared by name make hundreds.
    problem = other_state(path, engine.run, state) if engine.mesh.is_main else ""
    if problem := engine.mesh.from_main(problem):
        raise CheckpointError(problem)
    manifest = checkpointer.load(path, state, expected=identity)
    engine.resume(manifest.step)
    log.info("resumed from %s: step %d, %d samples seen", path, manifest.step, manifest.samples_seen)
    return manifest


def keep_options(run: RunConfig, out: Path, mesh: Mesh, step: int) -> RunConfig:
    """Write ``config.json`` now that a run is known to go on after ``step`` with these options.

    Returns:
        The options to export. A run that has no step left keeps those that it was trained with.
    """
    if not mesh.is_main:
        return run
    if step < run.train.num_steps or not (out / RUN_FILE).is_file():
        write_run_folder_config(run, out)
        return run
    log.info("%s: all %d steps are done, nothing is left to train; its options stay what they were", out, step)
    trained = read_run_folder_config(out)
    return dataclasses.replace(trained, train=dataclasses.replace(trained.train, num_steps=run.train.num_steps))


def export_if_complete(engine: Engine, run: RunConfig, out: Path, progress: Manifest, stop: StopSignals) -> bool:
    """Export the model of a complete run, or say that it was stopped; whether it is complete."""
    if engine.step < run.train.num_steps:
        log.info("stopped by %s after step %d; the same command goes on from there", stop.name, engine.step)
        return False
    export(engine, run, out, progress)
    return True


def export(engine: Engine, run: RunConfig, out: Path, progress: Manifest) -> None:
    """Write ``out/export``: weights, configuration and both tokenizers in one folder to generate from."""
    weights = {name: tensor.to("cpu") for name, tensor in engine.export()}
    if not engine.mesh.is_main:
        return
    folder = save_model_folder(
        out / "export",
        weights,
        dump_run_config(run),
        progress,
        extra={name: out / name for name in ("text_tokenizer", "image_tokenizer") if (out / name).is_dir()},
    )
    log.info("exported to %s", folder)


def is_measured(run: RunConfig, step: int) -> bool:
    """Whether held-out pairs are measured after this step."""
    return bool(run.train.eval_every) and step % run.train.eval_every == 0


def evaluate(engine: Engine, loaders: Mapping[str, PairLoader]) -> dict[str, float]:
    """Cross-entropies on the first ``train.eval_pairs`` of each held-out split, nothing noised or dropped."""
    values: dict[str, float] = {}
    for split, loader in loaders.items():
        result = engine.eval_step(loader.clean_batch(list(range(min(engine.run.train.eval_pairs, len(loader))))))
        values[f"{split}/text_to_image(nats/token)"] = float(result.image_ce)
        values[f"{split}/image_to_text(nats/token)"] = float(result.text_ce)
        values |= {f"{split}/{name}": float(value) for name, value in result.extra.items()}
    return values


class StepWindow:
    """The steps since the last log line: their means, and the watch over steps that are not finite.

    Results stay on the device until ``read``, so that steps in between need not wait for the host.
    """

    def __init__(self, max_skipped_in_row: int, counters: Mapping[str, int | float | str] | None = None) -> None:
        self._limit = max_skipped_in_row
        self._steps: list[tuple[Tensor, StepResult]] = []
        self._row: list[int] = []
        self._row_steps = 0
        self.complaint = ""
        """What the last ``read`` found: too many steps in a row were not finite. Empty: they were."""
        self._skipped = int((counters or {}).get(_STEPS_SKIPPED, 0))

    @property
    def counters(self) -> dict[str, int | float | str]:
        """What a checkpoint must keep; steps that are not read yet are counted, for which the host waits."""
        return {_STEPS_SKIPPED: self._skipped + sum(int(result.skipped) for _, result in self._steps)}

    def add(self, sample_ids: Tensor, result: StepResult) -> None:
        """Note one finished step.

        Args:
            sample_ids: int64 [batch_size], the pairs of all data ranks: which of them spoilt it, no rank can tell.
            result: what the engine reported.
        """
        self._steps.append((sample_ids, result))

    def read(self) -> dict[str, float]:
        """Means over the finite steps since the last call; ``step/skipped`` counts since the start."""
        finite, self.complaint = [], ""
        for sample_ids, result in self._steps:
            if float(result.skipped):
                self._skipped += 1
                self._row_steps += 1
                self._row += sample_ids.tolist()
                if self._row_steps >= self._limit:
                    self.complaint = self._complaint()
                    self._row, self._row_steps = [], 0
            else:
                self._row, self._row_steps = [], 0
                finite.append(result)
        results = finite or [result for _, result in self._steps]
        self._steps = []

        def mean(name: str) -> float:
            return float(torch.stack([getattr(r, name) for r in results]).mean()) if results else float("nan")

        names = dict.fromkeys(name for r in results for name in r.extra)
        extra = {name: float(torch.stack([r.extra[name] for r in results if name in r.extra]).mean()) for name in names}
        return {
            "loss/total": mean("loss"),
            "loss/text_to_image(nats/token)": mean("image_ce"),
            "loss/image_to_text(nats/token)": mean("text_ce"),
            "grad_norm": mean("grad_norm"),
            "step/skipped": float(self._skipped),
        } | extra

    def _complaint(self) -> str:
        samples = sorted(set(self._row))
        shown = ", ".join(map(str, samples[:50])) + (", ..." if len(samples) > 50 else "")
        return (
            f"train.max_skipped_in_row={self._limit}: that many steps in a row were not finite; samples {shown}. "
            "Lower optim.lr, use train.precision=fp32, or look at those samples."
        )
