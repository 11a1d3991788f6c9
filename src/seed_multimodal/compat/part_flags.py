"""Flags of the originals' programs for the YAML files of the original model's parts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

from seed_multimodal.errors import ConfigError

ORIGINAL = "released"  # the default of --model: the model that the files describe


def add_part_flags(parser: ArgumentParser, files: Mapping[str, str]) -> None:
    """A flag for each part; `files` are their defaults."""
    for part, file in files.items():
        parser.add_argument(
            f"--{part}", metavar="YAML", help=f"part of the original model (default: {file})"
        )
    parser.set_defaults(files=files)


def original_files(args: Namespace) -> dict[str, str] | None:
    """The file of each part; None: `--model` names a system. Raises ConfigError: both are named."""
    named = {part: getattr(args, part) for part in args.files if getattr(args, part)}
    if args.model == ORIGINAL:
        return {**args.files, **named}
    if named:
        raise ConfigError(
            f"--{next(iter(named))} names a part of the original model, --model all of another "
            "one; give one of them."
        )
    return None
