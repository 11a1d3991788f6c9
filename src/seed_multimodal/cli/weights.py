"""`seed fetch`: the weights of the originals."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.cli.common import add_json, emit
from seed_multimodal.downloads import MIRRORS, WantedPart, fetch_parts, online, read_mirrors
from seed_multimodal.entry import DONE, SOME_FAILED, log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import weights_root
from seed_multimodal.models.registry import families
from seed_multimodal.originals import original_parts
from seed_multimodal.settings import nearest

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """The commands with their flags."""
    fetcher = commands.add_parser("fetch", help=fetch.__doc__, description=fetch.__doc__)
    fetcher.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="8b, 14b, seed-x, seed-x-i, seed-x-edit, lavit, seed-1, or one part: "
        + ", ".join(original_parts()),
    )
    fetcher.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="PART=SOURCE",
        help="try this source first: unclip=owner/name (a hub repository, or owner/name/folder), "
        f"eva_vit_g.pth=URL; also from the environment, {MIRRORS}='PART=SOURCE …'",
    )
    fetcher.add_argument("--out", metavar="DIR", help="folder of pretrained/ (default: this one)")
    fetcher.add_argument(
        "--force", action="store_true", help="replace files that differ from the server's"
    )
    add_json(fetcher)
    fetcher.set_defaults(work=fetch)


def fetch(args: Namespace) -> int:
    """Download the weights of an original model to pretrained/ (also without HF_HUB_OFFLINE=0)."""
    wanted: list[WantedPart] = []
    for name in args.models:
        wanted += wanted_parts(name)
    mirrors = read_mirrors([*os.environ.get(MIRRORS, "").split(), *args.mirror])
    root = Path(args.out) if args.out else weights_root()

    with online():
        problems = fetch_parts(wanted, root, mirrors=mirrors, force=args.force)
    for problem in problems:
        log_line(f"seed: {problem}")
    folders = list(dict.fromkeys(str(item.target(root)) for item in wanted))
    emit(args, {"folders": folders, "problems": problems}, "\n".join(folders))
    return SOME_FAILED if problems else DONE


def wanted_parts(name: str) -> list[WantedPart]:
    """What an original model consists of, or one part. Raises ConfigError: there is none."""
    # A model may have the name of one of its parts.
    names: list[str] = []
    for spec in families():
        if name.lower() in spec.config.originals:
            return spec.config.of_original(name.lower()).wanted_parts()
        names += spec.config.originals
    parts = original_parts()
    if name.lower() not in parts:
        names += parts
        raise ConfigError(
            f"{name}: there is no original model or part of this name{nearest(name, names)}; "
            f"there are {', '.join(dict.fromkeys(names))}."
        )
    return [WantedPart(parts[name.lower()])]
