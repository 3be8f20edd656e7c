"""The demo set: emoji in several styles as WebDataset shards, with held-out pairs and held-out concepts."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from megatron_vilg.data.emoji import DEMO_STYLES, STYLES, Concept, EmojiSet, renderer_version
from megatron_vilg.data.scenes import draw_scenes
from megatron_vilg.data.shards import ShardWriter, file_sha256
from megatron_vilg.data.token_files import check_same, read_json, write_json
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

LANGUAGES = ("zh", "en")
TRAIN, HELD_PAIRS, HELD_CONCEPTS = "train", "val-pairs", "val-concepts"
_FORMAT = 2
"""2: no keyword is a name."""
_HELD_PAIR_SHARE = 0.08
_HELD_CONCEPT_SHARE = 0.05
_SIMPLE_NAME = re.compile(r"[\u4e00-\u9fff]{1,4}")
_LEFT_OUT_GROUPS = ("people-body", "flags", "symbols")
_LEFT_OUT_SUBGROUPS = ("time", "clothing", "office", "place-map")
_TAGS_USED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What goes into a demo set; equal options give equal shards."""

    concepts: int = 120
    """Concepts to train on, chosen by seed among simple ones; 0: every emoji there is."""
    held_out_concepts: int = 8
    """Concepts never trained on, in addition; with ``concepts = 0``: 5 % of all instead."""
    styles: tuple[str, ...] = DEMO_STYLES
    """Keys of ``emoji.STYLES``."""
    size: int = 64
    """Side of the pictures in pixels."""
    languages: tuple[str, ...] = ("zh",)
    """Languages of the other wordings; the canonical caption is Chinese."""
    scenes: int = 0
    """Pictures composed of several emoji, with captions that can be checked from the pixels."""
    seed: int = 0
    """Choice of concepts and of what is held out."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One picture to draw, and the split it belongs to."""

    concept: Concept
    style: str
    split: str


def canonical_caption(label_zh: str, style: str) -> str:
    """The caption that image-to-text has to say."""
    return f"{STYLES[style].zh}的{label_zh}"


def other_wordings(concept: Concept, style: str, languages: Sequence[str], names: Container[str] = ()) -> list[str]:
    """Captions that may stand for the canonical one.

    Full wordings, keywords instead of the name, and the name or the style alone: those teach that the two are
    separate features, which combinations never seen together need. A keyword that is one of ``names``, those of the
    whole set, is left out: trained with this picture, it would be a wrong answer to that concept's prompts, which may
    be held out.
    """
    texts: list[str] = []

    def keywords(tags: Sequence[str]) -> list[str]:
        return [tag for tag in tags if tag not in names][:_TAGS_USED]

    if "zh" in languages:
        name, manner = concept.label_zh, STYLES[style].zh
        texts += [f"{name}，{manner}", f"画{manner}的{name}", f"一张{manner}的图标：{name}", name, manner]
        texts += [f"{manner}的{tag}" for tag in keywords(concept.tags_zh)]
    if "en" in languages:
        name, manner = concept.label_en, STYLES[style].en
        texts += [f"{name} in {manner}", f"{name}, {manner}", f"an icon of {name}, {manner}", name, manner]
        texts += [f"{tag} in {manner}" for tag in keywords(concept.tags_en)]
    return [text for text in dict.fromkeys(texts) if text != canonical_caption(concept.label_zh, style)]


def choose_pairs(emoji: EmojiSet, options: DemoOptions) -> list[Pair]:
    """Choose concepts by seed and divide their pictures into ``train``, ``val-pairs`` and ``val-concepts``.

    Families of look-alikes are never divided: a held-out concept has no look-alike in training, and where a pair is
    held out, its look-alikes in the same style are too. Every concept of a held-out pair is trained in other styles.

    Raises:
        DataError: more concepts asked for than there are.
    """
    families = _families(emoji, options)
    available = sum(len(members) for members in families.values())
    wanted = available if options.concepts == 0 else options.concepts
    held_count = round(_HELD_CONCEPT_SHARE * available) if options.concepts == 0 else options.held_out_concepts
    if options.concepts and wanted + held_count > available:
        raise DataError(
            f"concepts = {wanted} and {held_count} held out: only {available} concepts are simple and in all styles "
            f"{','.join(options.styles)}. Use at most concepts={available - held_count}, or 0 for every emoji"
        )
    held: set[str] = set()
    for name in sorted(families, key=lambda name: _draw(options.seed, "held", name)):
        if len(held) + len(families[name]) <= held_count:
            held.update(concept.hexcode for concept in families[name])
    everyone = list(itertools.chain.from_iterable(families.values()))
    rest = sorted(
        (concept for concept in everyone if concept.hexcode not in held),
        key=lambda concept: _draw(options.seed, "chosen", concept.hexcode),
    )[:wanted]
    trained = {concept.hexcode for concept in rest}
    held_pairs = _hold_out_pairs(emoji, rest, options)
    pairs = []
    for concept in emoji.concepts:
        for style in emoji.styles_of(concept):
            if concept.hexcode in held:
                pairs.append(Pair(concept, style, HELD_CONCEPTS))
            elif concept.hexcode in trained:
                split = HELD_PAIRS if (concept.hexcode, style) in held_pairs else TRAIN
                pairs.append(Pair(concept, style, split))
    return pairs


