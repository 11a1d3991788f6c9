"""`seed fetch | verify`: weights of the originals, and a table of what a model computes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal import entry
from seed_multimodal.cli.common import add_command, add_flags, cat_image, emit, load_system
from seed_multimodal.disk import (
    JsonObject,
    read_json_object,
    replace_text,
    writable_folder,
    writing,
)
from seed_multimodal.entry import DONE, SOME_FAILED, log_line
from seed_multimodal.errors import ConfigError
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.settings import check_value, nearest
from seed_multimodal.weights.catalogue import SHIPPED_SYSTEMS, Part, catalogue, part_of
from seed_multimodal.weights.fetch import fetch_parts, online
from seed_multimodal.weights.find import weights_root

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """The commands with their flags."""
    fetcher = add_command(commands, fetch)
    fetcher.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"an original model ({', '.join(catalogue().systems)}), or a part of one: "
        + ", ".join(part for part in catalogue().parts if part not in catalogue().systems),
    )
    verifier = add_command(commands, verify)
    entry.add_device(verifier)
    add_flags(verifier, "language model")


def fetch(args: Namespace) -> int:
    """Download the weights of an original model to pretrained/ (whatever HF_HUB_OFFLINE is)."""
    wanted = [part for name in args.models for part in wanted_parts(name)]
    root = Path(args.out) if args.out else weights_root()

    with online():
        problems = fetch_parts(wanted, root, mirrors=args.mirror, force=args.force)
    for problem in problems:
        log_line(f"seed: {problem}")
    # Folders that no problem names.
    targets = dict.fromkeys(str(root / part.folder) for part in wanted)
    folders = [folder for folder in targets if folder not in " ".join(problems)]
    emit(args, {"folders": folders, "problems": problems}, "\n".join(folders))
    return SOME_FAILED if problems else DONE


def wanted_parts(name: str) -> list[Part]:
    """The parts of an original model, of whose repositories only the named folders; or one part.

    Raises ConfigError: there is none.
    """
    parts, systems = catalogue()
    names = list({**systems, **parts})
    if name.lower() in SHIPPED_SYSTEMS:
        raise ConfigError(
            f"{name}: is not downloaded; it comes with the repository, in pretrained/."
        )
    if name.lower() not in names:
        raise ConfigError(
            f"{name}: there is no original model or part of this name{nearest(name, names)}; "
            f"there are {', '.join(names)}."
        )
    # A model may have the name of one of its parts.
    if name.lower() not in systems:
        return [parts[name.lower()]]
    patterns: dict[str, tuple[str, ...]] = {}
    for path in systems[name.lower()].values():
        known = part_of(path) if isinstance(path, str) else None
        if known is not None:
            part, inner = known
            patterns[part.name] = patterns.get(part.name, ()) + part.files_at(inner)
    return [replace(parts[part_name], files=files) for part_name, files in patterns.items()]


def verify(args: Namespace) -> int:
    """Compute fixed inputs with a model and print a table to post, compared with a reference."""
    from seed_multimodal.evaluation.verify import REFERENCE, report, run_checks

    # 1. The reference, of another run or the model's own, and where results go.
    config = SystemConfig.find(args.model)
    reference = {}
    file = Path(args.reference or Path(config.name) / REFERENCE)
    if args.reference or file.is_file():
        stored = read_json_object(file, ConfigError)
        reference = check_value(dict[str, JsonObject], stored.get("checks"), str(file))
        log_line(f"compared with {file} (of {stored.get('model')})")
    else:
        log_line(
            f"{file}: no such file, so that nothing is compared; give another with --reference"
        )
    out = writable_folder(args.out, ConfigError) if args.out else None

    # 2. The table.
    system = load_system(args, config)
    checks = run_checks(system, cat_image().parent)
    record, table, n_differing = report(system, checks, reference)
    if out is not None:
        with writing(out, ConfigError):
            replace_text(out / "verify.md", table + "\n")
            replace_text(out / REFERENCE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    emit(args, {**record, "differing": n_differing}, table)
    return SOME_FAILED if n_differing else DONE
