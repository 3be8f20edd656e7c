"""Emoji as image-text data: concepts with Chinese and English names, drawn in up to eight styles."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vilg.data.npm import ensure_package, ensure_packages
from megatron_vilg.errors import DataError, MissingPackageError

NAMES_PACKAGE = ("emojibase-data", "17.0.0")
"""Names and keywords (MIT; the names come from Unicode CLDR)."""
_SKIPPED_GROUPS = (None, 2)  # regional letters, skin and hair components
_SUPERSAMPLED_PIXELS = 256


@dataclass(frozen=True, slots=True)
class Style:
    """One way of drawing."""

    key: str
    zh: str
    en: str
    package: str
    version: str
    licence: str
    credit: str


STYLES: dict[str, Style] = {
    style.key: style
    for style in (
        Style("noto", "谷歌卡通风格", "Google cartoon style", "@iconify-json/noto", "1.2.9", "Apache-2.0",
              "Noto Emoji, Google, https://github.com/googlefonts/noto-emoji"),
        Style("twemoji", "推特扁平风格", "Twitter flat style", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
              "Twemoji, Twitter and contributors, https://github.com/jdecked/twemoji"),
        Style("openmoji", "黑色描边风格", "black outline style", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0",
              "OpenMoji, https://openmoji.org (share alike)"),
        Style("fluent-flat", "微软扁平风格", "Microsoft flat style", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
              "Fluent Emoji, Microsoft, https://github.com/microsoft/fluentui-emoji"),
        Style("fluent-3d", "立体三维风格", "glossy 3D style", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
              "Fluent Emoji 3D, Microsoft, packaged by LobeHub, https://github.com/lobehub/fluent-emoji"),
        Style("emojione", "复古表情风格", "retro EmojiOne style", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0",
              "EmojiOne 2 (EmojiTwo), https://github.com/EmojiTwo/emojitwo"),
        Style("fluent-contrast", "微软黑白风格", "Microsoft black and white style",
              "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT",
              "Fluent Emoji High Contrast, Microsoft, https://github.com/microsoft/fluentui-emoji"),
        Style("emojione-mono", "复古黑白风格", "retro black and white style",
              "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0",
              "EmojiOne 2 monotone (EmojiTwo), https://github.com/EmojiTwo/emojitwo"),
    )
}  # fmt: skip


DEMO_STYLES = ("noto", "twemoji", "openmoji", "fluent-flat", "fluent-3d", "fluent-contrast")
"""Five coloured sets, and the pictures of one of them in black and white. Without EmojiOne's, which hardly differ from
Google's and Twitter's at this size."""


@dataclass(frozen=True, slots=True)
class Concept:
    """What a picture shows, whatever the style."""

    hexcode: str
    """Code points in lower case, joined by ``-``, without variation selectors."""
    emoji: str
    label_zh: str
    label_en: str
    tags_zh: tuple[str, ...]
    tags_en: tuple[str, ...]
    group: str
    subgroup: str
    family: str
    """Equal for concepts that look alike (man and woman, left and right, the same thing in another colour)."""


def normal_hexcode(text: str) -> str:
    """Lower case, without variation selectors, which the packages set or leave out at will."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


_VARIES = re.compile(
    r"(fe)?(m[ae]n|wom[ae]n|person|people|boy|girl|male|adult|child|face|facing|right|left|up|down|with|of|the|"
    r"and|in|a|light|dark|medium|skin|tone|red|orange|yellow|green|blue|purple|brown|black|white|pink|grey|large|small|"
    r"medium-small|hollow|open|closed)"
)
_SAME_HEAD = ("moon", "heart", "circle", "square", "diamond", "arrow", "book", "mailbox", "clock", "lock")


def family_of(label_en: str, subgroup: str) -> str:
    """Key of the look-alikes of a concept, from its English name without words that only vary it."""
    if subgroup == "time" and re.search(r"o['’]clock|thirty", label_en):
        return "clock"
    words = re.findall(r"[a-z'-]+", label_en.lower().replace("’", "'"))
    words = ["lock" if word in ("locked", "unlocked") else word for word in words]
    for head in _SAME_HEAD:
        if head in words:
            return head
    kept = sorted({word.removesuffix("s") for word in words if not _VARIES.fullmatch(word)})
    return " ".join(kept) or label_en.lower()


def tidy_label_zh(label: str) -> str:
    """``旗: 中国`` -> ``中国的旗帜``, ``按键: 1`` -> ``按键1``, ``男人: 秃顶`` -> ``秃顶的男人``."""
    head, colon, rest = (part.strip() for part in label.replace("：", ":").partition(":"))
    if not colon or not head or not rest:
        return label.strip()
    if head == "旗":
        return rest if rest.endswith("旗") else f"{rest}的旗帜"
    return f"{head}{rest}" if head == "按键" else f"{rest}的{head}"


def tidy_label_en(label: str) -> str:
    """``flag: China`` -> ``flag of China``, ``man: bald`` -> ``man, bald``."""
    label = label.replace("’", "'")
    return label.replace("flag: ", "flag of ", 1) if label.startswith("flag: ") else label.replace(": ", ", ")


