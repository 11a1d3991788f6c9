"""`seed init`: a small model to train on your own data, or the recipe of a SEED on other parts.

`--llm` or `--encoder`: `cli.recipe`. `--like KIND`: initial weights and settings of a small model.
Frozen parts (vision encoder, VAE, tokenizers) are copied from the shipped small system; trained
parts are random. A family's `starts` (YAML) has an entry for each kind of training:

    system: the shipped small system
    copied: its parts that are copied, and their names in the folder
    made: part → function (the shipped system's part, the folder's), "module:function"
    groups: the groups of the training's configuration, a file each ({out}: the folder)
    before: what is run first, in the folder MultiModalLLM
    program, options: of the training; "-m seed_multimodal.training.cli NAME" for one without file
"""

from __future__ import annotations

import os
import pkgutil
import shutil
from argparse import Namespace
from typing import TYPE_CHECKING

import yaml

from seed_multimodal.cli.common import add_command, add_flags, emit
from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject, atomic_folder, output_folder
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import families
from seed_multimodal.weights.find import locate_system

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands


def templates() -> dict[str, JsonObject]:
    """What can be trained, of all families.

    Raises ConfigError: two families have a name in common.
    """
    kinds: dict[str, JsonObject] = {}
    for spec in families():
        if spec.starts is None:
            continue
        starts = read_table(spec.starts)
        for kind in starts.keys() & kinds:
            raise ConfigError(f"{spec.starts}: another family has the start {kind!r}, too.")
        kinds |= starts
    return kinds


def add_commands(commands: Commands) -> None:
    """The command with its flags."""
    command = add_command(commands, init)
    command.add_argument("--like", choices=templates(), help="a small model of this kind")
    # A SEED on other parts.
    add_flags(command.add_mutually_exclusive_group(), "init adapter")
    command.set_defaults(adapter="lora")


def init(args: Namespace) -> int:
    """A small model to train on your own data, or the recipe of a SEED on other parts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of a missing GPU
    if args.like is not None:
        if args.llm or args.encoder or args.data or args.chats or args.size == "full":
            raise ConfigError(
                "--like has parts and data of its own: no --llm, --encoder, --data, --chats or "
                "--size full."
            )
        return init_like(args)
    from seed_multimodal.cli.recipe import describe, write_recipe

    out, steps = write_recipe(args)
    record = {"folder": str(out), "steps": [step._asdict() for step in steps]}
    emit(args, record, describe(out, steps))
    return DONE


def init_like(args: Namespace) -> int:
    """A small model with random weights and the settings to train it."""
    # The shipped system has the frozen parts.
    template = templates()[args.like]
    shipped = locate_system(template["system"])
    if shipped is None:
        raise ConfigError(
            f"{template['system']}: not found; run from the repository, which has it in "
            "pretrained/."
        )
    out = output_folder(args.out, force=False, label="the model")
    with atomic_folder(out, args.out, ConfigError) as folder:
        # 1. Frozen parts, and trained ones that begin at random.
        for source, target in template["copied"].items():
            shutil.copytree(shipped / source, folder / target)
        for name, function in template.get("made", {}).items():
            pkgutil.resolve_name(function)(shipped / name, folder / name)
        # 2. The groups of the training's configuration.
        for name, group in template["groups"].items():
            text = yaml.safe_dump(group, sort_keys=False).replace("{out}", str(out))
            (folder / f"{name}.yaml").write_text(text)

    # 3. The command that trains it, run in MultiModalLLM.
    environment = template.get("before", "").replace("{out}", str(out))
    files = " ".join(f"{name}={out}/{name}.yaml" for name in template["groups"])
    options = f"{template['options']} output_dir={out}/run"
    command = f"{environment} python {template['program']} {files} {options}".strip()
    emit(
        args,
        {"folder": str(out), "command": command},
        f"{out}: name your data in {out}/data.yaml, then train, in the folder MultiModalLLM:\n"
        f"{command}",
    )
    return DONE
