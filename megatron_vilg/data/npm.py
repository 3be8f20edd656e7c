"""Fetch data packages with the npm client: a tarball is downloaded and unpacked, nothing is installed or run."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vilg.errors import DataError, MissingPackageError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

_TIMEOUT_S = 300
"""For each package of a call."""


def package_folder(cache: Path, package: str) -> Path:
    """Where a package lies unpacked: ``@scope/name`` becomes ``scope-name``."""
    return cache / package.removeprefix("@").replace("/", "-")


def ensure_package(cache: Path, package: str, version: str) -> Path:
    """The folder of an unpacked package, fetched as by ``ensure_packages`` if it is not there yet."""
    ensure_packages(cache, {package: version})
    return package_folder(cache, package)


def ensure_packages(cache: Path, packages: Mapping[str, str]) -> None:
    """Have packages unpacked in ``cache``; those that are not there yet are fetched by one call of npm.

    Args:
        cache: made if something has to be fetched.
        packages: version by name.

    Raises:
        MissingPackageError: something has to be fetched and there is no npm client.
        DataError: npm could not fetch them, or another version lies in the cache.
    """
    missing: dict[str, str] = {}
    for package, version in packages.items():
        found = _version(folder := package_folder(cache, package))
        if found is None:
            missing[package] = version
        elif found != version:
            raise DataError(
                f"{folder} holds {package} {found}, needed is {version}: remove the folder, it is fetched again"
            )
    if missing:
        _fetch(cache, missing)


def _fetch(cache: Path, packages: Mapping[str, str]) -> None:
    specs = [f"{package}@{version}" for package, version in packages.items()]
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackageError(
            f"the demo pictures are npm packages, and there is no npm client to fetch {', '.join(specs)}. Install it "
            f"(for example `apt-get install npm`), or put the unpacked packages into {cache}, each named as "
            f"{package_folder(cache, next(iter(packages))).name} is, or train on pictures of "
            "your own: a folder of NAME.png and NAME.txt needs no npm"
        )
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s with npm", ", ".join(specs))
    with tempfile.TemporaryDirectory(dir=cache, suffix=".partial") as scratch:
        fetched: dict[str, Path] = {}
        for number, tarball in enumerate(_pack(npm, specs, Path(scratch))):
            unpacked = Path(scratch) / str(number)
            _unpack(tarball, unpacked)
            fetched[_description(unpacked).get("name", "")] = unpacked
        for package, version in packages.items():
            if package not in fetched or _version(fetched[package]) != version:
                got = ", ".join(f"{name} {_version(path)}" for name, path in fetched.items())
                raise DataError(f"npm gave {got} instead of {package} {version}")
        for package, unpacked in fetched.items():
            folder = package_folder(cache, package)
            if not folder.exists():  # another process may have been quicker
                unpacked.rename(folder)


def _description(folder: Path) -> dict[str, Any]:
    """What ``package.json`` says; nothing where there is none."""
    description = folder / "package.json"
    return dict(json.loads(description.read_text(encoding="utf-8"))) if description.is_file() else {}


def _version(folder: Path) -> str | None:
    version = _description(folder).get("version")
    return None if version is None else str(version)


def _pack(npm: str, specs: Sequence[str], into: Path) -> list[Path]:
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(into), *specs]
    names, limit = " ".join(specs), _TIMEOUT_S * len(specs)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, cwd=into)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"npm did not fetch {names} within {limit} seconds; run the command again") from error
    tarballs = sorted(into.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != len(specs):
        raise DataError(
            f"npm could not fetch {names} (exit code {done.returncode}): {done.stderr.strip() or 'no message'}. "
            f"Try it by hand: npm pack {names}"
        )
    return tarballs


def _unpack(tarball: Path, folder: Path) -> None:
    """Unpack without the first folder of the names, which npm tarballs all share."""
    with tarfile.open(tarball) as tar:
        for member in tar.getmembers():
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isfile() and inner.parts:
                member.name = str(inner)
                tar.extract(member, folder, filter="data")
