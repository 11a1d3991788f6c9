"""`seed eval tokenizer`: retrieval, reconstruction, codebook use and a contact sheet of a tokenizer."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.cli.common import loading
from seed_multimodal.config import load_yaml
from seed_multimodal.entry import DONE, add_debug, add_device, log_line, whole_number
from seed_multimodal.errors import DataError

if TYPE_CHECKING:
    from seed_multimodal.data.formats.pairs import PairSource

PARTS = ("decoder", "clip", "stage1", "clip_text", "text_tokenizer")
AMOUNTS = ("limit", "rebuild", "batch", "seed")


def evaluate(args: argparse.Namespace) -> int:
    """Measure, write the report and print it as one JSON line."""
    with loading(args):
        from seed_multimodal.device import RELEASED_FP16, choose_device
        from seed_multimodal.evaluation.machine import circumstances
        from seed_multimodal.evaluation.tokenizer import evaluate_tokenizer, open_tokenizer

        spec, settings = data_spec(args), {name: getattr(args, name) for name in (*PARTS, *AMOUNTS)}
        source = open_source(spec)
        runtime = choose_device(args.device, args.dtype, log=log_line, fp16=RELEASED_FP16)
        opened = open_tokenizer(args.model, runtime, **{name: settings[name] for name in PARTS})
        facts = {"model": args.model, "data": spec, "settings": settings, "runtime": str(runtime),
                 **circumstances(runtime.device, shlex.join(["seed", *sys.argv[1:]]))}
        report = evaluate_tokenizer(source, opened, args.out, facts, **{name: settings[name] for name in AMOUNTS},
                                    log=log_line)
    print(json.dumps(report, ensure_ascii=False))
    return DONE


def data_spec(args: argparse.Namespace) -> dict[str, Any]:
    """`--data` and its flags as the mapping that `data.formats.pairs.open_pairs` reads."""
    from seed_multimodal.data.formats.sources import registered

    if Path(args.data).suffix in (".yaml", ".yml"):
        spec = {str(key): value for key, value in load_yaml(args.data).items()}
    elif args.data in registered():
        spec = {"format": args.data, "split": args.split or "val"}
    else:
        spec = {"format": "auto", "files": args.data, "split": args.split}
    keys = {name: getattr(args, name) for name in ("image_root", "image_key", "caption_key")}
    return {key: value for key, value in {**spec, **keys}.items() if value is not None}


def open_source(spec: dict[str, Any]) -> PairSource:
    """The pairs that `spec` describes; images alone where files hold no captions."""
    from seed_multimodal.data.formats.pairs import open_pairs

    try:
        return open_pairs(spec)
    except DataError:
        if spec["format"] != "auto" or "caption_key" in spec:
            raise
        source = open_pairs({**spec, "captioned": False})
        log_line("There are no captions: retrieval is not measured.")
        return source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--model", default="pretrained/nano", help="system or tokenizer folder (default: %(default)s)")
    parser.add_argument("--data", required=True, help="a folder of images (captions in .txt), a list (.json, .jsonl, "
                        ".parquet), a pattern of .tar shards, a registered format (nano), or a .yaml file")
    parser.add_argument("--out", required=True, help="folder of report.json, evaluate.txt and the sheet")
    parser.add_argument("--stage1", help="stage-1 checkpoint: its text path for retrieval")
    parser.add_argument("--limit", type=whole_number(1), help="look at LIMIT images, drawn by --seed")
    parser.add_argument("--split", help="of a registered format (default: val)")
    parser.add_argument("--image-root", help="folder of the images that a list names")
    parser.add_argument("--image-key")
    parser.add_argument("--caption-key")
    parser.add_argument("--clip", help="CLIP vision encoder of the target embedding (none: without)")
    parser.add_argument("--clip-text", help="CLIP text encoder of the same space")
    parser.add_argument("--text-tokenizer", help="word pieces of stage 1")
    parser.add_argument("--decoder", help="diffusers folder that rebuilds images (none: without)")
    parser.add_argument("--rebuild", type=whole_number(0), default=128, help="rebuild so many images (default: 128)")
    parser.add_argument("--batch-size", dest="batch", type=whole_number(1), default=64)
    parser.add_argument("--seed", type=whole_number(0), default=0)
    add_device(parser)
    add_debug(parser)
    parser.set_defaults(work=evaluate)
