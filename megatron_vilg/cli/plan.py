"""``vilg plan``: what a layout costs each GPU, whether it fits, and which layouts would."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_vilg.cli.options import add_config_options, load_from_args
from megatron_vilg.cli.outputs import require_json_place, write_json
from megatron_vilg.config.check import check
from megatron_vilg.config.limits import MAX_PROCESSES
from megatron_vilg.config.schema import ParallelConfig, RunConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.parallel.estimate import AXES, KINDS, Estimate, estimate
from megatron_vilg.parallel.proposal import (
    GIB,
    PEAKS,
    Hardware,
    StepTime,
    fits,
    hindrances,
    nearest_layout,
    offloads,
    propose,
    step_time,
)

EXIT_DOES_NOT_FIT = 1
LEFT_OUT = "left out: moving what is offloaded, and updating it there"


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="say what a layout costs",
        description="Say what a layout costs each GPU: parameters, memory by kind, bytes sent per step and axis, idle "
        "time, FLOPs, and a step's time at given peaks. Impossible layouts are refused, with the nearest that works. "
        "Exit code 1 if the layout does not fit the memory.",
        epilog="example: vilg plan --preset paper-10b --world-size 256 parallel.tensor=2; "
        "vilg plan --preset paper-10b --world-size 32 --propose",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="GPUs (default: the product of the layout)")
    parser.add_argument("--propose", action="store_true", help="list the fastest layouts that fit, by estimate")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to a file as well")
    given = parser.add_argument_group("hardware that times and fits are computed from")
    hardware = Hardware()
    given.add_argument("--gpu-memory", type=float, default=hardware.memory, metavar="GIB", help="per GPU")
    peaks = " or ".join(f"{peak:g} in {precision}" for precision, peak in PEAKS.items())
    given.add_argument("--peak-tflops", type=float, metavar="T", help=f"dense, in the run's precision (H100: {peaks})")
    given.add_argument(
        "--efficiency", type=float, default=hardware.efficiency, help="share of the peak that is reached"
    )
    given.add_argument("--gpus-per-node", type=int, default=hardware.gpus_per_node, metavar="N")
    given.add_argument("--node-bandwidth", type=float, default=hardware.node_bandwidth, metavar="GB/s", help="per GPU")
    given.add_argument(
        "--network-bandwidth", type=float, default=hardware.network_bandwidth, metavar="GB/s", help="per GPU"
    )
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if the layout, or with ``--propose`` every layout, is too large."""
    config = load_from_args(args).run
    # Presets leave the size of the text vocabulary to its tokenizer; a plan takes the size that was asked for.
    config = config.resolve(text_vocab_size=config.model.text_vocab_size or config.text_tokenizer.vocab_size)
    if config.train.precision == "auto":  # which it is on the GPUs that a plan is made for
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    parallel = config.parallel
    fixed = parallel.tensor * parallel.pipeline * parallel.replica
    world_size = fixed * max(1, parallel.shard) if args.world_size is None else args.world_size
    hardware = _hardware(args, config, world_size)
    require_json_place(args.json)
    if args.propose:
        found = propose(config, world_size, hardware)
        if not found and (problems := hindrances(config, world_size, hardware)):
            raise ConfigError(problems)
        _print_proposals(config, world_size, hardware, found)
        proposals = [_as_json(each, cost, hardware, config.parallel) for each, cost in found]
        write_json(args.json, {"proposals": proposals})
        return 0 if found else EXIT_DOES_NOT_FIT
    _refuse_impossible(config, world_size)
    cost = estimate(config, world_size)
    _print_plan(config, cost, hardware)
    write_json(args.json, _as_json(config, cost, hardware))
    return 0 if fits(cost, hardware) else EXIT_DOES_NOT_FIT


