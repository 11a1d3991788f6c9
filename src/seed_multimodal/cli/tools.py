"""`seed convert | export-tokenizer | plot`: old weights, trained stages, and curves of training runs."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import add_json, cat_image, emit
from seed_multimodal.disk import writing
from seed_multimodal.entry import DONE, log_line
from seed_multimodal.errors import ConfigError


def add_commands(commands: Any) -> None:
    """The three commands with their flags."""
    converter = commands.add_parser("convert", help="old .pt/.pth/.bin weights → safetensors")
    converter.add_argument("source", metavar="OLD")
    converter.add_argument("target", metavar="NEW", nargs="?", help="default: the same name with .safetensors")
    converter.add_argument("--dtype", default="keep", help="keep, float32, bfloat16 or float16 (default: keep)")
    converter.add_argument("--force", action="store_true", help="write over an existing file")
    add_json(converter)
    converter.set_defaults(work=convert)
    plotter = commands.add_parser("plot", help="curves of training runs, over each other")
    plotter.add_argument("runs", nargs="+", metavar="RUN",
                         help="output folder of a training run, or its NAME.log.jsonl")
    plotter.add_argument("--out", default="curves.png", metavar="FILE",
                         help="figure to write, .png, .pdf or .svg (default: %(default)s)")
    add_json(plotter)
    plotter.set_defaults(work=plot)
    _add_export(commands.add_parser("export-tokenizer", help="trained stages → a tokenizer folder"))


def convert(args: argparse.Namespace) -> int:
    """Read `args.source` (.pt, .pth, .bin), write `args.target`, optionally in another precision."""
    from seed_multimodal.device import DTYPES
    from seed_multimodal.weights import load_state_dict, save_state_dict

    source = Path(args.source)
    target = Path(args.target) if args.target else source.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: the converted file must end in .safetensors.")
    if source.resolve() == target.resolve():
        raise ConfigError(f"{source}: is safetensors already.")
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    if args.dtype not in ("keep", *DTYPES):
        raise ConfigError(f"Unknown dtype {args.dtype!r}: use keep, {', '.join(sorted(DTYPES))}.")
    tensors = load_state_dict(source)
    if args.dtype != "keep":
        wanted = DTYPES[args.dtype]
        tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    with writing(target):
        save_state_dict(tensors, target, {"converted_from": source.name})
    numbers = sum(t.numel() for t in tensors.values())
    emit(args, {"source": str(source), "target": str(target), "tensors": len(tensors), "parameters": numbers},
         f"{target}: {len(tensors)} tensors, {numbers:,} numbers")
    return DONE


def plot(args: argparse.Namespace) -> int:
    """Draw the figure and print its name to stdout."""
    from seed_multimodal.training.plots import draw_runs

    logs = draw_runs(args.runs, args.out)
    for log in logs:
        log_line(f"{log}: drawn.")
    print(json.dumps({"figure": args.out, "logs": [str(log) for log in logs]}) if args.json else args.out)
    return DONE


def export(args: argparse.Namespace) -> int:
    """Join, write, read back, compare; print what came from where, or one JSON object with `--json`."""
    from seed_multimodal.language.tokenizer import check_codebook, read_files
    from seed_multimodal.seed.export import export_tokenizer

    if args.lavit or not args.stage2:
        return export_lavit(args)
    beside, check = {}, None
    if args.text_tokenizer:
        words = read_files(Path(args.text_tokenizer))
        beside, check = words.raw, partial(check_codebook, args.text_tokenizer, words.vocabulary)
    cat = cat_image()
    picture = args.image or (cat if cat.is_file() else None)
    report = export_tokenizer(args.stage2, args.out, stage1=args.stage1, vision=args.vision, config=args.config,
                              kind=args.kind, released=args.released, image=picture, beside=beside,
                              check=check, force=args.force)
    if args.json:
        print(json.dumps({
            "folder": str(report.folder), "kind": report.kind, "parts": report.parts,
            "picture": str(picture or "generated"), "codes": report.codes}))
    else:
        print("\n".join(report.lines()))
    return DONE


def export_lavit(args: argparse.Namespace) -> int:
    """A LaVIT tokenizer and its decoder from a checkpoint of stage 1."""
    from seed_multimodal.lavit.export import export_stage1

    other = [f"--{name.replace('_', '-')}" for name in ("stage1", "stage2", "released", "text_tokenizer", "image")
             if getattr(args, name)] + ["--kind"] * (args.kind != "auto")
    if not args.lavit:
        raise ConfigError("Give the checkpoint: --stage2 CKPT of a SEED tokenizer, or --lavit CKPT.")
    if other:
        raise ConfigError(f"--lavit goes with --vision, --config, --out and --force; {other[0]} is a SEED tokenizer's.")
    folders = export_stage1(args.lavit, args.out, vision=args.vision, config=args.config, force=args.force)
    if args.json:
        print(json.dumps({"tokenizer": str(folders[0]), "decoder": str(folders[1])}))
    else:
        print("\n".join(map(str, folders)))
    return DONE


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage1", metavar="CKPT", help="checkpoint of stage 1 (not needed if stage 2 trained the "
                        "Q-Former too)")
    parser.add_argument("--stage2", metavar="CKPT", help="checkpoint of stage 2")
    parser.add_argument("--lavit", metavar="CKPT", help="checkpoint of LaVIT's stage 1, in the place of both")
    parser.add_argument("--vision", metavar="CKPT", help="vision tower (eva_vit_g.pth, or the run's CLIP folder), "
                        "unless a stage trained it")
    parser.add_argument("--kind", choices=("auto", "seed2", "seed1"), default="auto", help="what stage 2 trained "
                        "(default: by its decode side; with both, seed2)")
    parser.add_argument("--config", metavar="JSON", help="sizes (default: config.json beside a checkpoint, else the "
                        "released ones)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--released", action="store_true", help="also the released files: seed_quantizer.pt (SEED-1: "
                        "causal_qformer.pth, seed_tokenizer.pth) and eva_vit_g.pth")
    parser.add_argument("--image", metavar="PICTURE", help="encoded to compare the result with the training modules "
                        "(default: images/cat.jpg)")
    parser.add_argument("--text-tokenizer", metavar="DIR", help="copy the language tokenizer's files from here, so "
                        "that the folder serves SeedLlama")
    parser.add_argument("--force", action="store_true", help="replace DIR if it is not empty")
    add_json(parser)
    parser.set_defaults(work=export)
