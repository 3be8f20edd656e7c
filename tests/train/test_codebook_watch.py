from __future__ import annotations

import logging

import pytest

from megatron_vilg.models.quantizer import CodebookUse
from megatron_vilg.train.codebook_watch import CodebookWatch


def test_collapse_is_said_once_with_healthy_ranges_and_recovery_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_vilg")
    watch = CodebookWatch(100)
    good, bad = CodebookUse(used=0.9, perplexity=70.0), CodebookUse(used=0.05, perplexity=3.0)
    assert watch.check(10, good, num_vectors=1000)
    assert not watch.check(20, bad, num_vectors=1000)
    assert not watch.check(30, bad, num_vectors=1000)
    (warning,) = caplog.messages
    assert "codebook/used(share)=0.05 (healthy: 0.60 to 1)" in warning
    assert "codebook/perplexity=3 (healthy: 20 to 100)" in warning
    assert watch.check(40, good, num_vectors=1000)
    assert "healthy again" in caplog.messages[-1] and len(caplog.messages) == 2


def test_few_codes_that_do_most_of_the_work_are_a_collapse_too() -> None:
    assert not CodebookWatch(100).check(1, CodebookUse(used=1.0, perplexity=5.0), num_vectors=1000)


def test_too_few_vectors_say_nothing() -> None:
    assert CodebookWatch(100).check(1, CodebookUse(used=0.05, perplexity=3.0), num_vectors=300)
