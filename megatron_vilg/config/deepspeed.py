"""DeepSpeed's JSON configuration: written from ours, extended by a user's file, which may not contradict it.

Source of names and meanings: deepspeed.ai/docs/config-json, and ``deepspeed/runtime/config.py`` of version 0.19.8.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError

Place = Literal["none", "cpu", "nvme"]

OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size / (processes x parallel.num_microbatches)",
    "gradient_accumulation_steps": "parallel.num_microbatches",
    "gradient_clipping": "optim.grad_clip",
    "bf16.enabled": "train.precision",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.offload_folder",
    "zero_optimization.offload_param.device": "parallel.offload_weights",
    "zero_optimization.offload_param.nvme_path": "parallel.offload_folder",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.name",
}
"""Keys that our configuration decides, and the option that does."""

DECIDED = {
    "optimizer": "optim.name, optim.lr, optim.betas, optim.eps and optim.weight_decay",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "parallel.recompute",
    "checkpoint": "checkpoint.every; checkpoints are canonical, not DeepSpeed's own",
    "tensor_parallel": "parallel.tensor=1",
    "pipeline": "parallel.pipeline=1",
    "sequence_parallel_size": "parallel.tensor=1",
    "managed_gradient_accumulation": "parallel.num_microbatches",
    "gradient_predivide_factor": "the mean over data ranks",
    "gradient_allreduce_op": "the mean over data ranks",
    "prescale_gradients": "the mean over data ranks",
    "elasticity": "train.batch_size",
    "autotuning": "train.batch_size and parallel.num_microbatches",
    "data_efficiency": "the order of pairs, which is a function of train.seed",
    "curriculum_learning": "the order of pairs, which is a function of train.seed",
    "zero_optimization.zenflow": "optim.name",
    "zero_optimization.offload_optimizer.super_offload": "optim.name",
    "zero_optimization.offload_optimizer.ratio": "parallel.offload_optimizer, which is all or nothing",
    "zero_optimization.compute_grad_norm": "optim.grad_clip",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload_weights",
    "bf16.bf16_master_weights_and_grads": "fp32 main weights",
    "bf16.bf16_optimizer_states": "fp32 main weights",
    "bf16.check_grad_overflow": "skipping steps that are not finite",
}
"""Keys that have no value of ours beside them, because something else here does their work."""

EXTENSIONS = frozenset(
    {
        "aio", "bf16", "comms_logger", "communication_data_type", "csv_monitor", "data_types", "disable_allgather",
        "disable_python_gc", "dump_state", "flops_profiler", "log_level", "memory_breakdown",
        "steps_per_print", "timers", "wall_clock_breakdown", "zero_optimization",
    }
)  # fmt: skip
"""Top-level keys that a user's file may hold; inside them everything that ``OURS`` and ``DECIDED`` do not name."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where optimizer state and weights are kept."""

    optimizer: Place
    weights: Place


def offload_of(run: RunConfig) -> Offload:
    """Places that the options name; ``parallel.cpu_offload`` means main memory for all that the ZeRO stage can move."""
    parallel = run.parallel
    optimizer, weights = parallel.offload_optimizer, parallel.offload_weights
    if parallel.cpu_offload:
        optimizer = "cpu" if optimizer == "none" else optimizer
        weights = "cpu" if weights == "none" and parallel.zero == 3 else weights
    return Offload(optimizer, weights)


def deepspeed_config(run: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration that DeepSpeed is started with, user's file included.

    Args:
        run: resolved configuration that ``check`` has passed for ``world_size``.
        world_size: processes.

    Raises:
        ConfigError: the user's file cannot be read, holds unknown keys, or contradicts ours; all of it at once.
    """
    result = _defaults(run)
    if run.train.deepspeed_config:
        extension, problems = read_extension(run, world_size)
        if problems:
            raise ConfigError(problems)
        _merge(result, extension)
    _merge(result, generated(run, world_size))
    return result


def generated(run: RunConfig, world_size: int) -> dict[str, Any]:
    """What our options say in DeepSpeed's words; a user's file may not say anything else."""
    pieces = world_size * run.parallel.num_microbatches
    offload = offload_of(run)
    zero: dict[str, Any] = {"stage": run.parallel.zero}
    for key, place in (("offload_optimizer", offload.optimizer), ("offload_param", offload.weights)):
        if place != "none":
            zero[key] = {"device": place}
            if place == "nvme":
                zero[key]["nvme_path"] = run.parallel.offload_folder
    return {
        "train_batch_size": run.train.batch_size,
        "train_micro_batch_size_per_gpu": run.train.batch_size // pieces,
        "gradient_accumulation_steps": run.parallel.num_microbatches,
        "gradient_clipping": run.optim.grad_clip,
        # Before the hardware has settled it, no file can say the same.
        "bf16": {"enabled": "auto" if run.train.precision == "auto" else run.train.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
    }


def _defaults(run: RunConfig) -> dict[str, Any]:
    """Where we start from something else than DeepSpeed does; a user's file may change these."""
    result: dict[str, Any] = {
        "steps_per_print": None,
        # Off, because switching it on replaces torch.nn.functional.linear in the whole process.
        "zero_optimization": {"memory_efficient_linear": False},
    }
    if run.train.precision == "bf16":
        result["communication_data_type"] = "fp32"
        if run.parallel.zero >= 2:  # at stage 1 this would choose another optimizer class, without the check for NaN
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def read_extension(run: RunConfig, world_size: int) -> tuple[dict[str, Any], list[str]]:
    """The user's file, and everything in it that cannot be followed."""
    path = Path(run.train.deepspeed_config)
    option = f"train.deepspeed_config={path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        return {}, [f"{option}: cannot be read ({error.strerror}). Works: a JSON file with DeepSpeed's keys."]
    except ValueError as error:
        return {}, [f"{option}: is not JSON ({error}). Works: a JSON file with DeepSpeed's keys."]
    if not isinstance(content, dict):
        return {}, [f"{option}: holds no object. Works: a JSON file with DeepSpeed's keys."]
    ours = dict(_leaves(generated(run, world_size)))
    return content, [problem for key, value in _leaves(content) for problem in _contradictions(path, key, value, ours)]


def _contradictions(path: Path, key: str, value: Any, ours: Mapping[str, Any]) -> Iterator[str]:
    if key in OURS:
        if ours.get(key) != value:
            here = json.dumps(ours[key]) if key in ours else "nothing"
            yield (
                f"{path}: {key} is {json.dumps(value)} there, and {here} here by {OURS[key]}. "
                f"Works: one of them; leave {key} out of the file."
            )
        return
    for prefix in _prefixes(key):
        if prefix in DECIDED:
            yield (
                f"{path}: {key} is {json.dumps(value)} there, but here that is decided by {DECIDED[prefix]}. "
                f"Works: leave {prefix} out of the file."
            )
            return
    top = key.partition(".")[0]
    if top not in EXTENSIONS:
        near = difflib.get_close_matches(top, [*EXTENSIONS, *(k.partition(".")[0] for k in (*OURS, *DECIDED))], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        works = ", ".join(sorted(EXTENSIONS))
        yield f"{path}: {top} is no key that can be passed on to DeepSpeed.{hint} Works: {works}."


def _prefixes(key: str) -> Iterator[str]:
    words = key.split(".")
    for count in range(1, len(words) + 1):
        yield ".".join(words[:count])


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an empty object is a leaf."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Put ``extra`` over ``base``, object by object."""
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} occurs twice in one object")
    return result
