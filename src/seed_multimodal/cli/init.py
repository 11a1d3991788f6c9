"""`seed init`: initial weights and settings of a small model, to train on your own data.

Frozen parts (vision encoder, VAE, tokenizers) are copied from the shipped small system; trained
parts are random, with the sizes in `starts.yaml`.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from seed_multimodal.cli.common import add_json, emit
from seed_multimodal.disk import JsonObject, atomic_folder, output_folder
from seed_multimodal.entry import DONE
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate_system

if TYPE_CHECKING:
    from seed_multimodal.cli.common import Commands

# What can be trained: the shipped system, parts to copy, files to write, the training program.
TEMPLATES: dict[str, JsonObject] = yaml.safe_load(
    Path(__file__).with_name("starts.yaml").read_text()
)


def add_command(commands: Commands) -> None:
    """The command with its flags."""
    command = commands.add_parser("init", help=init.__doc__, description=init.__doc__)
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument("--like", required=True, choices=TEMPLATES, help="what will be trained")
    command.add_argument(
        "--size", choices=("tiny",), default="tiny", help="of what begins at random"
    )
    add_json(command)
    command.set_defaults(work=init)


def init(args: Namespace) -> int:
    """A small model with random weights and the settings to train it on your own data."""
    # The shipped system has the frozen parts.
    template = TEMPLATES[args.like]
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
        if "encoder" in template:
            _copy_tokenizer(shipped / template["encoder"], folder / template["encoder"])
        if "unet" in template:
            _new_diffusion(shipped / template["unet"], folder / template["unet"])
        # 2. The groups of the training's configuration.
        for name, group in template["groups"].items():
            text = yaml.safe_dump(group, sort_keys=False).replace("{out}", str(out))
            (folder / f"{name}.yaml").write_text(text)

    # 3. The command that trains it, run in MultiModalLLM.
    environment = template.get("before", "").replace("{out}", str(out))
    files = " ".join(f"{name}={out}/{name}.yaml" for name in template["groups"])
    program = f"src/train/{template['program']}.py"
    options = f"{template['options']} output_dir={out}/run"
    command = f"{environment} python {program} {files} {options}".strip()
    emit(
        args,
        {"folder": str(out), "command": command},
        f"{out}: name your data in {out}/data.yaml, then train, in the folder MultiModalLLM:\n"
        f"{command}",
    )
    return DONE


def _copy_tokenizer(source: Path, target: Path) -> None:
    """LaVIT's tokenizer as stage 1 leaves it."""
    from seed_multimodal.models.lavit.checkpoints import (
        load_dynamic_tokenizer,
        save_dynamic_tokenizer,
    )

    save_dynamic_tokenizer(load_dynamic_tokenizer(source), target)


def _new_diffusion(source: Path, target: Path) -> None:
    """A diffusers folder: a new U-Net, the shipped autoencoder, SDXL's noise schedule."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from seed_multimodal.diffusion.base import vae_folder

    # The shipped U-Net's sizes with new weights.
    sizes = UNet2DConditionModel.load_config(source / "unet")
    UNet2DConditionModel.from_config(sizes).save_pretrained(target / "unet")
    shutil.copytree(vae_folder(source), target / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(target / "scheduler")
