"""Rules that span options. Every broken rule is reported, before anything starts.

A problem reads ``section.option=value: rule. Works: values that do.``
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_vilg.config.check_engine import check_engine
from megatron_vilg.config.limits import over_limits, reranker_over_limits, restyler_over_limits, tokenizer_over_limits
from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.sequence import TextToken

MAX_VOCABULARY = 65_535
"""Token caches hold ids as unsigned 16-bit numbers."""
CRITIC_PIXELS = 24
"""Smallest side that three halvings and two 4 x 4 convolutions of the critic leave something of."""
MAX_BATCH = 2**20
"""Pairs or pictures of one step. More are a slip of the keyboard, which would end in a full memory."""
TRITON_HEAD_SIZES = (16, 32, 64, 128, 256)
"""What our Triton kernel has tiles for."""
NUM_BYTE_PIECES = 256
"""Pieces that SentencePiece's byte fallback always takes."""


def check(run: RunConfig, world_size: int | None = 1) -> list[str]:
    """All broken rules of a configuration for ``world_size`` processes; empty when it can run.

    With None it is not asked whether the layout fits any number of processes. Sizes beyond reason are reported alone,
    because what follows from them would take hours.
    """
    # Twice: resolving computes with the sizes that were asked for, and derives others from them.
    if problems := over_limits(run, world_size):
        return problems
    run = run.resolve()
    if problems := over_limits(run, world_size):
        return problems
    return [
        *_check_model(run),
        *_check_text(run),
        *_check_image_tokenizer(run.image_tokenizer),
        *_check_image_tokenizer_training(run),
        *_check_training(run),
        *_check_reconstructor(run),
        *check_reranker(run.reranker),
        *check_restyler(run.restyler),
        *_check_layout(run, world_size),
        *check_engine(run, world_size),
    ]


def require(run: RunConfig, world_size: int | None = 1) -> None:
    """Raise ``ConfigError`` with all broken rules, if there are any."""
    if problems := check(run, world_size):
        raise ConfigError(problems)


