"""`seed assemble`: the parts that trainings made become one system folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from seed_multimodal.cli.common import add_json
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError

# Flags of each system; those in brackets can be left out.
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


def assemble(args: argparse.Namespace) -> int:
    """Make the folder and print its path."""
    from seed_multimodal.system.assemble import assemble_system

    parts = {name: value for name in PARTS[args.kind] if (value := getattr(args, name)) is not None}
    settings = read_json_object(Path(args.settings), ConfigError) if args.settings else {}
    folder = assemble_system(args.kind, args.out, parts, settings, force=args.force)
    print(json.dumps({"folder": str(folder)}) if args.json else f"{folder}: open it with --model {folder}")
    return DONE


def add_commands(parser: argparse.ArgumentParser) -> None:
    """One command for each kind of system."""
    kinds = parser.add_subparsers(dest="system", required=True, metavar="KIND")
    for kind, parts in PARTS.items():
        command = kinds.add_parser(kind.replace("_", "-"), help=f"of {', '.join(parts)}")
        for name, what in parts.items():
            command.add_argument(f"--{name}", metavar="DIR", required="[" not in what, help=what.strip("[]"))
        command.add_argument("--settings", metavar="JSON", help="keys of system.json (generation, tasks …), over those "
                             "that follow from the weights")
        command.add_argument("--out", metavar="DIR", required=True, help="folder to make")
        command.add_argument("--force", action="store_true", help="replace DIR if it is not empty")
        add_json(command)
        command.set_defaults(work=assemble, kind=kind)
