"""Each remedy alone, under stress: python benchmarks/stability.py --data D --tokenizer RUN --out F [--only qk_norm]

Joint training of a small generator and its reconstructor in bfloat16, at a learning rate several times the usual one,
with a critic that works from the first steps, and with every remedy off; then each remedy switched on alone, and all of
them together. Every row runs with the same seeds. ``F`` gets ``stability.json``, ``.md`` and ``.svg``; a run that is
done is not done again, and one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Before torch: one thread, so that rows can run beside each other on a machine of few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.stability_report import write_report
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.config.check import require
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.errors import TrainingError
from megatron_vilg.evaluate.curves import METRICS_FILE, read_metrics
from megatron_vilg.train.pretrain import pretrain
from megatron_vilg.train.stages import IMAGE_TOKENIZER, Prepared, prepare

USUAL_RATE = 1.5e-3
"""Of the preset ``demo``, which has the same depth."""
OFF = 1e6
"""A gradient norm that nothing reaches: no clipping."""
RESULT = "result.json"
LOSSES = ("loss/text_to_image(nats/token)", "loss/image_to_text(nats/token)")
WORSE = 1.2
"""Ending this much above the best tenth of the run counts as diverged."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """One row: what differs from the stress setting."""

    name: str
    settings: tuple[str, ...]
    """``section.option=value``."""

    def folder(self, out: Path, seed: int) -> Path:
        """Where its run with a seed is."""
        return out / "runs" / f"{self.name.replace(' ', '-')}-{seed}"


def stress_settings(steps: int, rate: float) -> list[str]:
    """Everything off, a high learning rate after a short warm-up, a critic at work from the second step on."""
    return [
        "model.num_layers=4", "model.width=96", "model.num_heads=4", "model.dropout=0", "model.conv_kernel=3",
        "model.qk_norm=false", "model.sandwich_norm=false", "model.embedding_gradient_shrink=1", "loss.z_loss=0",
        f"optim.lr={rate}", "optim.warmup_steps=10", "optim.schedule=constant", f"optim.grad_clip={OFF}",
        "reconstructor.enabled=true", f"reconstructor.grad_clip={OFF}", "reconstructor.critic_weight=0.5",
        "reconstructor.critic_adaptive_weight=false", "reconstructor.critic_start_step=0",
        "reconstructor.critic_gate=10", "reconstructor.critic_channels=16", "data.num_views=0",
        "data.target_view_probability=0", "data.target_view_fall=0", "data.image_input_noise=0.1",
        "optim.name=adamw", "optim.weight_decay=0.05",
        f"train.num_steps={steps}", "train.batch_size=16", "train.precision=bf16", "train.num_threads=1",
        "train.sample_every=0", f"train.eval_every={steps}", "checkpoint.every=20", "checkpoint.keep_last=5",
        "log.every=5", "log.instruments_every=10", "log.tensorboard=false",
    ]  # fmt: skip


def remedies(steps: int) -> list[Remedy]:
    """All rows, in the order of the table."""
    single = [
        Remedy("qk_norm", ("model.qk_norm=true",)),
        Remedy("sandwich_norm", ("model.sandwich_norm=true",)),
        Remedy("z_loss", ("loss.z_loss=1e-4",)),
        Remedy("embedding_gradient_shrink", ("model.embedding_gradient_shrink=0.1",)),
        Remedy("grad_clip", ("optim.grad_clip=1", "reconstructor.grad_clip=1")),
        Remedy("lr_share", ("reconstructor.lr_share=0.1",)),
        Remedy("warmup_steps", (f"reconstructor.warmup_steps={steps // 10}",)),
        Remedy("critic_gate", (f"reconstructor.critic_start_step={steps // 2}", "reconstructor.critic_gate=0.15")),
        Remedy("adaptive_weight", ("reconstructor.critic_adaptive_weight=true",)),
        Remedy("rollback", ("train.rollback_factor=1.15",)),
    ]
    everything = tuple(setting for remedy in single for setting in remedy.settings)
    return [
        Remedy("usual rate", (f"optim.lr={USUAL_RATE}",)),
        Remedy("nothing on", ()),
        *single,
        Remedy("all of them", everything),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the report."""
    args = _parser().parse_args(arguments)
    rows = remedies(args.steps)
    names = [row.name for row in rows]
    wanted = args.only.split(",") if args.only else names
    if unknown := [name for name in wanted if name not in names]:
        print(f"--only={','.join(unknown)}: no such row. Works: {', '.join(names)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    shared = args.out / "shared"
    tokenizer = args.tokenizer / IMAGE_TOKENIZER
    sizes = load_image_tokenizer(tokenizer).config
    base = stress_settings(args.steps, args.stress * USUAL_RATE)
    prepared = prepare(_config(base, sizes), args.data, shared, image_tokenizer=tokenizer)
    assert prepared is not None, "a given image tokenizer is not trained"
    for seed in range(args.seeds):
        for row in rows:
            if row.name in wanted:
                settings = [*base, *row.settings, f"train.seed={seed}"]
                _run_once(settings, sizes, prepared, row.folder(args.out, seed))
    results = [
        {"row": row.name, "settings": list(row.settings), "runs": _results(args.out, row, args.seeds)} for row in rows
    ]
    given = sys.argv[1:] if arguments is None else arguments
    record = {
        "command": shlex.join(["python", "benchmarks/stability.py", *given]),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": metadata.version("torch"), "python": platform.python_version()},
        "steps": args.steps,
        "stress": base,
        "rows": [result for result in results if result["runs"]],
    }
    write_report(record, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", metavar="D", type=Path, required=True, help="pairs, in any form that vilg train takes"
    )
    parser.add_argument("--tokenizer", metavar="RUN", type=Path, required=True, help="folder of vilg train-vqgan")
    parser.add_argument("--out", metavar="F", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--steps", metavar="N", type=int, default=200, help="of each run; default 200")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="runs per row; default 3")
    parser.add_argument("--stress", metavar="X", type=float, default=10.0, help="times the usual rate; default 10")
    parser.add_argument("--only", metavar="ROWS", help="names of rows, with commas between; default: all")
    return parser


def _config(settings: Sequence[str], sizes: ImageTokenizerConfig) -> Any:
    """A run of the stress setting with the sizes of the given image tokenizer."""
    run = load_run_config("demo", overrides=settings)
    model = dataclasses.replace(run.model, codebook_dim=sizes.codebook_dim)
    run = dataclasses.replace(run, model=model, image_tokenizer=sizes)
    require(run)
    return run


def _run_once(settings: Sequence[str], sizes: ImageTokenizerConfig, prepared: Prepared, folder: Path) -> None:
    """Train one row with one seed, unless its result is there; what it measured goes to ``result.json``."""
    file = folder / RESULT
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8"))["settings"] != list(settings):
            raise SystemExit(f"{file}: of other settings. Works: another --out, or remove {folder}")
        return
    vocabulary = prepared.run.model.text_vocab_size
    run = _config(settings, sizes).resolve(text_vocab_size=vocabulary)
    start, stopped = time.process_time(), ""
    try:
        if not pretrain(
            run,
            prepared.cache,
            folder,
            codebook=prepared.image_tokenizer.codebook,
            image_tokenizer=prepared.image_tokenizer,
            pixels=prepared.pixels,
        ):
            raise SystemExit("stopped by a signal; the same command goes on")
    except TrainingError as error:  # a run that is given up is what the table is about
        stopped = str(error)
    measured = measure(read_metrics(folder), stopped)
    seed = run.train.seed
    seconds = round(time.process_time() - start, 1)
    result = {"settings": list(settings), "seed": seed, "cpu_seconds": seconds, **measured}
    partial = file.with_name(RESULT + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    for name in ("checkpoints", "export"):  # only the metrics are needed from here on
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def measure(lines: Sequence[Mapping[str, Any]], stopped: str = "") -> dict[str, Any]:
    """Figures of one run from its metric lines (at least ten), and whether it diverged.

    ``stopped``: why it was given up, if it was. Sums of both cross-entropies are averaged over tenths of the run.
    """
    size = max(1, len(lines) // 10)
    tenths = [lines[start : start + size] for start in range(0, len(lines), size)]
    sums = [_mean([_total(line) for line in tenth]) for tenth in tenths]
    finite = [value for value in sums if value is not None]
    last = lines[-size:]
    final = _mean([_total(line) for line in last])
    diverged = bool(stopped) or final is None or final > WORSE * min(finite)
    held_out = [name for name in lines[-1] if name.endswith("text_to_image(nats/token)") and name not in LOSSES]

    def largest(prefix: str) -> float | None:
        values = [v for line in lines for name, v in line.items() if name.startswith(prefix) and v is not None]
        return max(values, default=None)

    return {
        "text_to_image": _mean([line.get(LOSSES[0]) for line in last]),
        "image_to_text": _mean([line.get(LOSSES[1]) for line in last]),
        "held_out": {name.split("/")[0]: lines[-1][name] for name in held_out},
        "best": min(finite, default=None),
        "largest_logit": largest("attention/max_logit"),
        "largest_rms": largest("hidden/last_rms"),
        "largest_log_z": largest("log_z("),
        "largest_gradient": largest("grad_norm"),
        "pixel_error": _mean([line.get("reconstruction/pixel_error(0..1)") for line in last]),
        "skipped": int(lines[-1].get("step/skipped") or 0),
        "rollbacks": int(largest("step/rollbacks") or 0),
        "last_step": lines[-1]["step"],
        "diverged": diverged,
        "stopped": stopped,
    }


def _total(line: Mapping[str, Any]) -> float | None:
    parts = [line.get(name) for name in LOSSES]
    return None if None in parts else sum(float(part) for part in parts if part is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is missing or was not finite."""
    if not values or None in values:
        return None
    return sum(value for value in values if value is not None) / len(values)


def _results(out: Path, row: Remedy, seeds: int) -> list[dict[str, Any]]:
    """Finished runs of a row, each with its curve of summed cross-entropies."""
    found = []
    for seed in range(seeds):
        folder = row.folder(out, seed)
        if (folder / RESULT).is_file() and (folder / METRICS_FILE).is_file():
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            del result["settings"]
            found.append(result | {"curve": [[line["step"], _total(line)] for line in read_metrics(folder)]})
    return found


if __name__ == "__main__":
    sys.exit(main())
