"""Sources of the drawings: pinned packages of the npm registry, checked against fixed sha512 values.

Packages are fetched by the registry's own client (`npm pack NAME@VERSION`) and nothing else; a file whose
sha512 is not the pinned one is refused. The archives are read in place, never unpacked or run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.errors import DataError


@dataclass(frozen=True)
class Source:
    """One pinned package: npm name and version, Subresource-Integrity value, licence of the artwork."""

    name: str
    package: str
    version: str
    integrity: str
    licence: str
    credit: str

    @property
    def filename(self) -> str:
        """Name `npm pack` gives the archive."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Drawing:
    """One SVG of a style: `code` is the code points in lower-case hex joined by '-', variation selectors left out."""

    style: str
    code: str
    svg: str


SOURCES = {
    source.name: source
    for source in (
        Source(
            "twemoji", "@twemoji/svg", "15.0.0",
            "sha512-ZSPef2B6nBaYnfgdTbAy4jgW95o7pi2xPGwGCU+WMTxo7J6B1lMPTWwSq/wTuiMq+N0khQ90CcvYp1wFoQpo/w==",
            "CC-BY-4.0", "Twemoji, copyright Twitter, Inc and other contributors",
        ),
        Source(
            "noto", "@iconify-json/noto", "1.2.9",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "Apache-2.0", "Noto Emoji, copyright Google Inc",
        ),
        Source(
            "fluent", "@iconify-json/fluent-emoji-flat", "1.2.6",
            "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "MIT", "Fluent Emoji (flat), copyright Microsoft Corporation",
        ),
    )
}


def fetch(source: Source, cache: Path) -> Path:
    """The package's archive in `cache`, fetched by `npm pack` when it is not there, and verified either way.

    Raises:
        DataError: npm is missing or fails, or the file's sha512 is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / source.filename
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(f"npm is not installed; install Node.js, or put {source.filename} into {cache}.")
        command = [npm, "pack", f"{source.package}@{source.version}", "--silent", "--pack-destination", str(cache)]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0 or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"npm pack {source.package}@{source.version} failed: {reason}")
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != source.integrity:
        raise DataError(f"{path}: its sha512 is not the pinned one for {source.package}@{source.version}; delete it.")
    return path


def read_member(archive: Path, member: str) -> bytes:
    """Bytes of one file of a package, for example `package/icons.json`."""
    with tarfile.open(archive, "r:gz") as tar:
        try:
            stream = tar.extractfile(member)
        except KeyError:
            stream = None
        if stream is None:
            raise DataError(f"{archive.name}: no member {member}.")
        return stream.read()


def plain_code(code: str) -> str:
    """Code points as every source can be matched: lower-case hex, no padding, no variation selector 16."""
    return "-".join(f"{int(point, 16):x}" for point in code.split("-") if int(point, 16) != 0xFE0F)


def drawings(style: str, archive: Path) -> Iterator[Drawing]:
    """Every SVG of a style, ordered by code."""
    reader = {"twemoji": _svg_files, "noto": _iconify, "fluent": _iconify}[style]
    yield from sorted(reader(style, archive), key=lambda drawing: drawing.code)


def _svg_files(style: str, archive: Path) -> Iterator[Drawing]:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parent, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not member.isreg() or parent != "package" or extension != "svg":
                continue
            stream = tar.extractfile(member)
            if stream is not None:
                yield Drawing(style, plain_code(stem), stream.read().decode("utf-8"))


def _iconify(style: str, archive: Path) -> Iterator[Drawing]:
    """Iconify sets: icons.json holds SVG bodies and aliases (some mirrored), chars.json maps code points to names."""
    data = json.loads(read_member(archive, "package/icons.json"))
    names = json.loads(read_member(archive, "package/chars.json"))
    for code, name in names.items():
        alias = data.get("aliases", {}).get(name)
        icon = data["icons"].get(alias["parent"] if alias else name)
        if icon is None:
            continue
        width, height = icon.get("width", data["width"]), icon.get("height", data["height"])
        left, top = icon.get("left", 0), icon.get("top", 0)
        body = icon["body"]
        if alias and alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        elif alias and set(alias) - {"parent"}:
            raise DataError(f"{archive.name}: icon {name} uses a transformation this build does not know: {alias}.")
        yield Drawing(
            style, plain_code(code),
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" '
            f'height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>',
        )
