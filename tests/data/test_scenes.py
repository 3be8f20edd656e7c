from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vilg.data.demo import DemoOptions, write_demo
from megatron_vilg.data.emoji import STYLES, EmojiSet
from megatron_vilg.data.images import to_tensor
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.scenes import BACKGROUNDS, KINDS, Scene, check_scene, draw_scenes
from megatron_vilg.errors import DataError
from tests.data.fake_emoji import write_packages


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiSet:
    return EmojiSet(write_packages(tmp_path_factory.mktemp("cache")), ("noto", "fluent-3d"))


@pytest.fixture(scope="module")
def scenes(emoji: EmojiSet) -> list[Scene]:
    return list(draw_scenes(emoji, count=150, size=48, seed=0))


def pixels(scene: Scene) -> torch.Tensor:
    return to_tensor(scene.image.convert("RGB"))


def test_every_scene_is_confirmed_by_its_pixels(scenes: list[Scene]) -> None:
    assert {scene.spec["kind"] for scene in scenes} == set(KINDS)
    assert {scene.spec["background"] for scene in scenes} == set(BACKGROUNDS)
    assert all(all(check_scene(pixels(scene), scene.spec).values()) for scene in scenes)


def test_other_scenes_are_not(scenes: list[Scene]) -> None:
    for name, low, high in (("background", 0.0, 0.25), ("count", 0.0, 0.5), ("size", 0.2, 0.8)):
        chosen = [scene for scene in scenes if name in scene.spec]
        others = chosen[1:] + chosen[:1]
        share = np.mean([check_scene(pixels(a), b.spec)[name] for a, b in zip(chosen, others, strict=True)])
        assert low <= share <= high, name


def test_captions_say_what_the_spec_says(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.caption.endswith(f"，{scene.spec['background']}背景")
        if "count" in scene.spec:
            assert scene.caption[0] == "一两三四五六"[scene.spec["count"] - 1]
        else:
            assert str(scene.spec.get("size", scene.spec.get("place"))) in scene.caption
        assert len(scene.spec["things"]) == (2 if scene.spec["kind"] == "place" else 1)
        assert scene.caption not in scene.alternates and STYLES[scene.spec["style"]].zh in scene.alternates[2]


def test_a_combination_is_in_one_split_whatever_its_ground(scenes: list[Scene]) -> None:
    splits: dict[str, set[str]] = {}
    for scene in scenes:
        key = repr({k: v for k, v in scene.spec.items() if k not in ("background", "style")})
        splits.setdefault(key, set()).add(scene.split)
    assert all(len(names) == 1 for names in splits.values())
    assert 0 < sum(scene.split == "val-scenes" for scene in scenes) < 40


def placed(scene: Scene) -> tuple[str, ...]:
    """The axis and the two things along it, from the left or from above."""
    first, second = scene.spec["things"]
    axis = "horizontal" if scene.spec["place"] in ("左边", "右边") else "vertical"
    return (axis, first, second) if scene.spec["place"] in ("左边", "上方") else (axis, second, first)


def test_the_same_picture_said_the_other_way_round_is_in_the_same_split(emoji: EmojiSet) -> None:
    few = {"1f400", "1f402", "1f403", "1f404", "1f405", "1f407", "1f40c", "1f410"}
    rest = {(concept.hexcode, style) for concept in emoji.concepts for style in emoji.styles} - {
        (code, style) for code in few for style in emoji.styles
    }
    scenes = [s for s in draw_scenes(emoji, count=500, size=16, seed=0, without=rest) if "place" in s.spec]
    found: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for scene in scenes:
        found.setdefault(placed(scene), set()).add((scene.spec["place"], scene.split))
    both = [pairs for pairs in found.values() if len({place for place, _ in pairs}) == 2]
    assert len(both) >= 20 and any(split == "val-scenes" for pairs in both for _, split in pairs)
    assert all(len({split for _, split in pairs}) == 1 for pairs in found.values())


def test_the_split_is_the_hash_of_what_stands_left_or_above(scenes: list[Scene]) -> None:
    for scene in scenes:
        kind = scene.spec["kind"]
        said = [kind, scene.spec["things"], scene.spec[kind]]
        if kind == "place":
            axis, *things = placed(scene)
            said = [kind, things, "左边" if axis == "horizontal" else "上方"]
        draw = int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:8], "big") / 2**64
        assert scene.split == ("val-scenes" if draw < 0.1 else "train")


