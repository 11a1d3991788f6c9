"""What a system makes of images: a sheet, scores, and a verdict in words.

    python src/tools/report_system.py --model SYSTEM --held_out IMAGES --save_dir OUT

`sheet.webp`: each image, rebuilt from its codes or features, its description; and what is drawn for
its caption. `report.md`: scores with 95 % intervals (Wilson's), and the verdict.

described: the description is one of the image's captions, articles, case and punctuation aside.
drawn: of all images, the nearest one to the drawing (32 × 32 pixels, the best of small shifts) has
the caption that was asked for. rebuilt: the nearest one is the image itself or has its caption.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))
from seed_multimodal import MultimodalSystem  # noqa: E402
from seed_multimodal.data.formats.contents import registered_formats  # noqa: E402
from seed_multimodal.data.formats.pairs import Pairs  # noqa: E402
from seed_multimodal.disk import replace_text  # noqa: E402
from seed_multimodal.entry import DONE, add_device, run_program  # noqa: E402
from seed_multimodal.evaluation.metrics import Estimate  # noqa: E402
from seed_multimodal.images.io import open_image  # noqa: E402
from seed_multimodal.images.sheet import Cell, Row, contact_sheet  # noqa: E402

SIDE = 32
SHIFTS = (-2, 0, 2)  # pixels
SHOWN = 10
GOOD, POOR = 0.8, 0.5  # shares
Z = 1.96  # of 95 %

Captioned = tuple[Image.Image, list[str]]


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a system by name or folder")
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--held_out", help="images with captions that it did not learn")
    shown.add_argument("--images", help="images with captions that it learned")
    parser.add_argument("--learned", help="those that it learned, among which the nearest may be")
    parser.add_argument("--limit", type=int, default=60, help="images (default: %(default)s)")
    parser.add_argument("--save_dir", type=Path, required=True)
    add_device(parser)
    return run_program(parser, write_report, None, "report")


def write_report(args: argparse.Namespace) -> int:
    """Write the sheet and the report; print the verdict."""
    kind = "held-out" if args.held_out else "learned"
    held_out = read_pairs(args.held_out or args.images, args.limit)
    others = read_pairs(args.learned) if args.learned else []
    system = MultimodalSystem.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    images = [image for image, _ in held_out]
    prompts = [captions[0] for _, captions in held_out]

    # 1. What the system makes of them.
    described = system.describe(images)
    rebuilt = system.reconstruct(images)
    drawn = system.draw(prompts, seed=0)

    # 2. Scores.
    candidates = held_out + others
    right = [
        plain(text) in {plain(caption) for caption in captions}
        for text, (_, captions) in zip(described, held_out, strict=True)
    ]
    scores = {
        "described": share(right),
        "rebuilt": share(recognised(rebuilt, held_out, candidates)),
        "drawn": share(recognised(drawn, held_out, candidates)),
    }
    codes_used = share_of_codes(system, [image for image, _ in candidates])

    # 3. The files.
    args.save_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        Row("image", [Cell(image, " / ".join(captions)) for image, captions in held_out[:SHOWN]]),
        Row("rebuilt, described", [*map(Cell, rebuilt[:SHOWN], described)]),
        Row("drawn", [*map(Cell, drawn[:SHOWN], prompts)]),
    ]
    name = "/".join(Path(system.config.name).parts[-2:])
    sheet = contact_sheet(rows, f"{name}: {kind} images")
    sheet.save(args.save_dir / "sheet.webp", quality=90)
    verdict = verdict_of(scores, codes_used, kind)
    replace_text(args.save_dir / "report.md", report_text(name, scores, verdict, kind))
    print(
        f"{verdict}\n{args.save_dir}: report.md, sheet.webp\nNext: seed chat --model {args.model}"
    )
    return DONE


def read_pairs(files: str, limit: int | None = None) -> list[Captioned]:
    """Images with their captions, of files or of a registered format (`nano`: held-out scenes)."""
    if files in registered_formats():
        pairs = Pairs(None, format=files, options={"split": "val", "number": limit})
    else:
        pairs = Pairs(files)
    rows: list[Captioned] = []
    for index in range(len(pairs))[:limit]:
        pair = pairs.read(index)
        rows.append((open_image(pair.image).image, pair.captions))
    return rows


# ---- scores


def share(right: Sequence[bool]) -> Estimate:
    """The share of right ones with Wilson's interval."""
    n = len(right)
    mean = sum(right) / n
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return Estimate(mean, middle - half, middle + half, n)


def plain(text: str) -> str:
    """Lower case, without articles and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def recognised(
    images: Sequence[Image.Image], wanted: Sequence[Captioned], candidates: Sequence[Captioned]
) -> list[bool]:
    """Whether the nearest candidate of each image has a wanted caption."""
    known = np.stack([thumbnail(image) for image, _ in candidates])
    results = []
    for image, (_, captions) in zip(images, wanted, strict=True):
        errors = [
            np.square(known - np.roll(thumbnail(image), (x, y), (0, 1))).mean((1, 2, 3))
            for x in SHIFTS
            for y in SHIFTS
        ]
        nearest = candidates[int(np.min(errors, axis=0).argmin())][1]
        results.append({*map(plain, nearest)} & {*map(plain, captions)} != set())
    return results


def thumbnail(image: Image.Image) -> np.ndarray:
    """In 0..1, [S, S, 3]."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def share_of_codes(system: MultimodalSystem, images: Sequence[Image.Image]) -> float | None:
    """Of the codebook, used by these images; None: the system has features."""
    if not system.abilities.draws_codes:
        return None
    rows = system.images.encode(images)
    used = {int(code) for row in rows for code in row}
    return len(used) / system.images.codebook_size


# ---- words


def verdict_of(scores: dict[str, Estimate], codes_used: float | None, kind: str) -> str:
    """What the system can do, and what to try if it cannot."""
    described, drawn = scores["described"], scores["drawn"]
    n = described.n
    parts = [f"describes {round(described.value * n)} of {n} {kind} images as their captions do"]
    parts.append(
        f"{round(drawn.value * n)} of {n} drawings are nearest to an image of their prompt"
    )
    if min(described.value, drawn.value) >= GOOD:
        return f"Useful: {'; '.join(parts)}."
    advice = []
    if codes_used is not None and codes_used < 0.1:
        advice.append(f"only {codes_used:.0%} of the codes are used")
    if scores["rebuilt"].value < GOOD:
        advice.append("not all rebuilt images are recognisable: train tokenizer and decoder longer")
    elif drawn.value < GOOD or described.value < GOOD:
        advice.append("the codes are good enough: train the language model longer")
    if max(described.value, drawn.value) < POOR:
        advice.append("more images a word help most")
    word = "Not useful yet" if min(described.value, drawn.value) < POOR else "Partly useful"
    return f"{word}: {'; '.join(parts)}. {'; '.join(advice).capitalize()}."


def report_text(name: str, scores: dict[str, Estimate], verdict: str, kind: str) -> str:
    """The page with the table."""
    lines = [f"# {name}", "", verdict, "", f"| {kind} images | right | 95 % interval | n |"]
    lines.append("| --- | ---: | --- | ---: |")
    for kind, score in scores.items():
        lines.append(
            f"| {kind} | {score.value:.2f} | {score.low:.2f} … {score.high:.2f} | {score.n} |"
        )
    return "\n".join([*lines, "", "![sheet](sheet.webp)", ""])


if __name__ == "__main__":
    sys.exit(main())
