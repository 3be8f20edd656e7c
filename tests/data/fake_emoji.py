"""Tiny stand-ins for the emoji packages, as they lie unpacked in a cache folder."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from megatron_vilg.data.emoji import NAMES_PACKAGE, STYLES
from megatron_vilg.data.npm import package_folder

NAMES = (
    ("1F400", "rat", "老鼠"),
    ("1F401", "mouse", "小鼠"),
    ("1F402", "ox", "公牛"),
    ("1F403", "buffalo", "水牛"),
    ("1F404", "cow", "奶牛"),
    ("1F405", "tiger", "老虎"),
    ("1F42F", "tiger face", "老虎头"),
    ("1F407", "rabbit", "兔子"),
    ("1F409", "dragon", "龙"),
    ("1F40A", "crocodile", "鳄鱼"),
    ("1F40B", "whale", "鲸鱼"),
    ("1F40C", "snail", "蜗牛"),
    ("1F40D", "snake", "蛇"),
    ("1F40E", "horse", "马"),
    ("1F434", "horse face", "马头"),
    ("1F410", "goat", "山羊"),
)
"""Two families of two among them: tiger and horse."""
LEFT_OUT = (
    ("1F468", "man", "男人", "1", "23"),
    ("1F1E8-1F1F3", "flag: China", "旗: 中国", "9", "98"),
    ("1F42A", "camel", "一只很长名字的骆驼", "3", "34"),
)
GROUPS = {
    "groups": {"1": "people-body", "3": "animals-nature", "9": "flags"},
    "subgroups": {"23": "person", "34": "animal-mammal", "98": "country-flag"},
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_packages(cache: Path) -> Path:
    """All seven packages: 19 concepts, a coloured shape each; EmojiOne without code points, 3D as WebP."""
    rows = [(*row, "3", "34") for row in NAMES] + list(LEFT_OUT)
    names = package_folder(cache, NAMES_PACKAGE[0])
    write_json(names / "package.json", {"version": NAMES_PACKAGE[1]})
    write_json(names / "meta" / "groups.json", GROUPS)
    for language, column in (("en", 1), ("zh", 2)):
        entries = [
            {
                "hexcode": row[0],
                "emoji": "".join(chr(int(part, 16)) for part in row[0].split("-")),
                "label": row[column],
                # The name of its neighbour first: real keywords are other concepts' names now and then.
                "tags": [rows[i - 1][column], f"{row[column]}{'标签' if language == 'zh' else ' tag'}"],
                "group": int(row[3]),
                "subgroup": int(row[4]),
            }
            for i, row in enumerate(rows)
        ]
        write_json(names / language / "data.json", [*entries, {"hexcode": "1F1E6", "label": "A", "emoji": "A"}])
    for number, style in enumerate(STYLES.values()):
        folder = package_folder(cache, style.package)
        write_json(folder / "package.json", {"version": style.version})
        icons = {row[1].replace(": ", "-").replace(" ", "-"): row for row in rows}
        if style.key == "fluent-3d":
            (folder / "assets").mkdir(parents=True)
            for i, row in enumerate(icons.values()):
                image = Image.new("RGBA", (32, 32), (i * 9, 99, 200, 255))
                image.save(folder / "assets" / f"{row[0].lower()}-fe0f.webp", lossless=True)
            continue
        bodies = {
            name: {"body": f'<circle cx="8" cy="8" r="{3 + number}" fill="rgb({i * 9},{number * 40},90)"/>'}
            for i, name in enumerate(icons)
        }
        alias = {"big-cat": {"parent": "tiger"}}
        write_json(folder / "icons.json", {"icons": bodies, "aliases": alias, "width": 16, "height": 16})
        chars = {row[0].lower(): name for name, row in icons.items()}
        write_json(folder / "chars.json", {} if style.key == "emojione" else chars)
    return cache
