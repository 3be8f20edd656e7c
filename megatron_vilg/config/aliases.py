"""Flags that people type by habit, translated to ``section.option=value``. An alias never adds an option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

ALIASES = {
    "--tensor-model-parallel-size": "parallel.tensor",
    "--tp": "parallel.tensor",
    "--pipeline-model-parallel-size": "parallel.pipeline",
    "--pp": "parallel.pipeline",
    "--gradient-accumulation-steps": "parallel.num_microbatches",
    "--num-layers": "model.num_layers",
    "--hidden-size": "model.width",
    "--num-attention-heads": "model.num_heads",
    "--global-batch-size": "train.batch_size",
    "--train-iters": "train.num_steps",
    "--max-steps": "train.num_steps",
    "--seed": "train.seed",
    "--lr": "optim.lr",
    "--learning-rate": "optim.lr",
    "--weight-decay": "optim.weight_decay",
    "--clip-grad": "optim.grad_clip",
    "--warmup-steps": "optim.warmup_steps",
    "--lr-warmup-iters": "optim.warmup_steps",
    "--save-interval": "checkpoint.every",
    "--log-interval": "log.every",
}
"""At most twenty, from Megatron-LM and Hugging Face, each with the same meaning there and here."""

_SETTING = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+=")


def split_settings(arguments: Sequence[str], aliases: Mapping[str, str] = ALIASES) -> tuple[list[str], list[str]]:
    """Separate flags and their values from ``section.option=value``, with aliases translated to the latter.

    Only a word that looks like ``name.name=...`` is a setting, whatever stands before it.
    """
    rest: list[str] = []
    settings: list[str] = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        flag, equals, value = word.partition("=")
        has_value_behind = index + 1 < len(arguments) and not arguments[index + 1].startswith("--")
        if flag in aliases and (equals or has_value_behind):
            if not equals:
                index += 1
                value = arguments[index]
            settings.append(f"{aliases[flag]}={value}")
        else:
            (settings if _SETTING.match(word) else rest).append(word)
        index += 1
    return rest, settings
