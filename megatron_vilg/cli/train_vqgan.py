"""``vilg train-vqgan``: train the image tokenizer of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.main import EXIT_STOPPED
from megatron_vilg.cli.options import add_config_options, run_config_from_args
from megatron_vilg.cli.outputs import full_disk_explained, require_run_folder, require_writable
from megatron_vilg.config.world import read_world
from megatron_vilg.log import get_logger

_log = get_logger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the options."""
    parser = subparsers.add_parser(
        "train-vqgan",
        help="train the image tokenizer",
        description="Train the image tokenizer on pictures. Again with the same --out: goes on where it stopped. "
        "Processes of torchrun or srun share each batch.",
        epilog="example: vilg train-vqgan --preset demo --data data/emoji --out runs/demo "
        "image_tokenizer_train.num_steps=700",
    )
    add_config_options(parser)
    parser.add_argument("--data", metavar="D", required=True, help="folder, .jsonl file or tar shards with pairs")
    parser.add_argument(
        "--out", metavar="RUN", type=Path, required=True, help="run folder; RUN/image_tokenizer is written"
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; the exit code is 0 only when the tokenizer is complete."""
    config = run_config_from_args(args)
    require_writable(args.out, f"--out={args.out}")
    require_run_folder(args.out)
    from megatron_vilg.checkpoint.claim import claimed
    from megatron_vilg.data.pixels import read_train_and_held_out
    from megatron_vilg.parallel.launch import device_of, joined
    from megatron_vilg.parallel.replicas import Replicas
    from megatron_vilg.train.host_memory import keep_freed_memory
    from megatron_vilg.train.precision import settle_precision
    from megatron_vilg.train.vqgan import require_trainable, train_image_tokenizer

    world = read_world()
    require_trainable(config, world.size)
    device = device_of(world, chosen_device(args.device))
    size = config.image_tokenizer.image_size
    train, held_out = read_train_and_held_out(
        args.data, size, max_bad_share=config.data.max_bad_share, val_share=config.data.val_share
    )
    num_held_out = 0 if held_out is None else len(held_out)
    _log.info("%d training pictures, %d held out, %d px", len(train), num_held_out, size)
    if device.type == "cpu":
        keep_freed_memory()
    with (
        joined(world, device, config.parallel.timeout_seconds),
        full_disk_explained(args.out),
        claimed(args.out, replicas := Replicas.of_group()) as claim,
    ):
        config = settle_precision(config, device, args.out)
        quality = train_image_tokenizer(
            config,
            train,
            held_out,
            args.out / "image_tokenizer",
            device=device,
            replicas=replicas,
            require_ours=claim.require,
        )
    return 0 if quality is not None else EXIT_STOPPED
