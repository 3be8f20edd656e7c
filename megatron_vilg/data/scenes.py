"""Scenes composed by a small grammar (how many, where, how large, on what), and their check from the pixels alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vilg.data.emoji import STYLES, Concept, EmojiSet, normal_hexcode
from megatron_vilg.data.images import to_tensor
from megatron_vilg.errors import DataError

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "白色": (255, 255, 255),
    "黑色": (0, 0, 0),
    "灰色": (140, 140, 140),
    "红色": (214, 40, 40),
    "橙色": (245, 140, 30),
    "黄色": (250, 220, 60),
    "绿色": (60, 160, 70),
    "青色": (70, 200, 210),
    "蓝色": (45, 90, 200),
    "紫色": (130, 70, 170),
    "粉色": (245, 160, 190),
}
"""Names and RGB values."""
KINDS = ("count", "place", "size")
_COUNTS = ("一", "两", "三", "四", "五", "六")
_SIZES = {"很大": 0.88, "很小": 0.3}
_PLACES = {
    "左边": ((0.05, 0.29), (0.53, 0.29)),
    "右边": ((0.53, 0.29), (0.05, 0.29)),
    "上方": ((0.29, 0.05), (0.29, 0.53)),
    "下方": ((0.29, 0.53), (0.29, 0.05)),
}
"""Left upper corners of the first and the second thing, as shares of the side."""
_PLACE_SIZE = 0.42
_CELLS = 3
_CELL_SIZE = 0.28
_GROUND_WORDINGS = ("{scene}，{color}背景", "{scene}，背景是{color}", "{color}背景上的{scene}")
_HELD_SHARE = 0.1
_TRIES = 40
# Measure word -> what it counts: only emoji that show the whole of one thing.
_COUNTED = {
    "只": "🐒🦍🦧🐕🐩🐺🦊🦝🐈🐅🐆🐏🐑🐐🐘🐇🦔🦇🐻🐨🐼🦥🦦🦨🦘🦡🦃🐓🐤🐦🐧🦅🦆🦢🦉🦩🦚🦜🐸🐢🦎🦀🐌🦋🐜🐝🐞🦂",
    "头": "🐂🐃🐄🐖🐗🦏🦛🐪🐫",
    "匹": "🐎🦓",
    "条": "🐍🐬🐟🐠🦈🐊👖🧣",
    "个": "🍈🍉🍊🍋🍍🍎🍏🍐🍑🍅🥥🥑🧅🍔🥚🍩🧁⚽🏀🏐🎾🎈🎁🧸🔔🎒💡🧲🏆⏰",
    "根": "🍌🥕🌽🥒",
    "串": "🍇🍡",
    "颗": "🍓🌰💎",
    "棵": "🌲🌳🌴🌵🎄",
    "朵": "🌸🌹🌺🌻🌷🍄",
    "辆": "🚌🚑🚒🚓🚕🚗🚙🚚🚜🏍🚲",
    "架": "✈🚁🎹",
    "艘": "⛵🚤🚢",
    "枚": "🚀",
    "栋": "🏠🏥🏫🏰",
    "把": "🔨🪓🔧✂🔑🪑🎸🎻",
    "本": "📕📗📘📙",
    "件": "👕🧥👗",
    "顶": "👒🎩🧢👑",
    "台": "💻📷📺📻🔬🖨",
    "杯": "🍺🍷☕",
    "块": "🍕🍪🧀🥩",
    "支": "✏🖊🕯",
}
_FAR_FROM_GROUND = 40
_COVERED_CELL = 0.06
_LARGE = 0.55


@dataclass(frozen=True, slots=True)
class Scene:
    """One composed picture with what it promises."""

    image: Image.Image
    caption: str
    alternates: tuple[str, ...]
    spec: dict[str, Any]
    """``kind``, ``background``, ``style``, ``things`` (hexcodes), and ``count``, ``size`` or ``place``."""
    split: str

    def fields(self) -> dict[str, Any]:
        """What the ``.json`` of a scene says."""
        style = STYLES[self.spec["style"]]
        return {
            "scene": self.spec,
            "style": style.key,
            "style_zh": style.zh,
            "licence": style.licence,
            "split": self.split,
            "alternates": list(self.alternates),
        }


@dataclass(frozen=True, slots=True)
class _Noun:
    concept: Concept
    measure: str


def draw_scenes(
    emoji: EmojiSet, *, count: int, size: int, seed: int, without: Collection[tuple[str, str]] = ()
) -> Iterator[Scene]:
    """Draw scenes; each depends on the seed and its number alone.

    A scene whose own pixels do not confirm it (a white goose on white) is drawn again on another ground, so
    ``check_scene`` agrees with every scene that comes out. About a tenth of all combinations of things and number,
    size or place is held out, whatever ground and style, and whichever of two things the caption names first.

    Args:
        emoji: sprites.
        count: how many scenes.
        size: side in pixels.
        seed: of the choices.
        without: (hexcode, style) of the pictures that must not appear, because they are held out; nor do their
            look-alikes, concepts of the same family, in that style.

    Raises:
        DataError: fewer than two countable emoji in a chosen style.
    """
    by_hexcode = {concept.hexcode: concept for concept in emoji.concepts}
    nouns = [
        _Noun(by_hexcode[code], measure)
        for measure, signs in _COUNTED.items()
        for code in (normal_hexcode(f"{ord(sign):x}") for sign in signs)
        if code in by_hexcode
    ]
    left_out = frozenset(without)
    pools = {
        style: [n for n in nouns if emoji.has(n.concept, style) and (n.concept.hexcode, style) not in left_out]
        for style in emoji.styles
    }
    hidden = frozenset((by_hexcode[code].family, style) for code, style in left_out if code in by_hexcode)
    shown = {style: [n for n in pool if (n.concept.family, style) not in hidden] for style, pool in pools.items()}
    poor = [style for style, pool in shown.items() if len(pool) < 2]
    if poor:
        raise DataError(f"scenes: style {poor[0]} has fewer than two emoji that can be counted")
    for number in range(count):
        yield _draw_scene(emoji, pools, hidden, size, random.Random(f"{seed}:{number}"))


def _draw_scene(
    emoji: EmojiSet, pools: Mapping[str, list[_Noun]], hidden: Container[tuple[str, str]], size: int, rng: random.Random
) -> Scene:
    """One scene of the nouns in ``pools`` whose (family, style) is not ``hidden``."""
    tries = 0
    while tries < _TRIES:
        style = rng.choice(emoji.styles)
        spec, text, sprites = _compose(pools[style], rng)
        spec["style"] = style
        grounds = rng.sample(list(BACKGROUNDS), len(BACKGROUNDS))
        # Here and not by a shorter pool, which would change all other scenes of the style.
        if any((concept.family, style) in hidden for concept, *_ in sprites):
            continue
        tries += 1
        for background in grounds:
            spec["background"] = background
            image = Image.new("RGBA", (size, size), (*BACKGROUNDS[background], 255))
            for concept, left, top, share in sprites:
                sprite = emoji.draw(concept, style, max(4, round(share * size)))
                image.alpha_composite(sprite, (round(left * size), round(top * size)))
            if all(check_scene(to_tensor(image.convert("RGB")), spec).values()):
                return _finish(image, text, spec)
    raise DataError(f"scenes: no scene out of {_TRIES} can be recognised at {size} pixels; use a larger size")


def _compose(
    pool: list[_Noun], rng: random.Random
) -> tuple[dict[str, Any], str, list[tuple[Concept, float, float, float]]]:
    """Choose what the scene shows: its spec, its text without the ground, sprites (left, top, share of the side)."""
    kind = rng.choice(KINDS)
    first, second = rng.sample(pool, 2)
    label = first.concept.label_zh
    if kind == "count":
        count = rng.randint(1, len(_COUNTS))
        cells = rng.sample(range(_CELLS**2), count)
        margin = (1 / _CELLS - _CELL_SIZE) / 2
        sprites = [
            (first.concept, cell % _CELLS / _CELLS + margin, cell // _CELLS / _CELLS + margin, _CELL_SIZE)
            for cell in cells
        ]
        spec = {"kind": kind, "things": [first.concept.hexcode], "count": count}
        return spec, f"{_COUNTS[count - 1]}{first.measure}{label}", sprites
    if kind == "size":
        word = rng.choice(list(_SIZES))
        share = _SIZES[word]
        spec = {"kind": kind, "things": [first.concept.hexcode], "size": word}
        return spec, f"一{first.measure}{word}的{label}", [(first.concept, (1 - share) / 2, (1 - share) / 2, share)]
    place = rng.choice(list(_PLACES))
    sprites = [
        (noun.concept, left, top, _PLACE_SIZE)
        for noun, (left, top) in zip((first, second), _PLACES[place], strict=True)
    ]
    spec = {"kind": kind, "things": [first.concept.hexcode, second.concept.hexcode], "place": place}
    return spec, f"一{first.measure}{label}在一{second.measure}{second.concept.label_zh}的{place}", sprites


def _finish(image: Image.Image, text: str, spec: dict[str, Any]) -> Scene:
    wordings = [w.format(scene=text, color=spec["background"]) for w in _GROUND_WORDINGS]
    styled = f"{wordings[0]}，{STYLES[spec['style']].zh}"
    draw = int.from_bytes(hashlib.sha256(_combination(spec).encode()).digest()[:8], "big") / 2**64
    return Scene(
        image=image,
        caption=wordings[0],
        alternates=(*wordings[1:], styled, text),
        spec=dict(spec),
        split="val-scenes" if draw < _HELD_SHARE else "train",
    )


def _combination(spec: Mapping[str, Any]) -> str:
    """What is held out as one: "B right of A" and "A left of B" are the same sprites in the same places."""
    things, chosen = spec["things"], [spec[name] for name in ("count", "size") if name in spec]
    if "place" in spec:
        place, corners = spec["place"], _PLACES[spec["place"]]
        if corners[0] > corners[1]:
            things = things[::-1]
            place = next(name for name, others in _PLACES.items() if others == corners[::-1])
        chosen = [place]
    return repr([spec["kind"], things, *chosen])


def check_scene(pixels: Tensor, spec: Mapping[str, Any]) -> dict[str, bool]:
    """Read back from the pixels what a caption promised; knows nothing of emoji, so it judges drawings too.

    Args:
        pixels: [3, S, S] in [-1, 1].
        spec: ``Scene.spec`` or the same keys.

    Returns:
        ``background``, and ``count`` or ``size`` where the spec has them: whether the picture agrees. Which thing
        stands where (``place``) is not read back.
    """
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    side = values.shape[0]
    rim = np.ones((side, side), bool)
    rim[2:-2, 2:-2] = False
    ground = np.median(values[rim], axis=0)
    nearest = min(BACKGROUNDS, key=lambda name: float(((np.asarray(BACKGROUNDS[name]) - ground) ** 2).sum()))
    found = {"background": nearest == spec["background"]}
    drawn = np.abs(values - ground).max(axis=-1) > _FAR_FROM_GROUND
    if "count" in spec:
        borders = [round(i * side / _CELLS) for i in range(_CELLS + 1)]
        covered = sum(
            drawn[borders[row] : borders[row + 1], borders[column] : borders[column + 1]].mean() > _COVERED_CELL
            for row in range(_CELLS)
            for column in range(_CELLS)
        )
        found["count"] = covered == spec["count"]
    if "size" in spec:
        rows, columns = np.nonzero(drawn)
        extent = max(np.ptp(rows), np.ptp(columns)) / side if len(rows) else 0.0
        found["size"] = len(rows) > 0 and (extent > _LARGE) == (spec["size"] == "很大")
    return {name: bool(value) for name, value in found.items()}
