"""The sizes compared, and models of that size: ours, the plain loop's, and Hugging Face's GPT-2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.plain_loop import PlainModel
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import ModelConfig, OpsConfig, RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.sequence import TextToken

Precision = Literal["fp32", "bf16"]
FIRST_PIECE = max(TextToken) + 1


def demo_size(precision: Precision) -> RunConfig:
    """The transformer of ``make demo`` and one layer more (4 x 256, 8 x 8 codes), 12 pairs a step.

    AdamW, as in the plain loops.
    """
    run = PRESETS["demo"]()
    run = replace(run, model=replace(run.model, num_layers=4)).resolve(text_vocab_size=1200)
    train = replace(run.train, precision=precision, batch_size=12)
    return replace(run, optim=replace(run.optim, name="adamw"), train=train)


def paper_size(precision: Precision) -> RunConfig:
    """The paper's row length (32 x 32 codes, 61 text slots) in 8 layers x 512, one pair a step."""
    run = demo_size(precision)
    model = ModelConfig(
        num_layers=8,
        width=512,
        num_heads=8,
        num_text_slots=61,
        image_side=32,
        text_vocab_size=8000,
        image_vocab_size=8192,
    )
    return replace(run, model=model, ops=OpsConfig(attention="fold"), train=replace(run.train, batch_size=1))


SIZES = {"8x8": demo_size, "32x32": paper_size}


def joint_vocabulary(model: ModelConfig) -> int:
    """Text and image tokens in one table, as the peers have them."""
    return model.text_vocab_size + model.image_vocab_size


def plain_model(model: ModelConfig) -> PlainModel:
    """The plain loop's model of this size."""
    return PlainModel(joint_vocabulary(model), model.spec.num_used + 1, model.width, model.num_heads, model.num_layers)


def gpt2(model: ModelConfig) -> Any:
    """Hugging Face's GPT-2 of this size: no dropout, input and output tables of their own like the others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=joint_vocabulary(model),
        n_positions=model.spec.num_used + 1,
        n_embd=model.width,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.mlp_ratio * model.width,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


def num_parameters(model: nn.Module) -> int:
    """Trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_pairs(model: ModelConfig, count: int, seed: int) -> PairBatch:
    """Pairs whose captions fill every slot, so that no position of a row is padding but the alignment's."""
    generator = torch.Generator().manual_seed(seed)
    codes = model.spec.num_image_tokens
    text = torch.randint(FIRST_PIECE, model.text_vocab_size, (count, 1, model.num_text_slots), generator=generator)
    image = torch.randint(model.image_vocab_size, (count, 1, codes), generator=generator)
    return PairBatch(
        text_ids=text.repeat(1, 2, 1),
        text_len=torch.full((count, 2), model.num_text_slots),
        image_ids=image.repeat(1, 2, 1),
        target_image_ids=image[:, 0],
        sample_ids=torch.arange(count),
    )


def random_rows(model: ModelConfig, rows: int, length: int, seed: int) -> Tensor:
    """Tokens of the joint vocabulary: int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(joint_vocabulary(model), (rows, length), generator=generator)
