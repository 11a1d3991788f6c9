"""The console command `seed`: images to codes and back, questions, drawings, edits, conversations.

    seed tokenize cat.jpg                       32 codes
    seed reconstruct cat.jpg --out rebuilt      image → codes → image; --codes 4,8,16,32: after
                                                so many of them
    seed describe cat.jpg                       a caption
    seed ask cat.jpg "What is this animal?"     an answer
    seed detect cat.jpg "the left ear"          boxes, and an image with them
    seed draw "three noto frogs in a meadow"    an image from words
    seed edit cat.jpg "Make it in noto style."  a changed image
    seed chat                                   a conversation with images in both directions

Results go to stdout (one JSON object a line with `--json`), everything else to stderr. Exit codes:
0 done, 1 some images or texts failed, 2 the whole command failed, 130 interrupted.
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from seed_multimodal import __version__
from seed_multimodal.cli import chat, data, evaluate, images, init, tools, weights
from seed_multimodal.cli.common import (
    add_command,
    add_common,
    add_condition_flags,
    add_flags,
    add_size,
    program_parser,
    run_command,
)
from seed_multimodal.entry import run_guarded

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands

# Common flags of a command that generates.
_add_generation = partial(add_common, batch_size=16, language=True, generation=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse's own errors exit with 2)."""
    gc.set_threshold(100_000, 50, 50)  # imports leave little to collect; a fifth of a short command
    args = build_parser().parse_args(argv)
    return run_guarded("seed", args.debug, partial(run_command, args))


def build_parser() -> ArgumentParser:
    """The parser with every sub-command."""
    parser = program_parser("seed", str(__doc__))
    parser.add_argument("--version", action="version", version=f"seed-multimodal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Batches of images or texts, and the conversation.
    _add_image_commands(commands)
    _add_language_commands(commands)
    # Weights, evaluations and data.
    tools.add_commands(commands)
    weights.add_commands(commands)
    init.add_commands(commands)
    kinds = commands.add_parser("eval", help="measure a model").add_subparsers(
        required=True, metavar="WHAT"
    )
    evaluate.add_commands(kinds)
    data.add_commands(commands.add_parser("data", help="check or convert training data"))
    return parser


def _add_image_commands(commands: Commands) -> None:
    """Commands that load no language model."""
    # Images → codes.
    tokenize = add_command(commands, images.tokenize)
    add_common(tokenize, batch_size=32)
    # Images or codes → images.
    reconstruct = add_command(commands, images.reconstruct)
    add_common(reconstruct, batch_size=8, out="outputs", drawing=True)
    add_flags(reconstruct, "numbers of codes")
    add_condition_flags(reconstruct)


def _add_language_commands(commands: Commands) -> None:
    """Commands that load a language model."""
    # Understanding of images.
    _add_generation(add_command(commands, images.describe))
    _add_generation(add_command(commands, images.ask))
    _add_generation(add_command(commands, images.detect), out="outputs")
    # Generation of images.
    draw = add_command(commands, images.draw)
    _add_generation(draw, out="outputs", drawing=True)
    add_flags(draw, "numbers of codes")
    add_flags(draw, "number of images")
    add_size(draw)
    edit = add_command(commands, images.edit)
    _add_generation(edit, out="outputs", drawing=True)
    add_flags(edit, "number of images")
    add_condition_flags(edit)
    # Both, in a conversation.
    conversation = add_command(commands, chat.chat)
    _add_generation(conversation, out="outputs/chat", drawing=True, batch_size=0)
