"""What a reconstructor, its critic and its feature network add to the last stage of a pipeline. Arithmetic, no torch.

``train/end_to_end.py`` keeps all of them whole, in float32, on every rank of that stage. Peaks are within 5 % of what
tests measure, most of them within 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from megatron_vilg.config.check_engine import LEAN
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.reconstructor_cost import (
    FLOAT_BYTES,
    Layer,
    critic_layers,
    forward_flops,
    kept_bytes,
    num_values,
    parameter_shapes,
    reconstructor_layers,
    widest,
)
from megatron_vilg.parallel.layout import Layout

MOMENT_BYTES = 8.0
"""Adam's two moments of a value, in float32."""
FEATURE_NETWORKS = {"efficientnet-lite0": (3_350_000, 185.0), "efficientnet-lite2": (4_782_024, 207.0)}
"""Their weights, and the values per pixel that the perceptual distance keeps; a file holds a Lite0."""
LOSS_MAPS = {"l1": 1, "logit_laplace": 4}
"""Maps of the size of the picture that the pixel loss keeps."""
EDGE_MAPS = 2
"""The same of the error of neighbouring pixels' differences."""
PASSING = {"vqgan": 1.0, "dvae": 1.5}
"""What passes through a decoder's backward pass at its fullest, in units of its widest output: measured."""
CRITIC_PASSES = 8
"""In units of one forward pass over one picture: forward and back to the decoder; then forward and back, with gradients
of its weights, for a true and a decoded picture."""


@dataclass(frozen=True, slots=True)
class JointCost:
    """Bytes on one rank of the last stage, beside the generator's; all zero without a reconstructor."""

    parameters: int = 0
    """Values of the reconstructor; the critic is no part of the model."""
    weights: float = 0.0
    """Reconstructor, its moving average, critic, feature network."""
    gradients: float = 0.0
    """The reconstructor's, from its backward pass to the update."""
    critic_gradients: float = 0.0
    """Always there: they stay until the critic's next step."""
    optimizer: float = 0.0
    """Both optimizers' state."""
    turning: float = 0.0
    """From the forward pass of a micro-batch's pictures to their backward pass, with what passes through that."""
    judging: float = 0.0
    """When the critic learns from all pictures of the step; the generator's activations and gradients are gone then."""
    sent: Mapping[str, float] = field(default_factory=dict)
    """Gradients, averaged over the data ranks and passed along ``tp``; sums of batch norms and of the adaptive weight
    are left out."""
    flops_needed: float = 0.0
    """Of one pair, forward and backward; the feature network is left out."""
    flops_executed: float = 0.0
    """Of one pair over all ranks that have it: those of ``tp`` all compute the same."""


def joint_cost(run: RunConfig, layout: Layout, matrix_bytes: float) -> JointCost:
    """Costs of ``reconstructor.*`` while the critic, if there is one, works.

    Args:
        run: resolved configuration.
        layout: with every size resolved.
        matrix_bytes: what the optimizer keeps of a value of a matrix that it may quantise.
    """
    options, tokenizer = run.reconstructor, run.image_tokenizer
    if not options.enabled:
        return JointCost()
    layers = reconstructor_layers(options, run.model, tokenizer)
    critic: tuple[Layer, ...] = ()
    if options.critic_weight:
        shares_norms = layout.data_size > 1
        critic = critic_layers(options.critic_channels, tokenizer.image_size, shares_norms=shares_norms)
    values, judge_values, network_values = num_values(layers), num_values(critic), _network(run)[0]
    averaged = values if options.ema_decay else 0
    flops, judge_flops = 3 * forward_flops(layers), forward_flops(critic)
    needed = flops + CRITIC_PASSES * judge_flops
    return JointCost(
        parameters=values,
        weights=float(FLOAT_BYTES * (values + averaged + judge_values + network_values)),
        gradients=float(FLOAT_BYTES * values),
        optimizer=_state_bytes(layers, run, matrix_bytes) + MOMENT_BYTES * judge_values,
        critic_gradients=float(FLOAT_BYTES * judge_values),
        turning=_turning(run, layout, layers, critic),
        judging=_judging(run, layout, critic),
        sent={
            "shard": 2 * (1 - 1 / layout.shard) * FLOAT_BYTES * (values + judge_values),
            "replica": 2 * (1 - 1 / layout.replica) * FLOAT_BYTES * (values + judge_values),
            "tp": float(FLOAT_BYTES * (values + judge_values) if layout.tensor > 1 else 0),
        },
        flops_needed=float(needed),
        # The adaptive weight takes the gradient through the critic a second time.
        flops_executed=float(layout.tensor * (needed + (judge_flops if options.critic_adaptive_weight else 0))),
    )


def _state_bytes(layers: tuple[Layer, ...], run: RunConfig, matrix_bytes: float) -> float:
    """Kernels are never quantised, because their rows are shorter than a block; Muon has no matrices here."""
    block = LEAN.get(run.optim.name, 0)
    shapes = parameter_shapes(layers).values()
    is_lean = [bool(block) and len(shape) == 2 and shape[-1] % block == 0 for shape in shapes]
    return sum(prod(s) * (matrix_bytes if lean else MOMENT_BYTES) for s, lean in zip(shapes, is_lean, strict=True))


def _turning(run: RunConfig, layout: Layout, layers: tuple[Layer, ...], critic: tuple[Layer, ...]) -> float:
    options, compute = run.reconstructor, _compute(run)
    picture = _picture_bytes(run)
    kept = kept_bytes(layers, compute) + PASSING[run.image_tokenizer.kind] * FLOAT_BYTES * widest(layers)
    loss = "logit_laplace" if run.image_tokenizer.kind == "dvae" else "l1"
    kept += picture * (
        LOSS_MAPS[loss if options.loss == "auto" else options.loss] + EDGE_MAPS * bool(options.edge_weight)
    )
    if options.perceptual_weight:
        kept += picture / 3 * _network(run)[1]
    pairs = layout.pairs_each(run.train.batch_size)
    total = pairs * (kept + (kept_bytes(critic, compute) if critic else 0.0))
    if critic:  # it is shown all pictures of a step at its end
        total += pairs * layout.num_microbatches * picture
    # Autocast's copies of the weights last from the forward to the backward pass.
    return total + (compute * num_values(layers) if compute < FLOAT_BYTES else 0)


def _judging(run: RunConfig, layout: Layout, critic: tuple[Layer, ...]) -> float:
    if not critic:
        return 0.0
    pictures = layout.pairs_each(run.train.batch_size) * layout.num_microbatches
    # Of every picture the true and the decoded one, and the latter in one piece besides.
    each = 3 * _picture_bytes(run) + 2 * kept_bytes(critic, _compute(run)) + FLOAT_BYTES * widest(critic)
    # Gradients of its weights by the true and by the decoded pictures are there side by side before they are added.
    return pictures * each + FLOAT_BYTES * num_values(critic)


def _compute(run: RunConfig) -> int:
    return 2 if run.train.precision == "bf16" else FLOAT_BYTES


def _picture_bytes(run: RunConfig) -> float:
    """A picture in float32."""
    return float(FLOAT_BYTES * 3 * run.image_tokenizer.image_size**2)


def _network(run: RunConfig) -> tuple[int, float]:
    """Weights of the feature network, and values per pixel; zeros without one."""
    if not run.reconstructor.perceptual_weight:
        return 0, 0.0
    name = run.image_tokenizer_train.perceptual_network
    return FEATURE_NETWORKS.get(name, FEATURE_NETWORKS["efficientnet-lite0"])
