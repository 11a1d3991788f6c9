"""The console command `seed`: images to codes and back, questions, drawings, edits, conversations.

    seed tokenize cat.jpg                       32 codes
    seed reconstruct cat.jpg --out rebuilt      image → codes → image; --codes 4,8,16,32: after
                                                so many of them
    seed describe cat.jpg                       a caption
    seed ask cat.jpg "What is this animal?"     an answer
    seed detect cat.jpg "the left ear"          boxes, and an image with them
    seed draw "a red apple"                     an image from words
    seed edit cat.jpg "Make it in noto style."  a changed image
    seed chat                                   a conversation with images in both directions

Results go to stdout (one JSON object a line with `--json`), everything else to stderr. Exit codes:
0 done, 1 some images or texts failed, 2 the whole command failed, 130 interrupted.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from seed_multimodal import __version__
from seed_multimodal.cli import chat, data, evaluate, images, init, tools, weights
from seed_multimodal.cli.common import (
    add_common,
    add_condition_flags,
    add_flags,
    add_json,
    add_size,
    program_parser,
    run_command,
)
from seed_multimodal.entry import bounded_int, run_guarded

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse's own errors exit with 2)."""
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
    init.add_command(commands)
    kinds = commands.add_parser("eval", help="measure a model").add_subparsers(
        required=True, metavar="WHAT"
    )
    evaluate.add_commands(kinds)
    data.add_commands(commands.add_parser("data", help="check or convert training data"))
    return parser


def _add_image_commands(commands: Commands) -> None:
    """Commands that load no language model."""
    # Images → codes.
    tokenize = _command(commands, images.tokenize, "images")
    add_common(tokenize, batch_size=32)
    add_flags(tokenize, "tokenize")
    # Images or codes → images.
    reconstruct = _command(commands, images.reconstruct)
    add_common(reconstruct, batch_size=8, out="outputs", drawing=True)
    add_flags(reconstruct, "reconstruct")
    _add_codes(reconstruct)
    add_condition_flags(reconstruct)


def _add_language_commands(commands: Commands) -> None:
    """Commands that load a language model."""
    # Understanding of images.
    describe = _command(commands, images.describe, "images")
    _add_generation(describe)
    add_flags(describe, "describe")
    ask = _command(commands, images.ask, "images")
    _add_generation(ask)
    ask.add_argument("question")
    detect = _command(commands, images.detect, "images")
    _add_generation(detect, out="outputs")
    add_flags(detect, "detect")
    # Generation of images.
    draw = _command(commands, images.draw, "texts")
    _add_generation(draw, out="outputs", drawing=True)
    _add_codes(draw)
    add_flags(draw, "number of images")
    add_size(draw)
    edit = _command(commands, images.edit, "images")
    _add_generation(edit, out="outputs", drawing=True)
    edit.add_argument("instruction")
    add_flags(edit, "number of images")
    add_condition_flags(edit)
    # Both, in a conversation.
    conversation = _command(commands, chat.chat)
    _add_generation(conversation, out="outputs/chat", drawing=True, batch_size=0)
    add_flags(conversation, "chat")


def _add_generation(
    parser: ArgumentParser, out: str = "", drawing: bool = False, batch_size: int = 16
) -> None:
    """Common flags of a command that generates; see `add_common`."""
    add_common(
        parser, out=out, batch_size=batch_size, language=True, generation=True, drawing=drawing
    )


def _add_codes(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--codes",
        type=_counts,
        default=[],
        metavar="N,N,…",
        help="progressive drawing: the image after the first "
        "N codes; several numbers (4,8,16,32): one image each, and a sheet of them",
    )


def _counts(text: str) -> list[int]:
    """Comma-separated numbers, each one once."""
    parse = bounded_int(1)
    counts = [parse(item.strip()) for item in text.split(",")]
    return list(dict.fromkeys(counts))


def _command(
    commands: Commands, work: Callable[[Namespace], int], items: str = ""
) -> ArgumentParser:
    """The parser of the command that runs the function `work`, named and described after it.

    items: "images" or "texts": it takes several of them.
    """
    # The function's name and docstring are the command's name and help.
    parser = commands.add_parser(work.__name__, help=work.__doc__, description=work.__doc__)
    if items:
        parser.add_argument(items, nargs="+", metavar=items.upper()[:-1])
    add_json(parser)
    parser.set_defaults(work=work)
    return parser
