"""Optimizers of an image tokenizer on the same batches, in turn: python benchmarks/image_tokenizers.py --data data/demo

Starts two image tokenizers from the same weights, one with AdamW and one with Muon, and gives each the same batch
before the other gets the next. Held-out pictures are measured as training goes on, so that the question is answered
which matters: after how many steps is the other's last error reached?
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.courses import Course, row_of_seconds, rows_of_curve, show
from benchmarks.measure import Bench, Row
from megatron_vilg.config.check import require
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.pixels import read_train_and_held_out
from megatron_vilg.errors import ConfigError, VilgError
from megatron_vilg.models.features import FeatureNetwork, load_feature_network
from megatron_vilg.models.pixel_losses import perceptual_distance
from megatron_vilg.train.pixel_source import PixelsInMemory
from megatron_vilg.train.vqgan import EVALUATION_BATCH, measure_reconstruction
from megatron_vilg.train.vqgan_engine import VQGANEngine, first_quantised_step

PEER, OURS = "adamw", "muon"
PIXELS, FEATURES, PSNR = "pixel error", "perceptual distance", "PSNR"
"""Held-out figures: error of pixels from 0 to 1, in the features that the loss reads, and dB."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both and print rows; 2 if the data or an option does not fit."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    torch.set_num_threads(1)
    bench = Bench(torch.device("cpu"))
    try:
        settings = [f"image_tokenizer_train.num_steps={options.steps}", *options.settings]
        run = load_run_config(preset=options.preset, overrides=settings)
        require(run)
        if run.image_tokenizer.kind != "vqgan":
            raise ConfigError([f"image_tokenizer.kind={run.image_tokenizer.kind}: is not compared here. Works: vqgan"])
        pictures = read_train_and_held_out(
            options.data,
            run.image_tokenizer.image_size,
            max_bad_share=run.data.max_bad_share,
            val_share=run.data.val_share,
        )
        courses = compare(bench, run, *pictures)
    except VilgError as error:
        print(f"benchmarks/image_tokenizers.py: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "benchmarks/image_tokenizers.py", *words])
    show(bench, command, list(rows(courses)), courses, options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="D", help="pairs, as `vilg data demo` writes them")
    parser.add_argument("--preset", default="demo", metavar="P", help="default demo")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each optimizer; default 400")
    parser.add_argument("--json", type=Path, metavar="F", help="also write rows and curves")
    parser.add_argument("settings", nargs="*", metavar="section.option=value", help="for both")
    return parser


def compare(bench: Bench, run: RunConfig, training: Tensor, held_out: Tensor | None) -> dict[str, Course]:
    """Train both in turn on the same batches of uint8 pictures [n, 3, S, S], with 16 measurements of held-out ones."""
    measured = training if held_out is None else held_out
    options = run.image_tokenizer_train
    every, first = max(1, options.num_steps // 16), first_quantised_step(options)
    engines = {
        name: VQGANEngine(replace(run, image_tokenizer_train=replace(options, optimizer=name)))  # type: ignore[arg-type]
        for name in (PEER, OURS)
    }
    courses = {name: Course() for name in engines}
    network = load_feature_network(options.perceptual_network)
    source = PixelsInMemory(training, run)
    for step in range(options.num_steps):
        batch = source.batch(step)
        for name, engine in engines.items():
            engine.before_step(step, source)
            start = bench.now()
            engine.train_step(step, batch)
            courses[name].seconds.append(bench.now() - start)
            if step >= first and (step + 1) % every == 0:
                note(courses[name], step + 1, engine, network, measured)
    return courses


@torch.no_grad()
def note(course: Course, step: int, engine: VQGANEngine, network: FeatureNetwork, pictures: Tensor) -> None:
    """Measure uint8 pictures [n, 3, S, S] after a step."""
    quality = measure_reconstruction(engine.model, pictures)
    distances = []
    for part in pictures.split(EVALUATION_BATCH):
        target = part.float() / 127.5 - 1.0
        output = engine.model.decode(engine.model.lookup(engine.model.encode(target)))
        distances.append(perceptual_distance(network, output, target))
    course.note(PIXELS, step, quality.l1)
    course.note(FEATURES, step, float(torch.cat(distances).mean()))
    course.note(PSNR, step, quality.psnr)


def rows(courses: Mapping[str, Course]) -> Iterator[Row]:
    """Steps to the peer's last errors and the last ones, PSNR, and seconds per step."""
    course, peer = courses[OURS], (PEER, courses[PEER])
    for name in (PIXELS, FEATURES):
        yield from rows_of_curve("O2", name, "1", course, peer, "")
    yield Row("O2", "PSNR then", course.curves[PSNR][-1][1], "dB", PEER, courses[PEER].curves[PSNR][-1][1])
    yield row_of_seconds("O2", OURS, course, peer, "")


if __name__ == "__main__":
    sys.exit(main())
