"""Filters against brute force, frequencies against probabilities, streams of random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.ops.sampling import guidance_scales, guidance_weights, keep_best, mixed, sample, sample_uniforms


def expected_distribution(logits: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    """Temperature, then top-k, then top-p, then min-p, one row, written with lists."""
    probability = (logits.double() / settings.temperature).softmax(0).tolist()
    order = sorted(range(len(probability)), key=lambda i: -probability[i])
    kept = order[: settings.top_k] if settings.top_k else order
    mass = sum(probability[i] for i in kept)
    result, before = torch.zeros(len(probability), dtype=torch.float64), 0.0
    for rank, i in enumerate(kept):
        if rank == 0 or before < settings.top_p:
            result[i] = probability[i]
        before += probability[i] / mass
    result[result < settings.min_p * result.max()] = 0.0
    return result / result.sum()


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(2, 12),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.0, 0.25, 0.6, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_distribution_is_that_of_brute_force(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    steps = 4000
    uniform = (torch.arange(steps) + 0.5) / steps  # every quantile once: counts are the distribution, without noise
    drawn = sample(logits.expand(steps, -1), config, uniform)
    share = torch.bincount(drawn, minlength=size) / steps
    torch.testing.assert_close(share.double(), expected_distribution(logits, config), atol=2.5 / steps, rtol=0)


def test_no_temperature_is_too_low() -> None:
    logits = torch.tensor([[1e4, 2e4, -3e4]])
    for temperature in (1e-20, 1e-31, 1e-40):
        assert sample(logits, SampleConfig(temperature=temperature), torch.tensor([0.5])).tolist() == [1]


def test_zero_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert sample(logits, SampleConfig(temperature=0.0), torch.tensor([0.99, 0.99])).tolist() == [1, 0]


@pytest.mark.parametrize("config", [SampleConfig(), SampleConfig(top_k=4), SampleConfig(top_p=0.999)])
def test_forbidden_tokens_are_never_drawn(config: SampleConfig) -> None:
    logits = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf")]).expand(1000, -1)
    uniform = torch.linspace(0, 1, 1000).clamp(max=1 - 2**-24)
    assert set(sample(logits, config, uniform).tolist()) == {1, 2}


def test_streams_belong_to_the_sample() -> None:
    all_rows = sample_uniforms(7, [(0, 0), (0, 1), (1, 0)], 50)
    assert torch.equal(all_rows[1:2], sample_uniforms(7, [(0, 1)], 50))
    assert torch.equal(all_rows[2, :20], sample_uniforms(7, [(1, 0)], 20)[0])
    assert not torch.equal(all_rows[0], all_rows[1]) and not torch.equal(all_rows[1], all_rows[2])
    assert not torch.equal(all_rows, sample_uniforms(8, [(0, 0), (0, 1), (1, 0)], 50))
    assert sample_uniforms(-1, [(0, 0)], 3).shape == (1, 3)
    many = sample_uniforms(0, [(p, s) for p in range(40) for s in range(5)], 100)
    assert many.min() >= 0 and many.max() < 1 and many.mean().item() == pytest.approx(0.5, abs=0.01)


def test_guidance_formula() -> None:
    conditional, unconditional = torch.randn(3, 5), torch.randn(3, 5)
    both = torch.cat([conditional, unconditional])
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(mixed(both, [2.5]), expected)
    torch.testing.assert_close(mixed(both, torch.tensor([0.0])), unconditional)
    assert mixed(conditional, []) is conditional
    part = torch.randn(3, 5)
    expected += 0.5 * (part - unconditional)
    torch.testing.assert_close(mixed(torch.cat([conditional, part, unconditional]), [2.5, 0.5]), expected)


def test_guidance_weights_are_of_the_prompt_and_its_parts() -> None:
    assert guidance_weights(SampleConfig(), 3, has_parts=True) == [[], [], []]
    both = SampleConfig(manner_guidance=0.25, thing_guidance=0.5)
    assert guidance_weights(both, 2, has_parts=False) == [[], []]
    assert guidance_weights(both, 1, has_parts=True) == [[1.0, 0.25, 0.5]]
    assert guidance_weights(SampleConfig(thing_guidance=0.5), 1, has_parts=True) == [[1.0, 0.5]]
    growing = SampleConfig(guidance=3.0, guidance_schedule="linear", manner_guidance=0.5)
    assert guidance_weights(growing, 3, has_parts=True) == [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]


def test_guidance_grows_from_one_to_its_scale() -> None:
    def scales(schedule: str, count: int = 5) -> list[float]:
        return guidance_scales(SampleConfig(guidance=3.0, guidance_schedule=schedule), count)  # type: ignore[arg-type]

    assert scales("constant") == [3.0] * 5
    assert scales("linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert scales("cosine") == pytest.approx([1.0, 2 - 2**0.5 / 2, 2.0, 2 + 2**0.5 / 2, 3.0])
    assert scales("linear", 1) == [3.0]


def test_the_best_are_kept_in_their_order() -> None:
    ids = torch.arange(12).view(2, 3, 2)
    best, scores = keep_best(ids, torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 6.0]]), 2)
    assert best.tolist() == [[[2, 3], [4, 5]], [[10, 11], [6, 7]]]
    assert scores is not None and scores.tolist() == [[3.0, 2.0], [6.0, 5.0]]
    first, none = keep_best(ids, None, 1)
    assert first.tolist() == [[[0, 1]], [[6, 7]]] and none is None
