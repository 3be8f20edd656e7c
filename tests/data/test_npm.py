from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from megatron_vilg.data.npm import ensure_package, ensure_packages, package_folder
from megatron_vilg.errors import DataError, MissingPackageError


def tarball(name: str, version: str, extra: str = "package/data/a.json") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, text in (("package/package.json", json.dumps({"name": name, "version": version})), (extra, "[1]")):
            member = tarfile.TarInfo(path)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_fetches_once_and_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.tgz").write_bytes(tarball("@scope/name", "1.2.3"))
    # npm pack --loglevel=error --ignore-scripts --pack-destination DIR SPEC
    fake_npm(tmp_path / "bin", monkeypatch, f'echo "$6" >> {tmp_path}/calls; cp {tmp_path}/p.tgz "$5/"')
    for _ in range(2):
        folder = ensure_package(tmp_path / "cache", "@scope/name", "1.2.3")
    assert folder == tmp_path / "cache" / "scope-name" == package_folder(tmp_path / "cache", "@scope/name")
    assert (folder / "data" / "a.json").read_text() == "[1]"
    assert (tmp_path / "calls").read_text() == "@scope/name@1.2.3\n"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["scope-name"]


def test_another_version_in_the_cache_is_named(tmp_path: Path) -> None:
    folder = package_folder(tmp_path, "name")
    folder.mkdir()
    (folder / "package.json").write_text('{"version": "0.9.0"}')
    with pytest.raises(DataError, match=r"holds name 0\.9\.0, needed is 1\.0\.0: remove the folder"):
        ensure_package(tmp_path, "name", "1.0.0")


def test_without_npm_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingPackageError, match=r"no npm client to fetch name@1\.0\.0\. Install it .*as name is.*your own"
    ):
        ensure_package(tmp_path / "cache", "name", "1.0.0")


def test_a_failing_npm_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, "echo 'E404 not found' >&2; exit 3")
    with pytest.raises(DataError, match=r"could not fetch name@1\.0\.0 \(exit code 3\): E404 not found"):
        ensure_package(tmp_path / "cache", "name", "1.0.0")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_package_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.tgz").write_bytes(tarball("name", "2.0.0"))
    fake_npm(tmp_path / "bin", monkeypatch, f'cp {tmp_path}/p.tgz "$5/"')
    with pytest.raises(DataError, match=r"npm gave name 2\.0\.0 instead of name 1\.0\.0"):
        ensure_package(tmp_path / "cache", "name", "1.0.0")
    assert list((tmp_path / "cache").iterdir()) == []


def test_names_that_leave_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.tgz").write_bytes(tarball("name", "1.0.0", "package/../../evil.json"))
    fake_npm(tmp_path / "bin", monkeypatch, f'cp {tmp_path}/p.tgz "$5/"')
    with pytest.raises((tarfile.TarError, DataError)):
        ensure_package(tmp_path / "cache", "name", "1.0.0")
    assert not list(tmp_path.rglob("evil.json"))


def test_several_come_by_one_call_and_those_that_are_there_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}@1.0.0.tgz").write_bytes(tarball(name, "1.0.0"))
    each = f'cp {tmp_path}/$spec.tgz "$into/" || exit 1'
    script = f'echo "$@" >> {tmp_path}/calls; into="$5"; shift 5; for spec; do {each}; done'
    fake_npm(tmp_path / "bin", monkeypatch, script)
    cache = tmp_path / "cache"
    ensure_package(cache, "b", "1.0.0")
    ensure_packages(cache, dict.fromkeys(["a", "b", "c"], "1.0.0"))
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b", "c"]
    assert [line.split()[5:] for line in (tmp_path / "calls").read_text().splitlines()] == [
        ["b@1.0.0"],
        ["a@1.0.0", "c@1.0.0"],
    ]
    with pytest.raises(DataError, match=r"could not fetch d@1\.0\.0 gone@1\.0\.0 \(exit code 1\): .*d@1\.0\.0"):
        ensure_packages(cache, {"a": "1.0.0", "d": "1.0.0", "gone": "1.0.0"})
    assert sorted(path.name for path in cache.iterdir()) == ["a", "b", "c"]
