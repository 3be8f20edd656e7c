"""Options of the tokenizers: SentencePiece, VQGAN or dVAE, and how the image tokenizer is trained."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_vilg.config.fields import STRICT, Count, Coverage, Fraction, NonNegative, Positive, PositiveInt, Precision


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextTokenizerConfig:
    """SentencePiece over the captions."""

    vocab_size: PositiveInt = 8000
    """Pieces wanted, special tokens and 256 byte pieces included; small corpora may give fewer."""
    character_coverage: Coverage = 1.0
    """Share of characters that get a piece of their own; the rest is written as bytes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageTokenizerConfig:
    """Architecture of the image tokenizer (VQGAN: taming-transformers, with LlamaGen's l2-normalised codes).

    A dVAE reads neither ``bottom_attention``, ``attention_levels``, ``latent_channels``, ``norm_groups``,
    ``l2_normalise``, ``codebook_update`` nor ``commitment_weight``.
    """

    kind: Literal["vqgan", "dvae"] = "vqgan"
    """``vqgan``, or ``dvae``: DALL-E's discrete VAE, the tokenizer of the paper's end-to-end ablation."""
    image_size: PositiveInt = 256
    """Side of the square picture in pixels."""
    patch: PositiveInt = 1
    """Pixels folded into channels before the first convolution (pixel unshuffle); 1: none."""
    channels: PositiveInt = 128
    """Channels of the first level."""
    channel_multipliers: tuple[PositiveInt, ...] = (1, 1, 2, 4)
    """Channels of each level as multiples of ``channels``; between two levels the picture is halved."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per level; a VQGAN's decoder has one more, as in taming-transformers."""
    bottom_attention: bool = True
    """Self-attention at the lowest resolution."""
    attention_levels: tuple[Count, ...] = ()
    """Levels, counted from 0, with self-attention behind each residual block too (``attn_resolutions`` of
    taming-transformers)."""
    latent_channels: Count = 0
    """Channels between the networks and 1x1 convolutions to and from the codes (``z_channels`` of
    taming-transformers). 0: the encoder ends in one 1x1 convolution, the decoder begins with one of 3x3."""
    norm_groups: PositiveInt = 32
    """Groups of each GroupNorm; must divide every level's channels. On CPU 16 or more channels a group are fast."""
    codebook_size: PositiveInt = 8192
    """Codes K."""
    codebook_dim: PositiveInt = 16
    """Numbers per code; 8 to 32 keep a VQGAN's codebook alive (ViT-VQGAN table 4, LlamaGen); DALL-E's dVAE has 128."""
    l2_normalise: bool = True
    """Compare directions only: codes and encoder outputs have length 1."""
    code_choice: Literal["nearest", "logits"] = "nearest"
    """Which code a vector becomes: the nearest, or the likeliest of a linear classifier (Gumbel models of
    taming-transformers, which can be imported, not trained here)."""
    codebook_update: Literal["ema", "gradient"] = "ema"
    """How codes follow the encoder: moving averages, or the codebook loss of VQ-VAE."""
    ema_decay: Fraction = 0.97
    """Decay of those moving averages, per step."""
    squeeze_input: bool = False
    """dVAE: the encoder sees pixels mapped to [0.1, 0.9], as DALL-E's published weights expect."""
    commitment_weight: NonNegative = 0.25
    """Weight of the loss that keeps encoder outputs near their code."""
    dead_code_threshold: NonNegative = 0.05
    """A code used less often than this per step (moving average) is replaced: in a VQGAN by an encoder output, in a
    dVAE by a copy of a busy code. 0: none is. Evenly used codes are used batch_size x tokens of a picture /
    codebook_size times a step; that should be about five times the threshold (a warning says where it is less)."""

    @property
    def downsample(self) -> int:
        """Pixels per token along one side."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid_side(self) -> int:
        """Tokens along one side of a picture."""
        return self.image_size // self.downsample


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageTokenizerTrainConfig:
    """Training of the image tokenizer (stage one)."""

    num_steps: PositiveInt = 100_000
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Pictures per step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: for the kernels between the first and the last convolution of encoder and decoder (of a dVAE's decoder
    all but the last: its first is the codebook), AdamW for the rest. The critic has AdamW."""
    lr: Positive = 1e-4
    """Peak learning rate of encoder, decoder and codebook."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Adam's two decays."""
    weight_decay: NonNegative = 1e-4
    """AdamW's weight decay."""
    warmup_steps: Count = 500
    """Steps of linear warm-up; then a cosine down to 2 % of the peak."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""
    precision: Precision = "auto"
    """Arithmetic of the convolutions; weights stay fp32. ``auto``: as for ``train.precision``."""
    continuous_fraction: Fraction = 0.1
    """First share of the steps without quantisation; k-means on encoder outputs then sets the codebook, once: a run
    that goes on with more steps keeps it."""
    frozen_codebook_fraction: Fraction = 0.15
    """Last share of the steps with a frozen codebook, so that the decoder settles."""
    weights_ema_decay: Fraction = 0.0
    """Decay per step of averaged weights, which are then what is measured and kept (DALL-E 0.999). 0: off."""
    temperature_start: Positive = 1.0
    """dVAE: temperature of the Gumbel-softmax at the start ..."""
    temperature_end: Positive = 0.0625
    """... and at the end of its cosine ..."""
    temperature_fraction: Fraction = 0.5
    """... which takes this share of the steps (DALL-E: 150,000 of 3,000,000), and never goes back where a run goes on
    with more steps."""
    kl_weight: NonNegative = 6.6
    """dVAE: weight of the divergence of the codes from a uniform choice, summed over tokens and divided by the number
    of pixel values, as DALL-E has it."""
    kl_warmup_fraction: Fraction = 0.05
    """Share of the steps over which that weight rises from 0 (DALL-E: 5,000 steps)."""
    pixel_weight: NonNegative = 1.0
    """Weight of the mean absolute pixel error; in a dVAE, of the logit-Laplace likelihood."""
    edge_weight: NonNegative = 0.5
    """Weight of the mean absolute error of neighbouring pixels' differences."""
    perceptual_weight: NonNegative = 1.0
    """Weight of the distance in the features of ``perceptual_network``."""
    perceptual_network: str = "efficientnet-lite0"
    """``efficientnet-lite0``, ``efficientnet-lite2`` (packages with weights), or the path of a weights file."""
    perceptual_share: Fraction = 0.5
    """Share of each batch on which the perceptual distance is computed."""
    critic_weight: NonNegative = 0.0
    """Weight of the PatchGAN critic; 0: no critic."""
    critic_adaptive_weight: bool = True
    """Scale the critic by the ratio of gradient norms at the last layer (VQGAN equation 7)."""
    critic_start_step: Count = 20_000
    """The critic never starts before this step ..."""
    critic_gate: Positive = 0.1
    """... nor before the moving average of the pixel error is below this."""
    critic_lr: Positive = 1e-4
    """Learning rate of the critic."""
    critic_channels: PositiveInt = 64
    """Channels of the critic's first layer."""
    augment_share: Fraction = 0.75
    """Share of each batch that is shifted and zoomed."""
    log_every: PositiveInt = 50
    """Steps between log lines."""
    picture_every: PositiveInt = 1000
    """Steps between pictures of reconstructions in tensorboard."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints."""
    seed: int = 0
    """Initial weights, order, augmentation."""