def _families(emoji: EmojiSet, options: DemoOptions) -> dict[str, list[Concept]]:
    """Concepts that may be chosen, by family; of two with the same Chinese name only the first."""
    families: dict[str, list[Concept]] = defaultdict(list)
    names: set[str] = set()
    for concept in emoji.concepts:
        simple = (
            concept.group not in _LEFT_OUT_GROUPS
            and concept.subgroup not in _LEFT_OUT_SUBGROUPS
            and _SIMPLE_NAME.fullmatch(concept.label_zh) is not None
            and emoji.styles_of(concept) == tuple(options.styles)
        )
        if (options.concepts == 0 or simple) and concept.label_zh not in names and emoji.styles_of(concept):
            names.add(concept.label_zh)
            families[concept.family].append(concept)
    return families


def _hold_out_pairs(emoji: EmojiSet, concepts: Sequence[Concept], options: DemoOptions) -> set[tuple[str, str]]:
    """About 8 % of the pairs, spread evenly over the styles; each concept keeps at least half of its styles."""
    families: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        families[concept.family].append(concept)
    goal = round(_HELD_PAIR_SHARE * sum(len(emoji.styles_of(concept)) for concept in concepts))
    queues = {
        style: iter(sorted(families, key=functools.partial(_draw, options.seed, "pair", style)))
        for style in options.styles
    }
    chosen: set[tuple[str, str]] = set()
    lost: Counter[str] = Counter()
    while queues and len(chosen) < goal:
        for style in list(queues):
            name = next(queues[style], None)
            if name is None:
                del queues[style]
                continue
            members = [concept for concept in families[name] if emoji.has(concept, style)]
            spare = all(2 * (lost[c.hexcode] + 1) <= len(emoji.styles_of(c)) for c in members)
            if spare and len(chosen) + len(members) <= goal:
                chosen.update((concept.hexcode, style) for concept in members)
                lost.update(concept.hexcode for concept in members)
    return chosen


def _draw(seed: int, *words: str) -> str:
    return hashlib.sha256("\0".join((str(seed), *words)).encode()).hexdigest()


def write_demo(out: Path | str, cache: Path, options: DemoOptions) -> dict[str, Any]:
    """Draw the demo set and write shards, ``README.md`` and ``manifest.json``.

    The folder appears when it is complete. A complete one made with the same options is kept.

    Args:
        out: new folder.
        cache: where npm packages lie or will lie unpacked.
        options: what to draw.

    Returns:
        The manifest.

    Raises:
        DataError: ``out`` holds something else; options that cannot be met; a package that cannot be had.
        MissingPackageError: no npm client, or no SVG renderer.
    """
    out = Path(out)
    if (out / "manifest.json").is_file():
        manifest = read_json(out / "manifest.json")
        if (found := manifest.get("format")) != _FORMAT:
            raise DataError(f"--out {out}: a demo set in format {found}, not {_FORMAT}. Give a new folder")
        check_same(str(out), manifest.get("options", {}), _options_json(options))
        logger.info("%s is complete already: %s", out, _counts_text(manifest["pairs"]))
        return manifest
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out}: it exists and is no demo set. Give a new folder")
    _check_options(options)
    emoji = EmojiSet(cache, options.styles)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    pairs = choose_pairs(emoji, options)
    shards = _write_pairs(partial, emoji, pairs, options)
    if options.scenes:
        shards += _write_scenes(partial, emoji, pairs, options)
    manifest = _manifest(emoji, pairs, shards, options)
    (partial / "README.md").write_text(_readme(manifest, options), encoding="utf-8")
    write_json(partial / "manifest.json", manifest)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    logger.info("%s: %s", out, _counts_text(manifest["pairs"]))
    return manifest


def _check_options(options: DemoOptions) -> None:
    wrong = [language for language in options.languages if language not in LANGUAGES]
    if wrong or not options.languages:
        raise DataError(f"languages = {','.join(options.languages)!r}: works zh, en, or zh,en")
    if len(set(options.styles)) != len(options.styles):
        raise DataError(f"styles = {','.join(options.styles)!r}: each style once")
    for name, least in (("size", 16), ("concepts", 0), ("held_out_concepts", 0), ("scenes", 0)):
        if getattr(options, name) < least:
            raise DataError(f"{name} = {getattr(options, name)}: at least {least} works")


