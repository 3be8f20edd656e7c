"""Options that decide which tensors a checkpoint holds: where they differ, one line says it for hundreds of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vilg.checkpoint.dcp_folder import read_metadata
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.train.optim import other_optimizer

_TAKE_APART = "`vilg checkpoint convert --from end-to-end --to vilg`, which takes it apart"
_JOIN = "`vilg checkpoint convert --from vilg --to end-to-end`, which makes another --out of it"


def other_state(path: Path, run: RunConfig, state: Mapping[str, Any]) -> str:
    """What is wrong if a checkpoint of pre-training was saved with other parts than a run asks for; empty: nothing is.

    Args:
        path: the checkpoint.
        run: resolved configuration.
        state: the run's tensors, nested as checkpoints are; those of this rank will do.

    Raises:
        CheckpointError: the checkpoint's list of tensors is missing or damaged.
    """
    if problem := other_optimizer(path, run.optim.name, state):
        return problem
    shapes = {name: tuple(info.shape) for name, info in read_metadata(path)[0].items()}
    return "\n".join(_other_reconstructor(path, run, shapes))


def _other_reconstructor(path: Path, run: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Options of the reconstructor, its averages and its critic that the names and shapes of a checkpoint deny."""
    options, parts = run.reconstructor, {name.partition(".")[0] for name in shapes}
    has = "reconstructor_optimizer" in parts
    if has != options.enabled:
        works = f"{str(has).lower()}, or {_TAKE_APART if has else _JOIN}"
        yield f"reconstructor.enabled={options.enabled}: {path} has {'one' if has else 'none'}. Works: {works}"
    if not (has and options.enabled):
        return
    for name, part, noun in (
        ("ema_decay", "reconstructor_average", "averaged weights"),
        ("critic_weight", "critic", "weights of a critic"),
    ):
        if (part in parts) != bool(value := getattr(options, name)):
            works = "a number above 0" if part in parts else "0"
            found = "has" if part in parts else "has no"
            yield f"reconstructor.{name}={value:g}: {path} {found} {noun}. Works: {works}, or another --out"
    for name, tensor, value in (
        ("mapping_width", "model.reconstructor.mapping.up.weight", options.mapping_width or run.model.width),
        ("critic_channels", "critic.layers.0.weight", options.critic_channels if options.critic_weight else None),
    ):
        if tensor in shapes and value not in (None, shapes[tensor][0]):
            size = shapes[tensor][0]
            yield f"reconstructor.{name}={value}: {path} has {size}. Works: {size}, or another --out"
