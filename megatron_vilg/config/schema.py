"""Every option of a run: frozen, typed, with its unit and meaning under the field.

Sizes live here, those of the tokenizers in ``config/tokenizers.py``; numbers that follow from them are properties.
Rules that span two fields are in ``config/check.py``. This module imports no torch, so that ``--help`` and ``plan``
answer at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_vilg.config.fields import STRICT, Count, Fraction, NonNegative, Positive, PositiveInt, Precision
from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.sample import SampleConfig as SampleConfig
from megatron_vilg.config.tokenizers import ImageTokenizerConfig, ImageTokenizerTrainConfig, TextTokenizerConfig
from megatron_vilg.sequence import StreamSpec


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The shared transformer (paper sections 3.1.2 and 4.1)."""

    num_layers: PositiveInt = 4
    """Transformer blocks."""
    width: PositiveInt = 256
    """Hidden size D."""
    num_heads: PositiveInt = 4
    """Attention heads A; must divide ``width``."""
    mlp_ratio: PositiveInt = 4
    """Hidden size of the feed-forward layer, as a multiple of ``width``."""
    num_text_slots: PositiveInt = 16
    """Text tokens per caption L, special tokens not counted. Longer captions are cut, and counted."""
    image_side: Count = 0
    """Image tokens per row; a picture has ``image_side ** 2``. 0: taken from ``image_tokenizer``."""
    text_vocab_size: Count = 0
    """Text tokens, special ones included. 0: taken from the trained text tokenizer."""
    image_vocab_size: Count = 0
    """Image codes. 0: taken from ``image_tokenizer``."""
    pattern: Literal["paper", "full"] = "paper"
    """Who an image token may see: the paper's row, column and convolution layers, or everything."""
    conv_kernel: PositiveInt = 11
    """Side of the convolution window of the last layer (odd)."""
    conv_wrap: bool = True
    """Whether that window wraps around the left and right border, as in DALL-E."""
    image_to_text_row: Literal["same_row", "window"] = "same_row"
    """Row layers of the image source: exactly the same row, or DALL-E's raster window made symmetric."""
    qk_norm: bool = True
    """Normalise queries and keys per head before the scores (Chameleon, section 2.3)."""
    sandwich_norm: bool = False
    """A second norm behind attention and feed-forward, before the residual sum (CogView)."""
    embedding_gradient_shrink: Fraction = 1.0
    """Share of the gradient that reaches the embedding tables (CogView uses 0.1). 1: all of it."""
    segment_embedding: bool = True
    """One learned vector for each of text source, image target, image source, text target."""
    codebook_dim: Count = 0
    """Also feed each image token a projection of its codebook vector of this size. 0: off."""
    dropout: Fraction = 0.0
    """Dropout behind attention and feed-forward, before the residual sum."""
    norm_eps: Positive = 1e-5
    """Added to the variance in every norm."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights; output projections use ``init_std / sqrt(2 * num_layers)``."""

    @property
    def head_dim(self) -> int:
        """H, the size of one attention head."""
        return self.width // self.num_heads

    @property
    def spec(self) -> StreamSpec:
        """The row layout that follows from the sizes."""
        return StreamSpec(num_text_slots=self.num_text_slots, image_side=self.image_side)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OpsConfig:
    """Which implementation executes an operation: results differ by rounding only, which in bf16 is more for some."""

    attention: Literal["auto", "dense", "sdpa", "fold", "flex", "triton"] = "auto"
    """``dense``: written-out scores; ``sdpa``: torch's fused kernel with a mask; ``fold``: blocks of image tokens with
    their own few keys (full layers: ``sdpa``); ``flex``: FlexAttention (CPU: no training); ``triton``: our kernel
    (GPU). ``auto`` picks by size: ``dense`` below 16 x 16 tokens, else ``fold``. In bf16 ``dense`` rounds scores
    before the softmax, where ``sdpa`` and ``fold`` keep fp32: docs/performance.md has the errors."""
    compile: bool = False
    """Let torch's compiler fuse what is around attention in training. The first step then takes up to a minute."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Pairs, their views, and what is randomly changed while training."""

    num_views: Count = 0
    """Shifted and zoomed copies of each picture kept in the token cache beside the picture itself."""
    view_shift_pixels: NonNegative = 3.0
    """Largest shift of such a copy, in pixels."""
    view_zoom: Fraction = 0.1
    """Largest zoom of such a copy, in or out."""
    view_flip: bool = False
    """Whether copies may be mirrored. Off by default: pictures may hold writing."""
    source_view_probability: Fraction = 1.0
    """How often image-to-text sees such a copy instead of the picture itself (if there are any)."""
    target_view_probability: Fraction = 0.0
    """How often text-to-image has such a copy as its target ..."""
    target_view_fall: Fraction = 0.0
    """... falling to never over this share of ``train.num_steps``. 0: it stays."""
    caption_dropout: Fraction = 0.1
    """How often text-to-image sees an empty caption (classifier-free guidance)."""
    alternate_caption_probability: Fraction = 0.0
    """How often text-to-image sees another wording of the caption, where a record brings some."""
    image_input_noise: Fraction = 0.0
    """Share of text-to-image *input* codes replaced at random; what is predicted stays clean. On small sets 0.3 to
    0.5 keep the model from following pictures that it knows by heart, whatever the text says."""
    image_source_noise: Fraction = 0.0
    """Share of image-to-text source codes replaced at random."""
    max_bad_share: Fraction = 0.01
    """Share of unreadable records above which reading stops; a few are always forgiven unless it is 0."""
    val_share: Fraction = 0.02
    """Share of pairs held out, by the hash of their key, where a source does not name its splits."""
    shard_size: PositiveInt = 2048
    """Pairs per shard of a token cache."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """The two-direction loss (paper equations 3 to 5)."""

    text_to_image_weight: NonNegative = 1.0
    """Weight of the image tokens' cross-entropy."""
    image_to_text_weight: NonNegative = 1.0
    """Weight of the text tokens' cross-entropy."""
    normalisation: Literal["direction_mean", "token_sum"] = "direction_mean"
    """Mean per direction, or one sum over all predicted tokens as equations 3 to 5 are written."""
    z_loss: NonNegative = 0.0
    """Weight of ``log(Z) ** 2`` of both heads (PaLM 1e-4, Chameleon 1e-5)."""
    label_smoothing: Fraction = 0.0
    """Probability spread evenly over all tokens of the head's vocabulary."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReconstructorConfig:
    """The reconstructor that is trained end to end with the generator (paper sections 3.1.3 and 5)."""

    enabled: bool = False
    """Train a decoder on the generator's hidden states, together with it."""
    weight: NonNegative = 1.0
    """Weight of the reconstruction loss beside the generation loss; both are means (paper: equal weights)."""
    state: Literal["input", "prediction"] = "input"
    """Which hidden state belongs to image token k: the one whose input it is, or the one that predicts it."""
    detach: bool = False
    """Keep the reconstruction loss from reaching the generator."""
    decoder_start: Literal["tokenizer", "scratch"] = "tokenizer"
    """Where the decoder starts: from the image tokenizer's, or at random weights."""
    mapping_width: Count = 0
    """Hidden size of the mapping from states to vectors. 0: ``model.width``."""
    loss: Literal["auto", "l1", "logit_laplace"] = "auto"
    """Pixel loss. ``auto``: the tokenizer's own, logit-Laplace for a dVAE and absolute error for a VQGAN."""
    edge_weight: NonNegative = 0.0
    """Weight of the mean absolute error of neighbouring pixels' differences."""
    perceptual_weight: NonNegative = 0.0
    """Weight of the distance in the features of ``image_tokenizer_train.perceptual_network``."""
    warmup_steps: Count = 0
    """First steps in which only the mapping learns, to hit the codebook rows, and the generator stands still. For a
    generator that is already trained."""
    lr_share: Positive = 1.0
    """Learning rate of mapping and decoder, as a share of ``optim.lr`` and its schedule."""
    grad_clip: Positive = 1.0
    """Largest gradient norm of mapping and decoder; the generator has ``optim.grad_clip``."""
    ema_decay: Fraction = 0.0
    """Decay per step of averaged weights, which are what is exported. 0: off."""
    critic_weight: NonNegative = 0.0
    """Weight of the PatchGAN critic; 0: no critic."""
    critic_adaptive_weight: bool = True
    """Scale the critic by the ratio of gradient norms at the decoder's last layer (VQGAN equation 7)."""
    critic_start_step: Count = 20_000
    """The critic never starts before this step ..."""
    critic_gate: Positive = 0.1
    """... nor before the moving average of the pixel error (0 to 1) is below this."""
    critic_lr: Positive = 1e-4
    """Learning rate of the critic."""
    critic_channels: PositiveInt = 64
    """Channels of the critic's first layer."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon", "adamw_8bit", "adamw_4bit", "apex_fused_adam"] = "adamw"
    """``adamw``: torch's, fused. ``muon``: for the matrices of the blocks; AdamW for the rest, at equal rates.
    ``adamw_8bit``, ``adamw_4bit``: torchao's, with quantised moments. ``apex_fused_adam``: NVIDIA's, built from
    source."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's two decays."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.05
    """Decay of matrices; vectors (norms, biases) are not decayed."""
    grad_clip: Positive = 1.0
    """Largest gradient norm over all parameters."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up."""
    warmup_steps: Count = 1000
    """Steps of linear warm-up."""
    min_lr_share: Fraction = 0.02
    """Floor of the cosine, as a share of ``lr``."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How ranks share the work."""

    tensor: PositiveInt = 1
    """Ranks that share one layer; between layers each holds a part of every row's positions."""
    pipeline: PositiveInt = 1
    """Ranks in the pipeline."""
    stages_per_rank: PositiveInt = 1
    """Pieces of the model on each rank of the pipeline; more than 1 needs ``schedule=interleaved``."""
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """Order of forward and backward passes in a pipeline. ``interleaved``: shorter idle times, more messages."""
    replica: PositiveInt = 1
    """Copies of the sharded weights (HSDP)."""
    shard: int = -1
    """Ranks that share weights, gradients and optimizer state. -1: all that is left."""
    zero: Literal[1, 2, 3] = 3
    """What each rank keeps whole between micro-batches: 1 weights and gradients, 2 weights, 3 nothing."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed over data ranks in; ``bf16`` halves those messages, and rounds what they carry."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer state in main memory, and update there."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed: where optimizer state lives and the update runs; ``nvme`` needs ``zero=3``."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed: where shards of weights wait until they are used; needs ``zero=3``."""
    offload_folder: str = ""
    """DeepSpeed: folder on a fast local disk for what is offloaded to ``nvme``."""
    num_microbatches: PositiveInt = 1
    """Pieces each rank's batch is cut into; gradients are accumulated over them."""
    recompute: Literal["none", "block", "selective"] = "none"
    """What is computed again in the backward pass instead of kept: ``block``: all but each block's input;
    ``selective``: only scores and softmax of each layer, the part whose memory grows fastest."""
    timeout_seconds: PositiveInt = 600
    """How long a process waits for another one in a collective before the job fails."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The training loop."""

    engine: Literal["native", "deepspeed"] = "native"
    """Who executes a step: this package with torch alone, or DeepSpeed (data parallelism only)."""
    deepspeed_config: str = ""
    """JSON file with further settings for DeepSpeed; keys that options of ours decide are refused. Empty: none."""
    num_steps: PositiveInt = 100_000
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Pairs per step over all ranks; each gives one row of either direction."""
    precision: Precision = "auto"
    """Arithmetic of matrix products; weights, optimizer and loss stay fp32. ``auto``: bf16 where the hardware has
    instructions for it, which many CPUs do not; a run keeps what it began with."""
    seed: int = 0
    """Initial weights, order, noise."""
    max_skipped_in_row: PositiveInt = 20
    """Non-finite steps in a row after which the run stops, or goes back with ``rollback_factor``."""
    rollback_factor: NonNegative = 0.0
    """Cross-entropies above this multiple of their running mean take the run back to a checkpoint from before, and past
    the pairs in between. 0: never."""
    rollback_patience: PositiveInt = 3
    """Log lines in a row that must be so high."""
    max_rollbacks: PositiveInt = 3
    """After so many the run stops instead."""
    eval_every: Count = 1000
    """Steps between measurements on held-out pairs. 0: never."""
    eval_pairs: PositiveInt = 128
    """Pairs per such measurement."""
    sample_every: Count = 1000
    """Steps between sample pictures and captions. 0: never."""
    num_threads: Count = 0
    """CPU threads of torch. 0: torch decides."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; with ``train.rollback_factor`` also one from before the losses rose."""
    keep_every: Count = 0
    """Checkpoints at multiples of this step count are kept for good. 0: none."""
    async_save: bool = False
    """Copy weights to main memory, go on training, and write the files meanwhile."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """What the run writes while it works."""

    every: PositiveInt = 20
    """Steps between log lines."""
    tensorboard: bool = True
    """Whether scalars and sample pictures go to ``tensorboard/`` too."""
    instruments_every: Count = 0
    """Steps between looks at attention logits, log Z and gradients per loss term. 0: never."""
    peak_tflops: NonNegative = 0.0
    """Peak of one device in TFLOP/s (dense bf16: 989 for an H100 or H200), for the metric ``mfu(%)``. 0: without it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything that defines a run; ``vilg config`` prints it with these texts."""

    preset: str = ""
    """Name of the preset the values started from; only a record."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The shared transformer."""
    ops: OpsConfig = dataclasses.field(default_factory=OpsConfig)
    """Implementations of operations."""
    text_tokenizer: TextTokenizerConfig = dataclasses.field(default_factory=TextTokenizerConfig)
    """Text tokenizer."""
    image_tokenizer: ImageTokenizerConfig = dataclasses.field(default_factory=ImageTokenizerConfig)
    """Image tokenizer."""
    image_tokenizer_train: ImageTokenizerTrainConfig = dataclasses.field(default_factory=ImageTokenizerTrainConfig)
    """Training of the image tokenizer."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Data."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Loss."""
    reconstructor: ReconstructorConfig = dataclasses.field(default_factory=ReconstructorConfig)
    """End-to-end reconstructor."""
    reranker: RerankerConfig = dataclasses.field(default_factory=RerankerConfig)
    """Contrastive reranker."""
    restyler: RestylerConfig = dataclasses.field(default_factory=RestylerConfig)
    """Draws things in manners that they were never shown in."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimizer."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """Parallel layout."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Training loop."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Logging."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    """Sampling."""

    def resolve(self, *, text_vocab_size: int | None = None) -> RunConfig:
        """Fill the zeros of ``model`` that other sections determine, and note the text tokenizer's true size.

        Args:
            text_vocab_size: size of the trained text tokenizer; without it a zero stays zero.
        """
        model = dataclasses.replace(
            self.model,
            image_side=self.model.image_side or self.image_tokenizer.grid_side,
            image_vocab_size=self.model.image_vocab_size or self.image_tokenizer.codebook_size,
            text_vocab_size=self.model.text_vocab_size or text_vocab_size or 0,
        )
        text = dataclasses.replace(self.text_tokenizer, vocab_size=text_vocab_size or self.text_tokenizer.vocab_size)
        return dataclasses.replace(self, model=model, text_tokenizer=text)
