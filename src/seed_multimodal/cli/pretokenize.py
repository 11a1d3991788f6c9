"""The tools `extract_image_ids_to_torchdata_parallel*.py`: parse their flags, pre-tokenise, return an exit code.

The first eight flags are the original ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from seed_multimodal.cli.common import program_parser
from seed_multimodal.entry import add_device, run_program


def main(kind: str, program: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Run the tool that writes `kind` records; returns the exit code."""
    return run_program(build_parser(program, description), lambda args: _run(kind, args), argv)


def build_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags of every extraction tool."""
    parser = program_parser(program, description)
    transform = parser.add_mutually_exclusive_group()
    transform.add_argument("--image_processor", metavar="YAML", help="images as a processor of transformers makes them")
    transform.add_argument("--image_transform", metavar="YAML", help="default: squash to the tokenizer's size")
    parser.add_argument("--tokenizer", metavar="YAML", required=True, help="or a folder of seed export-tokenizer")
    parser.add_argument("--data", metavar="YAML", required=True, help="the input")
    parser.add_argument("--save_dir", required=True)
    parser.add_argument("--gpus", type=int, help="processes, one per GPU (default: at most 4; on a CPU 1)")
    parser.add_argument("--batch_size", type=int, help="halved on out-of-memory (default: 256, on a CPU 32)")
    parser.add_argument("--num_workers", type=int, default=4, help="decode workers of each process (default: 4)")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every N-th unit from I on")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="continue in a folder that exists (default), or refuse it")
    parser.add_argument("--fields", metavar="NAME | A=B,…", help="a preset, or which keys of the input hold what")
    parser.add_argument("--views", type=int, default=1, help="of each image (caption, qa, chat), the others augmented")
    parser.add_argument("--seed", type=int, default=0, help="of the augmented views")
    add_device(parser, "auto", "auto: float16 on CUDA as the original, else float32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the encoder (default: on CUDA)")
    parser.add_argument("--block", type=int, default=10_000, help="records of a unit where no tar is read")
    parser.add_argument("--maxcount", type=int, default=10_000, help="records per output tar")
    parser.add_argument("--max_bad", type=int, default=20, help="broken samples in a row that end the run")
    parser.add_argument("--log_every", type=float, default=10.0, help="seconds between progress lines")
    return parser


def _run(kind: str, args: argparse.Namespace) -> int:
    from seed_multimodal.data.pretokenize.encode import EncoderSettings
    from seed_multimodal.data.pretokenize.input_settings import parse_fields
    from seed_multimodal.data.pretokenize.run import RunSettings, run

    return run(RunSettings(
        kind=kind, data=args.data, save_dir=args.save_dir,
        encoder=EncoderSettings(args.tokenizer, args.device, args.dtype, args.compile),
        fields=parse_fields(args.fields), gpus=args.gpus, shard=args.shard,
        image_transform=args.image_transform or args.image_processor, batch_size=args.batch_size,
        workers=args.num_workers, views=args.views, seed=args.seed, block=args.block, limit=args.maxcount,
        resume=args.resume, max_bad=args.max_bad, log_every=args.log_every, debug=args.debug))


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit():
        raise argparse.ArgumentTypeError(f"must be I/N, for example 0/16, not {text!r}")
    return int(number), int(count)
