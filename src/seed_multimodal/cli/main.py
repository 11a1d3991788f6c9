"""The console command `seed`: images to codes and back, questions, drawings, edits, conversations.

    seed tokenize cat.jpg                       32 codes
    seed reconstruct cat.jpg --out rebuilt      image → codes → image (--codes 4,8,16,32: after so many of them)
    seed describe cat.jpg                       a caption
    seed ask cat.jpg "What is this animal?"     an answer
    seed detect cat.jpg "the left ear"          boxes, and an image with them
    seed draw "a red apple"                     an image from words
    seed edit cat.jpg "Make it in noto style."  a changed image
    seed chat                                   a conversation with images in both directions
    seed convert old.pt new.safetensors         old weights, safely
    seed export-tokenizer --stage1 … --stage2 … trained stages → a tokenizer
    seed assemble lavit --tokenizer … --out …   parts of trainings → a system folder
    seed eval tokenizer --data … --out …        quality of a tokenizer
    seed eval vqa|caption|text2image …          accuracy, CIDEr, FID on the benchmarks' files
    seed plot runs/a runs/b                     curves of training runs
    seed data check train.jsonl …               errors in training data, and where
    seed data convert old/*.tar --out new       the original's pickled shards as json

Results go to stdout (one JSON object a line with `--json`), everything else to stderr. Exit codes: 0 done, 1 some
images or texts failed, 2 the whole command failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from seed_multimodal import __version__
from seed_multimodal.cli import assemble, chat, data, eval_tokenizer, evaluate, images, tools
from seed_multimodal.cli.common import (
    add_batch,
    add_beside,
    add_codes,
    add_common,
    add_drawing,
    add_generation,
    add_out,
)
from seed_multimodal.entry import add_offload, add_quantization, guarded, whole_number
from seed_multimodal.lavit.ratios import RATIOS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse's own errors exit with 2)."""
    args = build_parser().parse_args(argv)
    return guarded("seed", args.debug, lambda: args.work(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="seed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"seed-multimodal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_codec_commands(commands)
    _add_language_commands(commands)
    tools.add_commands(commands)
    assemble.add_commands(commands.add_parser("assemble", help="parts that trainings made → a system folder"))
    measured = commands.add_parser("eval", help="measure a model").add_subparsers(dest="what", required=True,
                                                                                  metavar="WHAT")
    eval_tokenizer.add_arguments(measured.add_parser("tokenizer",
                                                     help="retrieval, reconstruction, codebook, contact sheet"))
    evaluate.add_commands(measured)
    data.add_commands(commands.add_parser("data", help="check or convert training data"))
    return parser


def _add_codec_commands(commands: Any) -> None:
    tokenize = _command(commands, "tokenize", images.tokenize, "images → codes", 32, "images")
    tokenize.add_argument("--out", metavar="FILE", help="also write the codes, one JSON object a line")
    tokenize.add_argument("--save-plot", metavar="FILE", help="also draw the codes: a coloured strip for each image")

    reconstruct = _command(commands, "reconstruct", images.reconstruct, "images (or codes) → codes → images", 8)
    reconstruct.add_argument("images", nargs="*", metavar="IMAGE")
    reconstruct.add_argument("--codes-file", metavar="FILE", help="draw the codes that `seed tokenize --out` wrote")
    add_codes(reconstruct, images.counts_or_file, "; a FILE here is taken as --codes-file")
    reconstruct.add_argument("--condition", metavar="IMAGE", help="SEED-X: what the drawing may take over")
    add_beside(reconstruct)
    add_out(reconstruct)
    add_drawing(reconstruct)


def _add_language_commands(commands: Any) -> None:
    describe = _command(commands, "describe", images.describe, "a caption for each image", 16, "images", language=True)
    describe.add_argument("--prompt", help="ask for the description in other words")

    ask = _command(commands, "ask", images.ask, "one question about each image", 16, "images", language=True)
    ask.add_argument("question", metavar="QUESTION")

    detect = _command(commands, "detect", images.detect, "where something is, as boxes (SEED-X)", 16, "images",
                      language=True)
    detect.add_argument("phrase", metavar="PHRASE", help="such as: the red car")
    add_out(detect)

    draw = _command(commands, "draw", images.draw, "images from words", 16, "texts", language=True)
    add_codes(draw)
    draw.add_argument("--ratio", choices=RATIOS, help="LaVIT: width to height of the drawing (default: 1:1)")
    draw.add_argument("--height", type=whole_number(8), metavar="PIXELS", help="SEED-X, LaVIT: of the drawing")
    draw.add_argument("--width", type=whole_number(8), metavar="PIXELS")
    add_out(draw)
    add_drawing(draw)

    edit = _command(commands, "edit", images.edit, "edit each image", 16, "images", language=True)
    edit.add_argument("instruction", metavar="INSTRUCTION")
    add_beside(edit)
    add_out(edit)
    add_drawing(edit)

    talking = _command(commands, "chat", chat.chat, "a conversation; images are saved", language=True)
    talking.add_argument("--message", action="append", metavar="TEXT", help="send this and stop; repeat for more turns")
    talking.add_argument("--force-image", action="store_true", help="every answer holds an image")
    talking.add_argument("--image", action="append", default=[], metavar="IMAGE", help="shown with the first message")
    add_out(talking, "outputs/chat")
    talking.add_argument("--no-previews", action="store_true", help="on a terminal, too: no image before it is whole")
    add_drawing(talking)


def _command(commands: Any, name: str, work: Callable[[argparse.Namespace], int], text: str, batch_size: int = 0,
             items: str = "", *, language: bool = False) -> argparse.ArgumentParser:
    """A command with a system; `items`: "images" or "texts", of which it takes several."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if items:
        parser.add_argument(items, nargs="+", metavar=items.upper()[:-1])
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    add_common(parser)
    if batch_size:
        add_batch(parser, batch_size)
    if language:
        add_quantization(parser)
        add_offload(parser)
        add_generation(parser)
    parser.set_defaults(work=work)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
