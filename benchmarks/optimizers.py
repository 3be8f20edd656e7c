"""Optimizers on the same batches, in turn: python benchmarks/optimizers.py --run runs/demo [--steps 400] [--json F]

Takes configuration, token cache and image tokenizer of a run folder of ``vilg train``, starts one model per optimizer
from the same weights, and gives each the same batch before any gets the next. Held-out pairs are measured as training
goes on, so that the question is answered which matters: after how many pairs is the other's last cross-entropy reached?
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

from benchmarks.courses import Course, row_of_seconds, rows_of_curve, show
from benchmarks.measure import Bench, Row
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.config.check import require
from megatron_vilg.config.load import RUN_FILE, load_run_config
from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import ConfigError, VilgError
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.pretrain import held_out_loaders, loader_of
from megatron_vilg.train.stages import IMAGE_TOKENIZER, TOKENS

PEER = "adamw"
DIRECTIONS = ("text_to_image", "image_to_text")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all contenders and print rows; 2 if the run folder or an option does not fit."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    torch.set_num_threads(1)
    bench = Bench(torch.device("cpu"))
    try:
        courses = compare(bench, options.run, options.names.split(","), options.steps, options.split, options.settings)
    except VilgError as error:
        print(f"benchmarks/optimizers.py: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "benchmarks/optimizers.py", *words])
    show(bench, command, list(rows(courses)), courses, options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="run folder with tokens/")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each optimizer; default 400")
    parser.add_argument("--names", default="muon", metavar="A,B", help=f"beside {PEER}; default muon")
    parser.add_argument("--split", default="val-pairs", metavar="S", help="held-out split; default val-pairs")
    parser.add_argument("--json", type=Path, metavar="F", help="also write rows and curves")
    parser.add_argument("settings", nargs="*", metavar="section.option=value", help="for all contenders")
    return parser


def compare(
    bench: Bench, folder: Path, names: Sequence[str], steps: int, split: str, settings: Sequence[str] = ()
) -> dict[str, Course]:
    """Train one model per optimizer, the peer first, in turn on the same batches; 16 measurements of held-out pairs.

    Raises:
        ConfigError: options that do not work, no such split; DataError: no token cache.
    """
    every = max(1, steps // 16)
    shared = [f"train.num_steps={steps}", f"train.eval_every={every}", *settings]
    file = folder / RUN_FILE
    contenders = {}
    for name in (PEER, *names):
        contender = load_run_config(file=file, overrides=[*shared, f"optim.name={name}"])
        contenders[name] = replace(contender, parallel=ParallelConfig())  # whatever the run was: one process here
        require(contenders[name])
    run = contenders[PEER]
    cache = TokenCache.open(folder / TOKENS)
    held_out = held_out_loaders(run, cache, None)
    if split not in held_out:
        works = ", ".join(held_out) or "a run folder whose pairs have a held-out split"
        raise ConfigError([f"--split={split}: no such held-out split in {folder / TOKENS}. Works: {works}"])
    codebook = load_image_tokenizer(folder / IMAGE_TOKENIZER).codebook if run.model.codebook_dim else None
    engines = {name: NativeEngine(contender, "cpu", codebook) for name, contender in contenders.items()}
    courses = {name: Course() for name in contenders}
    measured = held_out[split].clean_batch(list(range(min(run.train.eval_pairs, len(held_out[split])))))
    loader = loader_of(run, cache, "train")
    for step in range(1, steps + 1):
        batch = loader.batch(step - 1)
        for name, engine in engines.items():
            start = bench.now()
            engine.train_step(batch)
            courses[name].seconds.append(bench.now() - start)
            if step % every == 0:
                result = engine.eval_step(measured)
                for direction, value in zip(DIRECTIONS, (result.image_ce, result.text_ce), strict=True):
                    courses[name].note(direction, step, float(value))
    return courses


def rows(courses: Mapping[str, Course]) -> Iterator[Row]:
    """Per contender: steps to the peer's last cross-entropy and the last ones, both directions; seconds per step."""
    peer = (PEER, courses[PEER])
    for name, course in courses.items():
        if name == PEER:
            continue
        for direction in DIRECTIONS:
            yield from rows_of_curve("O1", direction, "nats/token", course, peer, f"{name}: ")
        yield row_of_seconds("O1", name, course, peer, f"{name}: ")


if __name__ == "__main__":
    sys.exit(main())
