"""The tools `extract_image_ids_to_torchdata_parallel*.py`: parse their flags, pre-tokenise, return an exit code.

The first eight flags are the released ones with their defaults; all others are ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from seed_multimodal.data.pretokenize import RELEASED_BATCH, RELEASED_GPUS
from seed_multimodal.entry import add_device, run_program
from seed_multimodal.errors import ConfigError


class DefaultNumber(int):
    """A default that differs from the same number given on the command line."""


def main(kind: str, program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Run the tool that writes `kind` records; returns the exit code (2: refused, with one sentence on stderr)."""
    return run_program(build_parser(program, description), lambda args: _run(kind, args), argv)


def build_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags of every extraction tool."""
    parser = argparse.ArgumentParser(prog=program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_processor", metavar="YAML", help="pictures as a processor of transformers makes them")
    parser.add_argument("--image_transform", metavar="YAML",
                        help="the pictures' transform (default: squashed bilinearly to the tokenizer's size, nano's as "
                             "well; where --tokenizer names a system, the system's)")
    parser.add_argument("--tokenizer", metavar="YAML", help="or a folder, as seed export-tokenizer makes one")
    parser.add_argument("--data", metavar="YAML", help="what is read")
    parser.add_argument("--save_dir", metavar="FOLDER")
    parser.add_argument("--gpus", type=int, default=DefaultNumber(RELEASED_GPUS), metavar="N",
                        help="processes, one per GPU, never more than units of work (default: 4, or as many as there "
                             "are GPUs; on a CPU 1)")
    parser.add_argument("--batch_size", type=int, default=DefaultNumber(RELEASED_BATCH), metavar="N",
                        help="pictures at once; halved where they do not fit into memory (default: 256, on a CPU 32)")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N",
                        help="decode workers of each process (default: 4)")
    parser.add_argument("--shard", default="0/1", metavar="I/N",
                        help="make every N-th unit only, from I on (job arrays)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="continue in a folder that exists (default), or refuse it")
    parser.add_argument("--fields", metavar="NAME | A=B,…", help="a preset, or which keys of the input hold what")
    parser.add_argument("--views", type=int, default=1, metavar="N",
                        help="views of each picture (caption, qa and chat records; all but the first augmented)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the augmented views")
    add_device(parser, "auto", "auto: float16 on CUDA as released, else float32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compile the encoder, minutes before the start (default: on CUDA)")
    parser.add_argument("--block", type=int, default=10_000, metavar="N", help="records of a unit where no tar is read")
    parser.add_argument("--maxcount", type=int, default=10_000, metavar="N", help="records per output tar")
    parser.add_argument("--max_bad", type=int, default=20, metavar="N",
                        help="so many broken samples in a row end the run (default: 20)")
    parser.add_argument("--log_every", type=float, default=10.0, metavar="S", help="seconds between progress lines")
    return parser


def _run(kind: str, args: argparse.Namespace) -> int:
    from seed_multimodal.data.pretokenize.encode import EncoderSettings
    from seed_multimodal.data.pretokenize.input_settings import parse_fields
    from seed_multimodal.data.pretokenize.run import RunSettings, run

    for name in ("tokenizer", "data", "save_dir"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is not given.")
    if args.image_processor and args.image_transform:
        raise ConfigError("--image_processor and --image_transform exclude each other: pictures pass through one.")
    return run(RunSettings(
        kind=kind, data=args.data, save_dir=args.save_dir,
        encoder=EncoderSettings(args.tokenizer, args.device, args.dtype, args.compile),
        fields=parse_fields(args.fields), gpus=_given(args.gpus),
        shard=_shard(args.shard), image_transform=args.image_transform or args.image_processor,
        batch_size=_given(args.batch_size), workers=args.num_workers, views=args.views, seed=args.seed,
        block=args.block, limit=args.maxcount, resume=args.resume, max_bad=args.max_bad, log_every=args.log_every,
        debug=args.debug))


def _given(number: int) -> int | None:
    """A flag's number; None: it was not given."""
    return None if isinstance(number, DefaultNumber) else number


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit():
        raise ConfigError(f"--shard {text!r} must be I/N, for example 0/16.")
    return int(number), int(count)
