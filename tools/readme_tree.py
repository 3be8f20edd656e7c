"""Rewrite the list of the package's files in README.md from the first line of each docstring.

Usage: ``python tools/readme_tree.py`` after adding, renaming or re-purposing a file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN = "<!-- files: written by tools/readme_tree.py -->\n```text\n"
END = "```\n<!-- end of files -->\n"
FOLDERS = {
    "megatron_vilg": "",
    "tools": "Commands for those who work on the repository",
    "benchmarks": "Speed beside plain PyTorch and Hugging Face",
    "examples": "What to run first",
}
"""Folders with Python files, and their line where no ``__init__`` says it."""


def tree(root: Path = ROOT) -> str:
    """One line per file: path, and what it is for."""
    lines = []
    for folder, purpose in FOLDERS.items():
        files = sorted((root / folder).rglob("*.py"), key=lambda file: _order(file, root))
        if files and purpose:
            lines.append(_line(0, f"{folder}/", purpose))
        for file in files:
            path = file.relative_to(root)
            is_folder = file.name == "__init__.py"
            name = f"{path.parent.name}/" if is_folder else path.name
            lines.append(_line(len(path.parts) - (2 if is_folder else 1), name, _purpose(file)))
    return "\n".join(lines) + "\n"


def _line(depth: int, name: str, purpose: str) -> str:
    return f"{'  ' * depth + name:<28} {purpose}".rstrip()


def _order(file: Path, root: Path) -> tuple[tuple[int, str], ...]:
    """Files of a folder before its folders, its own line before both."""
    *folders, name = file.relative_to(root).parts
    return (*((1, folder) for folder in folders), (-1 if name == "__init__.py" else 0, name))


def _purpose(file: Path) -> str:
    """The docstring's first sentence, without the quotes that a code block would show."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").replace("``", "")
    return re.split(r"(?<=\w)\. ", first)[0].removesuffix(".")


def rewritten(readme: str, files: str) -> str:
    """The text of README.md with ``files`` between the two marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + files + END + tail


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8"), tree()), encoding="utf-8")