def _check_model(run: RunConfig) -> Iterable[str]:
    model, tokenizer = run.model, run.image_tokenizer
    if model.width % 2:
        step = 2 * model.num_heads
        below = model.width // step * step
        rule = f"must be a multiple of 2 x model.num_heads={model.num_heads}: heads have an even size"
        yield _problem("model.width", model.width, rule, [size for size in (below, below + step) if size])
    elif model.width % model.num_heads or model.head_dim % 2:
        heads = [n for n in _divisors(model.width) if model.width // n % 2 == 0]
        rule = f"must divide model.width={model.width} into heads of even size"
        yield _problem("model.num_heads", model.num_heads, rule, heads)
    elif run.ops.attention == "triton" and model.head_dim not in TRITON_HEAD_SIZES:
        rule = f"makes heads of {model.head_dim}; ops.attention=triton takes {_listed(TRITON_HEAD_SIZES)}"
        heads = [model.width // size for size in TRITON_HEAD_SIZES if model.width % size == 0]
        yield _problem("model.num_heads", model.num_heads, rule, heads or "ops.attention=fold")
    if model.image_side != tokenizer.grid_side:
        rule = (
            f"differs from the image tokenizer's grid (image_tokenizer.image_size={tokenizer.image_size} "
            f"/ {tokenizer.downsample} pixels per token)"
        )
        yield _problem("model.image_side", model.image_side, rule, [0, tokenizer.grid_side])
    if model.image_vocab_size != tokenizer.codebook_size:
        rule = f"differs from image_tokenizer.codebook_size={tokenizer.codebook_size}"
        yield _problem("model.image_vocab_size", model.image_vocab_size, rule, [0, tokenizer.codebook_size])
    largest = 2 * model.image_side - 1
    if model.pattern == "paper" and (model.conv_kernel % 2 == 0 or model.conv_kernel > largest):
        rule = f"must be odd and at most {largest}, which reaches all of a {model.image_side} x {model.image_side} grid"
        yield _problem("model.conv_kernel", model.conv_kernel, rule, range(1, largest + 1, 2))
    if model.codebook_dim not in (0, tokenizer.codebook_dim):
        rule = f"differs from image_tokenizer.codebook_dim={tokenizer.codebook_dim}"
        yield _problem("model.codebook_dim", model.codebook_dim, rule, [0, tokenizer.codebook_dim])
    yield from _below_one("model.dropout", model.dropout)


def _check_text(run: RunConfig) -> Iterable[str]:
    wanted = run.text_tokenizer.vocab_size
    smallest = len(TextToken) + NUM_BYTE_PIECES + 1
    if not smallest <= wanted <= MAX_VOCABULARY:
        rule = f"must leave room for {len(TextToken)} special tokens and {NUM_BYTE_PIECES} bytes, and ids for 16 bits"
        yield _problem("text_tokenizer.vocab_size", wanted, rule, f"{smallest} to {MAX_VOCABULARY}")
    declared = run.model.text_vocab_size
    if declared and declared < wanted:
        rule = f"is below text_tokenizer.vocab_size={wanted}: some ids would have no embedding"
        yield _problem("model.text_vocab_size", declared, rule, f"0 or {wanted} and more")
    if declared > MAX_VOCABULARY:
        rule = "ids are kept in 16 bits"
        yield _problem("model.text_vocab_size", declared, rule, f"0, or at most {MAX_VOCABULARY}")
    if run.model.num_text_slots > MAX_VOCABULARY:
        rule = "lengths are kept in 16 bits"
        yield _problem("model.num_text_slots", run.model.num_text_slots, rule, f"at most {MAX_VOCABULARY}")


def check_image_tokenizer(tokenizer: ImageTokenizerConfig) -> list[str]:
    """All broken rules of an image tokenizer's architecture."""
    return tokenizer_over_limits(tokenizer) or list(_check_image_tokenizer(tokenizer))


def _check_image_tokenizer(tokenizer: ImageTokenizerConfig) -> Iterable[str]:
    if tokenizer.image_size % tokenizer.downsample:
        below = tokenizer.image_size // tokenizer.downsample * tokenizer.downsample
        near = [size for size in (below, below + tokenizer.downsample) if size]
        rule = f"must be a multiple of {tokenizer.downsample}, the pixels per token of patch and channel_multipliers"
        yield _problem("image_tokenizer.image_size", tokenizer.image_size, rule, near)
    multipliers = tokenizer.channel_multipliers
    # With channels between networks and codes the first convolution has a width of its own, as in taming-transformers.
    first = {tokenizer.channels} if tokenizer.latent_channels else set()
    widths = sorted(first | {tokenizer.channels * m for m in multipliers})
    if not multipliers:
        yield _problem("image_tokenizer.channel_multipliers", [], "there must be a level", "1,2, or any whole numbers")
        return
    if tokenizer.kind == "vqgan" and any(width % tokenizer.norm_groups for width in widths):
        rule = f"must divide the channels of every level, {widths}"
        yield _problem("image_tokenizer.norm_groups", tokenizer.norm_groups, rule, _divisors(math.gcd(*widths)))
    levels = len(multipliers)
    if max(tokenizer.attention_levels, default=0) >= levels:
        rule = f"there are {levels} levels, as many as image_tokenizer.channel_multipliers"
        yield _problem(
            "image_tokenizer.attention_levels", list(tokenizer.attention_levels), rule, f"some of 0 to {levels - 1}"
        )
    if tokenizer.codebook_size > MAX_VOCABULARY:
        rule = "ids are kept in 16 bits"
        yield _problem("image_tokenizer.codebook_size", tokenizer.codebook_size, rule, f"at most {MAX_VOCABULARY}")
    yield from _below_one("image_tokenizer.ema_decay", tokenizer.ema_decay)


def _check_image_tokenizer_training(run: RunConfig) -> Iterable[str]:
    training = run.image_tokenizer_train
    section = "image_tokenizer_train"
    yield from _batch(f"{section}.batch_size", training.batch_size)
    if training.warmup_steps >= training.num_steps:
        rule = f"must be below {section}.num_steps={training.num_steps}"
        yield _problem(f"{section}.warmup_steps", training.warmup_steps, rule, f"0 to {training.num_steps - 1}")
    if training.continuous_fraction + training.frozen_codebook_fraction >= 1:
        rule = (
            f"with {section}.frozen_codebook_fraction={training.frozen_codebook_fraction} "
            "no step is left in which the codebook learns"
        )
        works = "two fractions with a sum below 1, such as 0.1 and 0.15"
        yield _problem(f"{section}.continuous_fraction", training.continuous_fraction, rule, works)
    if training.critic_weight and training.critic_start_step >= training.num_steps:
        rule = f"the critic would never start within {section}.num_steps={training.num_steps}"
        works = f"0 to {training.num_steps - 1}, or {section}.critic_weight=0"
        yield _problem(f"{section}.critic_start_step", training.critic_start_step, rule, works)
    if training.critic_weight and run.image_tokenizer.kind == "dvae":
        rule = "a dVAE is trained by its likelihood, without a critic (image_tokenizer.kind=dvae)"
        yield _problem(f"{section}.critic_weight", training.critic_weight, rule, "0, or image_tokenizer.kind=vqgan")
    if training.critic_weight and run.image_tokenizer.image_size < CRITIC_PIXELS:
        rule = f"the critic needs pictures of at least {CRITIC_PIXELS} pixels (image_tokenizer.image_size)"
        yield _problem(f"{section}.critic_weight", training.critic_weight, rule, [0])
    if training.perceptual_weight and not round(training.perceptual_share * training.batch_size):
        rule = f"is not one picture of {section}.batch_size={training.batch_size}"
        works = f"{1 / training.batch_size:.3g} to 1, or {section}.perceptual_weight=0"
        yield _problem(f"{section}.perceptual_share", training.perceptual_share, rule, works)
    yield from _decays(f"{section}.betas", training.betas)
    yield from _below_one(f"{section}.weights_ema_decay", training.weights_ema_decay)


def _check_training(run: RunConfig) -> Iterable[str]:
    if run.optim.warmup_steps >= run.train.num_steps:
        rule = f"must be below train.num_steps={run.train.num_steps}"
        yield _problem("optim.warmup_steps", run.optim.warmup_steps, rule, f"0 to {run.train.num_steps - 1}")
    yield from _batch("train.batch_size", run.train.batch_size)
    yield from _decays("optim.betas", run.optim.betas)
    yield from _below_one("loss.label_smoothing", run.loss.label_smoothing)
    if not run.loss.text_to_image_weight and not run.loss.image_to_text_weight:
        rule = "with loss.image_to_text_weight=0 too there is nothing to learn"
        yield _problem("loss.text_to_image_weight", 0.0, rule, "a number above 0 in one of the two")
    if run.data.target_view_probability and not run.data.num_views:
        rule = "there are no such copies with data.num_views=0"
        yield _problem("data.target_view_probability", run.data.target_view_probability, rule, "0, or more views")
    if run.data.target_view_fall and not run.data.target_view_probability:
        rule = "there is nothing to fall from with data.target_view_probability=0"
        yield _problem("data.target_view_fall", run.data.target_view_fall, rule, "0, or a probability above 0")
    if 0 < run.train.rollback_factor <= 1:
        rule = "losses at their own mean would already be above it"
        yield _problem("train.rollback_factor", run.train.rollback_factor, rule, "0 (off), or above 1, such as 1.5")
    if not run.sample.top_p:
        yield _problem("sample.top_p", run.sample.top_p, "would keep no token at all", "above 0, up to 1")


def _check_reconstructor(run: RunConfig) -> Iterable[str]:
    options, section = run.reconstructor, "reconstructor"
    if not options.enabled:
        return
    if run.train.engine != "native":
        rule = "trains the generator alone, without a reconstructor (reconstructor.enabled=true)"
        yield f"train.engine={run.train.engine}: {rule}. Works: native."
    if run.data.target_view_probability:
        rule = "a reconstructor learns the pictures themselves, not shifted copies (reconstructor.enabled=true)"
        works = "0, with data.target_view_fall=0" if run.data.target_view_fall else "0"
        yield _problem("data.target_view_probability", run.data.target_view_probability, rule, works)
    if options.loss == "logit_laplace" and run.image_tokenizer.kind != "dvae":
        rule = "needs the decoder of a dVAE, which says how sure it is (image_tokenizer.kind=vqgan)"
        yield _problem(f"{section}.loss", options.loss, rule, "auto, l1")
    if options.warmup_steps >= run.train.num_steps:
        rule = f"must be below train.num_steps={run.train.num_steps}"
        yield _problem(f"{section}.warmup_steps", options.warmup_steps, rule, f"0 to {run.train.num_steps - 1}")
    if options.critic_weight and options.critic_start_step >= run.train.num_steps:
        rule = f"the critic would never start within train.num_steps={run.train.num_steps}"
        works = f"0 to {run.train.num_steps - 1}, or {section}.critic_weight=0"
        yield _problem(f"{section}.critic_start_step", options.critic_start_step, rule, works)
    if options.critic_weight and run.image_tokenizer.image_size < CRITIC_PIXELS:
        rule = f"the critic needs pictures of at least {CRITIC_PIXELS} pixels (image_tokenizer.image_size)"
        yield _problem(f"{section}.critic_weight", options.critic_weight, rule, [0])
    yield from _below_one(f"{section}.ema_decay", options.ema_decay)


def _check_layout(run: RunConfig, world_size: int | None) -> Iterable[str]:
    yield from _check_tensor(run)
    yield from _check_pipeline(run)
    if world_size is None:
        return
    yield from _check_grid(run, world_size)


def _check_tensor(run: RunConfig) -> Iterable[str]:
    parallel, model = run.parallel, run.model
    sizes = {
        "model.num_heads": model.num_heads,
        "the row length": model.spec.length,
        "model.image_vocab_size": model.image_vocab_size,
        "model.text_vocab_size": model.text_vocab_size,
    }
    if broken := {name: size for name, size in sizes.items() if size % parallel.tensor}:
        works = [n for n in _divisors(model.num_heads) if all(size % n == 0 for size in sizes.values())]
        rule = "must divide " + " and ".join(f"{name}={size}" for name, size in broken.items())
        listed = _listed(works)
        if "model.text_vocab_size" in broken:  # what a small corpus yields is not what was asked for
            below = model.text_vocab_size // parallel.tensor * parallel.tensor
            listed += f", or in a new run folder text_tokenizer.vocab_size={below}"
        yield _problem("parallel.tensor", parallel.tensor, rule, listed)
    if parallel.tensor > 1 and model.dropout:
        rule = f"with parallel.tensor={parallel.tensor} ranks would drop different values of what they share"
        yield _problem("model.dropout", model.dropout, rule, "0, or parallel.tensor=1")
    if parallel.tensor > 1 and run.ops.compile:
        rule = f"blocks cut over parallel.tensor={parallel.tensor} exchange data inside what would be compiled"
        yield _problem("ops.compile", True, rule, "false, or parallel.tensor=1")


def _check_pipeline(run: RunConfig) -> Iterable[str]:
    parallel, layers = run.parallel, run.model.num_layers
    if parallel.pipeline > layers:
        rule = f"must not exceed model.num_layers={layers}"
        yield _problem("parallel.pipeline", parallel.pipeline, rule, f"1 to {layers}")
        return
    most = layers // parallel.pipeline
    if parallel.schedule == "interleaved":
        if parallel.pipeline == 1:
            yield _problem("parallel.schedule", parallel.schedule, "needs parallel.pipeline of 2 and more", "1f1b")
        elif parallel.stages_per_rank == 1 or parallel.stages_per_rank > most:
            rule = f"schedule=interleaved needs 2 and more, in all at most model.num_layers={layers}"
            works = f"2 to {most}" if most >= 2 else "parallel.schedule=1f1b and 1"
            yield _problem("parallel.stages_per_rank", parallel.stages_per_rank, rule, works)
        if parallel.num_microbatches % parallel.pipeline:
            rule = f"schedule=interleaved goes in rounds of parallel.pipeline={parallel.pipeline}"
            above = -(-parallel.num_microbatches // parallel.pipeline) * parallel.pipeline
            yield _problem("parallel.num_microbatches", parallel.num_microbatches, rule, [above, 2 * above])
        return
    if parallel.num_microbatches < parallel.pipeline:
        rule = f"every rank of parallel.pipeline={parallel.pipeline} needs one to work on"
        works = f"{parallel.pipeline} and more, better {4 * parallel.pipeline}"
        yield _problem("parallel.num_microbatches", parallel.num_microbatches, rule, works)
    if parallel.stages_per_rank > 1:
        rule = "only schedule=interleaved has more than one stage on a rank"
        yield _problem("parallel.stages_per_rank", parallel.stages_per_rank, rule, [1])


def _check_grid(run: RunConfig, world_size: int) -> Iterable[str]:
    parallel = run.parallel
    if parallel.shard < -1 or parallel.shard == 0:
        yield _problem(
            "parallel.shard", parallel.shard, "is no number of ranks", "-1 (all that is left), or 1 and more"
        )
        return
    fixed = parallel.tensor * parallel.pipeline * parallel.replica
    shard = parallel.shard if parallel.shard > 0 else world_size // fixed
    if fixed * shard != world_size:
        rule = (
            f"tensor x pipeline x replica x shard = {parallel.tensor} x {parallel.pipeline} x {parallel.replica} x "
            f"{parallel.shard} does not give the number of processes, {world_size}"
        )
        if world_size % fixed == 0:
            yield _problem("parallel.shard", parallel.shard, rule, [-1, world_size // fixed])
        else:
            left = ", with parallel.shard=-1" if parallel.shard > 0 else ""
            products = f"tensor x pipeline x replica = {_listed(_divisors(world_size))}{left}"
            yield _problem("parallel.tensor", parallel.tensor, rule, products)
        return
    pieces = parallel.replica * shard * parallel.num_microbatches
    if run.train.batch_size % pieces:
        rule = (
            f"must divide by replica x shard x parallel.num_microbatches = {parallel.replica} x {shard} x "
            f"{parallel.num_microbatches}"
        )
        below = run.train.batch_size // pieces * pieces
        works = [size for size in (below, below + pieces) if size]
        yield _problem("train.batch_size", run.train.batch_size, rule, works)


def check_reranker(config: RerankerConfig) -> list[str]:
    """All broken rules of a reranker."""
    if problems := reranker_over_limits(config):
        return problems
    problems = [
        *_below_one("reranker.feature_dropout", config.feature_dropout),
        *_below_one("reranker.text_dropout", config.text_dropout),
        *_batch("reranker.batch_size", config.batch_size),
    ]
    if config.batch_size < 2:
        rule = "a caption is compared with those of other pairs"
        problems.append(_problem("reranker.batch_size", config.batch_size, rule, f"2 to {MAX_BATCH}"))
    if config.width % config.num_heads:
        rule = f"must divide reranker.width={config.width}"
        problems.append(_problem("reranker.num_heads", config.num_heads, rule, _divisors(config.width)))
    return problems


def check_restyler(config: RestylerConfig) -> list[str]:
    """All broken rules of a restyler."""
    if problems := restyler_over_limits(config):
        return problems
    problems = list(_batch("restyler.batch_size", config.batch_size))
    if config.width % config.num_heads:
        rule = f"must divide restyler.width={config.width}"
        problems.append(_problem("restyler.num_heads", config.num_heads, rule, _divisors(config.width)))
    return problems


def _batch(path: str, size: int) -> Iterable[str]:
    if size > MAX_BATCH:
        yield _problem(path, size, "is more than one step can take", f"1 to {MAX_BATCH}")


def _decays(path: str, betas: tuple[float, float]) -> Iterable[str]:
    if max(betas) >= 1:
        yield _problem(path, list(betas), "a decay of 1 never forgets", "two numbers from 0 to below 1")


def _below_one(path: str, value: float) -> Iterable[str]:
    if value >= 1:
        yield _problem(path, value, "must be below 1", "0 to 0.99")


def _problem(path: str, value: object, rule: str, works: str | Iterable[int]) -> str:
    return f"{path}={value}: {rule}. Works: {works if isinstance(works, str) else _listed(works)}."


def _listed(values: Iterable[int], most: int = 16) -> str:
    """``1, 2, 4``; long lists keep both ends."""
    words = [str(value) for value in values]
    if len(words) > most:
        words = [*words[: most - 2], "...", words[-1]]
    return ", ".join(words)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
