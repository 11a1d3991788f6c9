"""`seed init`: a small model to train on your own data, or the recipe of a SEED on other parts.

`--llm` or `--encoder`: `cli.recipe`. `--like nano`: the shipped weights, tuned on your data.
`--like KIND`: initial weights and settings of a small model; frozen parts (vision encoder, VAE,
tokenizers) are copied from the shipped small system, trained ones are random. A family's `starts`
(YAML) has an entry for each kind of training, where {out} is the folder:

    system: the shipped small system ({shipped})
    reads: whether it takes --data ({data}) and --chats ({chats})
    copied: its parts that are copied, and their names in the folder
    made: part → function (the shipped system's part, the folder's), "module:function"
    groups: the groups of the training's configuration, a file each
    command: of the training, in the folder MultiModalLLM
    takes: what is said of it
"""

from __future__ import annotations

import os
import pkgutil
import shlex
import shutil
from argparse import Namespace
from typing import TYPE_CHECKING

import yaml

from seed_multimodal.cli.common import add_command, add_flags, emit
from seed_multimodal.config import read_table, with_values
from seed_multimodal.disk import JsonObject, atomic_folder, output_folder
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import families
from seed_multimodal.weights.find import locate_system

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands

SCRIPT = """#!/usr/bin/env bash
# A stopped training resumes by the same command.
set -e
cd {application}
ROOT=..
. ../scripts/environment.sh
PATH="$(dirname "$PYTHON"):$PATH"
{command}
"""


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
        reads_data = templates()[args.like].get("reads", False)
        if args.llm or args.encoder or args.size == "full":
            raise ConfigError("--like has parts of its own: no --llm, --encoder or --size full.")
        if (args.data or args.chats) and not reads_data:
            raise ConfigError(
                f"--like {args.like} names its data in data.yaml: no --data, --chats."
            )
        if reads_data and not args.data:
            raise ConfigError(f"--like {args.like} needs --data: a folder of images with captions.")
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
    from seed_multimodal.cli.recipe import data_files

    values = {"shipped": str(shipped.resolve())}
    for name in ("data", "chats"):
        files = getattr(args, name)
        values[name] = data_files(files) if files else ""
    if template.get("reads"):
        check_data(values["data"], values["chats"])
    out = output_folder(args.out, force=False, label="the model").resolve()
    values["out"] = str(out)
    command = template["command"]
    with atomic_folder(out, args.out, ConfigError) as folder:
        # 1. Frozen parts, and trained ones that begin at random.
        for source, target in template.get("copied", {}).items():
            shutil.copytree(shipped / source, folder / target)
        for name, function in template.get("made", {}).items():
            pkgutil.resolve_name(function)(shipped / name, folder / name)
        # 2. The groups of the training's configuration, and the command.
        for name, group in template["groups"].items():
            text = yaml.safe_dump(with_values(group, values), sort_keys=False)
            (folder / f"{name}.yaml").write_text(text)
        command = with_values(command, {name: shlex.quote(path) for name, path in values.items()})
        application = shlex.quote(str(shipped.resolve().parents[1] / "MultiModalLLM"))
        (folder / "run.sh").write_text(SCRIPT.format(application=application, command=command))

    # 3. What is next.
    takes = f"Name your data in {out}/data.yaml before it starts."
    if "takes" in template:
        takes = with_values(template["takes"], values)
    text = f"{command}\n{takes}\nNext: bash {shlex.quote(f'{out}/run.sh')}"
    emit(args, {"folder": str(out), "command": command}, text)
    return DONE


def check_data(data: str, chats: str) -> None:
    """Raise DataError: the first samples have no captions, or the first chats are none."""
    from seed_multimodal.data.formats.conversations import conversation
    from seed_multimodal.data.formats.pairs import Pairs
    from seed_multimodal.data.formats.records import open_records

    Pairs(data).check_usable(captioned=True)
    if chats:
        records = open_records(chats)

        def read(index: int) -> None:
            record = records.locate(index).parsed()
            conversation(record.fields, record.location)

        records.check_usable(read)
