"""Largest sizes that an option may ask for: more are slips of the keyboard, and would be computed with for hours."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig

MAX_PROCESSES = 2**20
"""Processes of a job, along any axis and in all."""
_MODEL = {
    "num_layers": 4096,
    "width": 2**20,
    "num_heads": 2**20,
    "mlp_ratio": 1024,
    "image_side": 1024,
}
_PARALLEL = ("tensor", "pipeline", "stages_per_rank", "replica", "shard", "num_microbatches")
_IMAGE_TOKENIZER = {"image_size": 2**16, "patch": 1024, "channels": 2**16, "norm_groups": 2**16, "codebook_dim": 2**16}
_RERANKER = {"width": 2**16, "text_layers": 1024, "num_heads": 2**16, "renderings": 1024}
_RESTYLER = {
    "num_layers": 1024,
    "width": 2**16,
    "num_heads": 2**16,
    "num_references": 1024,
}
MAX_LEVELS = 16
"""Halvings of a picture; 2 to the power of them are the pixels of a token's side."""


def over_limits(run: RunConfig, world_size: int | None = None) -> list[str]:
    """One problem for each size of a resolved configuration, or number of processes, that is beyond reason."""
    problems = list(_over("model", run.model, _MODEL))
    problems += _over("parallel", run.parallel, dict.fromkeys(_PARALLEL, MAX_PROCESSES))
    problems += tokenizer_over_limits(run.image_tokenizer)
    problems += reranker_over_limits(run.reranker)
    problems += restyler_over_limits(run.restyler)
    if world_size is not None and world_size > MAX_PROCESSES:
        problems.append(f"{world_size} processes: are more than a job can have. Works: 1 to {MAX_PROCESSES}.")
    return problems


def tokenizer_over_limits(tokenizer: ImageTokenizerConfig) -> list[str]:
    """The same for the sizes of an image tokenizer."""
    problems = list(_over("image_tokenizer", tokenizer, _IMAGE_TOKENIZER))
    path, multipliers = "image_tokenizer.channel_multipliers", tokenizer.channel_multipliers
    if len(multipliers) > MAX_LEVELS:
        problems.append(f"{path}: has {len(multipliers)} levels. Works: 1 to {MAX_LEVELS}.")
    elif max(multipliers, default=1) > 1024:
        problems.append(f"{path}={list(multipliers)}: is more than a model can have. Works: 1 to 1024 each.")
    return problems


def reranker_over_limits(config: RerankerConfig) -> list[str]:
    """The same for the sizes of a reranker."""
    return list(_over("reranker", config, _RERANKER))


def restyler_over_limits(config: RestylerConfig) -> list[str]:
    """The same for the sizes of a restyler."""
    return list(_over("restyler", config, _RESTYLER))


def _over(section: str, config: object, limits: dict[str, int]) -> Iterator[str]:
    for name, most in limits.items():
        if (value := getattr(config, name)) > most:
            yield f"{section}.{name}={value}: is more than a model or a job can have. Works: at most {most}."
