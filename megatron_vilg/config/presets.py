"""Named starting points. A preset is a function without arguments that returns a whole configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_vilg.config.schema import (
    CheckpointConfig,
    DataConfig,
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
    TextTokenizerConfig,
    TrainConfig,
)


def demo() -> RunConfig:
    """Emoji in six styles, 48 px, 8 x 8 tokens: 20 minutes on two CPU cores with AVX2, less with bfloat16 instructions.

    At first a third of what text-to-image draws are shifted copies, which cannot be learnt by heart; fewer and fewer to
    the end, so that trained pictures are known then.
    """
    return RunConfig(
        preset="demo",
        model=ModelConfig(num_layers=3, width=256, num_heads=4, num_text_slots=13, codebook_dim=16),
        text_tokenizer=TextTokenizerConfig(vocab_size=1200),
        image_tokenizer=ImageTokenizerConfig(
            image_size=48,
            patch=3,
            channels=64,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            bottom_attention=False,
            norm_groups=4,
            codebook_size=512,
            codebook_dim=16,
        ),
        image_tokenizer_train=ImageTokenizerTrainConfig(
            num_steps=800,
            batch_size=16,
            optimizer="muon",
            lr=2.5e-3,
            warmup_steps=30,
            continuous_fraction=0.12,
            perceptual_weight=0.5,
            picture_every=400,
            checkpoint_every=300,
        ),
        data=DataConfig(
            num_views=16,
            view_shift_pixels=4.0,
            view_zoom=0.15,
            view_flip=True,
            target_view_probability=0.3,
            target_view_fall=1.0,
            caption_dropout=0.08,
            alternate_caption_probability=0.25,
            image_input_noise=0.5,  # what was drawn so far tells less, so the text decides, for pairs never shown too
            image_source_noise=0.1,
        ),
        # A caption has 4 tokens and a picture 64: the mean over captions is noisy, and at equal weight its noise sets
        # Adam's step size for everything.
        loss=LossConfig(image_to_text_weight=0.35),
        optim=OptimConfig(name="muon", lr=4e-3, betas=(0.9, 0.97), weight_decay=0.2, warmup_steps=60),
        train=TrainConfig(num_steps=700, batch_size=32, eval_every=200, sample_every=300),
        checkpoint=CheckpointConfig(every=250),
        sample=SampleConfig(
            temperature=0.8, top_k=16, guidance=1.4, manner_guidance=1.0, rerank=8, caption_candidates=32
        ),
    )


def demo_full() -> RunConfig:
    """All emoji in eight styles and composed scenes, 48 px; resumable.

    Six hours on two CPU cores with bfloat16 instructions; not timed on a GPU.

    Most of what text-to-image draws at first are shifted copies: they keep a model that sees each picture sixty
    times from learning it by heart, and what it then draws in a style never shown for a thing is right more often.
    """
    quick = demo()
    return replace(
        quick,
        preset="demo-full",
        model=replace(quick.model, num_layers=6, width=320, num_heads=5, num_text_slots=16, dropout=0.05),
        text_tokenizer=TextTokenizerConfig(vocab_size=4800),
        image_tokenizer=replace(quick.image_tokenizer, channels=96, codebook_size=1024),
        image_tokenizer_train=replace(
            quick.image_tokenizer_train,
            num_steps=10_000,
            optimizer="adamw",
            lr=2e-3,
            warmup_steps=100,
            picture_every=2000,
            checkpoint_every=500,
        ),
        data=replace(
            quick.data,
            num_views=10,
            view_flip=False,  # scenes say left and right
            target_view_probability=0.8,
            caption_dropout=0.1,
            alternate_caption_probability=0.35,
            image_source_noise=0.15,
        ),
        optim=replace(quick.optim, name="muon", lr=3e-3, weight_decay=0.1, warmup_steps=300),
        train=replace(quick.train, num_steps=9000, batch_size=96, eval_every=2000, eval_pairs=512, sample_every=2000),
        sample=replace(quick.sample, guidance=1.25, manner_guidance=0.5, rerank=16, caption_candidates=96),
    )


def e2e_300m() -> RunConfig:
    """The 300M generator of the paper's end-to-end ablation (section 5): 24 layers, 1024 wide, 16 heads.

    As it stands it trains on the codes of a frozen VQGAN. The ablation itself has DALL-E's dVAE and a reconstructor:
    ``image_tokenizer.kind=dvae reconstructor.enabled=true``.
    """
    return RunConfig(
        preset="e2e-300m",
        model=ModelConfig(num_layers=24, width=1024, num_heads=16, num_text_slots=61),
        text_tokenizer=TextTokenizerConfig(vocab_size=18_000, character_coverage=0.9995),
        optim=OptimConfig(lr=3e-4, warmup_steps=5000),
        train=TrainConfig(num_steps=250_000, batch_size=512, precision="bf16"),
        parallel=ParallelConfig(recompute="block"),
        log=LogConfig(every=50),
    )


def paper_10b() -> RunConfig:
    """The 10B model (paper section 4.1): 48 layers, 4096 wide, 64 heads, 32 x 32 tokens of a VQGAN with 8192 codes."""
    return RunConfig(
        preset="paper-10b",
        model=ModelConfig(
            num_layers=48,
            width=4096,
            num_heads=64,
            num_text_slots=61,
            image_side=32,
            text_vocab_size=18_000,
            image_vocab_size=8192,
        ),
        text_tokenizer=TextTokenizerConfig(vocab_size=18_000, character_coverage=0.9995),
        loss=LossConfig(z_loss=1e-5),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.96), weight_decay=0.04, warmup_steps=5000),
        # No sample pictures: the first rank would gather the whole model for them, 37 GiB in fp32.
        train=TrainConfig(num_steps=430_000, batch_size=2048, precision="bf16", sample_every=0),
        parallel=ParallelConfig(recompute="block"),
        log=LogConfig(every=50),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "demo-full": demo_full,
    "e2e-300m": e2e_300m,
    "paper-10b": paper_10b,
}
