from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.evaluate.captions import chance_score, char_f1, longest_named, score_captions

CAPTIONS = st.text(alphabet="红绿蓝的熊猫狗", max_size=8)


def test_char_f1_counts_characters_as_often_as_they_occur() -> None:
    assert char_f1("红熊", "红熊") == 1.0
    assert char_f1("熊红", "红熊") == 1.0
    assert char_f1("猫", "红熊") == 0.0
    assert char_f1("熊熊熊", "熊") == pytest.approx(2 * 1 / 4)
    assert char_f1("", "") == 1.0
    assert char_f1("", "熊") == 0.0


@settings(deadline=None)  # a busy machine pauses any example
@given(CAPTIONS, CAPTIONS)
def test_char_f1_is_symmetric_and_bounded(left: str, right: str) -> None:
    assert char_f1(left, right) == pytest.approx(char_f1(right, left))
    assert 0.0 <= char_f1(left, right) <= 1.0


def test_the_longest_name_in_a_text_is_what_it_names() -> None:
    names = ["鱼", "章鱼", "龙", "恐龙", ""]
    assert longest_named("黑白风格的章鱼", names) == {"章鱼"}
    assert longest_named("黑白风格的鱼", names) == {"鱼"}
    assert longest_named("龙和鱼", names) == {"龙", "鱼"}
    assert longest_named("黑白风格的猫", names) == set()


def test_white_space_does_not_count() -> None:
    score = score_captions(["立体 的熊\n", "猫"], ["立体的熊", "狗"])
    assert score.exact_match == 0.5
    assert score.char_f1 == 0.5
    assert score.count == 2


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="as many candidates as references"):
        score_captions(["熊"], [])


@settings(deadline=None)  # a busy machine pauses any example
@given(st.lists(CAPTIONS, min_size=1, max_size=5), st.lists(CAPTIONS, min_size=1, max_size=5))
def test_chance_is_the_mean_over_all_guesses(references: list[str], pool: list[str]) -> None:
    chance = chance_score(references, pool)
    guesses = [score_captions([guess], [truth]) for truth, guess in itertools.product(references, pool)]
    assert chance.exact_match == pytest.approx(np.mean([g.exact_match for g in guesses]))
    assert chance.char_f1 == pytest.approx(np.mean([g.char_f1 for g in guesses]), abs=1e-6)
