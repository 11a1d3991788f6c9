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
from seed_multimodal.entry import DONE, add_device, log_line
from seed_multimodal.quiet import quiet_libraries


def evaluate(args: argparse.Namespace) -> int:
    """Measure and write the report; prints its path and headline numbers, or the whole report with `--json`."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.evaluation.tokenizer import EvalSettings, evaluate_tokenizer

        flags = ("stage1", "clip_text", "text_tokenizer", "decoder", "clip", "interpolation", "limit", "rebuild",
                 "seed", "device", "dtype")
        settings = EvalSettings(data_spec(args), batch=args.batch_size, **{flag: getattr(args, flag) for flag in flags})
        report = evaluate_tokenizer(args.model, args.out, settings, log_line, shlex.join(["seed", *sys.argv[1:]]))
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return DONE
    for name, route in report["retrieval"].items():
        levels = ", ".join(f"{key} {value:.1f}" for key, value in route["lavis"].items() if key != "agg_metrics")
        print(f"{name} (n {route['n']}, texts {route['texts']}), percent: {levels}")
    for name in ("embedding", "image_clip"):
        if part := report["reconstruction"].get(name):
            print(f"{name} (n {part['n']}): cosine {part['cosine']['value']:.3f}, R@1 {part['image_r1']['value']:.3f}")
    codes = report["codes"]
    print(f"codes (n {codes['sequences']}): {codes['used']} of {codes['codebook']} used, perplexity "
          f"{codes['perplexity']:.1f}, {codes['distinct']} distinct sequences")
    print(Path(args.out) / "report.md")
    return DONE


def data_spec(args: argparse.Namespace) -> dict[str, Any]:
    """`--data` and its flags as the mapping that `data.formats.pairs.open_pairs` reads."""
    from seed_multimodal.data.formats.registry import registered

    if Path(args.data).suffix in (".yaml", ".yml"):
        spec = {str(key): value for key, value in load_yaml(args.data).items()}
    elif args.data in registered():
        spec = {"format": args.data, "split": args.split or "val"}
    else:
        spec = {"format": "auto", "files": args.data, "split": args.split}
    return {key: value for key, value in {**spec, "image_root": args.image_root, "image_key": args.image_key,
                                          "caption_key": args.caption_key}.items() if value is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default="pretrained/nano", metavar="DIR", help="system or tokenizer folder, nano, "
                        "or released (default: %(default)s)")
    parser.add_argument("--data", required=True, metavar="SPEC", help="a folder of images and captions, a list (.json, "
                        ".jsonl, .parquet), a pattern of .tar shards, a registered format (nano), or a .yaml file")
    parser.add_argument("--out", required=True, metavar="DIR", help="for report.json, report.md, evaluate.txt, sheet")
    parser.add_argument("--stage1", metavar="CKPT", help="stage-1 checkpoint: its text path for retrieval")
    parser.add_argument("--limit", type=int, metavar="N", help="look at N images, drawn by --seed (default: all)")
    data = parser.add_argument_group("data")
    data.add_argument("--split", help="of a registered format (default: val)")
    data.add_argument("--image-root", metavar="DIR", help="folder of the images that a list names")
    data.add_argument("--image-key", metavar="KEY")
    data.add_argument("--caption-key", metavar="KEY")
    parts = parser.add_argument_group("parts")
    parts.add_argument("--clip", metavar="DIR", help="CLIP vision encoder of the target embedding (none: without)")
    parts.add_argument("--clip-text", metavar="DIR", help="CLIP text encoder of the same space")
    parts.add_argument("--text-tokenizer", metavar="DIR", help="word pieces of stage 1")
    parts.add_argument("--decoder", metavar="DIR", help="diffusers folder that rebuilds images (none: without)")
    parts.add_argument("--interpolation", choices=("bilinear", "bicubic"), help="how images are resized")
    parts.add_argument("--rebuild", type=int, default=128, metavar="N", help="rebuild N images (default: 128)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=64, metavar="N")
    add_device(machine)
    machine.add_argument("--seed", type=int, default=0)
    add_json(parser, "the whole report on stdout")
    parser.set_defaults(work=evaluate)
