"""The console command `seed`: pictures to codes and back, questions, drawings, edits, conversations.

    seed tokenize cat.jpg                       32 codes
    seed reconstruct cat.jpg --out rebuilt      picture → codes → picture (--codes 4,8,16,32: after so many of them)
    seed describe cat.jpg                       a caption
    seed ask cat.jpg "What is this animal?"     an answer
    seed detect cat.jpg "the left ear"          boxes, and a picture of them
    seed draw "a red apple"                     a picture from words
    seed edit cat.jpg "Make it in noto style."  a changed picture
    seed chat                                   a conversation with pictures in both directions
    seed convert old.pt new.safetensors         old weights, safely
    seed export-tokenizer --stage1 … --stage2 … trained stages → a tokenizer
    seed assemble lavit --tokenizer … --out …   parts of trainings → a system folder
    seed eval tokenizer --data … --out …        quality of a tokenizer
    seed eval vqa|caption|text2image …          accuracy, CIDEr, FID on the benchmarks' files
    seed plot runs/a runs/b                     curves of training runs
    seed data check train.jsonl …               errors in training data, and where
    seed data convert old/*.tar --out new       the original's pickled shards as json

Results go to stdout (one JSON object a line with `--json`), everything else to stderr. Exit codes: 0 done, 1 some
pictures of a batch were refused, 2 refused as a whole, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from seed_multimodal import __version__
from seed_multimodal.commands import (
    assemble,
    chat,
    convert,
    data,
    eval_tokenizer,
    evaluate,
    export_tokenizer,
    pictures,
    plot,
)
from seed_multimodal.commands.common import (
    add_beside,
    add_codes,
    add_common,
    add_drawing,
    add_generation,
    add_json,
    add_out,
)
from seed_multimodal.entry import add_offload, add_quantization, guarded, whole_number
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.settings import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse's own errors exit with 2)."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_unknown(parser, args, unknown)
    return guarded("seed", args.debug, lambda: args.work(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="seed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"seed-multimodal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)

    tokenize = _command(commands, "tokenize", pictures.tokenize, "pictures → codes")
    tokenize.add_argument("pictures", nargs="+", metavar="PICTURE")
    tokenize.add_argument("--out", metavar="FILE", help="also write the codes, one JSON object a line")
    tokenize.add_argument("--save-plot", metavar="FILE", help="also draw the codes: a coloured strip for each picture")
    tokenize.add_argument("--batch-size", type=whole_number(1), default=32, metavar="N")

    reconstruct = _command(commands, "reconstruct", pictures.reconstruct, "pictures (or codes) → codes → pictures")
    reconstruct.add_argument("pictures", nargs="*", metavar="PICTURE")
    reconstruct.add_argument("--codes-file", metavar="FILE", help="draw the codes that `seed tokenize --out` wrote")
    add_codes(reconstruct, pictures.counts_or_file, "; a FILE here is taken as --codes-file")
    reconstruct.add_argument("--condition", metavar="PICTURE", help="SEED-X: what the drawing may take over")
    add_beside(reconstruct)
    add_out(reconstruct)
    reconstruct.add_argument("--batch-size", type=whole_number(1), default=8, metavar="N")
    add_drawing(reconstruct)

    describe = _command(commands, "describe", pictures.describe, "a caption for each picture", language=True)
    describe.add_argument("pictures", nargs="+", metavar="PICTURE")
    describe.add_argument("--prompt", help="ask for the description in other words")

    ask = _command(commands, "ask", pictures.ask, "one question about each picture", language=True)
    ask.add_argument("pictures", nargs="+", metavar="PICTURE")
    ask.add_argument("question", metavar="QUESTION")

    detect = _command(commands, "detect", pictures.detect, "where something is, as boxes (SEED-X)", language=True)
    detect.add_argument("pictures", nargs="+", metavar="PICTURE")
    detect.add_argument("phrase", metavar="PHRASE", help="such as: the red car")
    add_out(detect)

    draw = _command(commands, "draw", pictures.draw, "pictures from words", language=True)
    draw.add_argument("texts", nargs="+", metavar="TEXT")
    add_codes(draw)
    draw.add_argument("--ratio", choices=RATIOS, help="LaVIT: width to height of the drawing (default: 1:1)")
    draw.add_argument("--height", type=whole_number(8), metavar="PIXELS", help="SEED-X, LaVIT: of the drawing")
    draw.add_argument("--width", type=whole_number(8), metavar="PIXELS")
    add_out(draw)
    add_drawing(draw)

    edit = _command(commands, "edit", pictures.edit, "edit each picture", language=True)
    edit.add_argument("pictures", nargs="+", metavar="PICTURE")
    edit.add_argument("instruction", metavar="INSTRUCTION")
    add_beside(edit)
    add_out(edit)
    add_drawing(edit)

    talking = _command(commands, "chat", chat.chat, "a conversation; pictures are saved", language=True)
    talking.add_argument("--message", action="append", metavar="TEXT", help="send this and stop; repeat for more turns")
    talking.add_argument("--force-image", action="store_true", help="every answer holds a picture")
    talking.add_argument("--image", action="append", default=[], metavar="PICTURE", help="shown with the first message")
    talking.add_argument("--out", metavar="FOLDER", default="outputs/chat",
                         help="for drawn pictures (default: %(default)s)")
    talking.add_argument("--no-previews", action="store_true", help="on a terminal, too: no picture before it is whole")
    add_drawing(talking)

    converter = commands.add_parser("convert", help="old .pt/.pth/.bin weights → safetensors")
    converter.add_argument("source", metavar="OLD")
    converter.add_argument("target", metavar="NEW", nargs="?", help="default: the same name with .safetensors")
    converter.add_argument("--dtype", default="keep", help="keep, float32, bfloat16 or float16 (default: keep)")
    converter.add_argument("--force", action="store_true", help="write over an existing file")
    add_json(converter)
    converter.set_defaults(work=convert.convert)
    export_tokenizer.add_arguments(commands.add_parser("export-tokenizer", help="trained stages → a tokenizer folder"))
    assemble.add_commands(commands.add_parser("assemble", help="parts that trainings made → a system folder"))
    measured = commands.add_parser("eval", help="measure a model").add_subparsers(dest="what", required=True,
                                                                                    metavar="WHAT")
    eval_tokenizer.add_arguments(measured.add_parser("tokenizer",
                                                     help="retrieval, reconstruction, codebook, contact sheet"))
    evaluate.add_commands(measured)
    plotter = commands.add_parser("plot", help="curves of training runs, over each other")
    plot.add_arguments(plotter)
    plotter.set_defaults(work=plot.plot)
    data.add_commands(commands.add_parser("data", help="check or convert training data"))
    return parser


class _Command(argparse.ArgumentParser):
    """The parser of one command: options may stand anywhere, also between its pictures and its text.

    argparse gives a text away to the pictures before it when an option follows, as in `edit a.png b.png --steps 5
    TEXT`; its own way to mix them knows no `--` (Python 3.11) and no commands, so it is only the second try.
    """

    _second = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; a subparser is called by this name."""
        found, left = super().parse_known_args(args, namespace)
        if self._second or not left or self._subparsers is not None or args is None or "--" in args:
            return found, left
        self._second = True
        try:
            mixed, still = self.parse_known_intermixed_args(args)
        finally:
            self._second = False
        return (found, left) if still else (mixed, [])


def _refuse_unknown(parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: list[str]) -> NoReturn:
    """End with the usage of the command that was meant, and the option nearest to an unknown one."""
    for name in ("command", "what", "system"):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and action.dest == name:
                parser = action.choices[getattr(args, name)]
                break
    known = [option for action in parser._actions for option in action.option_strings]
    options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    hint = nearest(options[0], known) if options else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _command(
    commands: argparse._SubParsersAction, name: str, work: Callable[[argparse.Namespace], int], text: str,
    language: bool = False,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    add_common(parser)
    if language:
        add_quantization(parser)
        add_offload(parser)
        add_generation(parser)
    parser.set_defaults(work=work)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
