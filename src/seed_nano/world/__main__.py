"""Nano's world of scenes.

    python -m seed_nano.world build --out data/nano     fetch the drawings, write the shard
    python -m seed_nano.world check                     prove that nothing held out is trained on
    python -m seed_nano.world sheet                     write a sheet of scenes to look at
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from seed_multimodal.disk import replacing, writing
from seed_multimodal.entry import DONE, run_program, whole_number
from seed_multimodal.errors import DataError
from seed_nano.world.check import check_no_leak
from seed_nano.world.evaluation import check_lists, write_lists
from seed_nano.world.place import LISTS, find_world
from seed_nano.world.scene import render
from seed_nano.world.splits import SPLITS, scene_at
from seed_nano.world.sprites import build, check_files, load_sprites


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m seed_nano.world", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("build", help="fetch the pinned packages and draw every thing in every style")
    made.add_argument("--out", required=True, type=Path, help="folder to write")
    made.add_argument("--cache", type=Path, default=Path(".seed-cache/packages"), help="where packages are kept")
    checked = verbs.add_parser("check", help="prove that nothing held out is trained on")
    checked.add_argument("--samples", type=whole_number(1), default=5000,
                         help="training samples of every kind to look at")
    checked.add_argument("--seed", type=whole_number(0), default=0)
    shown = verbs.add_parser("sheet", help="write a sheet: a row of scenes for every split")
    shown.add_argument("--out", type=Path, default=Path("outputs/nano-scenes.png"))
    shown.add_argument("--size", type=whole_number(1), default=96, help="side of a scene in pixels")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    def work(args: argparse.Namespace) -> int:
        {"build": _build, "check": _check, "sheet": _sheet}[args.verb](args)
        return DONE

    return run_program(parser(), work, arguments, "nano data")


def _build(args: argparse.Namespace) -> None:
    if not (args.out / LISTS).is_file():  # else they stay as they are, whatever became of the code
        args.out.mkdir(parents=True, exist_ok=True)
        write_lists(args.out)
    made = build(args.out, args.cache)
    print(f"{made['sprites']} drawings, {made['bytes'] / 1e6:.2f} MB, in {args.out}.")


def _check(args: argparse.Namespace) -> None:
    folder = find_world()
    check_files(folder)
    load_sprites(folder)
    listed = check_lists(folder)
    seen = check_no_leak(args.samples, args.seed)
    print(f"{folder}: its files are those of the manifest. The lists are of their splits: {_numbers(listed)} scenes.\n"
          f"Nothing held out is trained on, of {_numbers(seen)} scenes.")


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _sheet(args: argparse.Namespace, columns: int = 14) -> None:
    kind = Image.registered_extensions().get(args.out.suffix.lower())
    if kind not in Image.SAVE:
        raise DataError(f"{args.out}: its ending names no picture format that can be written; end it in .png.")
    gap = np.full((args.size, 2, 3), 255, np.uint8)
    rows = []
    for split in SPLITS:
        row = [render(scene_at(0, index, split), args.size) for index in range(columns)]
        rows.append(np.concatenate([part for picture in row for part in (picture, gap)], 1))
        rows.append(np.full((2, rows[-1].shape[1], 3), 255, np.uint8))
    with writing(args.out, DataError):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out) as file:
            Image.fromarray(np.concatenate(rows)).save(file, kind)
    print(f"Wrote {args.out}: a row each for {', '.join(SPLITS)}.")


if __name__ == "__main__":
    sys.exit(main())