def _hardware(args: argparse.Namespace, config: RunConfig, world_size: int) -> Hardware:
    """The hardware that was described; refused unless every figure can be computed with."""
    peak = PEAKS[config.train.precision] if args.peak_tflops is None else args.peak_tflops
    figures = {
        "--gpu-memory": args.gpu_memory,
        "--peak-tflops": peak,
        "--efficiency": args.efficiency,
        "--gpus-per-node": args.gpus_per_node,
        "--node-bandwidth": args.node_bandwidth,
        "--network-bandwidth": args.network_bandwidth,
    }
    problems = [
        f"{name}={value}: is no quantity. Works: a finite number above 0."
        for name, value in figures.items()
        if not 0 < value < math.inf
    ]
    if 1 < args.efficiency < math.inf:
        problems.append(f"--efficiency={args.efficiency}: is a share of the peak. Works: above 0, up to 1.")
    if not 0 < world_size <= MAX_PROCESSES:
        name = "tensor x pipeline x replica x shard" if args.world_size is None else "--world-size"
        problems.append(f"{name}={world_size}: is no number of GPUs. Works: 1 to {MAX_PROCESSES}.")
    if problems:
        raise ConfigError(problems)
    return Hardware(
        memory=args.gpu_memory,
        peak=peak,
        efficiency=args.efficiency,
        gpus_per_node=args.gpus_per_node,
        node_bandwidth=args.node_bandwidth,
        network_bandwidth=args.network_bandwidth,
    )


def _refuse_impossible(config: RunConfig, world_size: int) -> None:
    problems = check(config, world_size)
    if not problems:
        return
    near = nearest_layout(config, world_size)
    if near is not None:
        words = layout_words(near, config.parallel)
        problems.append(f"the nearest layout of {world_size} processes that works: {words}")
    raise ConfigError(problems)


def layout_words(parallel: ParallelConfig, asked: ParallelConfig | None = None) -> str:
    """The options that give a layout, to be pasted behind a command, which asked for ``asked``."""
    names = ["tensor", "pipeline", "replica", "shard", "zero", "num_microbatches", "recompute"]
    usual = [parallel if asked is None else asked, ParallelConfig()]
    for name in ("schedule", "stages_per_rank", "cpu_offload", "offload_optimizer", "offload_weights"):
        if any(getattr(parallel, name) != getattr(other, name) for other in usual):
            names.append(name)
    return " ".join(f"parallel.{name}={str(getattr(parallel, name)).lower()}" for name in names)


def _print_plan(config: RunConfig, cost: Estimate, hardware: Hardware) -> None:
    layout, rank, time = cost.layout, cost.fullest, step_time(cost, hardware)
    pairs = layout.pairs_each(config.train.batch_size)
    model = f"{cost.parameters / 1e9:.3f} B parameters, {cost.stack_parameters / 1e9:.3f} B of them in blocks"
    if cost.reconstructor_parameters:
        model += f", {cost.reconstructor_parameters / 1e9:.3f} B in the reconstructor, on the last stage"
    _line("model", model)
    _line(
        "layout",
        f"{layout.world_size} GPUs = tensor {layout.tensor} x pipeline {layout.pipeline} x replica {layout.replica} x "
        f"shard {layout.shard}; ZeRO {config.parallel.zero}, {layout.num_microbatches} micro-batches of {pairs} pairs, "
        f"recompute {config.parallel.recompute}, {config.train.precision}",
    )
    _line("parameters", f"{rank.parameters / 1e6:.1f} M kept on the fullest rank")
    _line("memory", "  ".join(f"{kind} {rank.memory[kind] / GIB:.2f}" for kind in KINDS) + "  GiB, largest of each")
    for place, moved in (("main memory", rank.host), ("disk", rank.disk)):
        if moved:
            _line(place, "  ".join(f"{kind} {size / GIB:.2f}" for kind, size in moved.items()) + "  GiB")
    verdict = "fits" if fits(cost, hardware) else "DOES NOT FIT"
    _line(
        "peak",
        f"{rank.peak / GIB:.2f} GiB at the fullest moment; {verdict} {hardware.memory:g} GiB "
        f"({hardware.memory_share:.0%} of it may be filled)",
    )
    if cost.drawn:
        _line(
            "samples",
            f"{cost.drawn / GIB:.2f} GiB: the whole model, on the first GPU every {config.train.sample_every} steps; "
            "part of its peak (never: train.sample_every=0)",
        )
    sent = cost.busiest
    _line("sent", "  ".join(f"{axis} {sent[axis] / 1e9:.2f}" for axis in AXES) + "  GB per rank and step")
    _line("bubble", f"{cost.bubble:.1%} of a step waits in the pipeline")
    _line(
        "FLOPs",
        f"{cost.flops_kept:.3e} per step with kept attention only, {cost.flops_dense:.3e} with dense attention, "
        f"{cost.flops_executed:.3e} executed",
    )
    _line("step", _time_words(config, time))
    if config.train.engine != "native":
        _line("engine", f"the native engine's figures; {config.train.engine} has buffers of its own beside them")
    _line(
        "computed with",
        f"{hardware.peak:g} TFLOP/s x {hardware.efficiency:g}, {hardware.node_bandwidth:g} GB/s inside a node of "
        f"{hardware.gpus_per_node}, {hardware.network_bandwidth:g} GB/s between nodes; not measured",
    )