class EmojiSet:
    """Concepts and their pictures in the chosen styles."""

    def __init__(self, cache: Path, styles: Sequence[str]) -> None:
        """Fetch what is missing and read the indexes.

        Args:
            cache: folder of unpacked packages.
            styles: keys of ``STYLES``.

        Raises:
            DataError: unknown style, or a package that cannot be fetched or read.
            MissingPackageError: no npm client, no resvg-py.
        """
        unknown = [style for style in styles if style not in STYLES]
        if unknown or not styles:
            raise DataError(f"styles = {','.join(styles)!r}: works any of {','.join(STYLES)}")
        self.styles = tuple(styles)
        self.packages = dict([NAMES_PACKAGE, *((STYLES[style].package, STYLES[style].version) for style in styles)])
        ensure_packages(cache, self.packages)
        self.concepts = _read_concepts(ensure_package(cache, *NAMES_PACKAGE))
        self._icons: dict[str, dict[str, Any]] = {}
        self._files: dict[str, dict[str, Path]] = {}
        self._names: dict[str, dict[str, str]] = {}
        for style in styles:
            folder = ensure_package(cache, STYLES[style].package, STYLES[style].version)
            if (folder / "assets").is_dir():
                self._files[style] = {normal_hexcode(p.stem): p for p in sorted((folder / "assets").glob("*.webp"))}
            else:
                self._icons[style] = _read_json(folder / "icons.json")
                chars = _read_json(folder / "chars.json") if (folder / "chars.json").is_file() else {}
                self._names[style] = {normal_hexcode(code): name for code, name in chars.items()}
        self._name_by_label(cache)

    def _name_by_label(self, cache: Path) -> None:
        """Give a set without code points those of the shared icon names, which stand in the Twemoji package."""
        without = [style for style, names in self._names.items() if not names]
        if not without:
            return
        reference = next((names for names in self._names.values() if names), None)
        if reference is None:
            twemoji = STYLES["twemoji"]
            folder = ensure_package(cache, twemoji.package, twemoji.version)
            reference = {normal_hexcode(c): n for c, n in _read_json(folder / "chars.json").items()}
        known = [names for names in self._names.values() if names] or [reference]
        for style in without:
            icons = self._icons[style]["icons"]
            for names in known:
                for code, name in names.items():
                    if name in icons:
                        self._names[style].setdefault(code, name)

    def has(self, concept: Concept, style: str) -> bool:
        """Whether the style draws the concept."""
        return concept.hexcode in (self._files.get(style) or self._names[style])

    def styles_of(self, concept: Concept) -> tuple[str, ...]:
        """The chosen styles that draw the concept, in their order."""
        return tuple(style for style in self.styles if self.has(concept, style))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (one set per process; scenes ask for the same sprites again)
    def draw(self, concept: Concept, style: str, size: int) -> Image.Image:
        """The picture as RGBA, ``size`` pixels a side, centred.

        Raises:
            MissingPackageError: a drawing from SVG without resvg-py.
        """
        if style in self._files:
            with Image.open(self._files[style][concept.hexcode]) as opened:
                image = opened.convert("RGBA")
        else:
            factor = max(1, _SUPERSAMPLED_PIXELS // size)
            image = _draw_svg(icon_svg(self._icons[style], self._names[style][concept.hexcode]), size * factor)
        if max(image.size) != size:
            scale = size / max(image.size)
            fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(fitted, Image.Resampling.LANCZOS)
        if image.size == (size, size):
            return image
        ground = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        ground.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return ground


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """The SVG of one icon of an Iconify set; aliases take their parent's drawing."""
    alias = icons.get("aliases", {}).get(name)
    icon = {**icons["icons"][alias["parent"]], **alias} if alias else icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def renderer_version() -> str:
    """Version of the SVG renderer; pictures may differ between versions."""
    return importlib.metadata.version("resvg-py")


def _draw_svg(svg: str, width: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise MissingPackageError("drawing emoji needs the package resvg-py: pip install resvg-py") from error
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True))
    with Image.open(io.BytesIO(data)) as opened:
        return opened.convert("RGBA")


def _read_concepts(folder: Path) -> tuple[Concept, ...]:
    names = _read_json(folder / "meta" / "groups.json")
    chinese = {entry["hexcode"]: entry for entry in _read_json(folder / "zh" / "data.json")}
    concepts = []
    for entry in _read_json(folder / "en" / "data.json"):
        if entry.get("group") in _SKIPPED_GROUPS or entry["hexcode"] not in chinese:
            continue
        translated = chinese[entry["hexcode"]]
        subgroup = names["subgroups"].get(str(entry.get("subgroup")), "")
        label_en = tidy_label_en(entry["label"])
        concepts.append(
            Concept(
                hexcode=normal_hexcode(entry["hexcode"]),
                emoji=entry["emoji"],
                label_zh=tidy_label_zh(translated["label"]),
                label_en=label_en,
                tags_zh=tuple(translated.get("tags", ())),
                tags_en=tuple(entry.get("tags", ())),
                group=names["groups"][str(entry["group"])],
                subgroup=subgroup,
                family=family_of(label_en, subgroup),
            )
        )
    return tuple(concepts)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove its package folder, it is fetched again") from error
