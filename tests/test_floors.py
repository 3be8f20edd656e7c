"""Fences that import-linter cannot draw: parts of torch, and imports inside functions of the commands."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_vilg

PACKAGE = Path(megatron_vilg.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
DISTRIBUTED_FLOORS = ("parallel", "checkpoint")
MOST_LINES = 400
MOST_FUNCTION_LINES = 60


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_torch_distributed_stays_on_its_floors() -> None:
    users = [
        str(file.relative_to(PACKAGE))
        for file in FILES
        if file.relative_to(PACKAGE).parts[0] not in DISTRIBUTED_FLOORS
        and any(is_inside(module, "torch.distributed") for module in imported_modules(ast.parse(file.read_text())))
    ]
    assert users == []


def test_private_names_of_torch_stay_in_one_file() -> None:
    users = [
        (str(file.relative_to(PACKAGE)), module)
        for file in FILES
        if file.relative_to(PACKAGE).as_posix() != "parallel/torch_compat.py"
        for module in imported_modules(ast.parse(file.read_text()))
        if is_inside(module, "torch") and any(part.startswith("_") for part in module.split("."))
    ]
    assert users == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    long_functions = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MOST_FUNCTION_LINES
    ]
    assert long_functions == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_every_package_of_an_extra_is_used() -> None:
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"deepspeed", "lean", "kernels", "eval"} <= extras.keys()
    source = "\n".join(file.read_text() for file in FILES)
    asked = [re.findall(r"^[\w-]+", need)[0] for name in extras.keys() - {"bench", "dev"} for need in extras[name]]
    assert [package for package in asked if not re.search(rf"\b{package}\b", source)] == []