def _time_words(config: RunConfig, time: StepTime) -> str:
    pairs = config.train.batch_size / time.step
    days = config.train.num_steps * time.step / 86_400
    update = f" + update {time.update:.2f}" if config.optim.name == "muon" else ""
    return (
        f"{time.step:.2f} s = compute {time.compute:.2f} + idle {time.idle:.2f} + tensor {time.tensor:.2f} + "
        f"data {time.data:.2f}{update}; {pairs:.0f} pairs/s, MFU {time.mfu:.1%}, {days:.1f} days for "
        f"{config.train.num_steps} steps{f'; {LEFT_OUT}' if offloads(config) else ''}"
    )


def _print_proposals(
    config: RunConfig, world_size: int, hardware: Hardware, found: list[tuple[RunConfig, Estimate]]
) -> None:
    title = f"{world_size} GPUs of {hardware.memory:g} GiB, {config.train.batch_size} pairs a step"
    if not found:
        offload = "" if offloads(config) or config.optim.name == "muon" else ", or parallel.cpu_offload=true"
        print(f"{title}: no layout fits. Works: more GPUs or memory{offload}")
        return
    offload = f"; those with offloading last ({LEFT_OUT})" if offloads(config) else ""
    print(f"{title}; fastest first, by estimate{offload}:")
    for each, cost in found:
        time = step_time(cost, hardware)
        print(f"{time.step:8.2f} s  {cost.fullest.peak / GIB:6.1f} GiB  {layout_words(each.parallel, config.parallel)}")


def _line(name: str, text: str) -> None:
    print(f"{name:<14} {text}")


def _as_json(
    config: RunConfig, cost: Estimate, hardware: Hardware, asked: ParallelConfig | None = None
) -> dict[str, Any]:
    time = step_time(cost, hardware)
    return {
        "layout": dataclasses.asdict(cost.layout) | {"world_size": cost.layout.world_size},
        "options": layout_words(config.parallel, asked),
        "parameters": cost.parameters,
        "stack_parameters": cost.stack_parameters,
        "reconstructor_parameters": cost.reconstructor_parameters,
        "ranks": [dataclasses.asdict(rank) for rank in cost.ranks],
        "peak_bytes": cost.fullest.peak,
        "samples_bytes": cost.drawn,
        "fits": fits(cost, hardware),
        "sent_bytes": cost.busiest,
        "bubble": cost.bubble,
        "flops": {"kept": cost.flops_kept, "dense": cost.flops_dense, "executed": cost.flops_executed}
        | {"update": cost.flops_update},
        "seconds": dataclasses.asdict(time) | {"step": time.step},
        "seconds_leave_out_offload": offloads(config),
        "hardware": dataclasses.asdict(hardware),
    }
