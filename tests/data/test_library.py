"""Pictures of things in several manners, found by the words of captions."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vilg.data.library import Library, label_of
from megatron_vilg.data.token_cache import CachedRecord, SplitTokens
from tests.styled_run import write_styled_run


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> SplitTokens:
    folder = tmp_path_factory.mktemp("library")
    return write_styled_run(folder / "run", folder / "pairs").split("train")


def test_it_has_the_pairs_whose_source_names_thing_and_manner(tokens: SplitTokens) -> None:
    library, pairs = Library.of(tokens)
    records = tokens.records()
    assert len(library) == len(pairs) == len(records) - 1  # not the scene
    assert library.manners == ("flat", "line", "solid") and library.things == ("c0", "c1", "c2", "c3", "c4")
    for number, pair in enumerate(pairs):
        assert label_of(records[pair]) == (
            library.things[library.thing[number]],
            library.manners[library.manner[number]],
        )
        own = tokens.images(pairs[number : number + 1], np.zeros(1, int))[0]
        np.testing.assert_array_equal(library.codes[number], own)


def test_prompts_find_things_and_manners_in_either_order(tokens: SplitTokens) -> None:
    library, _ = Library.of(tokens)
    assert library.find("线描风格的猫") == library.find("猫，线描风格") == (1, 1)
    for prompt in ("猫", "线描风格", "油画风格的猫", "线描风格的狗", ""):
        assert library.find(prompt) is None
    assert library.number(("c1", "line")) == (1, 1)
    assert library.number(("c9", "line")) is None and library.number(None) is None


def test_pictures_of_a_thing_without_one_manner(tokens: SplitTokens) -> None:
    library, _ = Library.of(tokens)
    for thing in range(5):
        found = library.pictures(thing)
        assert list(library.thing[found]) == [thing] * len(found) and len(found) == (2 if thing < 4 else 1)
        manner = int(library.manner[found[0]])
        assert list(library.pictures(thing, but=manner)) == list(found[1:])


@pytest.mark.parametrize("fields", [{}, {"concept": "a"}, {"concept": "a", "style": ""}, {"concept": 3, "style": "b"}])
def test_other_fields_are_no_label(fields: dict[str, object]) -> None:
    assert label_of(CachedRecord("k", "caption", fields)) is None


def test_of_two_pairs_with_one_label_the_first_counts() -> None:
    class Twice(SplitTokens):
        def __init__(self) -> None:
            pass

        def records(self) -> list[CachedRecord]:
            return [CachedRecord(str(n), "a的b", {"concept": "b", "style": "a"}) for n in range(2)]

        def images(self, pairs: np.ndarray, views: np.ndarray) -> np.ndarray:
            return np.stack([pairs, views], axis=1).astype(np.uint16)

    library, pairs = Library.of(Twice())
    assert list(pairs) == [0] and len(library) == 1
