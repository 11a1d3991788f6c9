"""Tiny parts, data and configurations for tests of the de-tokenizer's training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_sdxl
import torch
from llm_runs import merged, write_json_lines
from PIL import Image
from repository import ROOT

from seed_multimodal.nn.vision.qwen import QwenVit, QwenVitConfig

APPLICATION = ROOT / "MultiModalLLM"
CONFIGS = APPLICATION / "configs" / "seed_x_detokenizer"
RUN = {
    "optim": {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 1},
    "trainer": {
        "max_steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "dataloader_num_workers": 0,
        "report_to": [],
        "curves": False,
        "logging_steps": 1,
        "save_steps": 2,
        "sample_steps": 0,
    },
}
TOWER = QwenVitConfig(
    image_size=16,
    patch_size=4,
    width=16,
    layers=1,
    heads=2,
    output_dim=tiny_sdxl.WIDTH,
    n_queries=16,
    position_grid=4,
    pool_heads=2,
)


def write_images(folder: Path, sizes: Iterable[tuple[int, int]]) -> None:
    """Noise images of these heights and widths."""
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir()
    for index, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )


def write_parts(root: Path) -> Path:
    """A folder with `sdxl`, `vision` (the vision encoder), images and a list of edits."""
    tiny_sdxl.sdxl_folder(root / "sdxl")
    torch.manual_seed(5)
    QwenVit(TOWER).save_pretrained(root / "vision")
    for folder, count in (("pictures", 9), ("before", 5), ("after", 5)):
        write_images(
            root / folder,
            ((24 + index, 20) if index % 2 else (20, 24 + 2 * index) for index in range(count)),
        )
    write_json_lines(
        root / "edits.jsonl",
        ({"source_image": f"before/{n}.png", "target_image": f"after/{n}.png"} for n in range(5)),
    )
    return root


def config(parts: Path, output: Path, stage: int = 1, **changes: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration; `changes` are merged into its groups."""
    sources: list[dict[str, Any]] = [{"name": "pictures", "files": str(parts / "pictures")}]
    if stage == 2:
        sources.append(
            {
                "name": "edits",
                "files": str(parts / "edits.jsonl"),
                "image_key": "target_image",
                "condition_key": "source_image",
                "weight": 2.0,
            }
        )
    return merged(
        {
            "output_dir": str(output),
            **RUN,
            "model": {
                "sdxl": str(parts / "sdxl"),
                "visual_encoder": str(parts / "vision"),
                "stage": stage,
                "tokens": 4,
                "resampler": vars(tiny_sdxl.SIZES),
            },
            "data": {"sources": sources, "batch_size": 4, "resolution": 16, "encoder_size": 16},
        },
        changes,
    )


def arguments(parts: Path, output: Path, stage: int, *more: str) -> list[str]:
    """Arguments of the program: edits and scenes for the second stage, scenes for the first."""
    data = "tiny_edits" if stage == 2 else "tiny"
    return [
        "model=tiny",
        f"data={data}",
        "trainer=tiny",
        "optim=tiny",
        f"model.sdxl={parts / 'sdxl'}",
        f"model.visual_encoder={parts / 'vision'}",
        f"model.stage={stage}",
        "trainer.max_steps=12",
        "trainer.save_steps=3",
        "trainer.curves=false",
        f"output_dir={output}",
        *more,
    ]


def losses(output: Path) -> list[float]:
    """The losses of the run's log, by step."""
    return [
        json.loads(line)["loss"] for line in (output / "train.log.jsonl").read_text().splitlines()
    ]