def test_scenes_depend_on_seed_and_number(emoji: EmojiSet, scenes: list[Scene]) -> None:
    again = list(draw_scenes(emoji, count=5, size=48, seed=0))
    assert [s.spec for s in again] == [s.spec for s in scenes[:5]]
    assert [s.image.tobytes() for s in again] == [s.image.tobytes() for s in scenes[:5]]
    assert [s.spec for s in draw_scenes(emoji, count=5, size=48, seed=1)] != [s.spec for s in again]


def test_held_out_pictures_are_left_out(emoji: EmojiSet) -> None:
    scenes = list(draw_scenes(emoji, count=60, size=32, seed=0, without={("1f402", "noto")}))
    used = {(thing, scene.spec["style"]) for scene in scenes for thing in scene.spec["things"]}
    assert ("1f402", "noto") not in used and ("1f402", "fluent-3d") in used


def test_look_alikes_of_held_out_pictures_are_left_out_and_other_scenes_stay(emoji: EmojiSet) -> None:
    def drawn(without: set[tuple[str, str]]) -> list[Scene]:
        return list(draw_scenes(emoji, count=150, size=32, seed=0, without=without))

    def shows(scene: Scene) -> bool:
        return "1f405" in scene.spec["things"] and scene.spec["style"] == "noto"

    before, after = drawn(set()), drawn({("1f42f", "noto")})  # the tiger's face; scenes know the tiger alone
    assert any(map(shows, before)) and not any(map(shows, after))
    assert any("1f405" in scene.spec["things"] for scene in after)
    for one, other in zip(before, after, strict=True):
        assert shows(one) or (one.spec, one.image.tobytes()) == (other.spec, other.image.tobytes())


def test_an_empty_picture_has_a_ground_and_nothing_else() -> None:
    empty = torch.ones(3, 32, 32)
    spec: dict[str, Any] = {"background": "白色", "count": 1}
    assert check_scene(empty, spec) == {"background": True, "count": False}
    assert check_scene(empty, {"background": "红色", "size": "很小"}) == {"background": False, "size": False}


def test_too_few_things(emoji: EmojiSet) -> None:
    everything = {(concept.hexcode, style) for concept in emoji.concepts for style in emoji.styles}
    with pytest.raises(DataError, match="style noto has fewer than two emoji that can be counted"):
        list(draw_scenes(emoji, count=1, size=32, seed=0, without=everything))


def test_scenes_are_part_of_a_demo_set(tmp_path: Path) -> None:
    cache = write_packages(tmp_path / "cache")
    options = DemoOptions(concepts=8, held_out_concepts=2, size=32, styles=("noto", "twemoji"), scenes=30)
    manifest = write_demo(tmp_path / "d", cache, options)
    assert list(find_records(tmp_path / "d")) == ["train", "val-concepts", "val-pairs", "val-scenes"]
    train = [r for r in read_records(tmp_path / "d", "train") if "scene" in r.fields]
    held = list(read_records(tmp_path / "d", "val-scenes"))
    assert len(train) + len(held) == 30 and manifest["pairs"]["val-scenes"] == len(held)
    unseen = {
        (r.fields["concept"], r.fields["style"])
        for split in ("val-concepts", "val-pairs")
        for r in read_records(tmp_path / "d", split)
    }
    family = {concept.hexcode: concept.family for concept in EmojiSet(cache, options.styles).concepts}
    look_alikes = {(family[code], style) for code, style in unseen}
    for record in train + held:
        spec = record.fields["scene"]
        assert not look_alikes & {(family[thing], spec["style"]) for thing in spec["things"]}
        assert not unseen & {(thing, spec["style"]) for thing in spec["things"]}
        assert all(check_scene(to_tensor(record.decode()), spec).values())
