"""Models and batches small enough for unit tests."""

from __future__ import annotations

import torch

from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import Implementation
from megatron_vilg.parallel.init import init_weights


def tiny_config(**changes: object) -> ModelConfig:
    """Two heads of 8, a 4 x 4 grid, 5 text slots."""
    values: dict[str, object] = {
        "num_layers": 4,
        "width": 16,
        "num_heads": 2,
        "num_text_slots": 5,
        "image_side": 4,
        "text_vocab_size": 23,
        "image_vocab_size": 11,
        "conv_kernel": 3,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def tiny_model(config: ModelConfig | None = None, implementation: Implementation = "dense", std: float = 0.3) -> ViLG:
    """A model whose outputs differ clearly from position to position (weights larger than for training)."""
    config = config or tiny_config()
    model = ViLG(config, implementation)
    init_weights(model, seed=1, std=std, num_layers=config.num_layers)
    return model


def tiny_batch(config: ModelConfig, num_pairs: int = 4, seed: int = 0) -> PairBatch:
    """Random pairs; text lengths from 0 (an empty caption) to all slots."""
    generator = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    slots, codes = config.num_text_slots, config.spec.num_image_tokens
    text_len = ids(slots + 1, num_pairs, 2)
    text_len[:, 1].clamp_(min=1)
    text_ids = ids(config.text_vocab_size, num_pairs, 2, slots, low=6)
    text_ids = torch.where(torch.arange(slots) < text_len[..., None], text_ids, 0)
    return PairBatch(
        text_ids=text_ids,
        text_len=text_len,
        image_ids=ids(config.image_vocab_size, num_pairs, 2, codes),
        target_image_ids=ids(config.image_vocab_size, num_pairs, codes),
        sample_ids=torch.arange(num_pairs),
    )


def tiny_run(model: ModelConfig | None = None, **train: object) -> RunConfig:
    """A run of the tiny model in fp32, on codes of a tokenizer of four pixels a code."""
    values: dict[str, object] = {"num_steps": 8, "batch_size": 4, "precision": "fp32"}
    model = model or tiny_config()
    return RunConfig(
        model=model,
        image_tokenizer=ImageTokenizerConfig(
            image_size=4 * model.image_side,
            channel_multipliers=(1, 1, 1),
            codebook_size=model.image_vocab_size,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        train=TrainConfig(**(values | train)),  # type: ignore[arg-type]
    )
