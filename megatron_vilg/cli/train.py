"""``vilg train``: from pairs (or a token cache) to a model one can generate from; again with the same run: resumes."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg import log
from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.main import EXIT_STOPPED
from megatron_vilg.cli.options import add_config_options, run_config_from_args
from megatron_vilg.cli.outputs import full_disk_explained, require_run_folder
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import ConfigError

if TYPE_CHECKING:
    from megatron_vilg.train.signals import StopRaises

_log = log.get_logger(__name__)


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train the generator in both directions",
        description="Train in both directions at once. Tokenizers and token cache are made inside the run folder where "
        "they are missing. The same command again goes on from the newest checkpoint.",
        epilog="example: vilg train --preset demo --data data/demo --out runs/demo optim.lr=1e-3",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="D", help="folder, .jsonl or tar shards of pairs")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--text-tokenizer", type=Path, metavar="FOLDER", help="use this one instead of training one")
    parser.add_argument("--image-tokenizer", type=Path, metavar="FOLDER", help="use this one instead of training one")
    add_device_option(parser)
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare what is missing, then train; 0 when the run is complete, 75 when a signal stopped it."""
    from megatron_vilg.train.signals import StopRaises, ends_at_once

    with ends_at_once(EXIT_STOPPED):
        config = run_config_from_args(args, is_joint=True)
        require_run_folder(args.out)
    world = read_world()
    with ExitStack() as open_files:
        try:
            open_files.enter_context(log.also_to_file(args.out / "logs" / f"rank-{world.rank:04d}.log"))
        except OSError as error:
            raise ConfigError([f"--out={args.out}: cannot be written ({error}); name another folder"]) from error
        with StopRaises(is_alone=world.size == 1) as stop:
            return 0 if _train(args, config, world, stop) else EXIT_STOPPED
        _log.warning("stopped by %s between two steps of work; the same command goes on", stop.name)
        return EXIT_STOPPED


def _train(args: argparse.Namespace, config: RunConfig, world: World, stop: StopRaises) -> bool:
    """Whether the run is complete; False: stopped, and saved."""
    from megatron_vilg.checkpoint.claim import claimed
    from megatron_vilg.cli.samples import SamplePictures
    from megatron_vilg.ops.attention import choose_implementation
    from megatron_vilg.parallel.launch import device_of, joined, place
    from megatron_vilg.parallel.mesh import build_mesh
    from megatron_vilg.parallel.replicas import Replicas
    from megatron_vilg.train.host_memory import keep_freed_memory
    from megatron_vilg.train.pretrain import pretrain
    from megatron_vilg.train.stages import prepare, timed

    _log.info("rank %d of %d: %s", world.rank, world.size, place())
    device = device_of(world, chosen_device(args.device))
    choose_implementation(config.ops.attention, config.model.image_side, device, training=True)  # or refuse it now
    if device.type == "cpu":
        keep_freed_memory()
    with (
        stop.anywhere(),
        joined(world, device, config.parallel.timeout_seconds) as job,
        full_disk_explained(args.out),
        claimed(args.out, Replicas.of_group()) as claim,
    ):
        ready = prepare(
            config,
            args.data,
            args.out,
            text_tokenizer=args.text_tokenizer,
            image_tokenizer=args.image_tokenizer,
            device=device,
            job=job,
            require_ours=claim.require,
        )
        if ready is None:
            return False
        with timed(args.out, "train") if world.is_main else nullcontext():
            return pretrain(
                ready.run,
                ready.cache,
                args.out,
                codebook=ready.image_tokenizer.codebook,
                image_tokenizer=ready.image_tokenizer,
                pixels=ready.pixels,
                mesh=build_mesh(ready.run.parallel, device, job),
                on_sample=SamplePictures(ready, args.out),
                claim=claim,
            )