def _write_pairs(
    folder: Path, emoji: EmojiSet, pairs: Sequence[Pair], options: DemoOptions
) -> list[tuple[str, int, list[Path]]]:
    shards = []
    names = {name for pair in pairs for name in (pair.concept.label_zh, pair.concept.label_en)}
    with tqdm(total=len(pairs), desc="draw", unit="picture", disable=None) as bar:
        for split in (TRAIN, HELD_PAIRS, HELD_CONCEPTS):
            # Styles of a concept would stand together; by hash, each stretch of a shard is a fair sample.
            chosen = sorted(
                (pair for pair in pairs if pair.split == split),
                key=lambda pair: _draw(options.seed, "order", pair.concept.hexcode, pair.style),
            )
            with ShardWriter(folder, split) as writer:
                for number, pair in enumerate(chosen):
                    image = png_on_white(emoji.draw(pair.concept, pair.style, options.size))
                    caption = canonical_caption(pair.concept.label_zh, pair.style)
                    writer.add(f"{number:06d}", image, caption, pair_fields(pair, options.languages, names))
                    bar.update()
            shards.append((split, len(chosen), writer.shards))
    return shards


def _write_scenes(
    folder: Path, emoji: EmojiSet, pairs: Sequence[Pair], options: DemoOptions
) -> list[tuple[str, int, list[Path]]]:
    held = {(pair.concept.hexcode, pair.style) for pair in pairs if pair.split == HELD_PAIRS}
    held |= {(pair.concept.hexcode, style) for pair in pairs if pair.split == HELD_CONCEPTS for style in emoji.styles}
    writers = {"train": ShardWriter(folder, "train-scenes"), "val-scenes": ShardWriter(folder, "val-scenes")}
    scenes = draw_scenes(emoji, count=options.scenes, size=options.size, seed=options.seed, without=held)
    for number, scene in enumerate(tqdm(scenes, total=options.scenes, desc="scenes", unit="picture", disable=None)):
        writers[scene.split].add(f"scene{number:06d}", png_on_white(scene.image), scene.caption, scene.fields())
    for writer in writers.values():
        writer.close()
    return [(split, writer.num_pairs, writer.shards) for split, writer in writers.items()]


def pair_fields(pair: Pair, languages: Sequence[str], names: Container[str]) -> dict[str, Any]:
    """What the ``.json`` of a pair says, in a set of concepts with these names."""
    concept, style = pair.concept, STYLES[pair.style]
    return {
        "concept": concept.hexcode,
        "emoji": concept.emoji,
        "style": style.key,
        "style_zh": style.zh,
        "style_en": style.en,
        "label_zh": concept.label_zh,
        "label_en": concept.label_en,
        "tags_zh": list(concept.tags_zh),
        "licence": style.licence,
        "split": pair.split,
        "group": concept.group,
        "family": concept.family,
        "alternates": other_wordings(concept, pair.style, languages, names),
    }


def png_on_white(image: Image.Image) -> bytes:
    """An RGBA picture on white ground as a PNG file."""
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image.convert("RGBA"))
    out = io.BytesIO()
    ground.convert("RGB").save(out, "PNG", optimize=False)
    return out.getvalue()


def _manifest(
    emoji: EmojiSet, pairs: Sequence[Pair], shards: Sequence[tuple[str, int, list[Path]]], options: DemoOptions
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    checksums: dict[str, str] = {}
    for split, count, paths in shards:
        counts[split] += count
        checksums |= {path.name: file_sha256(path) for path in paths}
    digest = hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
    return {
        "format": _FORMAT,
        "options": _options_json(options),
        "pairs": dict(counts),
        "concepts": {split: len({p.concept.hexcode for p in pairs if p.split == split}) for split in _splits(pairs)},
        "styles": dict(Counter(pair.style for pair in pairs)),
        "packages": emoji.packages,
        "renderer": f"resvg-py {renderer_version()}",
        "shards": checksums,
        "sha256": digest,
    }


def _splits(pairs: Sequence[Pair]) -> Iterator[str]:
    return iter(dict.fromkeys(pair.split for pair in pairs))


def _options_json(options: DemoOptions) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))  # tuples as lists, as the file has them


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def _readme(manifest: dict[str, Any], options: DemoOptions) -> str:
    rows = [
        f"| {style} | {STYLES[style].zh} | {manifest['styles'].get(style, 0)} | {STYLES[style].licence} | "
        f"{STYLES[style].credit} | {STYLES[style].package} {STYLES[style].version} |"
        for style in options.styles
    ]
    kinds = {
        "train": "what a model may learn from",
        "val-pairs": "a concept and a style, each trained, but never together",
        "val-concepts": "concepts never trained, nor what looks like them by its name",
        "val-scenes": "things in a number, size or place never trained together, on any ground, named in any order",
    }
    counts = [f"| {split} | {count} | {kinds[split]} |" for split, count in manifest["pairs"].items()]
    return "\n".join(
        [
            "# Emoji pairs",
            "",
            f"Pictures of {options.size} x {options.size} pixels on white with Chinese captions, as WebDataset shards:",
            "KEY.png, KEY.txt (the caption), KEY.json (its parts and other wordings).",
            "",
            "| split | pairs | what it is |",
            "| --- | --- | --- |",
            *counts,
            "",
            "## Licences of the pictures",
            "",
            "The sets keep their own licences. Whoever shows pictures of the CC-BY and CC-BY-SA sets names them;",
            "what is derived from OpenMoji has to be shared under the same licence.",
            "",
            "| style | in captions | pictures | licence | credit | package |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Names and keywords: emojibase-data (MIT), from Unicode CLDR (Unicode licence).",
            "",
        ]
    )
