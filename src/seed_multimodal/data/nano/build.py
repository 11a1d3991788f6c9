"""Build the nano set: fetch, render, unite, split, caption, and write shards with everything beside them.

Run: `python -m seed_multimodal.data.nano build --out data/nano64` (about two minutes on one core, no GPU).
Share-alike art goes to shards of its own (`nano64-sharealike-000000.tar.gz`); two builds from the same
packages with the same libraries give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.data.formats.writer import write_shard
from seed_multimodal.data.nano.concepts import COMMON_WORDS, Concept, fold_label, read_concepts
from seed_multimodal.data.nano.conversations import make_conversations
from seed_multimodal.data.nano.edits import make_edits
from seed_multimodal.data.nano.families import SPLITS, assign_splits, name_families
from seed_multimodal.data.nano.near import near_pairs
from seed_multimodal.data.nano.packages import SHARE_ALIKE, SOURCES, Drawing, drawings, fetch
from seed_multimodal.data.nano.render import main_colour, render_svg
from seed_multimodal.data.nano.types import NanoRecord
from seed_multimodal.data.nano.words import MAX_TAGS, captions, questions
from seed_multimodal.disk import sha256_of
from seed_multimodal.errors import DataError
from seed_multimodal.progress import Progress

FORMAT = 1
Log = Callable[[str], None] | None
CONVERSATIONS = {"train": 4000, "val": 120, "test_concept": 120, "test_combo": 120}


@dataclass
class BuildOptions:
    """Options: picture side in pixels, styles, tones, WebP quality (101 is lossless), samples in one shard."""

    size: int = 64
    styles: tuple[str, ...] = ("twemoji", "noto", "fluent")
    all_tones: bool = False
    quality: int = 101
    per_shard: int = 20_000


@dataclass
class BuildReport:
    """Result of a build."""

    out: Path
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class Picture:
    """A rendered drawing: uint8 [S, S, 3] pixels and the sha256 of them."""

    drawing: Drawing
    concept: Concept
    pixels: np.ndarray
    digest: str

    @property
    def key(self) -> str:
        """Key of the record: style and code."""
        return f"{self.drawing.style}-{self.drawing.code}"


def build(out: Path, cache: Path, options: BuildOptions, log: Log = None) -> BuildReport:
    """Fetch the pinned packages and build into `out`; `log` gets the progress.

    Raises:
        DataError: an unknown style or a bad package.
    """
    for style in options.styles:
        if style not in SOURCES or style == "emojibase":
            raise DataError(f"unknown style {style!r}; the styles are twemoji, noto, fluent and openmoji.")
    concepts = read_concepts(fetch(SOURCES["emojibase"], cache), all_tones=options.all_tones)
    svgs = [drawing for style in options.styles for drawing in drawings(style, fetch(SOURCES[style], cache))]
    return build_from(svgs, concepts, out, options, log)


def build_from(svgs: list[Drawing], concepts: dict[str, Concept], out: Path, options: BuildOptions,
               log: Log = None) -> BuildReport:
    """Build from given drawings and concepts (tests use this with a few SVGs of their own)."""
    began = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = BuildReport(out)
    pictures, facts = _render_all(svgs, concepts, options, report, log)
    if not pictures:
        raise DataError(f"{out}: nothing to build; no drawing has a known code point.")
    records = _records(pictures, facts)
    edits = make_edits(records)
    conversations = make_conversations(records, edits, CONVERSATIONS)
    files = _write_shards(out, records, pictures, options)
    files.append(_write_lines(out / "edits.jsonl.gz", (
        [e.source, e.target, e.instruction, e.response, e.kind, e.split] for e in edits)))
    files.append(_write_lines(out / "conversations.jsonl.gz", (
        {"split": c.split, "messages": [[m["role"], *m["content"]] for m in c.messages]} for c in conversations)))
    report.kept = len(records)
    report.counts = {
        "pictures": _by_split(r.split for r in records),
        **{f"pictures {style}": _by_split(r.split for r in records if r.style == style) for style in options.styles},
        "families": _by_split({(r.family, r.split): r.split for r in records}.values()),
        "edits": _by_split(e.split for e in edits),
        "conversations": _by_split(c.split for c in conversations),
    }
    report.bytes = sum(path.stat().st_size for path in files) + _write_manifest(out, files, options, report)
    report.seconds = time.perf_counter() - began
    return report


def _render_all(svgs: list[Drawing], concepts: dict[str, Concept], options: BuildOptions, report: BuildReport,
                log: Log) -> tuple[list[Picture], dict[str, list[str]]]:
    """Pictures in order of key, and the facts that unite them into families (dropped duplicates leave theirs)."""
    pictures: list[Picture] = []
    seen: dict[str, Picture] = {}
    facts: dict[str, list[str]] = {}
    known = [d for d in svgs if d.code in concepts]
    report.skipped["no words for it (toned, component or not in Unicode)"] = len(svgs) - len(known)
    known.sort(key=lambda d: (options.styles.index(d.style), concepts[d.code].order, d.code))
    bar = Progress("rendering", len(known), "picture", log=log)
    for drawing in known:
        bar.update()
        concept = concepts[drawing.code]
        pixels = render_svg(drawing.svg, options.size, f"{drawing.style} {drawing.code}")
        if pixels is None:
            report.skipped["blank"] += 1
            continue
        picture = Picture(drawing, concept, pixels, hashlib.sha256(pixels.tobytes()).hexdigest())
        own = [f"code {concept.family_code}", f"label {fold_label(concept.label)}"]
        if picture.digest in seen:
            report.skipped["pixel-equal to another"] += 1
            facts[seen[picture.digest].key] += own
            continue
        seen[picture.digest] = picture
        facts[picture.key] = own
        pictures.append(picture)
    bar.close()
    return sorted(pictures, key=lambda p: p.key), facts


def _records(pictures: list[Picture], facts: dict[str, list[str]]) -> list[NanoRecord]:
    """Records of the pictures in the same order, with splits, captions and questions."""
    for i, j in near_pairs([p.pixels for p in pictures]):
        facts[pictures[j].key].append(facts[pictures[i].key][0])
    families = name_families((p.key, facts[p.key]) for p in pictures)
    splits = assign_splits(((p.key, families[p.key], p.drawing.style, p.concept.label) for p in pictures), COMMON_WORDS)
    labels = {split: sorted({p.concept.label for p in pictures if splits[p.key] == split}) for split in SPLITS}
    hidden = set(labels["val"]) | set(labels["test_concept"])
    records = []
    for p in pictures:
        split = splits[p.key]
        # Held-out names stay out of train words altogether, also where they are only a tag of something else.
        tags = [t for t in p.concept.tags if split in ("val", "test_concept") or t not in hidden][:MAX_TAGS]
        colour, share = main_colour(p.pixels)
        record = NanoRecord(
            key=p.key, style=p.drawing.style, family=families[p.key], label=p.concept.label, split=split,
            captions=captions(p.drawing.style, p.concept.label, p.concept.subgroup, tags, p.concept.tone), qa=[],
            group=p.concept.group, subgroup=p.concept.subgroup, tags=tags, colour=colour, tone=p.concept.tone,
            gender=p.concept.gender, code=p.concept.code,
        )
        pool = labels["train"] if split == "test_combo" else labels[split]
        record.qa = questions(record, share, pool)
        records.append(record)
    return records


def _write_shards(
    out: Path, records: list[NanoRecord], pictures: list[Picture], options: BuildOptions
) -> list[Path]:
    """Write shards in an order mixed by hash, share-alike styles apart; remove shards of an earlier build."""
    for old in out.glob("nano*.tar*"):
        old.unlink()
    written = []
    order = sorted(range(len(records)), key=lambda i: hashlib.sha256(records[i].key.encode()).digest())
    for suffix, wanted in (("", False), ("-sharealike", True)):
        chosen = [i for i in order if (records[i].style in SHARE_ALIKE) == wanted]
        for number, start in enumerate(range(0, len(chosen), options.per_shard)):
            path = out / f"nano{options.size}{suffix}-{number:06d}.tar.gz"
            write_shard(path, ((records[i].key, {
                "webp": encode_webp(pictures[i].pixels, options.quality),
                "json": _dump(records[i].to_json()).encode(),
            }) for i in chosen[start:start + options.per_shard]))
            written.append(path)
    return written


def encode_webp(pixels: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] as WebP; quality 101 is lossless."""
    buffer = io.BytesIO()
    lossless = quality > 100
    Image.fromarray(pixels).save(buffer, "WEBP", quality=100 if lossless else quality, method=4, lossless=lossless)
    return buffer.getvalue()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def _write_lines(path: Path, rows: Iterable[Any]) -> Path:
    text = "".join(f"{_dump(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))
    return path


def _by_split(splits: Iterable[str]) -> dict[str, int]:
    counts = Counter(splits)
    return {split: counts[split] for split in SPLITS}


def _write_manifest(out: Path, files: list[Path], options: BuildOptions, report: BuildReport) -> int:
    """manifest.json: counts, sha256 of every file, sources, libraries; the number of its bytes."""
    used = [SOURCES[name] for name in (*options.styles, "emojibase")]
    manifest = {
        "format": FORMAT, "size": options.size, "styles": list(options.styles), "all_tones": options.all_tones,
        "webp_quality": options.quality, "records": report.kept, "counts": report.counts,
        "skipped": dict(report.skipped),
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files},
        # Other versions of these may round a pixel differently; the same ones give the same bytes.
        "libraries": {"resvg_py": version("resvg_py"), "pillow": version("pillow")},
        "sources": [{"name": s.name, "package": f"{s.package}@{s.version}", "integrity": s.integrity,
                     "licence": s.licence, "credit": s.credit} for s in used],
    }
    path = out / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="ascii", newline="\n")
    return path.stat().st_size
