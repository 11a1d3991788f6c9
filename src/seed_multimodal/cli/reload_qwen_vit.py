"""`reload_qwen_vit.py`: Qwen-VL-Chat's shards → the file of the vision encoder that SEED-X's YAML files name.

Only the shards that the index names for the vision encoder are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.disk import read_json_object, writing
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import first_file, locate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="reload_qwen_vit.py",
                                     description="The vision encoder of Qwen-VL-Chat as a file of its own.")
    parser.add_argument("--source", default="pretrained/Qwen-VL-Chat", help="folder (default: %(default)s)")
    parser.add_argument("--out", default="pretrained/QwenViT/qwen_vit_G.pt", help="default: %(default)s")
    parser.add_argument("--dtype", default="keep", choices=("keep", "fp32", "fp16", "bf16"), help="default: keep")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    return run_program(parser, _reload, argv)


def _reload(args: argparse.Namespace) -> int:
    from seed_multimodal.device import DTYPES
    from seed_multimodal.seed_x.vision import IN_QWEN_VL
    from seed_multimodal.weights import INDEXES, load_state_dict, save_torch

    target, source = Path(args.out), locate(args.source) or Path(args.source)
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    index = first_file(source, INDEXES)
    if index is None:
        raise CheckpointError(f"{source}: there is no {' or '.join(INDEXES)}; download Qwen/Qwen-VL-Chat to "
                              "pretrained/Qwen-VL-Chat, or name its folder with --source.")
    places = {name: file for name, file in read_json_object(index)["weight_map"].items() if IN_QWEN_VL in name}
    tensors: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        shard = load_state_dict(source / file, mapped=True)
        tensors |= {name.removeprefix(IN_QWEN_VL): shard[name] for name, place in places.items() if place == file}
    if args.dtype != "keep":
        tensors = {name: value.to(DTYPES[args.dtype]) for name, value in tensors.items()}
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_torch(tensors, target)
    log_line(f"{target}: {len(tensors)} tensors")
    return DONE
