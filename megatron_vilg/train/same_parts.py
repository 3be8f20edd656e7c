"""Whether a checkpoint has the parts of the run that is to go on from it, in words of the options that decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vilg.checkpoint.dcp_folder import read_metadata
from megatron_vilg.checkpoint.tensors import part_of
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.train.optim import other_optimizer


@dataclass(frozen=True, slots=True)
class Part:
    """What a run may have beside model and optimizer."""

    word: str
    """First word of the names of its tensors."""
    name: str
    """In the words of a message, with its verb."""
    option: str
    value: object
    """Of the option, in the run that is to go on."""
    is_wanted: bool
    """Whether the run has it then."""
    works: str
    """Values with which it has it if it has not, and the other way round."""


def other_parts_of_run(path: Path, run: RunConfig, state: Mapping[str, Any]) -> str:
    """What is wrong if a checkpoint of a generator has other parts than a run; empty: nothing is.

    Args:
        path: the checkpoint.
        run: resolved configuration.
        state: tensors of the main rank, nested as checkpoints are.

    Raises:
        CheckpointError: the checkpoint's list of tensors is missing or damaged.
    """
    options, with_it = run.reconstructor, run.reconstructor.enabled
    end_to_end = "vilg checkpoint convert --from vilg --to end-to-end, which starts such a run from this one"
    whole = Part(
        word="reconstructor_optimizer",
        name="a reconstructor is",
        option="reconstructor.enabled",
        value=with_it,
        is_wanted=with_it,
        works=f"false, {end_to_end}" if with_it else "true",
    )
    inner = [
        _weighted("critic", "a critic is", "reconstructor.critic_weight", options.critic_weight),
        _weighted("reconstructor_average", "averaged weights are", "reconstructor.ema_decay", options.ema_decay),
    ]
    return (
        _other(path, [whole]) or _other(path, inner if with_it else []) or other_optimizer(path, run.optim.name, state)
    )


def other_parts_of_tokenizer(path: Path, run: RunConfig, state: Mapping[str, Any]) -> str:
    """The same for a checkpoint of an image tokenizer."""
    options, section = run.image_tokenizer_train, "image_tokenizer_train"
    parts = [
        _weighted("critic", "a critic is", f"{section}.critic_weight", options.critic_weight),
        _weighted("average", "averaged weights are", f"{section}.weights_ema_decay", options.weights_ema_decay),
    ]
    return _other(path, parts) or other_optimizer(path, options.optimizer, state, option=f"{section}.optimizer")


def _weighted(word: str, name: str, option: str, value: float) -> Part:
    return Part(word, name, option, value, bool(value), "0" if value else "the value of before")


def _other(path: Path, parts: Sequence[Part]) -> str:
    there = {part_of(name) for name in read_metadata(path)[0]} if parts else set()
    lines = []
    for part in parts:
        if (part.word in there) != part.is_wanted:
            has = "has, and the checkpoint {} has not" if part.is_wanted else "has not, and the checkpoint {} has"
            rule = f"{part.name} what this run {has.format(path)}"
            lines.append(f"{part.option}={part.value}: {rule}. Works: {part.works}, or another --out")
    return "\n".join(lines)
