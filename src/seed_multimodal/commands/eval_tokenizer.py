"""`seed eval tokenizer`: retrieval, reconstruction, codebook use and a contact sheet of a tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import add_json
from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.registry import registered
from seed_multimodal.entry import DONE, add_device, log_line
from seed_multimodal.quiet import quiet_libraries


def evaluate(args: argparse.Namespace) -> int:
    """Measure and write the report; prints its path and headline numbers, or the whole report with `--json`."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.evaluation.tokenizer_eval import EvalSettings, evaluate_tokenizer

        spec = data_spec(args.data, args.split, image_root=args.image_root, image_key=args.image_key,
                         caption_key=args.caption_key)
        settings = EvalSettings(
            data=spec, stage1=args.stage1, clip_text=args.clip_text, text_tokenizer=args.text_tokenizer,
            decoder=args.decoder, clip=args.clip, interpolation=args.interpolation, limit=args.limit,
            rebuild=args.rebuild, batch=args.batch_size, k_test=args.k_test, seed=args.seed, device=args.device,
            dtype=args.dtype, fast=args.fast)
        report = evaluate_tokenizer(args.model, args.out, settings, log=log_line,
                                    command=shlex.join(["seed", *sys.argv[1:]]))
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return DONE
    for name, route in report["retrieval"]["routes"].items():
        levels = ", ".join(f"{key} {value:.1f}" for key, value in route["lavis"].items() if key != "agg_metrics")
        print(f"{name} (n {route['n']}, texts {route['texts']}), percent: {levels}")
    for name in ("embedding", "picture_clip"):
        if part := report["reconstruction"].get(name):
            others = part["cosine_to_others"]["value"]
            print(f"{name} (n {part['n']}): cosine {part['cosine']['value']:.3f}"
                  + (f", to others {others:.3f}, right picture first {part['picture_r1']['value']:.3f}"
                     if others is not None else ", no others to compare with"))
    codes = report["codes"]
    print(f"codes (n {codes['sequences']}): {codes['used']} of {codes['codebook']} used, perplexity "
          f"{codes['perplexity']:.1f}, {codes['distinct']} distinct sequences")
    print(Path(args.out) / "report.md")
    return DONE


def data_spec(text: str, split: str | None = None, **keys: Any) -> dict[str, Any]:
    """`--data` as the mapping that `data.formats.pairs.open_pairs` reads.

    Args:
        text: a registered format, a .yaml file with such a mapping, or what `formats.pairs.Pairs` reads: a folder, a
            file or a pattern.
        split: of a registered format (default: val).
        keys: further keys of the mapping (`image_root`, `caption_key`, …); None means not given.
    """
    given = {key: value for key, value in keys.items() if value is not None}
    suffix = Path(text).suffix
    if suffix in (".yaml", ".yml"):
        spec: dict[str, Any] = {str(key): value for key, value in load_yaml(text).items()}
    elif text in registered():
        spec = {"format": text, "split": split or "val"}
    else:
        spec = {"format": "auto", "files": text}
    return {**spec, **given}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default="pretrained/nano", metavar="DIR", help="system or tokenizer folder, nano, "
                        "or released (default: %(default)s)")
    parser.add_argument("--data", required=True, metavar="SPEC", help="a registered format (nano), a folder of images "
                        "and captions, a list (.json, .jsonl, .parquet), a pattern of .tar shards, or a .yaml file")
    parser.add_argument("--out", required=True, metavar="DIR", help="for report.json, report.md, evaluate.txt, sheet")
    parser.add_argument("--stage1", metavar="CKPT", help="stage-1 checkpoint: its text path for retrieval")
    parser.add_argument("--limit", type=int, metavar="N", help="look at N pictures, drawn by --seed (default: all)")
    data = parser.add_argument_group("data")
    data.add_argument("--split", help="of a registered format (default: val)")
    data.add_argument("--image-root", metavar="DIR", help="folder of the pictures that a list names")
    data.add_argument("--image-key", metavar="KEY")
    data.add_argument("--caption-key", metavar="KEY")
    data.add_argument("--k-test", type=int, default=128, metavar="N", help="scores that are kept of each query "
                      "(default: 128, as released)")
    parts = parser.add_argument_group("parts (none leaves one out)")
    parts.add_argument("--clip", metavar="DIR", help="CLIP vision tower of the target embedding")
    parts.add_argument("--clip-text", metavar="DIR", help="CLIP text tower of the same space")
    parts.add_argument("--text-tokenizer", metavar="DIR", help="word pieces of stage 1")
    parts.add_argument("--decoder", metavar="DIR", help="diffusers folder that rebuilds pictures")
    parts.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="how pictures are resized")
    parts.add_argument("--rebuild", type=int, default=128, metavar="N", help="rebuild N pictures (default: 128)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=64, metavar="N")
    add_device(machine)
    machine.add_argument("--fast", action=argparse.BooleanOptionalAction, default=None, help="encode on packed "
                         "weights: the same codes but for rounding (default: on CUDA)")
    machine.add_argument("--seed", type=int, default=0)
    add_json(parser, "the whole report on stdout")
    parser.set_defaults(work=evaluate)
