"""`seed convert | export-tokenizer | assemble | plot`: old weights, trained stages, system folders, and curves."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import add_json, cat_image, emit
from seed_multimodal.disk import read_json_object, writing
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError

# Flags of each system of `seed assemble`; those in brackets can be left out.
PARTS: dict[str, dict[str, str]] = {
    "seed_llama": {"llm": "[language model]", "tokenizer": "folder that seed export-tokenizer made, with words",
                   "detokenizer": "[stable-unCLIP folder; default: the tokenizer's diffusion_model]"},
    "seed_x": {"llm": "language model", "agent": "resamplers: of a merged agent, or a checkpoint of the tuning",
               "tokenizer": "words", "vision": "vision encoder", "detokenizer": "[adapter of either stage]",
               "sdxl": "[SDXL's unet/config.json, vae and scheduler]"},
    "lavit": {"llm": "[checkpoint of stage 2]", "words": "[text tokenizer; default: in the language model's folder]",
              "tokenizer": "what seed export-tokenizer --lavit made, with its decoder",
              "decoder": "[decoder of codes; default: the one trained with the pixels, else the tokenizer's]",
              "pixels": "[result of the pixel decoder's training, OUTPUT_DIR/pixels]"}}


def add_commands(commands: Any) -> None:
    """The four commands with their flags."""
    converter = commands.add_parser("convert", help="old .pt/.pth/.bin weights → safetensors")
    converter.add_argument("source")
    converter.add_argument("target", nargs="?", help="default: the same name with .safetensors")
    converter.add_argument("--dtype", default="keep", help="keep, float32, bfloat16 or float16 (default: keep)")
    converter.add_argument("--force", action="store_true", help="write over an existing file")
    converter.set_defaults(work=convert)
    plotter = commands.add_parser("plot", help="curves of training runs, over each other")
    plotter.add_argument("runs", nargs="+", help="output folders of training runs, or their NAME.log.jsonl")
    plotter.add_argument("--out", default="curves.png", help="figure: .png, .pdf or .svg (default: %(default)s)")
    plotter.set_defaults(work=plot)
    exporter = commands.add_parser("export-tokenizer", help="trained stages → a tokenizer folder")
    _add_export(exporter)
    for command in (converter, plotter, exporter):
        add_json(command)
    kinds = commands.add_parser("assemble", help="parts of trainings → a system folder").add_subparsers(required=True)
    for kind, parts in PARTS.items():
        command = kinds.add_parser(kind.replace("_", "-"), help=f"of {', '.join(parts)}")
        for name, text in parts.items():
            command.add_argument(f"--{name}", metavar="DIR", required="[" not in text, help=text.strip("[]"))
        command.add_argument("--settings", help="JSON file with keys of system.json (generation, tasks …)")
        command.add_argument("--out", required=True, help="folder to make")
        command.add_argument("--force", action="store_true", help="replace that folder if it is not empty")
        add_json(command)
        command.set_defaults(work=assemble, kind=kind)


def _add_export(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_mutually_exclusive_group(required=True)
    stages.add_argument("--stage2", metavar="CKPT", help="checkpoint of stage 2")
    stages.add_argument("--lavit", metavar="CKPT", help="of LaVIT's stage 1, with --vision, --config, --out, --force")
    parser.add_argument("--stage1", metavar="CKPT", help="not needed if stage 2 trained the Q-Former too")
    parser.add_argument("--vision", metavar="CKPT", help="vision encoder (eva_vit_g.pth, or the run's CLIP folder), "
                        "unless a stage trained it")
    parser.add_argument("--kind", choices=("auto", "seed2", "seed1"), default="auto", help="what stage 2 trained "
                        "(default: by its decode side; with both, seed2)")
    parser.add_argument("--config", metavar="JSON", help="sizes (default: beside a checkpoint, else the original ones)")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--released", action="store_true", help="also the original files: seed_quantizer.pt (SEED-1: "
                        "causal_qformer.pth, seed_tokenizer.pth) and eva_vit_g.pth")
    parser.add_argument("--image", help="to compare with the training modules (default: images/cat.jpg)")
    parser.add_argument("--text-tokenizer", metavar="DIR", help="copy the language tokenizer's files from here")
    parser.add_argument("--force", action="store_true", help="replace the folder if it is not empty")
    parser.set_defaults(work=export)


def convert(args: argparse.Namespace) -> int:
    """Read `args.source` (.pt, .pth, .bin), write `args.target`, optionally in another precision."""
    from seed_multimodal.device import DTYPES
    from seed_multimodal.weights import load_state_dict, save_state_dict

    source = Path(args.source)
    target = Path(args.target) if args.target else source.with_suffix(".safetensors")
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    if args.dtype not in ("keep", *DTYPES):
        raise ConfigError(f"Unknown dtype {args.dtype!r}: use keep, {', '.join(sorted(DTYPES))}.")
    tensors = load_state_dict(source)
    if args.dtype != "keep":
        tensors = {name: tensor.to(DTYPES[args.dtype]) if tensor.is_floating_point() else tensor
                   for name, tensor in tensors.items()}
    with writing(target):
        save_state_dict(tensors, target, {"converted_from": source.name})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    emit(args, {"source": str(source), "target": str(target), "tensors": len(tensors), "parameters": parameters},
         f"{target}: {len(tensors)} tensors, {parameters:,} numbers")
    return DONE


def plot(args: argparse.Namespace) -> int:
    """Draw the figure and print its name."""
    from seed_multimodal.training.plots import draw_runs

    logs = draw_runs(args.runs, args.out)
    emit(args, {"figure": args.out, "logs": [str(log) for log in logs]}, args.out)
    return DONE


def export(args: argparse.Namespace) -> int:
    """Join, write, read back, compare; print which part came from where."""
    from seed_multimodal.language.tokenizer import check_codebook, read_files
    from seed_multimodal.lavit.export import export_stage1
    from seed_multimodal.seed.export import export_tokenizer

    if args.lavit:
        folders = export_stage1(args.lavit, args.out, vision=args.vision, config=args.config, force=args.force)
        emit(args, {"tokenizer": str(folders[0]), "decoder": str(folders[1])}, "\n".join(map(str, folders)))
        return DONE
    beside, check = {}, None
    if args.text_tokenizer:
        words = read_files(Path(args.text_tokenizer))
        beside, check = words.raw, partial(check_codebook, args.text_tokenizer, words.vocabulary)
    image = args.image or (cat_image() if cat_image().is_file() else None)
    report = export_tokenizer(args.stage2, args.out, stage1=args.stage1, vision=args.vision, config=args.config,
                              kind=args.kind, released=args.released, image=image, beside=beside, check=check,
                              force=args.force)
    emit(args, {"folder": str(report.folder), "kind": report.kind, "tensors": report.tensors, "parts": report.parts,
                "ignored": report.ignored, "image": str(image or "generated"), "codes": report.codes},
         "\n".join(report.lines()))
    return DONE


def assemble(args: argparse.Namespace) -> int:
    """Make the folder and print its path."""
    from seed_multimodal.system.assemble import assemble_system

    parts = {name: value for name in PARTS[args.kind] if (value := getattr(args, name)) is not None}
    settings = read_json_object(Path(args.settings), ConfigError) if args.settings else {}
    folder = assemble_system(args.kind, args.out, parts, settings, force=args.force)
    emit(args, {"folder": str(folder)}, f"{folder}: open it with --model {folder}")
    return DONE
