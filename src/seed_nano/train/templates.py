"""Configurations of the applications: `templates/SYSTEM/NAME.yaml` with the settings of a run filled in.

A template names settings as `${llm.width}`, folders as `${work}`, and the settings of its own stage as `${stage.lr}`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_multimodal.disk import replace_text
from seed_multimodal.errors import ConfigError
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_nano.train.workspace import Workspace, located
from seed_nano.world.scene import find_world

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
RESOLVERS: dict[str, Callable[..., Any]] = {
    "sum": lambda a, b: a + b, "product": lambda a, b: a * b, "quotient": lambda a, b: a // b,
    "rows": lambda batch, tokens, length: max(1, batch * tokens // length),  # packed rows of `batch` sequences
    "sizes": lambda side, sizes: [[int(a * side / 64), int(b * side / 64)] for a, b in sizes],
    "held_out": lambda data: OmegaConf.create(
        OmegaConf.to_yaml(data, resolve=True).replace("records/train/", "records/val/")),
}
for resolver, function in RESOLVERS.items():
    OmegaConf.register_new_resolver(resolver, function, replace=True)


def render(space: Workspace, name: str, settings: str) -> Path:
    """Write `work/NAME.yaml` by the settings of stage `settings`; returns its path.

    Raises:
        ConfigError: `start` of the stage does not exist.
    """
    stage = getattr(space.config, settings)
    start = located(stage.start)
    if stage.start and not start.exists():
        raise ConfigError(f"{settings}.start: {start} does not exist.")
    sized, steps = space.config, stage.save_every_steps
    values = asdict(space.config) | {
        "work": str(space.work.absolute()), "out": str(space.out.absolute()),
        "words": str(space.words_folder.absolute()), "decoder": str(space.decoder_folder.absolute()),
        "world": str(find_world().absolute()),
        "compile": bool(shutil.which("g++")) if sized.llm.compile is None else sized.llm.compile,
        "sections": Seed2Config.num_query if getattr(getattr(sized, "tokenizer", None), "sections", False) else 1,
        "stage": asdict(stage) | {
            "start": str(start.absolute()), "run_seed": sized.seed + stage.seed, "fifth": stage.steps // 5,
            "fifth_or_set": steps or max(1, stage.steps // 5), "tenth_or_set": steps or max(1, stage.steps // 10),
            "samples": stage.steps * stage.accumulate * stage.batch_size,
            "report_to": ["tensorboard"] if stage.tensorboard else []},
        "recipe": OmegaConf.load(TEMPLATES / space.system / f"{name}.yaml")}
    recipe = OmegaConf.create(values)["recipe"]
    assert isinstance(recipe, DictConfig)
    plain: Any = OmegaConf.to_container(recipe, resolve=True)
    for section, keys in plain.pop("with_start", {}).items():
        if stage.start:
            merged = plain[section] | keys
            plain[section] = {key: value for key, value in merged.items() if value is not None or key not in keys}
    file = space.work / f"{name}.yaml"
    replace_text(file, f"# Written from {space.work.absolute()}/config.yaml\n{OmegaConf.to_yaml(plain)}")
    return file
