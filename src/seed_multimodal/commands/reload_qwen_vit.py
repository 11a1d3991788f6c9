"""`reload_qwen_vit.py`: Qwen-VL-Chat's shards → the vision tower's file that SEED-X's YAML files name.

Only the shards that hold tensors of the tower are read, so only they need be there; no code of Qwen-VL's is run. Each
of them leaves a part of the result in a hidden folder beside it, and a command that was killed goes on from there.
Files are mapped; memory holds a tensor at a time, or with `--dtype` those of one shard.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.disk import folder_lock, read_json_object, replace_text, writing
from seed_multimodal.entry import DONE, log_line, run_program
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import locate
from seed_multimodal.progress import Progress

SOURCE, TARGET = "pretrained/Qwen-VL-Chat", "pretrained/QwenViT/qwen_vit_G.pt"
WHERE = ("download Qwen/Qwen-VL-Chat (of its shards, those that the index names for transformer.visual are enough) to "
         f"{SOURCE}, or name its folder with --source; --model nano-x of the programs in src/inference runs without it")
SUFFIXES = (".pt", ".pth", ".bin")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from seed_multimodal.device import DTYPES

    parser = argparse.ArgumentParser(
        prog="reload_qwen_vit.py",
        description="The vision tower of Qwen-VL-Chat, with its attention pool, as a file of its own.")
    parser.add_argument("--source", default=SOURCE, metavar="FOLDER", help="Qwen-VL-Chat (default: %(default)s)")
    parser.add_argument("--out", default=TARGET, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--dtype", default="keep", help=f"keep, {', '.join(sorted(DTYPES))} (default: keep)")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    return run_program(parser, _reload, argv)


def _reload(args: argparse.Namespace) -> int:
    from seed_multimodal.device import DTYPES

    target, source = Path(args.out), locate(args.source)
    if target.suffix not in SUFFIXES:
        raise ConfigError(f"{target}: the file's name must end in {', '.join(SUFFIXES)}; `seed convert` makes "
                          f"safetensors of it.")
    if args.dtype not in ("keep", *DTYPES):
        raise ConfigError(f"Unknown dtype {args.dtype!r}: use keep, {', '.join(sorted(DTYPES))}.")
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: exists already (--force writes over it).")
    if source is None or not source.is_dir():
        raise CheckpointError(f"{args.source}: there is no such folder; {WHERE}.")
    config, files = _sizes(source), shards_of_tower(source)
    folder = target.parent / f".{target.name}.parts"
    with folder_lock(folder, CheckpointError, f"making {target}"):
        tensors, size = _join(files, target, folder, config, args.dtype)
    log_line(f"{target}: {tensors} tensors, {size:,} numbers")
    return DONE


def _join(files: Sequence[Path], target: Path, folder: Path, config: Any, dtype: str) -> tuple[int, int]:
    """Make the parts that are not there, then the result; gives how many tensors and numbers it has."""
    from seed_multimodal.vision.qwen_vit import QwenVitConfig
    from seed_multimodal.weights import load_state_dict, save_torch

    wanted = _wanted(config)
    found: dict[str, Any] = {}
    with Progress("reload_qwen_vit", len(wanted), "tensor", every=5.0) as bar:
        for file in files:
            part = _part(file, folder, dtype)
            found |= load_state_dict(part, mapped=True)
            bar.update(len(found) - bar.done)
    _check(found, wanted, files[0].parent)
    log_line(f"writing {target} …")
    with writing(target):
        save_torch({name: found[name] for name in wanted}, target)
        if config != QwenVitConfig():
            values = {"model_type": "qwen_vit", **dataclasses.asdict(config)}
            replace_text(target.with_name("config.json"), json.dumps(values, indent=2) + "\n")
    numbers = sum(found[name].numel() for name in wanted)
    found.clear()
    shutil.rmtree(folder, ignore_errors=True)
    return len(wanted), numbers


def shards_of_tower(source: Path) -> list[Path]:
    """The files in which tensors of the tower are, by the index if there is one.

    Raises:
        CheckpointError: no weights, a damaged index, none of the tower in it, or shards that are not there (all of
            them).
    """
    from seed_multimodal.language.shards import INDEXES, weight_files
    from seed_multimodal.vision.qwen_vit import IN_QWEN_VL

    index = next((source / name for name in INDEXES if (source / name).is_file()), None)
    if index is None:
        return weight_files(source)
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: not an index of shards: it holds no 'weight_map'.")
    names = sorted({Path(file).name for name, file in places.items() if name.startswith(IN_QWEN_VL)})
    if not names:
        raise CheckpointError(f"{index}: names no tensors of a vision tower ({IN_QWEN_VL}*), so this is no "
                              f"Qwen-VL; {WHERE}.")
    gone = [name for name in names if not (source / name).is_file()]
    if gone:
        raise CheckpointError(f"{source}: {len(gone)} of the {len(names)} shards that hold the vision tower are not "
                              f"there: {', '.join(gone)}; download them from Qwen/Qwen-VL-Chat.")
    return [source / name for name in names]


def _part(file: Path, folder: Path, dtype: str) -> Path:
    """A shard's tensors of the tower, in a file of their own; one that was made before is taken."""
    from seed_multimodal.device import DTYPES
    from seed_multimodal.language.shards import Shards
    from seed_multimodal.vision.qwen_vit import IN_QWEN_VL
    from seed_multimodal.weights import save_torch

    about = file.stat()
    part = folder / f"{file.name}.{about.st_size}.{about.st_mtime_ns}.{dtype}.pt"
    if part.is_file():  # whole, since it got its name at the end
        log_line(f"{file.name}: taken from an earlier run")
        return part
    shards = Shards(file)
    names = [name for name in shards.entries if name.startswith(IN_QWEN_VL)]
    if not names:
        raise CheckpointError(f"{file}: holds no tensors of a vision tower ({IN_QWEN_VL}*).")
    values = {name.removeprefix(IN_QWEN_VL): shards.read(name) for name in names}
    if dtype != "keep":
        values = {name: value.to(DTYPES[dtype]) for name, value in values.items()}
    with writing(part):
        save_torch(values, part)
    shards.close()
    return part


def _sizes(source: Path) -> Any:
    """Of the tower, by `visual` in the model's `config.json`; the released ones without."""
    from seed_multimodal.settings import read_settings
    from seed_multimodal.vision.qwen_vit import QwenVitConfig

    file = source / "config.json"
    given = read_json_object(file).get("visual", {}) if file.is_file() else {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{file}: visual must hold the sizes of the vision tower.")
    known = [one.name for one in dataclasses.fields(QwenVitConfig)]
    return read_settings(QwenVitConfig, {key: value for key, value in given.items() if key in known}, str(file))


def _wanted(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tower's tensors."""
    import torch

    from seed_multimodal.vision.qwen_vit import QwenVit

    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in QwenVit(config).state_dict().items()}


def _check(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], source: Path) -> None:
    from seed_multimodal.weights import refuse_tensors, warn_tensors

    refuse_tensors([name for name in wanted if name not in found], (), source, "missing from the vision tower")
    wrong = [f"{name} (file {tuple(found[name].shape)}, model {shape})" for name, shape in wanted.items()
             if tuple(found[name].shape) != shape]
    refuse_tensors(wrong, (), source, "of another size")
    warn_tensors([name for name in found if name not in wanted], (), source)
