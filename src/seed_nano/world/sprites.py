"""The drawings of nano's things with their transparency: built once from pinned packages, committed as one shard.

A sprite is trimmed to what is visible, its longer side `SIDE` pixels. Its colours are used premultiplied with alpha, so
that no colour of an invisible pixel gets into an edge when a picture is reduced.
"""

from __future__ import annotations

import io
import json
from contextlib import closing
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from seed_multimodal.data.formats.record import Record
from seed_multimodal.data.formats.tar import OpenFiles, tar_records
from seed_multimodal.data.formats.tar_headers import Damaged
from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.disk import read_json_object, replace_text, sha256_of
from seed_multimodal.errors import DataError, ImageError
from seed_multimodal.images.open import image_header
from seed_nano.world.packages import SOURCES, drawings, fetch
from seed_nano.world.place import BUILD_HINT, LISTS, SHARD, find_world
from seed_nano.world.things import STYLES, THINGS

SIDE = 112


@lru_cache(maxsize=4)
def load_sprites(path: str | Path | None = None) -> dict[tuple[str, str], Image.Image]:
    """Every sprite by (style, thing), RGBA with premultiplied colours (mode `RGBa`).

    Raises:
        DataError: the shard is missing, torn or lacks a drawing.
    """
    file = find_world(path) / SHARD
    sprites = {}
    try:
        with closing(OpenFiles()) as files:
            for record in tar_records(file):
                style, _, name = record.key.partition("-")
                if "webp" in record.members:  # what is missing is named below
                    sprites[style, name.replace("_", " ")] = _drawing(record, files)
    except (Damaged, OSError) as error:
        raise DataError(f"{file}: torn, damaged or no shard of drawings ({error}); {BUILD_HINT}") from None
    missing = next(((s, n) for s in STYLES for n in THINGS if (s, n) not in sprites), None)
    if missing:
        raise DataError(f"{file}: it has no drawing of {missing[1]!r} in style {missing[0]!r}; {BUILD_HINT}")
    return sprites


def _drawing(record: Record, files: OpenFiles) -> Image.Image:
    place = record.members["webp"]
    content = place if isinstance(place, bytes) else files.read(place.file, place.offset, place.size)
    try:
        image_header(content, name=record.where)  # its limits hold for drawings, too
        return Image.open(io.BytesIO(content)).convert("RGBA").convert("RGBa")
    except ImageError as error:
        raise DataError(f"{error} {BUILD_HINT[0].upper()}{BUILD_HINT[1:]}") from None
    except OSError as error:  # Pillow's own errors are OSErrors
        raise DataError(f"{record.where}: a damaged drawing ({error}); {BUILD_HINT}") from None


def draw_sprite(svg: str, name: str, side: int = SIDE) -> Image.Image:
    """One SVG as RGBA, trimmed to its visible part, its longer side `side` pixels.

    Raises:
        DataError: naming the drawing, when the SVG cannot be rendered or shows nothing.
    """
    import resvg_py

    try:
        # Drawn at four times the size and reduced once, so that thin lines survive; dpi lets sizes in mm render.
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side * 4, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"{name}: its SVG cannot be rendered ({error}).") from None
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = drawn.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise DataError(f"{name}: its SVG shows nothing.")
    drawn = drawn.crop(box).convert("RGBa")
    scale = side / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    return drawn.resize(size, Image.Resampling.BOX).convert("RGBA")


def build(out: Path, cache: Path) -> dict[str, int]:
    """Fetch the packages, draw every thing in every style, write shard and manifest to `out`; lists there stay.

    Returns:
        Numbers: `sprites`, `bytes`.

    Raises:
        DataError: a package cannot be had or is not the pinned one; a thing has no drawing in a style.
    """
    members = []
    for style in STYLES:
        svgs = {drawing.code: drawing.svg for drawing in drawings(style, fetch(SOURCES[style], cache))}
        for thing in THINGS.values():
            if thing.code not in svgs:
                raise DataError(f"{SOURCES[style].package}: it has no drawing of {thing.name!r} ({thing.code}).")
            buffer = io.BytesIO()
            sprite = draw_sprite(svgs[thing.code], f"{style} {thing.name}")
            sprite.save(buffer, "WEBP", lossless=True, quality=100, method=6)
            members.append((f"{style}-{thing.name.replace(' ', '_')}", {"webp": buffer.getvalue()}))
    write_shard(out / SHARD, members)
    manifest = {
        "format": 2, "side": SIDE, "styles": list(STYLES), "things": len(THINGS),
        "files": {name: {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
                  for name in (SHARD, LISTS) if (out / name).is_file()},
        # Other versions of these may round a pixel differently; the same ones give the same bytes.
        "libraries": {"resvg_py": version("resvg_py"), "pillow": version("pillow")},
        "sources": [{"name": s.name, "package": f"{s.package}@{s.version}", "integrity": s.integrity,
                     "licence": s.licence, "credit": s.credit} for s in (SOURCES[style] for style in STYLES)],
    }
    replace_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return {"sprites": len(members), "bytes": (out / SHARD).stat().st_size}


def check_files(folder: Path) -> None:
    """Raise DataError when a file of the set is missing or not the one that its manifest names."""
    named = read_json_object(folder / "manifest.json", DataError).get("files")
    for name in (SHARD, LISTS):
        entry = named.get(name) if isinstance(named, dict) else None
        if not isinstance(entry, dict) or not (folder / name).is_file():
            raise DataError(f"{folder}: {name} is not there, or not in its manifest.json; {BUILD_HINT}")
        if sha256_of(folder / name) != entry.get("sha256"):
            raise DataError(f"{folder / name}: its sha256 is not the manifest's; it is damaged or from elsewhere.")
