"""`seed convert`: an old torch checkpoint becomes safetensors, read as tensors only."""

from __future__ import annotations

import argparse
from pathlib import Path

from seed_multimodal.commands.common import emit
from seed_multimodal.disk import writing
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError


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
