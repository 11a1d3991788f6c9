"""Tiny configurations of SEED_Tokenizer's stages, and running the application in processes."""

import importlib.util
import random
import shlex
import sys
from pathlib import Path

import llm_runs
import pytest
from repository import ROOT
from tiny import write_json
from yaml_tables import read_tables

APPLICATION = ROOT / "SEED_Tokenizer"
SIZES = read_tables(__file__)
# Stage → its configuration, below lavis/projects.
PROJECTS = {
    "stage1": "nano/pretrain_qformer.yaml",
    "stage2": "nano/pretrain_codebook.yaml",
    "seed1": "nano/pretrain_codebook.yaml",
    "lavit": "nano/pretrain_lavit.yaml",
}


def require_lavis():
    """Put the application on the import path and its names into LAVIS's registry; the test is
    skipped without LAVIS."""
    if importlib.util.find_spec("lavis") is None:
        pytest.skip("salesforce-lavis is not installed: bash install.sh --lavis")
    if str(APPLICATION) not in sys.path:
        sys.path.append(str(APPLICATION))
    from seed_lavis import register

    register()


def program(name):
    """A program of the application, as a module of this process."""
    require_lavis()
    return importlib.import_module(name)


def build(arguments: list[str]):
    """The runner of train.py's arguments `--cfg-path FILE [--options OPTION …]`."""
    return program("train").build(arguments[1], arguments[3:])


def write_images(folder, count=24) -> Path:
    """Images of nano's scenes and `pairs.json` next to them."""
    from PIL import Image

    from seed_nano.world.scene import render
    from seed_nano.world.splits import scene_at
    from seed_nano.world.words import describe

    folder.mkdir(parents=True, exist_ok=True)
    # Each image with its description and one in other words.
    items = []
    for index in range(count):
        scene = scene_at(0, index)
        name = f"scene-{index}.png"
        Image.fromarray(render(scene)).save(folder / name)
        items.append(
            {"image": name, "caption": [describe(scene), describe(scene, random.Random(index))]}
        )
    write_json(folder / "pairs.json", items)
    return folder


def write_config(stage: str, images: Path, output) -> list[str]:
    """Arguments of train.py for a tiny run on `images`, with a YAML file next to `output`."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(APPLICATION / "lavis" / "projects" / PROJECTS[stage])
    dataset = config.datasets.pop("nano")
    if stage == "lavit":
        splits = {"train": str(images), "val": str(images)}
        config.datasets = {"pictures": {**dataset, "build_info": {"splits": splits}}}
    else:
        dataset.vis_processor.train.name = "blip2_image_train"  # random views, as in the original
        pairs = {"storage": [str(images / "pairs.json")]}
        info = {"annotations": {"train": pairs, "val": pairs}, "images": {"storage": str(images)}}
        config.datasets = {"coco_caption": {**dataset, "build_info": info}}
    config.run.output_dir = str(output)
    # Tiny sizes over the project's own file.
    sizes = [{} if stage == "lavit" else SIZES["all"], SIZES[stage]]
    if stage == "seed1":
        for key in ("clip_model", "image_features_dim"):
            config.model.pop(key)
    file = output.with_suffix(".yaml")
    OmegaConf.save(OmegaConf.merge(config, *sizes), file)
    return ["--cfg-path", str(file)]


def log_of(folder, stage: str) -> dict[int, dict[str, float]]:
    """Step → values of a run's log, those of evaluations included."""
    values = {}
    for line in llm_runs.log_lines(folder, f"{stage}.log.jsonl"):
        values.setdefault(int(line["step"]), {}).update(line)
    return values


def printed(text) -> list[str]:
    """The next command that a run printed."""
    return shlex.split(next(line for line in text.splitlines() if line.startswith("Next: ")))[1:]
