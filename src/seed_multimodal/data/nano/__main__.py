"""The nano data set's command.

    python -m seed_multimodal.data.nano build --out data/nano64     fetch, render, split, write
    python -m seed_multimodal.data.nano check data/nano64           prove that nothing leaks
    python -m seed_multimodal.data.nano sheet data/nano64           write a contact sheet to look at
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from seed_multimodal.data.nano.build import BuildOptions, BuildReport, build
from seed_multimodal.data.nano.check import check_folder, report
from seed_multimodal.data.nano.load import load_nano
from seed_multimodal.data.nano.packages import SHARE_ALIKE, SOURCES
from seed_multimodal.data.nano.sheet import nano_sheet
from seed_multimodal.disk import writing
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import DataError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m seed_multimodal.data.nano", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("build", help="fetch the pinned packages and build the set")
    made.add_argument("--out", required=True, type=Path, help="folder to write")
    made.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    made.add_argument("--styles", default="twemoji,noto,fluent",
                      help="comma-separated: twemoji, noto, fluent, openmoji (share-alike, in shards of its own)")
    made.add_argument("--all-tones", action="store_true", help="keep every skin tone, and make tone edits")
    made.add_argument("--quality", type=int, default=101, help="WebP quality 1..100, or 101 for lossless (default)")
    made.add_argument("--cache", type=Path, default=Path(".seed-cache/packages"), help="where packages are kept")
    checked = verbs.add_parser("check", help="prove that no held-out label or picture is in train")
    checked.add_argument("folder", type=Path)
    shown = verbs.add_parser("sheet", help="write a contact sheet")
    shown.add_argument("folder", type=Path)
    shown.add_argument("--out", type=Path, default=None, help="PNG to write (default outputs/NAME-sheet.png)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    def work(args: argparse.Namespace) -> int:
        {"build": _build, "check": _check, "sheet": _sheet}[args.verb](args)
        return DONE

    return run_program(parser(), work, arguments, "nano data")


def _build(args: argparse.Namespace) -> None:
    styles = tuple(dict.fromkeys(style.strip() for style in args.styles.split(",") if style.strip()))
    if not 1 <= args.quality <= 101:
        raise DataError(f"--quality {args.quality}: it must be 1..100, or 101 for lossless.")
    options = BuildOptions(size=args.size, styles=styles, all_tones=args.all_tones, quality=args.quality)
    packages = ", ".join(f"{SOURCES[s].package}@{SOURCES[s].version}" for s in (*styles, "emojibase") if s in SOURCES)
    print(f"Building {args.size} px pictures from {packages} (packages in {args.cache}).")
    _summary(build(args.out, args.cache, options, log_line), options)


def _summary(done: BuildReport, options: BuildOptions) -> None:
    print(f"Done in {done.seconds:.0f} s: {done.kept} pictures, {done.bytes / 1e6:.2f} MB in {done.out}.")
    for reason, number in done.skipped.items():
        print(f"  skipped {number}: {reason}")
    for name, splits in done.counts.items():
        print(f"  {name:18} " + "  ".join(f"{split} {number}" for split, number in splits.items()))
    if SHARE_ALIKE & set(options.styles):
        print("  The sharealike shards are CC BY-SA 4.0: so is everything made of them, weights included.")


def _check(args: argparse.Namespace) -> None:
    report(check_folder(args.folder))
    nano = load_nano(args.folder)
    splits = ", ".join(f"{split} {len(nano.split(split))}" for split in ("train", "val", "test_concept", "test_combo"))
    print(f"{args.folder}: sound; no held-out label or picture is in train ({splits}; {len(nano.edits)} edits, "
          f"{len(nano.conversations)} conversations).")


def _sheet(args: argparse.Namespace) -> None:
    nano = load_nano(args.folder)
    path = args.out or Path("outputs") / f"{nano.folder.name}-sheet.png"
    sheet = nano_sheet(nano)
    with writing(path, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    sys.exit(main())
